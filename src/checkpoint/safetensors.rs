//! Safetensors files: their headers, and reading them tensor by tensor.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::Value;

use crate::error::{Error, Result};

/// Where a tensor lies.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub file: PathBuf,
    pub dtype: DType,
    pub shape: Vec<usize>,
    start: u64,
    bytes: usize,
}

/// The tensors of one file or of all shards of an index, by name; only headers are in memory.
#[derive(Debug)]
pub(crate) struct Safetensors {
    entries: BTreeMap<String, Entry>,
    files: Vec<PathBuf>,
}

/// What the format itself allows for a header.
const LARGEST_HEADER: u64 = 100_000_000;

/// What the files of weights of a standard checkpoint are called: `model.safetensors` or `model-00001-of-….safetensors`.
pub(crate) const STANDARD: &str = "model";
/// The same of a compact one: other readers find no weights, and so cannot invent those that are shared.
pub(crate) const COMPACT: &str = "foldgpt";

/// The name of the only file of weights.
pub(crate) fn single(stem: &str) -> String {
    format!("{stem}.safetensors")
}

/// The name of the index of several files of weights.
pub(crate) fn index(stem: &str) -> String {
    format!("{stem}.safetensors.index.json")
}

impl Safetensors {
    /// Reads the headers of the file of weights called `stem`, or of the shards that its index names, in `directory`.
    pub(crate) fn open(directory: &Path, stem: &str) -> Result<Self> {
        let files = shards(directory, stem)?;
        let mut entries = BTreeMap::new();
        for file in &files {
            for (name, entry) in header(file)?.1 {
                if let Some(other) = entries.insert(name.clone(), entry) {
                    let reason = format!("stands in {} too, expected one", other.file.display());
                    return Err(Error::tensor(file, name, reason));
                }
            }
        }
        Ok(Self { entries, files })
    }

    pub(crate) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }
}

impl Entry {
    /// The tensor as it is stored, on the CPU.
    pub(crate) fn read(&self, name: &str) -> Result<Tensor> {
        Tensor::from_raw_buffer(&self.bytes()?, self.dtype, &self.shape, &Device::Cpu)
            .map_err(|error| Error::tensor(&self.file, name, error.to_string()))
    }

    /// The tensor's bytes, as they lie in the file.
    pub(crate) fn bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; self.bytes];
        self.read_into(&mut self.open()?, &mut bytes, 0)?;
        Ok(bytes)
    }

    /// What `look` finds in each piece of so many bytes, of which it is told where in the tensor it begins. All threads read
    /// and look, each into memory of its own that its caches hold, with what `begin` made for it: there is no more than a
    /// piece of each in memory.
    pub(crate) fn pieces<S, T: Send>(
        &self,
        size: usize,
        begin: impl Fn() -> Result<S> + Sync,
        look: impl Fn(&mut S, usize, &[u8]) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let count = self.bytes.div_ceil(size);
        // Pieces that follow each other to each thread, in a file that it has opened once, so that the system reads ahead.
        let runs = (0..count).into_par_iter().chunks(count.div_ceil(rayon::current_num_threads()).max(1));
        let found = runs.map(|run| {
            let (mut file, mut memory, mut with) = (self.open()?, vec![0u8; size.min(self.bytes)], begin()?);
            let found = run.into_iter().map(|index| {
                let start = index * size;
                let (piece, _) = memory.split_at_mut(size.min(self.bytes - start));
                self.read_into(&mut file, piece, start)?;
                look(&mut with, start, piece)
            });
            found.collect::<Result<Vec<T>>>()
        });
        Ok(found.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    fn open(&self) -> Result<File> {
        File::open(&self.file).map_err(Error::io("open", &self.file))
    }

    fn read_into(&self, file: &mut File, bytes: &mut [u8], offset: usize) -> Result<()> {
        let start = SeekFrom::Start(self.start + offset as u64);
        file.seek(start).map_err(Error::io("read", &self.file))?;
        file.read_exact(bytes).map_err(Error::io("read", &self.file))
    }
}

/// The files that hold the tensors, in the order of their names.
fn shards(directory: &Path, stem: &str) -> Result<Vec<PathBuf>> {
    let names = (single(stem), index(stem));
    let (single, index) = (directory.join(&names.0), directory.join(&names.1));
    // Where both exist the single file counts, as in transformers.
    if single.exists() {
        return Ok(vec![single]);
    }
    if !index.exists() {
        return Err(Error::format(directory, format!("no weights, expected {} or {}", names.0, names.1)));
    }
    Ok(shard_names(&index)?.into_iter().map(|name| directory.join(name)).collect())
}

/// The files that an index names, each once.
pub(super) fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(index).map_err(Error::io("read", index))?;
    let json: Value = serde_json::from_str(&text).map_err(|error| Error::format(index, error.to_string()))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| Error::format(index, "no object `weight_map`"))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        // A shard is a plain file name beside its index, never a path that leads elsewhere.
        let name =
            file.as_str().filter(|name| !name.is_empty() && !name.contains(['/', '\\']) && *name != "..");
        let Some(name) = name else {
            return Err(Error::tensor(index, tensor, format!("is in {file}, expected a file name")));
        };
        names.insert(name.to_owned());
    }
    if names.is_empty() {
        return Err(Error::format(index, "`weight_map` is empty"));
    }
    Ok(names)
}

/// What a file begins with: the length of its header, and the header, which says of the file what `about` says, and that
/// these tensors follow, one directly after the other.
pub(crate) fn beginning<'a>(
    path: &Path,
    about: About,
    tensors: impl IntoIterator<Item = (String, DType, &'a [usize])>,
) -> Result<Vec<u8>> {
    let mut end = 0;
    let places = tensors.into_iter().map(|(name, dtype, shape)| {
        let start = end;
        end += shape.iter().product::<usize>() * dtype.size_in_bytes();
        let info = TensorInfo { dtype: dtype.into(), shape: shape.to_vec(), data_offsets: (start, end) };
        (name, info)
    });
    let places = places.collect();
    let metadata =
        Metadata::new(Some(about), places).map_err(|error| Error::format(path, error.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|error| Error::format(path, error.to_string()))?;
    // Numbers begin at a multiple of their size.
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() as u64 > LARGEST_HEADER {
        let reason =
            format!("a header of {} bytes, of which safetensors has at most {LARGEST_HEADER}", header.len());
        return Err(Error::format(path, reason));
    }
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut header);
    Ok(bytes)
}

/// What a file says of itself, by name.
pub(crate) type About = HashMap<String, String>;

/// The header of one file: what it says of itself, and every tensor's place, checked against the file's length.
pub(crate) fn header(path: &Path) -> Result<(About, BTreeMap<String, Entry>)> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let len = file.metadata().map_err(Error::io("read", path))?.len();
    let mut prefix = [0u8; 8];
    let short = || Error::format(path, format!("{len} bytes are too short for a safetensors header"));
    if len < 8 {
        return Err(short());
    }
    file.read_exact(&mut prefix).map_err(Error::io("read", path))?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > LARGEST_HEADER || header_len > len - 8 {
        let reason = format!("a header of {header_len} bytes in a file of {len} bytes, is it safetensors?");
        return Err(Error::format(path, reason));
    }
    let mut json = vec![0u8; header_len as usize];
    file.read_exact(&mut json).map_err(Error::io("read", path))?;
    let metadata: Metadata =
        serde_json::from_slice(&json).map_err(|error| Error::format(path, format!("bad header: {error}")))?;
    let data_start = 8 + header_len;
    let expected = metadata.data_len() as u64;
    if data_start.checked_add(expected) != Some(len) {
        let found = len - data_start;
        return Err(Error::format(
            path,
            format!("{found} bytes of tensors, but the header tells of {expected}"),
        ));
    }
    let mut entries = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let dtype = DType::try_from(info.dtype)
            .map_err(|_| Error::tensor(path, &name, format!("type {:?} is not supported", info.dtype)))?;
        let (start, end) = info.data_offsets;
        let elements = info.shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let size = elements.and_then(|n| n.checked_mul(dtype.size_in_bytes()));
        if start > end || end as u64 > expected || size != Some(end - start) {
            let reason = format!("bytes {start}..{end} do not hold {dtype:?} {:?}", info.shape);
            return Err(Error::tensor(path, name, reason));
        }
        let entry = Entry {
            file: path.to_path_buf(),
            dtype,
            shape: info.shape.clone(),
            start: data_start + start as u64,
            bytes: end - start,
        };
        entries.insert(name, entry);
    }
    Ok((metadata.metadata().clone().unwrap_or_default(), entries))
}
