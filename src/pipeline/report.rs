//! What a compression found, in numbers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::curve::HealPoint;
use super::recipe::Recipe;
use super::stage::Stage;
use crate::account::Account;
use crate::checkpoint::Format;
use crate::error::{Error, Result};
use crate::eval::{Accuracy, Latency, Perplexity};
use crate::heal::HealReport;
use crate::plan::{Calibration, Plan};
use crate::report::Row;

/// All numbers of before and after, and where they come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Report {
    /// The version of the crate.
    pub version: String,
    /// The command that it was run by, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// What was asked for.
    pub recipe: Recipe,
    /// SHA-256 of the dense model's weights.
    pub model_sha256: String,
    /// SHA-256 of the weights that were saved.
    pub saved_sha256: String,
    /// SHA-256 of each task's file, by the task's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub task_files: BTreeMap<String, String>,
    /// The windows that calibrated.
    pub calibration: Calibration,
    /// The model as it was.
    pub dense: Measured,
    /// The folded model before it was healed, where it was.
    pub folded: Option<Measured>,
    /// What was saved, measured before that.
    pub compressed: Measured,
    /// Bytes of all tensors of the dense checkpoint.
    pub dense_bytes: u64,
    /// Bytes of all tensors that were saved.
    pub saved_bytes: u64,
    /// What was done, with the scores that decided it.
    pub plan: Plan,
    /// The mixes that were tried, where there were several; the smallest model first.
    pub mixes: Vec<Tried>,
    /// The dense model's loss on the calibration windows, in nats per token, where mixes were compared on them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration_nll: Option<f64>,
    /// How the healing went.
    pub heal: Option<HealReport>,
    /// The losses that it trained by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub heal_curve: Vec<HealPoint>,
    /// Whether the model stayed on disk for the recipe's `max_memory`, its blocks read one at a time.
    #[serde(default)]
    pub streamed: bool,
    /// How the models before and after go on with a text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<Sample>,
    /// The format in which the result was saved.
    #[serde(default)]
    pub format: Format,
    /// What other recipes made of the same model, with the same working directory and the same evaluation windows; the
    /// smallest model first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<Other>,
    /// The stages that this run had to do, in their order; all others were known.
    #[serde(skip)]
    pub ran: Vec<Stage>,
}

/// A model in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Measured {
    /// Blocks that run.
    pub blocks: usize,
    /// Parameters; what depths share counts once.
    pub parameters: usize,
    /// The loss on the evaluation windows, in f32.
    pub perplexity: Perplexity,
    /// The accuracy on each task, by its name.
    pub tasks: BTreeMap<String, Accuracy>,
    /// What it takes in f32, counted, for tokens that see an evaluation window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<Account>,
    /// How fast it is and what it takes in memory, in f32, where the recipe asks; of the dense model and of what was
    /// saved, measured in turns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
}

/// A mix that was tried.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Tried {
    /// Parameters of its model.
    pub parameters: usize,
    /// Loss on the calibration windows before any healing, in nats per token.
    pub loss: f64,
    /// Blocks that it removes.
    pub removed: usize,
    /// The share of the total that it keeps for residuals.
    pub residual_share: f64,
    /// Whether another mix is no larger and has no higher loss.
    #[serde(default)]
    pub beaten: bool,
}

/// How each model goes on with a text, always by the likeliest token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Sample {
    /// The beginning.
    pub prompt: String,
    /// What the dense model makes of it.
    pub dense: String,
    /// What the folded model makes of it before it is healed, where it is.
    pub folded: Option<String>,
    /// What the compressed model makes of it.
    pub compressed: String,
}

/// Another compression of the same model, evaluated alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Other {
    /// The directory that it was written to.
    pub out: PathBuf,
    /// Blocks that run.
    pub blocks: usize,
    /// Parameters; what depths share counts once.
    pub parameters: usize,
    /// Loss on the evaluation windows, in nats per token.
    pub mean_nll: f64,
    /// Whether it was healed.
    pub healed: bool,
}

/// What was written, or is about to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SavedRecord {
    pub directory: PathBuf,
    pub tensor_bytes: u64,
    pub weights_sha256: String,
    /// SHA-256 of the model card that was written with it.
    pub card_sha256: String,
}

impl Report {
    /// Reads a report.
    ///
    /// # Errors
    /// [`Error::Report`] for text that is none.
    pub fn from_json(json: &str) -> Result<Self> {
        serde_json::from_str(json).map_err(|error| Error::Report(error.to_string()))
    }

    /// The report as JSON text: its fields, and as `comparison` its rows of before and after.
    ///
    /// # Errors
    /// None in practice: every report can be written.
    pub fn to_json(&self) -> Result<String> {
        #[derive(Serialize)]
        struct WithRows<'a> {
            #[serde(flatten)]
            report: &'a Report,
            comparison: Vec<Row>,
        }
        let with_rows = WithRows { report: self, comparison: self.comparison() };
        serde_json::to_string_pretty(&with_rows).map_err(|error| Error::Report(error.to_string()))
    }

    /// By how much the loss is above that of the dense model, in nats per token.
    #[must_use]
    pub fn nll_increase(&self) -> f64 {
        self.compressed.perplexity.mean_nll - self.dense.perplexity.mean_nll
    }
}
