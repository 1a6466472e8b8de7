//! Writing some of a checkpoint's blocks without loading any: stored tensors are copied from file to file.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;

use candle_core::DType;
use rayon::prelude::*;

use super::finite::are_finite;
use super::layout::{Stored, stored_tensors};
use super::save::{Format, Prepared, SaveOptions, Saved};
use super::shard::{Place, Writer};
use super::written::{Content, Written, bytes_of};
use super::{Checkpoint, Source};
use crate::error::{Error, Result};
use crate::model::{Param, Part};
use crate::plan::Plan;
use crate::progress::Observer;

/// Bytes that a thread reads, looks at, sums and writes at once: few enough to stay in its caches on the way, and a
/// constant, so that a tensor has the same checksums every time.
const PIECE: usize = 1 << 20;

impl Checkpoint {
    /// Writes the model with only the blocks of `kept`, in that order, as [`save`](Self::save) writes the decoder of
    /// these blocks, byte for byte: stored tensors are copied as they are (scales too, of which `save` narrows those that
    /// lose nothing by it). Of safetensors files a mebibyte for each thread is in memory; of GGUF files, and where a
    /// tensor changes its type, one tensor at a time.
    ///
    /// The directory is complete or absent, as there; each tensor is compared with what was copied by its checksums. A value
    /// that is NaN or infinite is refused in what is copied, and not looked for in the blocks that are dropped, where
    /// [`decoder`](Self::decoder) finds it.
    ///
    /// # Errors
    /// [`Error::NoSuchBlock`]; a plan that removes other blocks, or that shares or removes parts of blocks; blocks
    /// with scales, residuals or one half only in the expanded format, which has to compute; a weight that is NaN or
    /// infinite; a directory that exists and is not empty, a full disk, a result that does not read back as it was, or
    /// a cancelling observer.
    pub fn save_blocks(
        &self,
        kept: &[usize],
        plan: Option<&Plan>,
        directory: impl AsRef<Path>,
        options: &SaveOptions,
        observer: &mut dyn Observer,
    ) -> Result<Saved> {
        self.prepare_blocks(kept, plan, directory.as_ref(), options, observer)?.place()
    }

    /// As [`save_blocks`](Self::save_blocks), all but the renaming.
    pub(crate) fn prepare_blocks(
        &self,
        kept: &[usize],
        plan: Option<&Plan>,
        directory: &Path,
        options: &SaveOptions,
        observer: &mut dyn Observer,
    ) -> Result<Prepared> {
        let written = self.of_blocks(kept, options.format)?;
        if let Some(plan) = plan {
            self.check_plan(plan, kept, &written.model, observer)?;
        }
        self.write(&written, plan, directory, options, observer)
    }

    /// The bytes of all tensors that [`save_blocks`](Self::save_blocks) writes.
    pub(crate) fn bytes_to_copy(&self, kept: &[usize], format: Format) -> Result<u64> {
        Ok(self.of_blocks(kept, format)?.bytes())
    }

    /// What is written of some blocks.
    fn of_blocks(&self, kept: &[usize], format: Format) -> Result<Written<'_>> {
        let model = self.architecture.with_blocks(kept)?;
        let mut folded = (0..model.depth()).map(|depth| model.fold.block(depth));
        let computed = folded.any(|block| block.part != Part::Whole || !block.adapters.is_empty());
        let architecture = match format {
            Format::Compact => model.clone(),
            Format::Expanded if !computed => model.expanded(),
            Format::Expanded => {
                let reason = "blocks with scales, residuals or one half cannot be copied to the expanded format, \
                              expected the compact one, or a decoder that is saved";
                return Err(Error::Plan(reason.into()));
            }
        };
        let (mut tensors, mut origins) = (Vec::new(), HashMap::new());
        for stored in stored_tensors(&architecture) {
            let origin = self.origin(&stored, kept)?;
            origins.insert(stored.name.clone(), origin);
            tensors.push((stored, self.stored_dtype(&origin.name)));
        }
        let content = Box::new(Copied { checkpoint: self, origins, checksums: RefCell::default() });
        let kept = kept.to_vec();
        Ok(Written { format, model, architecture, kept, tensors, merges: false, content })
    }

    /// The tensor of this checkpoint that a tensor of the one with the blocks `kept` is.
    fn origin(&self, stored: &Stored, kept: &[usize]) -> Result<&Stored> {
        // What blocks share is stored under the first that uses it.
        let moved = stored.params.iter().map(|&(param, rows)| match param {
            Param::Block(depth, part) => {
                let block = kept.get(depth).copied().unwrap_or(depth);
                (Param::Block(self.architecture.fold.block(block).holder(block, part), part), rows)
            }
            other => (other, rows),
        });
        let moved: Vec<(Param, usize)> = moved.collect();
        let same = |other: &&Stored| {
            other.params == moved && other.shape == stored.shape && other.transposed == stored.transposed
        };
        self.tensors.iter().find(same).ok_or_else(|| {
            Error::tensor(&self.location, &stored.name, "is no tensor of the checkpoint that is copied")
        })
    }

    /// What `look` finds in each piece of a tensor, where it is stored in this type.
    fn pieces<S, T: Send>(
        &self,
        stored: &Stored,
        dtype: DType,
        begin: impl Fn() -> Result<S> + Sync,
        look: impl Fn(&mut S, usize, &[u8]) -> Result<T> + Sync,
    ) -> Result<Option<Vec<T>>> {
        let Source::Safetensors(tensors) = &self.source else { return Ok(None) };
        let entry = self.entry(tensors, &stored.name).filter(|(_, entry)| entry.dtype == dtype);
        entry.map(|(_, entry)| entry.pieces(PIECE, begin, look)).transpose()
    }
}

/// Tensors of a checkpoint on their way to another one.
struct Copied<'a> {
    checkpoint: &'a Checkpoint,
    /// The tensor that each new one is.
    origins: HashMap<String, &'a Stored>,
    /// What was copied.
    checksums: RefCell<HashMap<String, Vec<u32>>>,
}

impl Content for Copied<'_> {
    fn write(&self, stored: &Stored, dtype: DType, place: &Place<'_>) -> Result<()> {
        let missing = || Error::tensor(&self.checkpoint.location, &stored.name, "missing");
        let origin = self.origins.get(&stored.name).ok_or_else(missing)?;
        let copy = |writer: &mut Writer<'_>, offset: usize, piece: &[u8]| {
            if !are_finite(piece, dtype) {
                return Err(self.checkpoint.not_finite(origin, dtype));
            }
            writer.write(offset, piece)?;
            Ok(checksum(piece))
        };
        let checksums = match self.checkpoint.pieces(origin, dtype, || place.writer(), copy)? {
            Some(checksums) => checksums,
            None => {
                let bytes = bytes_of(&self.checkpoint.read(origin)?)?;
                place.writer()?.write(0, &bytes)?;
                bytes.par_chunks(PIECE).map(checksum).collect()
            }
        };
        self.checksums.borrow_mut().insert(stored.name.clone(), checksums);
        Ok(())
    }

    fn is_in(&self, reloaded: &Checkpoint, stored: &Stored) -> Result<bool> {
        let dtype = reloaded.stored_dtype(&stored.name);
        let found = reloaded.pieces(stored, dtype, || Ok(()), |(), _, piece| Ok(checksum(piece)))?;
        Ok(found.is_some_and(|found| self.checksums.borrow().get(&stored.name) == Some(&found)))
    }
}

/// CRC-32 of a piece. It is to find what was written wrongly, which needs no cryptography: SHA-256 took two fifths of the
/// processor's time.
fn checksum(piece: &[u8]) -> u32 {
    crc32fast::hash(piece)
}
