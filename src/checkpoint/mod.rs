//! Checkpoints: the only module that touches files of weights.

mod card;
mod compact;
mod config;
mod copy;
mod finite;
mod gguf;
mod hub;
mod layout;
mod parts;
mod safetensors;
mod save;
mod shard;
mod staging;
mod streamed;
mod surgery;
mod written;

pub use card::ModelCard;
pub(crate) use card::{CARD, name_of, tags};
pub use compact::FORMAT_VERSION;
pub use hub::HubOptions;
pub(crate) use safetensors::{Entry, beginning, header};
pub use save::{Format, SaveOptions, Saved};
pub use staging::check_destination;
pub use streamed::{StreamOptions, StreamedDecoder};
pub(crate) use written::compact_bytes;

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::data::Tokenizer;
use crate::error::{Error, Result};
use crate::model::{Architecture, Decoder, Param, StoredTypes};
use crate::progress::{self, Observer};
use gguf::GgufFile;
use layout::Stored;
use parts::Parts;
use safetensors::Safetensors;

/// A model on disk: its configuration, its tensors by name, its tokenizer.
///
/// Opening reads headers only, and checks every tensor's name and shape against the configuration.
///
/// ```
/// use foldgpt::{Checkpoint, candle::{DType, Device}};
///
/// let checkpoint = Checkpoint::open("examples/tiny-stories")?;
/// let decoder = checkpoint.decoder(DType::F32, &Device::Cpu)?;
/// assert_eq!(decoder.depth(), checkpoint.architecture().depth());
/// # Ok::<(), foldgpt::Error>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    location: PathBuf,
    source: Source,
    config: Value,
    architecture: Architecture,
    tensors: Vec<Stored>,
    dtype: Option<DType>,
    sha256: OnceLock<String>,
}

#[derive(Debug)]
enum Source {
    Safetensors(Safetensors),
    Gguf(Box<GgufFile>),
    /// Nothing on disk yet, only a tokenizer to save with the weights.
    New(Box<Tokenizer>),
}

impl Checkpoint {
    /// Opens a model: a directory in the Hugging Face layout, a GGUF file, or (with the feature `hub`) a hub id
    /// `org/name` or `org/name@revision`, by what the environment says ([`HubOptions::from_env`]). What exists on disk
    /// is never looked for elsewhere.
    ///
    /// # Errors
    /// A path that does not exist, a file that is truncated or not what it seems, a configuration that is not
    /// supported, or tensors that contradict it; nothing large is allocated before all of this is known.
    pub fn open(model: impl AsRef<Path>) -> Result<Self> {
        Self::open_observed(model, &mut ())
    }

    /// As [`open`](Self::open), and tells an observer of what is fetched from the hub, as
    /// [`open_hub`](Self::open_hub) does.
    ///
    /// # Errors
    /// As `open`, or a cancelling observer.
    pub fn open_observed(model: impl AsRef<Path>, observer: &mut dyn Observer) -> Result<Self> {
        let path = model.as_ref();
        if path.is_dir() {
            return Self::open_directory(path);
        }
        if path.is_file() {
            return Self::open_gguf(path);
        }
        match path.to_str().filter(|name| hub::is_hub_id(name)) {
            Some(id) => Self::open_hub(id, &HubOptions::from_env()?, observer),
            None => Err(Error::format(path, "does not exist, expected a directory, a gguf file or a hub id")),
        }
    }

    /// Opens a model of the Hugging Face hub by its id, `org/name` or `org/name@revision`, and fetches into the cache
    /// what that does not hold: the config, the weights and what belongs to the tokenizer, no other file. Needs the
    /// feature `hub`.
    ///
    /// The hub is asked what the revision stands for now; nothing more is asked where the cache holds that, and nothing
    /// at all for a commit that it holds. Where nobody answers, the cache's last state of the revision is opened.
    ///
    /// The observer is told of bytes in the stage `fetch`, first for what describes the model, then for the rest. A
    /// transfer that breaks or is cancelled leaves what has arrived, and goes on from there, now or in a later process.
    /// A file counts as fetched once its length and hash are those of the hub's list.
    ///
    /// # Errors
    /// [`Error::Hub`] where the hub refuses (its `status` tells a missing token from a missing model, revision or
    /// file), does not answer and the cache does not hold all of the model, or sends what it should not; a full disk;
    /// a cancelling observer; and what [`open`](Self::open) says of the files.
    pub fn open_hub(id: &str, options: &HubOptions, observer: &mut dyn Observer) -> Result<Self> {
        Self::open_directory(&hub::fetch(id, options, observer)?)
    }

    /// A checkpoint that is not on disk yet: what [`save`](Self::save) will write beside the weights of a new model.
    ///
    /// # Errors
    /// A `config.json` that is not supported.
    pub fn create(config: Value, tokenizer: Tokenizer) -> Result<Self> {
        let source = Source::New(Box::new(tokenizer));
        Self::checked(PathBuf::new(), source, config)
    }

    fn open_directory(directory: &Path) -> Result<Self> {
        let (path, config) = read_config(directory)?;
        let stem = compact::stem(&config).map_err(|error| error.in_config_file(&path))?;
        let source = Source::Safetensors(Safetensors::open(directory, stem)?);
        Self::checked(directory.to_path_buf(), source, config).map_err(|error| error.in_config_file(&path))
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let file = GgufFile::open(path)?;
        let open = || {
            let config = file.config()?;
            Self::checked(path.to_path_buf(), Source::Gguf(Box::new(file)), config)
        };
        open().map_err(|error| error.in_config_file(path))
    }

    fn checked(location: PathBuf, source: Source, config: Value) -> Result<Self> {
        let architecture = Architecture::from_config(&config)?;
        let tensors = layout::stored_tensors(&architecture);
        let sha256 = OnceLock::new();
        let checkpoint = Self { location, source, config, architecture, tensors, dtype: None, sha256 };
        checkpoint.check_tensors()?;
        Ok(checkpoint)
    }

    /// What will be written where nothing else is asked for, and what the weights are rounded to when they are
    /// loaded: `dtype` in place of the stored types.
    ///
    /// A GGUF file's weights are bf16 unless this says otherwise.
    #[must_use]
    pub fn stored_as(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// What the configuration describes.
    #[must_use]
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The `config.json`; for a GGUF file, its equivalent.
    #[must_use]
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Where the model was found.
    #[must_use]
    pub fn location(&self) -> &Path {
        &self.location
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// A missing or unreadable tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.source {
            Source::Safetensors(_) => Tokenizer::open(&self.location.join("tokenizer.json"), &self.config),
            Source::Gguf(file) => Ok(Tokenizer::new(file.tokenizer()?, &self.config)),
            Source::New(tokenizer) => Ok((**tokenizer).clone()),
        }
    }

    /// Reads the weights, one tensor at a time: peak memory is the model and one tensor.
    ///
    /// With `DType::BF16` on the CPU matrices are held in bf16 and computed with by the dot-product instructions of
    /// AVX-512 where there are any: half the memory, and less time. Norms, biases and activations stay in f32 there.
    ///
    /// # Errors
    /// A file that cannot be read, or a weight that is NaN or infinite.
    pub fn decoder(&self, dtype: DType, device: &Device) -> Result<Decoder> {
        self.decoder_observed(dtype, device, &mut ())
    }

    /// As [`decoder`](Self::decoder), telling `observer` of every tensor read.
    ///
    /// # Errors
    /// As [`decoder`](Self::decoder), and a cancelling observer.
    pub fn decoder_observed(
        &self,
        dtype: DType,
        device: &Device,
        observer: &mut dyn Observer,
    ) -> Result<Decoder> {
        const STAGE: &str = "load";
        self.check_types(dtype)?;
        let total = self.tensors.len() as u64;
        progress::stage(STAGE, total, observer, |observer| {
            let (mut parts, mut told) = (Parts::new(self, dtype, device), 0);
            Decoder::build(self.architecture.clone(), |param, _| {
                let value = parts.param(param)?;
                if parts.read > told {
                    told = parts.read;
                    progress::advance(STAGE, told, total, observer)?;
                }
                Ok(value)
            })
        })
        .map(|decoder| decoder.stored_as(self.stored_types()))
    }

    /// The type that each parameter has on disk, or will have; that of what blocks share for each of them.
    #[must_use]
    pub fn stored_types(&self) -> StoredTypes {
        let mut types: HashMap<Param, DType> = HashMap::new();
        for stored in &self.tensors {
            let dtype = self.stored_dtype(&stored.name);
            types.extend(stored.params.iter().map(|(param, _)| (*param, dtype)));
        }
        let parts = self.architecture.block_params();
        for depth in 0..self.architecture.depth() {
            let block = self.architecture.fold.block(depth);
            for &(part, _) in &parts {
                if let Some(&dtype) = types.get(&Param::Block(block.holder(depth, part), part)) {
                    types.entry(Param::Block(depth, part)).or_insert(dtype);
                }
            }
        }
        StoredTypes::new(self.narrowest_dtype(), types)
    }

    /// The narrowest type that a matrix has on disk, or will have.
    fn narrowest_dtype(&self) -> DType {
        let matrices = self.tensors.iter().filter(|stored| stored.shape.len() > 1);
        let types = matrices.map(|stored| self.stored_dtype(&stored.name));
        types.min_by_key(DType::size_in_bytes).unwrap_or(DType::BF16)
    }

    /// Weights are floats, in memory and on disk.
    fn check_types(&self, compute: DType) -> Result<()> {
        let floats = [DType::F32, DType::F16, DType::BF16, DType::F64];
        for dtype in [Some(compute), self.dtype].into_iter().flatten() {
            if !floats.contains(&dtype) {
                return Err(Error::argument("dtype", format!("{dtype:?}"), format!("one of {floats:?}")));
            }
        }
        Ok(())
    }

    /// The bytes of all tensors as they are stored, or will be.
    #[must_use]
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|stored| stored.bytes(self.stored_dtype(&stored.name))).sum()
    }

    /// The SHA-256 of the files of weights, one after the other, in hexadecimal. They are read the first time only.
    ///
    /// # Errors
    /// A file that cannot be read, or a cancelling observer.
    pub fn sha256(&self, observer: &mut dyn Observer) -> Result<String> {
        if let Some(known) = self.sha256.get() {
            return Ok(known.clone());
        }
        let found = self.hash_files(observer)?;
        Ok(self.sha256.get_or_init(|| found).clone())
    }

    fn hash_files(&self, observer: &mut dyn Observer) -> Result<String> {
        const STAGE: &str = "hash";
        let files = match &self.source {
            Source::Safetensors(tensors) => tensors.files().to_vec(),
            Source::Gguf(_) => vec![self.location.clone()],
            Source::New(_) => Vec::new(),
        };
        let sizes =
            files.iter().map(|path| Ok(std::fs::metadata(path).map_err(Error::io("read", path))?.len()));
        let (mut done, total) = (0, sizes.sum::<Result<u64>>()?);
        let mut hash = Sha256::new();
        let mut buffer = vec![0u8; 1 << 22];
        progress::stage(STAGE, total, observer, |observer| {
            for path in &files {
                let mut file = std::fs::File::open(path).map_err(Error::io("open", path))?;
                loop {
                    let read = file.read(&mut buffer).map_err(Error::io("read", path))?;
                    let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
                    hash.update(bytes);
                    done += bytes.len() as u64;
                    progress::advance(STAGE, done, total, observer)?;
                }
            }
            Ok(())
        })?;
        Ok(crate::data::hex(&hash.finalize()))
    }

    /// A tensor as it is stored, rounded to what will be written.
    fn read(&self, stored: &Stored) -> Result<Tensor> {
        let tensor = match &self.source {
            Source::Safetensors(tensors) => match self.entry(tensors, &stored.name) {
                Some((name, entry)) => entry.read(&name)?,
                None => return Err(Error::tensor(&self.location, &stored.name, "missing")),
            },
            Source::Gguf(file) => file.read(&stored.name)?,
            Source::New(_) => {
                return Err(Error::format(&self.location, "the model has no weights on disk yet"));
            }
        };
        self.check_finite(stored, &tensor)?;
        self.cast(stored, tensor, self.stored_dtype(&stored.name))
    }

    /// A finite tensor in another type, which must be able to hold its values.
    fn cast(&self, stored: &Stored, tensor: Tensor, dtype: DType) -> Result<Tensor> {
        if dtype == tensor.dtype() {
            return Ok(tensor);
        }
        let cast = tensor.to_dtype(dtype)?;
        if dtype.size_in_bytes() <= tensor.dtype().size_in_bytes() {
            self.check_finite(stored, &cast)?;
        }
        Ok(cast)
    }

    /// Refuses NaN and infinities in a tensor on the CPU, such as a value that its type cannot hold.
    fn check_finite(&self, stored: &Stored, tensor: &Tensor) -> Result<()> {
        if finite::is_finite(tensor) { Ok(()) } else { Err(self.not_finite(stored, tensor.dtype())) }
    }

    fn not_finite(&self, stored: &Stored, dtype: DType) -> Error {
        let reason = format!("holds a value that is NaN or infinite as {dtype:?}");
        Error::tensor(self.file_of(&stored.name), &stored.name, reason)
    }

    /// The file that holds a tensor.
    fn file_of(&self, name: &str) -> &Path {
        match &self.source {
            Source::Safetensors(tensors) => {
                self.entry(tensors, name).map_or(self.location.as_path(), |(_, entry)| entry.file.as_path())
            }
            Source::Gguf(_) | Source::New(_) => &self.location,
        }
    }

    /// The type that a tensor has on disk, or will have.
    fn stored_dtype(&self, name: &str) -> DType {
        let on_disk = match &self.source {
            Source::Safetensors(tensors) => self.entry(tensors, name).map(|(_, entry)| entry.dtype),
            Source::Gguf(_) | Source::New(_) => None,
        };
        self.dtype.or(on_disk).unwrap_or(DType::BF16)
    }

    /// A tensor of the files by its full name, or by that of a bare base model.
    fn entry<'a>(&self, tensors: &'a Safetensors, name: &str) -> Option<(String, &'a safetensors::Entry)> {
        let bare = name.strip_prefix(layout::base_prefix(&self.architecture));
        [Some(name), bare].into_iter().flatten().find_map(|name| Some((name.to_string(), tensors.get(name)?)))
    }

    /// Every tensor that the configuration asks for is there in its shape, and no other.
    fn check_tensors(&self) -> Result<()> {
        let (location, arch) = (self.location.as_path(), &self.architecture);
        let found: HashMap<String, (PathBuf, Vec<usize>)> = match &self.source {
            Source::New(_) => return Ok(()),
            Source::Gguf(file) => {
                let tensors = file.tensors().into_iter();
                tensors.map(|(name, shape)| (name, (location.to_path_buf(), shape))).collect()
            }
            Source::Safetensors(tensors) => tensors
                .names()
                .filter_map(|name| {
                    let entry = tensors.get(name)?;
                    Some((name.to_string(), (entry.file.clone(), entry.shape.clone())))
                })
                .collect(),
        };
        let prefix = layout::base_prefix(arch);
        let mut expected = std::collections::HashSet::new();
        for stored in &self.tensors {
            let bare = stored.name.strip_prefix(prefix).unwrap_or(&stored.name);
            let name = if found.contains_key(&stored.name) { stored.name.as_str() } else { bare };
            let Some((file, shape)) = found.get(name) else {
                let reason = format!("missing, expected shape {:?}", stored.shape);
                return Err(Error::tensor(location, &stored.name, reason));
            };
            if *shape != stored.shape {
                let reason = format!("shape {shape:?}, expected {:?} by the config", stored.shape);
                return Err(Error::tensor(file, name, reason));
            }
            expected.insert(name);
        }
        let mut extra: Vec<_> = found.iter().filter(|(name, _)| !expected.contains(name.as_str())).collect();
        extra.retain(|(name, _)| !layout::is_redundant(arch, name));
        extra.sort();
        match extra.first() {
            Some((name, (file, shape))) => {
                let reason = format!("shape {shape:?} is not expected by the config");
                Err(Error::tensor(file, name.as_str(), reason))
            }
            None => Ok(()),
        }
    }
}

/// The `config.json` of a directory, with its path.
fn read_config(directory: &Path) -> Result<(PathBuf, Value)> {
    let path = directory.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let config = serde_json::from_str(&text).map_err(|error| Error::format(&path, error.to_string()))?;
    Ok((path, config))
}
