//! What a compression found, in numbers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::recipe::Recipe;
use super::stage::Stage;
use crate::error::{Error, Result};
use crate::eval::{Accuracy, Latency, Perplexity};
use crate::heal::HealReport;
use crate::plan::{Calibration, Plan};

/// All numbers of before and after, and where they come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Report {
    /// The version of the crate.
    pub version: String,
    /// What was asked for.
    pub recipe: Recipe,
    /// SHA-256 of the dense model's weights.
    pub model_sha256: String,
    /// SHA-256 of the weights that were saved.
    pub saved_sha256: String,
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
    /// The mixes that no other beat, where several were tried; the smallest model first.
    pub mixes: Vec<Tried>,
    /// How the healing went.
    pub heal: Option<HealReport>,
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
    /// Seconds that this took.
    pub seconds: f64,
    /// The accuracy on each task, by its name.
    pub tasks: BTreeMap<String, Accuracy>,
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
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SavedRecord {
    pub directory: PathBuf,
    pub tensor_bytes: u64,
    /// Absent while it is hashed.
    pub weights_sha256: Option<String>,
}

impl Report {
    /// The report as JSON text.
    ///
    /// # Errors
    /// None in practice: every report can be written.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|error| Error::recipe("report", error.to_string()))
    }

    /// By how much the loss is above that of the dense model, in nats per token.
    #[must_use]
    pub fn nll_increase(&self) -> f64 {
        self.compressed.perplexity.mean_nll - self.dense.perplexity.mean_nll
    }
}
