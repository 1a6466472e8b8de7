//! Writing a checkpoint: everything, or nothing.

use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::card::{CARD, ModelCard};
use super::layout::Stored;
use super::safetensors::{COMPACT, STANDARD, index, single};
use super::shard::Shard;
use super::staging::Staging;
use super::written::Written;
use super::{Checkpoint, Source, compact, surgery};
use crate::error::{Error, Result};
use crate::model::{Architecture, Decoder};
use crate::plan::Plan;
use crate::progress::Observer;

/// In what form a folded model is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Format {
    /// A standard Hugging Face directory: every block written out, scales and residuals merged into the matrices.
    /// It loads everywhere, and is as large as a model whose blocks share nothing. Merged matrices are f32, which
    /// holds what they compute, unless the checkpoint was told its type.
    #[default]
    Expanded,
    /// Each shared tensor once, as docs/format.md specifies it.
    Compact,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Expanded => "expanded",
            Self::Compact => "compact",
        })
    }
}

/// How a checkpoint is written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SaveOptions {
    /// The form of a folded model.
    pub format: Format,
    /// Tensors are split into files of at most this many bytes; a larger tensor has a file of its own.
    pub max_shard_bytes: u64,
    /// The model card, `README.md`. Where absent, that of [`Checkpoint::card`], which says what was done and has no
    /// results.
    pub card: Option<ModelCard>,
}

impl Default for SaveOptions {
    /// A standard directory in shards of 5 GB, as transformers writes them.
    fn default() -> Self {
        Self { format: Format::default(), max_shard_bytes: 5_000_000_000, card: None }
    }
}

impl Format {
    /// What a decoder of this architecture is in a checkpoint of this form.
    pub(crate) fn architecture(self, arch: &Architecture) -> Architecture {
        match self {
            Self::Expanded => arch.expanded(),
            Self::Compact => arch.clone(),
        }
    }
}

impl From<Format> for SaveOptions {
    fn from(format: Format) -> Self {
        Self { format, ..Self::default() }
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
    /// The bytes of the files of weights: those of the tensors, and of the headers that name them.
    pub file_bytes: u64,
    /// The files of weights.
    pub weight_files: Vec<String>,
}

/// A checkpoint that is whole and compared, and not in its place yet; dropped, it is gone.
pub(crate) struct Prepared {
    staging: Staging,
    /// What was written, opened where it lies now.
    pub(crate) checkpoint: Checkpoint,
    /// What will have been saved.
    pub(crate) saved: Saved,
}

impl Prepared {
    /// Renames it into its place.
    pub(crate) fn place(self) -> Result<Saved> {
        let Self { staging, saved, .. } = self;
        staging.commit(&saved.directory)?;
        let (files, bytes) = (saved.weight_files.len(), saved.tensor_bytes);
        tracing::debug!(path = %saved.directory.display(), files, bytes, "saved");
        Ok(saved)
    }
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
    /// Writes `decoder`, made from this checkpoint: weights in the types they had (a decoder held in a narrower type
    /// has lost what that cannot hold), the configuration cut to the blocks that are left, the tokenizer, the plan, and
    /// a model card.
    /// In the expanded format that is a Hugging Face directory that transformers loads.
    ///
    /// Everything is written beside `directory`, synced, opened again and compared with the decoder tensor by
    /// tensor, and renamed only then: `directory` holds nothing or all of it. What a crash leaves beside it is a
    /// hidden directory that ends in `.partial` and may be deleted.
    ///
    /// # Errors
    /// A directory that exists and is not empty, a decoder of another architecture or one that is quantised, a full
    /// disk, or a result that does not read back as it was.
    pub fn save(
        &self,
        decoder: &Decoder,
        plan: Option<&Plan>,
        directory: impl AsRef<Path>,
        options: &SaveOptions,
        observer: &mut dyn Observer,
    ) -> Result<Saved> {
        self.prepare(decoder, plan, directory.as_ref(), options, observer)?.place()
    }

    /// As [`save`](Self::save), all but the renaming.
    pub(crate) fn prepare(
        &self,
        decoder: &Decoder,
        plan: Option<&Plan>,
        directory: &Path,
        options: &SaveOptions,
        observer: &mut dyn Observer,
    ) -> Result<Prepared> {
        decoder.check_not_quantized()?;
        if let Some(plan) = plan {
            let kept: Vec<usize> = decoder.blocks().iter().map(|block| block.own.origin).collect();
            self.check_plan(plan, &kept, decoder.architecture(), observer)?;
        }
        let written = self.of_decoder(decoder, options.format)?;
        self.write(&written, plan, directory, options, observer)
    }

    /// Writes all of it beside its place, and compares.
    pub(super) fn write(
        &self,
        written: &Written<'_>,
        plan: Option<&Plan>,
        directory: &Path,
        options: &SaveOptions,
        observer: &mut dyn Observer,
    ) -> Result<Prepared> {
        let staging = Staging::beside(directory)?;
        let config = self.config_of(written)?;
        staging.write("config.json", pretty(&config)?.as_bytes())?;
        if let Some(plan) = plan {
            staging.write(PLAN, plan.to_json()?.as_bytes())?;
        }
        self.write_companions(&staging)?;
        let card = options.card.clone().unwrap_or_else(|| self.unmeasured(written, plan));
        staging.write(CARD, card.to_markdown(options.format).as_bytes())?;
        let (weight_files, tensor_bytes) = write_weights(written, &staging, options, observer)?;
        let checkpoint = compare(written, &staging.path, observer)?;
        let mut file_bytes = 0;
        for path in weight_files.iter().map(|name| staging.path.join(name)) {
            file_bytes += std::fs::metadata(&path).map_err(Error::io("read", &path))?.len();
        }
        let saved = Saved { directory: directory.to_path_buf(), tensor_bytes, file_bytes, weight_files };
        Ok(Prepared { staging, checkpoint, saved })
    }

    /// A plan is written only beside what it describes.
    pub(super) fn check_plan(
        &self,
        plan: &Plan,
        kept: &[usize],
        architecture: &Architecture,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        plan.check_model(&self.architecture)?;
        if kept != plan.kept() {
            return Err(Error::Plan(format!("keeps blocks {:?}, the decoder has {kept:?}", plan.kept())));
        }
        if plan.architecture(&self.architecture)? != *architecture {
            let reason = "and the decoder differ in the halves of blocks, or in what these share and add";
            return Err(Error::Plan(reason.into()));
        }
        let Some(expected) = plan.model_sha256() else { return Ok(()) };
        let found = self.sha256(observer)?;
        if found != expected {
            return Err(Error::Plan(format!("is for a model with sha256 {expected}, this one has {found}")));
        }
        Ok(())
    }

    fn config_of(&self, written: &Written<'_>) -> Result<Value> {
        let embedding = self.tensors.first().map_or(DType::BF16, |stored| self.stored_dtype(&stored.name));
        // Where merging made tensors wider, readers that follow this field should not narrow them again.
        let mut types = written.tensors.iter().map(|(_, dtype)| dtype.size_in_bytes());
        let widened = types.any(|size| size > embedding.size_in_bytes());
        let dtype = match embedding {
            DType::F64 => "float64",
            _ if written.merges && widened => "float32",
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        let mut config = surgery::cut(&self.config, &written.kept, &written.architecture, dtype)?;
        if let (Format::Compact, Some(fields)) = (written.format, config.as_object_mut()) {
            fields.insert(compact::SECTION.into(), compact::to_section(&written.architecture)?);
        }
        Ok(config)
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
}

fn write_weights(
    written: &Written<'_>,
    staging: &Staging,
    options: &SaveOptions,
    observer: &mut dyn Observer,
) -> Result<(Vec<String>, u64)> {
    let total = written.bytes();
    let stem = if written.format == Format::Compact { COMPACT } else { STANDARD };
    let shards = shards(&written.tensors, options.max_shard_bytes);
    let count = shards.len();
    let (mut names, mut weight_map) = (Vec::new(), serde_json::Map::new());
    crate::progress::counted(STAGE, total, observer, |advance| {
        let mut done = 0;
        for (number, tensors) in (1..).zip(shards) {
            let name = match count {
                1 => single(stem),
                count => format!("{stem}-{number:05}-of-{count:05}.safetensors"),
            };
            let shard = Shard::create(staging.path.join(&name), tensors)?;
            for (stored, dtype, place) in shard.places() {
                written.content.write(stored, dtype, &place)?;
                done += stored.bytes(dtype);
                advance(done)?;
                weight_map.insert(stored.name.clone(), Value::from(name.as_str()));
            }
            shard.finish()?;
            names.push(name);
        }
        Ok(())
    })?;
    if names.len() > 1 {
        let content = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        staging.write(&index(stem), pretty(&content)?.as_bytes())?;
    }
    Ok((names, total))
}

/// Opens what was written as anyone would, and compares it with the decoder: architecture, then every tensor.
fn compare(written: &Written<'_>, directory: &Path, observer: &mut dyn Observer) -> Result<Checkpoint> {
    let reloaded = Checkpoint::open(directory)?;
    if reloaded.architecture() != &written.architecture {
        let reason = "config.json cannot say what the decoder computes (a kept block's attention or rope)";
        return Err(Error::format(&directory.join("config.json"), reason));
    }
    crate::progress::steps("verify", reloaded.tensors.len(), observer, |place| {
        let Some(stored) = reloaded.tensors.get(place) else { return Ok(()) };
        if written.content.is_in(&reloaded, stored)? {
            return Ok(());
        }
        Err(Error::tensor(directory, &stored.name, "does not read back as it was written"))
    })?;
    Ok(reloaded)
}

/// Consecutive tensors, cut where a file would pass `limit`.
fn shards(tensors: &[(Stored, DType)], limit: u64) -> Vec<Vec<&(Stored, DType)>> {
    let mut shards: Vec<Vec<&(Stored, DType)>> = Vec::new();
    let mut filled = 0u64;
    for tensor in tensors {
        let bytes = tensor.0.bytes(tensor.1);
        match shards.last_mut().filter(|_| filled + bytes <= limit) {
            Some(shard) => shard.push(tensor),
            None => {
                shards.push(vec![tensor]);
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
