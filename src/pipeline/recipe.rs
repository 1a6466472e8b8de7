//! What a compression is told, as data.

use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::DType;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::bytes::Bytes;
use crate::checkpoint::Format;
use crate::data::Bos;
use crate::error::{Error, Result};
use crate::eval::LatencyOptions;
use crate::heal::{Heal, ParamGroup, Trainable};
use crate::importance::{Gates, GatesWithCoupling, Method};
use crate::model::Architecture;
use crate::plan::{Donor, Groups, Own};

/// All that a compression is told. A TOML or JSON file of these fields is a recipe; what it leaves out is as it is by
/// default, and what it has besides is refused. Paths are taken from the current directory.
///
/// ```
/// use foldgpt::Recipe;
/// use foldgpt::pipeline::Goal;
///
/// let recipe = Recipe::from_toml(r#"
///     model = "org/name"
///     text = "stories.txt"
///     out = "smaller"
///     target = { rate = 0.2 }
///     max_nll_increase = 0.25
///
///     [heal]
///     budget = { steps = 200 }
/// "#)?;
/// assert_eq!(recipe.target, Some(Goal::Rate(0.2)));
/// # Ok::<(), foldgpt::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Recipe {
    /// A directory in the Hugging Face layout, a GGUF file, or a hub id (`org/name`, feature `hub`).
    pub model: String,
    /// A plain text, or JSON Lines (`*.jsonl`) whose documents are [joined](crate::data::json_lines): its first 80 %
    /// calibrate and heal, its last 20 % evaluate.
    pub text: PathBuf,
    /// The field of JSON Lines that holds the text; `text` where absent.
    pub text_field: Option<String>,
    /// The directory to write, new or empty.
    pub out: PathBuf,
    /// Where every stage keeps its result; beside `out`, with `.work` after its name, where absent.
    pub work: Option<PathBuf>,
    /// Seed of everything drawn.
    pub seed: u64,
    /// What blocks are scored in. All else is computed in f32.
    pub dtype: Precision,
    /// The most memory that a run may take: a number of bytes, or a text such as `"3GB"`; without a bound where absent.
    /// Where the model in memory would be more, its blocks are read from disk one at a time, for the same result; then
    /// blocks can only be dropped, and scored by Block Influence, angular distance, perplexity, gates or chance, and no
    /// text is continued for the report.
    /// Counted are weights, states and activations, with a sixteenth for all else.
    pub max_memory: Option<Bytes>,
    /// How the text is cut.
    pub windows: WindowOptions,
    /// How blocks are scored; by gates with coupling where absent.
    pub method: Method,
    /// Options of the method `gates`; what to remove and protect, and the seed, are the recipe's own.
    pub gates: Option<Gates>,
    /// Options of the method `coupling`, likewise.
    pub coupling: Option<GatesWithCoupling>,
    /// How much is removed. Nothing where absent, but for what `mix` removes.
    #[serde(deserialize_with = "target")]
    pub target: Option<Goal>,
    /// Blocks that stay, by index from 0.
    pub protect: Vec<usize>,
    /// What the blocks that stay share.
    pub share: Option<Share>,
    /// A total to be met by removal first, then sharing, then rank. `target` is then the most that is removed, in a
    /// search too; a tenth of the blocks where absent.
    pub mix: Option<MixOptions>,
    /// How the rest is healed; not at all where absent. Its seed is the recipe's.
    pub heal: Option<Heal>,
    /// The quality gate: by how much the loss on the evaluation windows may be above that of the dense model, in nats
    /// per token. Above it nothing is saved; what was healed until then stays in the working directory, for a recipe
    /// that asks for less.
    pub max_nll_increase: Option<f64>,
    /// Files of tasks, JSON Lines, to be answered before and after.
    pub tasks: Vec<PathBuf>,
    /// Items of each task, at most.
    pub task_items: Option<usize>,
    /// How fast the model is before and after, and what it takes in memory: not measured where absent, since times tell
    /// little on a machine that is busy, and only the caller knows. `true` in a file asks for [`LatencyOptions`] as they
    /// are by default.
    #[serde(deserialize_with = "latency")]
    pub latency: Option<LatencyOptions>,
    /// How the model is written; where absent, compact if its blocks share, if it was made of a compact one, or if
    /// adapters of healing stay beside their matrices, and expanded otherwise.
    pub format: Option<Format>,
    /// Texts that the models before and after continue, for the report.
    pub samples: SampleOptions,
    /// The model's id on the hub, for the model card; what was fetched from there needs none.
    pub base_model: Option<String>,
}

/// Options, or whether they are those by default.
fn latency<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<LatencyOptions>, D::Error> {
    struct Asked;
    impl<'de> Visitor<'de> for Asked {
        type Value = Option<LatencyOptions>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("true, false, or the options of measuring speed")
        }

        fn visit_bool<E>(self, asked: bool) -> std::result::Result<Self::Value, E> {
            Ok(asked.then(LatencyOptions::default))
        }

        fn visit_unit<E>(self) -> std::result::Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<Self::Value, A::Error> {
            LatencyOptions::deserialize(MapAccessDeserializer::new(map)).map(Some)
        }
    }
    deserializer.deserialize_any(Asked)
}

/// A goal, or none; of several at once it says which.
fn target<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Goal>, D::Error> {
    let Some(asked) = Option::<serde_json::Map<String, Value>>::deserialize(deserializer)? else {
        return Ok(None);
    };
    if asked.len() != 1 {
        let found = asked.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" and ");
        let found = if found.is_empty() { "nothing".into() } else { found };
        return Err(D::Error::custom(format!(
            "`target` is {found}, expected exactly one goal, such as `rate`"
        )));
    }
    Goal::deserialize(Value::Object(asked)).map(Some).map_err(D::Error::custom)
}

/// What blocks are scored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Precision {
    /// As everything else.
    #[default]
    F32,
    /// Half the memory, and less time on CPUs with AVX-512 bf16; the f32 model is in memory beside it.
    Bf16,
}

/// How the text is cut into windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct WindowOptions {
    /// Tokens in each window; 512 by default.
    pub seq_len: usize,
    /// Whether windows begin with the begin-of-text token; as the tokenizer does it by default.
    pub bos: Bos,
    /// Whether special tokens that the text writes out are read as any other characters; not by default. See
    /// [`Tokenizer::with_split_special_tokens`](crate::Tokenizer::with_split_special_tokens).
    pub split_special_tokens: bool,
    /// Windows that calibrate, at most, spread over the first 80 %; 16 by default. Healing trains on all that there are.
    pub calibrate: usize,
    /// Windows that evaluate, at most, the first of the last 20 %; 32 by default.
    pub evaluate: usize,
}

impl Default for WindowOptions {
    fn default() -> Self {
        Self { seq_len: 512, bos: Bos::Auto, split_special_tokens: false, calibrate: 16, evaluate: 32 }
    }
}

/// What is continued by the models before and after, for whoever reads the report; nothing is measured by it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct SampleOptions {
    /// Beginnings of texts. Where there are none, as by default, two windows of the evaluation text begin them.
    pub prompts: Vec<String>,
    /// Tokens that are made for each, at most, always the likeliest; 0 for no samples, 40 by default.
    pub tokens: usize,
}

impl Default for SampleOptions {
    fn default() -> Self {
        Self { prompts: Vec::new(), tokens: 40 }
    }
}

/// How much is removed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Goal {
    /// This share of the blocks, from 0 to below 1, rounded to the nearest number.
    Rate(f64),
    /// This many blocks.
    Blocks(usize),
    /// As few blocks as leave at most this many parameters.
    Parameters(usize),
    /// As few blocks as leave at most this many bytes of tensors in the recipe's format, before anything is shared;
    /// norms that the recipe heals are stored in f32, and count so.
    Bytes(u64),
    /// As many blocks as can go, in the order of their scores, with a loss that is at most this much higher on the
    /// calibration windows, in nats per token, before any healing. Where the recipe sets no quality gate, this is the
    /// gate too.
    #[serde(alias = "nll_increase")]
    NllIncrease(f64),
}

/// What the blocks that stay share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Share {
    /// Which blocks.
    pub groups: Groups,
    /// Whose matrices they use; means where absent.
    #[serde(default)]
    pub donor: Donor,
    /// What each keeps for itself; its norms where absent.
    #[serde(default)]
    pub own: Own,
}

impl Share {
    /// These blocks share the means of their matrices, and keep their norms.
    #[must_use]
    pub fn new(groups: Groups) -> Self {
        Self { groups, donor: Donor::default(), own: Own::default() }
    }
}

/// A total that removal, sharing and rank meet together, as a [`Mix`](crate::Mix) does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct MixOptions {
    /// The total.
    pub total: Total,
    /// The share of it that is kept for residuals, from 0 to below 1; 0.05 where absent. A search tries others too.
    #[serde(default = "residual_share")]
    pub residual_share: f64,
    /// Whose matrices tied blocks use; means where absent.
    #[serde(default)]
    pub donor: Donor,
    /// Whether mixes in several proportions are tried, and the one of the lowest loss is taken: with none, half and all
    /// of the blocks removed that may go, each with nothing, `residual_share` and three times as much (below 1) kept for
    /// residuals.
    #[serde(default)]
    pub search: bool,
}

impl MixOptions {
    /// One mix of the usual proportions.
    #[must_use]
    pub fn new(total: Total) -> Self {
        Self { total, residual_share: residual_share(), donor: Donor::default(), search: false }
    }

    /// The shares for residuals that are tried.
    pub(crate) fn residual_shares(&self) -> Vec<f64> {
        let share = self.residual_share;
        if !self.search {
            return vec![share];
        }
        let mut shares = vec![0.0, share, 3.0 * share];
        shares.retain(|share| *share < 1.0);
        shares.dedup();
        shares
    }
}

fn residual_share() -> f64 {
    0.05
}

/// What a whole model may take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Total {
    /// This share of the dense model's parameters, above 0 and below 1.
    Share(f64),
    /// This many parameters.
    Parameters(usize),
}

impl Precision {
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

impl Recipe {
    /// Reads a recipe from a file: JSON where its name ends in `.json`, else TOML.
    ///
    /// # Errors
    /// A file that cannot be read or is no recipe.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let json = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
        let recipe = if json { Self::from_json(&text) } else { Self::from_toml(&text) };
        recipe.map_err(|error| Error::format(path, error.to_string()))
    }

    /// Reads a recipe from TOML.
    ///
    /// # Errors
    /// [`Error::Recipe`] for text that is none, with the field that is not known.
    pub fn from_toml(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|error| unreadable(&error))
    }

    /// Reads a recipe from JSON.
    ///
    /// # Errors
    /// As [`from_toml`](Self::from_toml).
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|error| unreadable(&error))
    }

    /// The directory where stages keep their results.
    #[must_use]
    pub fn work_directory(&self) -> PathBuf {
        self.work.clone().unwrap_or_else(|| {
            let mut name = self.out.file_name().unwrap_or_default().to_owned();
            name.push(".work");
            self.out.with_file_name(name)
        })
    }

    /// How a model is written, by whether its blocks share or it was made of a compact one.
    pub(crate) fn format_where(&self, shared: bool) -> Format {
        let kept = |group: &ParamGroup| matches!(&group.params, Trainable::Lora(lora) if !lora.merge);
        let adapted = || self.heal.iter().flat_map(|heal| &heal.groups).any(kept);
        self.format.unwrap_or_else(|| if shared || adapted() { Format::Compact } else { Format::Expanded })
    }

    /// The same before it is known what blocks share, of a model of this architecture.
    pub(crate) fn expected_format(&self, arch: &Architecture) -> Format {
        self.format_where(self.share.is_some() || self.mix.is_some() || !arch.fold.is_plain())
    }

    /// The greatest increase of the loss that lets the model be saved.
    pub(crate) fn gate(&self) -> Option<f64> {
        self.max_nll_increase.or(match self.target {
            Some(Goal::NllIncrease(limit)) => Some(limit),
            _ => None,
        })
    }
}

fn unreadable(error: &dyn std::fmt::Display) -> Error {
    Error::Recipe { field: None, reason: error.to_string() }
}
