//! What a checkpoint in the making holds: which tensors, of which types, with which values.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::layout::{Stored, stored_tensors};
use super::shard::Place;
use super::{Checkpoint, Format};
use crate::error::{Error, Result};
use crate::model::{Architecture, BlockParam, Decoder, Param, StoredTypes};
use crate::plan::Plan;

impl Checkpoint {
    /// The bytes of all tensors that saving this decoder writes.
    pub(crate) fn bytes_to_save(&self, decoder: &Decoder, format: Format) -> Result<u64> {
        Ok(self.of_decoder(decoder, format)?.bytes())
    }

    /// The bytes of all tensors that [`save`](Self::save) writes of what `plan` makes of this checkpoint's decoder. Vectors
    /// that the type of their place cannot hold take more: those that healing has moved, and norms of a donor that are
    /// stored in a wider type.
    ///
    /// # Errors
    /// A plan for another model.
    pub fn stored_bytes(&self, plan: &Plan, format: Format) -> Result<u64> {
        self.stored_bytes_after(plan, format, |_, _| false)
    }

    /// As [`stored_bytes`](Self::stored_bytes), of a model some of whose vectors have `moved`, which is asked of each
    /// and the model's depth.
    pub(crate) fn stored_bytes_after(
        &self,
        plan: &Plan,
        format: Format,
        moved: impl Fn(Param, usize) -> bool,
    ) -> Result<u64> {
        let arch = plan.architecture(&self.architecture)?;
        let bytes = |(stored, dtype): &(Stored, DType)| {
            let moved = stored.params.iter().any(|(param, _)| moved(*param, arch.depth()));
            let wide = moved && dtype.size_in_bytes() < DType::F32.size_in_bytes();
            stored.bytes(if wide { DType::F32 } else { *dtype })
        };
        Ok(self.written_tensors(&arch, &plan.kept(), format).iter().map(bytes).sum())
    }

    /// What removing blocks frees at least, ascending, in this format, and the bytes of the whole model.
    pub(crate) fn freed_bytes(&self, format: Format) -> (Vec<u64>, u64) {
        let all: Vec<usize> = (0..self.architecture.depth()).collect();
        let written = self.written_tensors(&self.architecture, &all, format);
        let types = written.iter().flat_map(|(stored, dtype)| {
            let params = stored.params.iter();
            params.map(move |(param, _)| (*param, *dtype))
        });
        let types = StoredTypes::new(self.narrowest_dtype(), types);
        let arch = format.architecture(&self.architecture);
        (arch.freed(|param, shape| types.size(param, shape)), types.bytes_of(&arch))
    }

    /// What is written of a decoder of this architecture, whose depths are `origins` of this checkpoint's blocks, each
    /// tensor with its type.
    fn written_tensors(
        &self,
        arch: &Architecture,
        origins: &[usize],
        format: Format,
    ) -> Vec<(Stored, DType)> {
        let types = self.stored_types().of_blocks(origins);
        let tensors = stored_tensors(&format.architecture(arch)).into_iter().map(|stored| {
            let dtype = stored.dtype(&types);
            let merged = format == Format::Expanded && stored.is_adapted(arch);
            let wide = merged && self.dtype.is_none() && dtype != DType::F64;
            (stored, if wide { DType::F32 } else { dtype })
        });
        tensors.collect()
    }

    /// Refuses what no folding makes of this checkpoint.
    fn check_origin(&self, decoder: &Decoder) -> Result<()> {
        let depth = self.architecture.depth();
        let unfolded = |arch: &Architecture| Architecture { blocks: Vec::new(), ..arch.expanded() };
        let alike = unfolded(decoder.architecture()) == unfolded(&self.architecture);
        if alike && decoder.origins().iter().all(|&origin| origin < depth) {
            return Ok(());
        }
        Err(Error::Plan("the decoder was not made from this checkpoint".into()))
    }
}

/// The bytes of a decoder's tensors in a compact checkpoint.
pub(crate) fn compact_bytes(decoder: &Decoder) -> Result<u64> {
    let types = decoder.stored_types();
    let params: HashMap<Param, &Tensor> = decoder.params().collect();
    let bytes = |stored: &Stored| -> Result<u64> {
        let dtype = stored.dtype(&types);
        let wide = stored.is_vector_beyond(&params, dtype)?;
        Ok(stored.bytes(if wide { DType::F32 } else { dtype }))
    };
    stored_tensors(decoder.architecture()).iter().map(bytes).sum()
}

/// A checkpoint in the making: which tensors, in which types, and what they hold.
pub(super) struct Written<'a> {
    pub(super) format: Format,
    /// That of the model, with what its blocks share.
    pub(super) model: Architecture,
    /// The architecture that the checkpoint will have.
    pub(super) architecture: Architecture,
    /// The index that each of its blocks has in the original model.
    pub(super) kept: Vec<usize>,
    /// With their types.
    pub(super) tensors: Vec<(Stored, DType)>,
    /// Whether matrices are written that are held in parts.
    pub(super) merges: bool,
    pub(super) content: Box<dyn Content + 'a>,
}

impl Written<'_> {
    /// The bytes of all tensors.
    pub(super) fn bytes(&self) -> u64 {
        self.tensors.iter().map(|(stored, dtype)| stored.bytes(*dtype)).sum()
    }
}

/// What the tensors of a checkpoint in the making hold.
pub(super) trait Content {
    /// Writes a tensor, as it will be stored in `dtype`, to its place.
    fn write(&self, stored: &Stored, dtype: DType, place: &Place<'_>) -> Result<()>;

    /// Whether a tensor of the checkpoint that was written holds what it should.
    fn is_in(&self, reloaded: &Checkpoint, stored: &Stored) -> Result<bool>;
}

impl Checkpoint {
    /// What is written of a decoder.
    pub(super) fn of_decoder<'a>(&self, decoder: &'a Decoder, format: Format) -> Result<Written<'a>> {
        self.check_origin(decoder)?;
        let (model, kept) = (decoder.architecture().clone(), decoder.origins());
        let architecture = format.architecture(&model);
        let params: HashMap<Param, &Tensor> = decoder.params().collect();
        let mut tensors = self.written_tensors(&model, &kept, format);
        for (stored, dtype) in &mut tensors {
            if stored.is_vector_beyond(&params, *dtype)? {
                *dtype = DType::F32;
            }
        }
        let merges =
            format == Format::Expanded && tensors.iter().any(|(stored, _)| stored.is_adapted(&model));
        let shapes = architecture.params().into_iter().collect();
        let content = Box::new(InMemory { decoder, format, params, shapes });
        Ok(Written { format, model, architecture, kept, tensors, merges, content })
    }
}

/// The tensors of a decoder in memory.
struct InMemory<'a> {
    decoder: &'a Decoder,
    format: Format,
    params: HashMap<Param, &'a Tensor>,
    shapes: HashMap<Param, Vec<usize>>,
}

impl Content for InMemory<'_> {
    fn write(&self, stored: &Stored, dtype: DType, place: &Place<'_>) -> Result<()> {
        place.writer()?.write(0, &bytes_of(&self.tensor(stored, dtype)?)?)
    }

    fn is_in(&self, reloaded: &Checkpoint, stored: &Stored) -> Result<bool> {
        let on_disk = reloaded.read(stored)?;
        Ok(bytes_of(&on_disk)? == bytes_of(&self.tensor(stored, on_disk.dtype())?)?)
    }
}

impl InMemory<'_> {
    /// A tensor as it is stored.
    fn tensor(&self, stored: &Stored, dtype: DType) -> Result<Tensor> {
        stored.join(|param| self.param(param, dtype))
    }

    /// The parameter in `dtype`. A half that a block lost is written as zeros in the expanded format: no common
    /// format can leave out an attention or an MLP, and one whose output projection is zero adds nothing, exactly.
    fn param(&self, param: Param, dtype: DType) -> Result<Tensor> {
        let on_disk = |tensor: &Tensor| Ok(tensor.to_device(&Device::Cpu)?.to_dtype(dtype)?);
        if let (Param::Block(depth, BlockParam::Weight(projection)), Format::Expanded) = (param, self.format)
            && let Some(block) = self.decoder.blocks().get(depth)
            && let Some(merged) = block.merged(projection)?
        {
            return on_disk(&merged);
        }
        match (self.params.get(&param), self.shapes.get(&param)) {
            (Some(tensor), _) => on_disk(tensor),
            (None, Some(shape)) => Ok(Tensor::zeros(shape.as_slice(), dtype, &Device::Cpu)?),
            (None, None) => Err(Error::Plan(format!("the decoder has no {param}"))),
        }
    }
}

pub(super) fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(tensor.elem_count() * tensor.dtype().size_in_bytes());
    tensor.write_bytes(&mut bytes)?;
    Ok(bytes)
}
