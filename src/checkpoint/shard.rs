//! A file of weights in the making, whose tensors are written wherever they lie, by any thread.

use std::cmp::Reverse;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use candle_core::DType;

use super::layout::Stored;
use super::safetensors::{About, beginning};
use crate::error::{Error, Result};

/// A file with the header of its tensors, and room for what they hold.
pub(super) struct Shard<'a> {
    path: PathBuf,
    file: File,
    /// In the order of the file.
    tensors: Vec<&'a (Stored, DType)>,
    /// Where the first begins.
    start: u64,
}

/// Where the bytes of one tensor go.
pub(super) struct Place<'a> {
    path: &'a Path,
    start: u64,
    bytes: u64,
}

/// A handle by which one thread writes to a place.
pub(super) struct Writer<'a> {
    place: &'a Place<'a>,
    file: File,
}

impl<'a> Shard<'a> {
    /// Makes the file of these tensors, in the order of safetensors' own writer: wide types first, so that every number
    /// lies at a multiple of its size, and then by name.
    pub(super) fn create(path: PathBuf, mut tensors: Vec<&'a (Stored, DType)>) -> Result<Self> {
        tensors.sort_by_key(|(stored, dtype)| (Reverse(Dtype::from(*dtype)), &stored.name));
        // What transformers looks for.
        let about = About::from([("format".into(), "pt".into())]);
        let named = tensors.iter().map(|(stored, dtype)| (stored.name.clone(), *dtype, &*stored.shape));
        let header = beginning(&path, about, named)?;
        let start = header.len() as u64;
        let bytes: u64 = tensors.iter().map(|(stored, dtype)| stored.bytes(*dtype)).sum();
        let mut file = File::create(&path).map_err(Error::io("create", &path))?;
        let written = file.write_all(&header).and_then(|()| file.set_len(start + bytes));
        written.map_err(Error::io("write", &path))?;
        Ok(Self { path, file, tensors, start })
    }

    /// Every tensor with the place that it has to be written to.
    pub(super) fn places(&self) -> impl Iterator<Item = (&'a Stored, DType, Place<'_>)> {
        let mut end = self.start;
        self.tensors.iter().map(move |(stored, dtype)| {
            let (start, bytes) = (end, stored.bytes(*dtype));
            end += bytes;
            (stored, *dtype, Place { path: &self.path, start, bytes })
        })
    }

    /// Waits until all of it is on the disk.
    pub(super) fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }
}

impl Place<'_> {
    /// A handle of its own, since writing by one that others use would need a lock.
    pub(super) fn writer(&self) -> Result<Writer<'_>> {
        let file = File::options().write(true).open(self.path).map_err(Error::io("open", self.path))?;
        Ok(Writer { place: self, file })
    }
}

impl Writer<'_> {
    /// Writes bytes of the tensor from its byte `offset` on.
    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        let Place { path, start, bytes: room } = *self.place;
        let (offset, end) = (offset as u64, offset as u64 + bytes.len() as u64);
        if end > room {
            return Err(Error::format(path, format!("bytes {offset}..{end} of a tensor of {room} bytes")));
        }
        let written =
            self.file.seek(SeekFrom::Start(start + offset)).and_then(|_| self.file.write_all(bytes));
        written.map_err(Error::io("write", path))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use ::safetensors::tensor::TensorView;
    use rayon::prelude::*;

    use super::super::safetensors::header;
    use super::*;

    /// Bytes of which no two neighbouring pieces are alike.
    fn bytes(count: usize, seed: usize) -> Vec<u8> {
        (0..count).map(|place| ((place * place + seed) % 251) as u8).collect()
    }

    #[test]
    fn pieces_of_any_order_and_size_make_the_file_of_the_formats_own_writer() {
        let scratch = tempfile::tempdir().unwrap();
        let stored = |name: &str, shape: &[usize], dtype| {
            let stored =
                Stored { name: name.into(), shape: shape.to_vec(), params: Vec::new(), transposed: false };
            (stored, dtype)
        };
        let tensors = [
            stored("norm", &[3], DType::BF16),
            stored("embed", &[70, 30], DType::BF16),
            stored("scale", &[33], DType::F32),
            stored("none", &[0, 4], DType::F32),
        ];
        let values: Vec<Vec<u8>> = (0..)
            .zip(&tensors)
            .map(|(seed, (stored, dtype))| bytes(stored.bytes(*dtype) as usize, seed))
            .collect();
        let value =
            |name: &str| tensors.iter().zip(&values).find(|((stored, _), _)| stored.name == name).unwrap().1;

        let path = scratch.path().join("pieces");
        let shard = Shard::create(path.clone(), tensors.iter().collect()).unwrap();
        for (stored, _, place) in shard.places() {
            let value = value(&stored.name);
            let written = value
                .par_chunks(64)
                .enumerate()
                .rev()
                .map(|(index, piece)| place.writer()?.write(index * 64, piece));
            written.collect::<Result<()>>().unwrap();
            let beyond = place.writer().unwrap().write(value.len(), &[0]);
            assert!(beyond.is_err(), "the next tensor is not written over");
        }
        shard.finish().unwrap();

        let views = tensors.iter().zip(&values).map(|((stored, dtype), value)| {
            (stored.name.clone(), TensorView::new((*dtype).into(), stored.shape.clone(), value).unwrap())
        });
        let about = About::from([("format".into(), "pt".into())]);
        let expected = ::safetensors::serialize(views, Some(about)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), expected);

        // Read again in pieces of any size, each of which is told where it begins.
        let (_, entries) = header(&path).unwrap();
        for ((stored, _), value) in tensors.iter().zip(&values) {
            for size in [1, 7, 64, 1 << 20] {
                let look = |(): &mut (), start: usize, piece: &[u8]| Ok((start, piece.to_vec()));
                let found = entries[&stored.name].pieces(size, || Ok(()), look).unwrap();
                let starts: Vec<usize> = found.iter().map(|(start, _)| *start).collect();
                assert_eq!(starts, (0..value.len()).step_by(size).collect::<Vec<_>>());
                assert!(found.iter().all(|(_, piece)| piece.len() <= size));
                assert_eq!(&found.into_iter().flat_map(|(_, piece)| piece).collect::<Vec<_>>(), value);
            }
            let refused = entries[&stored.name].pieces(
                16,
                || Ok(()),
                |(), start, _| match start {
                    16 => Err(Error::Cancelled { stage: "save" }),
                    _ => Ok(()),
                },
            );
            assert_eq!(refused.is_err(), value.len() > 16);
        }
    }
}
