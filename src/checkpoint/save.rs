//! Writing a checkpoint: everything, or nothing.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::layout::{Stored, stored_tensors};
use super::staging::Staging;
use super::{Checkpoint, Source, surgery};
use crate::error::{Error, Result};
use crate::model::{Decoder, Param, Part, Unit};
use crate::plan::Plan;
use crate::progress::Observer;

/// How a checkpoint is written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SaveOptions {
    /// Tensors are split into files of at most this many bytes; a larger tensor has a file of its own.
    pub max_shard_bytes: u64,
}

impl Default for SaveOptions {
    /// Shards of 5 GB, as transformers writes them.
    fn default() -> Self {
        Self { max_shard_bytes: 5_000_000_000 }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Saved {
    /// The directory.
    pub directory: PathBuf,
    /// The bytes of all tensors.
    pub tensor_bytes: u64,
    /// The files of weights.
    pub weight_files: Vec<String>,
}

/// Files that belong to the model beside its weights: fetched from the hub, and carried along from a directory.
pub(super) const COMPANIONS: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
];

const PLAN: &str = "plan.json";
const STAGE: &str = "save";

impl Checkpoint {
    /// Writes `decoder`, made from this checkpoint, as a Hugging Face directory that transformers loads: weights in
    /// the types they had (a decoder held in a narrower type has lost what that cannot hold), the configuration cut to the blocks that are left, the tokenizer, and the plan.
    ///
    /// Everything is written beside `directory`, synced, opened again and compared with the decoder tensor by
    /// tensor, and renamed only then: `directory` holds nothing or all of it. What a crash leaves beside it is a
    /// hidden directory that ends in `.partial` and may be deleted.
    ///
    /// # Errors
    /// A directory that exists and is not empty, a decoder of another architecture, a full disk, or a result that
    /// does not read back as it was.
    pub fn save(
        &self,
        decoder: &Decoder,
        plan: Option<&Plan>,
        directory: impl AsRef<Path>,
        options: &SaveOptions,
        observer: &mut dyn Observer,
    ) -> Result<Saved> {
        let directory = directory.as_ref();
        if let Some(plan) = plan {
            self.check_plan(plan, decoder, observer)?;
        }
        let staging = Staging::beside(directory)?;
        let config = self.config_of(decoder)?;
        staging.write("config.json", pretty(&config)?.as_bytes())?;
        if let Some(plan) = plan {
            staging.write(PLAN, plan.to_json()?.as_bytes())?;
        }
        self.write_companions(&staging)?;
        let (weight_files, tensor_bytes) = self.write_weights(decoder, &staging, options, observer)?;
        compare(decoder, &staging.path, observer)?;
        staging.commit(directory)?;
        Ok(Saved { directory: directory.to_path_buf(), tensor_bytes, weight_files })
    }

    /// A plan is written only beside what it describes.
    fn check_plan(&self, plan: &Plan, decoder: &Decoder, observer: &mut dyn Observer) -> Result<()> {
        plan.check_model(&self.architecture)?;
        let kept: Vec<usize> = decoder.blocks().iter().map(|block| block.own.origin).collect();
        if kept != plan.kept() {
            return Err(Error::Plan(format!("keeps blocks {:?}, the decoder has {kept:?}", plan.kept())));
        }
        for block in decoder.blocks() {
            for part in [Part::Attention, Part::Mlp] {
                let unit = Unit { block: block.own.origin, part };
                if block.has(part) == plan.removed_halves().contains(&unit) {
                    return Err(Error::Plan(format!("and the decoder differ in half {unit}")));
                }
            }
        }
        let Some(expected) = plan.model_sha256() else { return Ok(()) };
        let found = self.sha256(observer)?;
        if found != expected {
            return Err(Error::Plan(format!("is for a model with sha256 {expected}, this one has {found}")));
        }
        Ok(())
    }

    fn config_of(&self, decoder: &Decoder) -> Result<Value> {
        let kept: Vec<usize> = decoder.blocks().iter().map(|block| block.own.origin).collect();
        let embedding = stored_tensors(&self.architecture).into_iter().next();
        let dtype = embedding.map_or(DType::BF16, |stored| self.stored_dtype(&stored.name));
        let dtype = match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            DType::F64 => "float64",
            _ => "float32",
        };
        surgery::cut(&self.config, &kept, decoder.architecture(), dtype)
    }

    fn write_companions(&self, staging: &Staging) -> Result<()> {
        match &self.source {
            Source::Safetensors(_) => {
                for name in COMPANIONS {
                    let from = self.location.join(name);
                    if from.is_file() {
                        let bytes = std::fs::read(&from).map_err(Error::io("read", &from))?;
                        staging.write(name, &bytes)?;
                    }
                }
                Ok(())
            }
            Source::Gguf(file) => {
                staging.write("tokenizer_config.json", pretty(&file.tokenizer_config())?.as_bytes())?;
                staging.write("tokenizer.json", self.tokenizer()?.to_json()?.as_bytes())
            }
            Source::New(tokenizer) => {
                staging.write("tokenizer_config.json", pretty(&tokenizer.config())?.as_bytes())?;
                staging.write("tokenizer.json", tokenizer.to_json()?.as_bytes())
            }
        }
    }

    fn write_weights(
        &self,
        decoder: &Decoder,
        staging: &Staging,
        options: &SaveOptions,
        observer: &mut dyn Observer,
    ) -> Result<(Vec<String>, u64)> {
        let params = Params::of(decoder);
        let tensors = stored_tensors(decoder.architecture());
        let origins = self.origins(decoder, &tensors)?;
        let views = tensors.iter().zip(&origins).map(|(stored, dtype)| {
            let bytes = stored.shape.iter().product::<usize>() * dtype.size_in_bytes();
            TensorView { stored, dtype: *dtype, bytes, params: &params, failure: RefCell::new(None) }
        });
        let views: Vec<TensorView<'_>> = views.collect();
        let shards = shards(&views, options.max_shard_bytes);
        let total: u64 = views.iter().map(|view| view.bytes as u64).sum();
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let (mut names, mut weight_map) = (Vec::new(), serde_json::Map::new());
        crate::progress::steps(STAGE, shards.len(), observer, |index| {
            let name = match shards.len() {
                1 => "model.safetensors".to_string(),
                count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            let path = staging.path.join(&name);
            let Some(views) = shards.get(index) else { return Ok(()) };
            let named = views.iter().map(|view| (view.stored.name.as_str(), *view));
            ::safetensors::serialize_to_file(named, Some(metadata.clone()), &path)
                .map_err(|error| written(&path, error))?;
            if let Some(error) = views.iter().find_map(|view| view.failure.take()) {
                return Err(error);
            }
            staging.adopt(&path)?;
            weight_map
                .extend(views.iter().map(|view| (view.stored.name.clone(), Value::from(name.as_str()))));
            names.push(name);
            Ok(())
        })?;
        if names.len() > 1 {
            let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
            staging.write("model.safetensors.index.json", pretty(&index)?.as_bytes())?;
        }
        Ok((names, total))
    }

    /// The type that each tensor of a cut decoder has in this checkpoint.
    fn origins(&self, decoder: &Decoder, tensors: &[Stored]) -> Result<Vec<DType>> {
        let mut names = HashMap::new();
        for stored in &self.tensors {
            names.extend(stored.params.iter().map(|(param, _)| (*param, stored.name.as_str())));
        }
        let blocks = decoder.blocks();
        let dtype = |stored: &Stored| {
            let source = match stored.params.first()?.0 {
                Param::Block(depth, part) => Param::Block(blocks.get(depth)?.own.origin, part),
                other => other,
            };
            Some(self.stored_dtype(names.get(&source)?))
        };
        let foreign = || Error::Plan("the decoder was not made from this checkpoint".into());
        tensors.iter().map(|stored| dtype(stored).ok_or_else(foreign)).collect()
    }
}

/// Opens what was written as anyone would, and compares it with the decoder: architecture, then every tensor.
fn compare(decoder: &Decoder, written: &Path, observer: &mut dyn Observer) -> Result<()> {
    let reloaded = Checkpoint::open(written)?;
    if reloaded.architecture() != decoder.architecture() {
        let reason = "config.json cannot say what the decoder computes (a kept block's attention or rope)";
        return Err(Error::format(&written.join("config.json"), reason));
    }
    let params = Params::of(decoder);
    crate::progress::steps("verify", reloaded.tensors.len(), observer, |index| {
        let Some(stored) = reloaded.tensors.get(index) else { return Ok(()) };
        let on_disk = reloaded.read(stored)?;
        let in_memory = joined(stored, &params, on_disk.dtype())?;
        if bytes_of(&on_disk)? == bytes_of(&in_memory)? {
            return Ok(());
        }
        Err(Error::tensor(written, &stored.name, "does not read back as it was written"))
    })
}

/// A stored tensor put together only while it is written.
struct TensorView<'a> {
    stored: &'a Stored,
    dtype: DType,
    bytes: usize,
    params: &'a Params<'a>,
    /// Why the tensor could not be put together: the writer's interface has no place for an error.
    failure: RefCell<Option<Error>>,
}

impl ::safetensors::View for &TensorView<'_> {
    fn dtype(&self) -> ::safetensors::Dtype {
        self.dtype.into()
    }

    fn shape(&self) -> &[usize] {
        &self.stored.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = joined(self.stored, self.params, self.dtype).and_then(|tensor| bytes_of(&tensor));
        Cow::Owned(bytes.unwrap_or_else(|error| {
            *self.failure.borrow_mut() = Some(error);
            vec![0; self.bytes]
        }))
    }

    fn data_len(&self) -> usize {
        self.bytes
    }
}

/// A decoder's tensors by parameter, and what stands for those that it lacks.
struct Params<'a> {
    tensors: HashMap<Param, &'a Tensor>,
    shapes: HashMap<Param, Vec<usize>>,
}

impl<'a> Params<'a> {
    fn of(decoder: &'a Decoder) -> Self {
        Self {
            tensors: decoder.params().collect(),
            shapes: decoder.architecture().params().into_iter().collect(),
        }
    }

    /// The parameter in `dtype`. A half that a block lost is written as zeros: no common format can leave out an
    /// attention or an MLP, and one whose output projection is zero adds nothing, exactly.
    fn get(&self, param: Param, dtype: DType) -> Result<Tensor> {
        match (self.tensors.get(&param), self.shapes.get(&param)) {
            (Some(tensor), _) => Ok(tensor.to_device(&Device::Cpu)?.to_dtype(dtype)?),
            (None, Some(shape)) => Ok(Tensor::zeros(shape.as_slice(), dtype, &Device::Cpu)?),
            (None, None) => Err(Error::Plan(format!("the decoder has no {param}"))),
        }
    }
}

fn joined(stored: &Stored, params: &Params<'_>, dtype: DType) -> Result<Tensor> {
    stored.join(|param| params.get(param, dtype))
}

fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(tensor.elem_count() * tensor.dtype().size_in_bytes());
    tensor.write_bytes(&mut bytes)?;
    Ok(bytes)
}

/// Consecutive tensors, cut where a file would pass `limit`.
fn shards<'a, 'b>(views: &'b [TensorView<'a>], limit: u64) -> Vec<Vec<&'b TensorView<'a>>> {
    let mut shards: Vec<Vec<&TensorView<'_>>> = Vec::new();
    let mut filled = 0u64;
    for view in views {
        let bytes = view.bytes as u64;
        match shards.last_mut().filter(|_| filled + bytes <= limit) {
            Some(shard) => shard.push(view),
            None => {
                shards.push(vec![view]);
                filled = 0;
            }
        }
        filled += bytes;
    }
    shards
}

fn pretty(value: &Value) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|error| Error::Plan(format!("cannot write json: {error}")))
}

fn written(path: &Path, error: ::safetensors::SafeTensorError) -> Error {
    match error {
        ::safetensors::SafeTensorError::IoError(source) => Error::io("write", path)(source),
        other => Error::format(path, other.to_string()),
    }
}
