//! A file of weights in the making, whose tensors are written wherever they lie, by any thread.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use candle_core::DType;

use super::layout::Stored;
use super::safetensors::{About, beginning};
use crate::error::{Error, Result};

/// A file with the header of its tensors, and room for what they hold.
pub(super) struct Shard {
    path: PathBuf,
    file: File,
    start: u64,
}

/// Where the bytes of one tensor go.
pub(super) struct Place<'a> {
    shard: &'a Shard,
    start: u64,
}

impl Shard {
    /// Makes the file of these tensors, which lie in it in this order.
    pub(super) fn create(path: PathBuf, tensors: &[&(Stored, DType)]) -> Result<Self> {
        // What transformers looks for.
        let about = About::from([("format".into(), "pt".into())]);
        let named = tensors.iter().map(|(stored, dtype)| (stored.name.clone(), *dtype, &*stored.shape));
        let header = beginning(&path, about, named)?;
        let start = header.len() as u64;
        let bytes: u64 = tensors.iter().map(|(stored, dtype)| stored.bytes(*dtype)).sum();
        let mut file = File::create(&path).map_err(Error::io("create", &path))?;
        let written = file.write_all(&header).and_then(|()| file.set_len(start + bytes));
        written.map_err(Error::io("write", &path))?;
        Ok(Self { path, file, start })
    }

    /// Where a tensor goes that has so many bytes of others before it.
    pub(super) fn place(&self, before: u64) -> Place<'_> {
        Place { shard: self, start: self.start + before }
    }

    /// Waits until all of it is on the disk.
    pub(super) fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }
}

impl Place<'_> {
    /// Writes bytes of the tensor from its byte `offset` on.
    pub(super) fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        let written = write_at(self.shard, self.start + offset as u64, bytes);
        written.map_err(Error::io("write", &self.shard.path))
    }
}

/// One handle serves all threads: a lock around going to a place and writing cost an eighth of the time of copying.
#[cfg(unix)]
fn write_at(shard: &Shard, start: u64, bytes: &[u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(&shard.file, bytes, start)
}

/// Elsewhere every use has a handle of its own, since writing moves the place that others would write at.
#[cfg(not(unix))]
fn write_at(shard: &Shard, start: u64, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::{Seek, SeekFrom};
    let mut file = File::options().write(true).open(&shard.path)?;
    file.seek(SeekFrom::Start(start))?;
    file.write_all(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rayon::prelude::*;
    use safetensors::tensor::TensorView;

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
            stored("norm", &[33], DType::F32),
            stored("embed", &[70, 30], DType::BF16),
            stored("head", &[1, 5], DType::BF16),
        ];
        let values: Vec<Vec<u8>> =
            (0..).zip(&tensors).map(|(seed, (s, d))| bytes(s.bytes(*d) as usize, seed)).collect();

        let path = scratch.path().join("pieces");
        let shard = Shard::create(path.clone(), &tensors.each_ref()).unwrap();
        let mut before = 0;
        for value in &values {
            let place = shard.place(before);
            let written =
                value.par_chunks(64).enumerate().rev().map(|(index, piece)| place.write(index * 64, piece));
            written.collect::<Result<()>>().unwrap();
            before += value.len() as u64;
        }
        shard.finish().unwrap();

        let views = tensors.iter().zip(&values).map(|((stored, dtype), value)| {
            (stored.name.clone(), TensorView::new((*dtype).into(), stored.shape.clone(), value).unwrap())
        });
        let about = About::from([("format".into(), "pt".into())]);
        let expected = safetensors::serialize(views, Some(about)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), expected);

        // Read again in pieces of any size, each of which is told where it begins.
        let (_, entries) = header(&path).unwrap();
        for ((stored, _), value) in tensors.iter().zip(&values) {
            for size in [1, 7, 64, 1 << 20] {
                let look = |start: usize, piece: &[u8]| Ok((start, piece.to_vec()));
                let found = entries[&stored.name].pieces(size, look).unwrap();
                let starts: Vec<usize> = found.iter().map(|(start, _)| *start).collect();
                assert_eq!(starts, (0..value.len()).step_by(size).collect::<Vec<_>>());
                assert!(found.iter().all(|(_, piece)| piece.len() <= size));
                assert_eq!(&found.into_iter().flat_map(|(_, piece)| piece).collect::<Vec<_>>(), value);
            }
            let refused = entries[&stored.name].pieces(16, |start, _| match start {
                16 => Err(Error::Cancelled { stage: "save" }),
                _ => Ok(()),
            });
            assert_eq!(refused.is_err(), value.len() > 16);
        }
    }
}
