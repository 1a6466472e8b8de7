//! The stages by name.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A stage of the pipeline. An observer hears of it as `compress: ` and its name, with the stages of the work itself
/// inside of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Stage {
    /// How much each block matters.
    Score,
    /// What goes and what is shared.
    Plan,
    /// The plan applied. It follows from the plan and is not kept.
    Fold,
    /// The small fine-tune.
    Heal,
    /// Losses and accuracies, and the quality gate.
    Evaluate,
    /// The checkpoint.
    Save,
}

impl Stage {
    /// All stages, in their order.
    pub const ALL: [Self; 6] = [Self::Score, Self::Plan, Self::Fold, Self::Heal, Self::Evaluate, Self::Save];

    /// The stage's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Score => "score",
            Self::Plan => "plan",
            Self::Fold => "fold",
            Self::Heal => "heal",
            Self::Evaluate => "evaluate",
            Self::Save => "save",
        }
    }

    /// What an observer hears.
    #[must_use]
    pub fn observed(self) -> &'static str {
        match self {
            Self::Score => "compress: score",
            Self::Plan => "compress: plan",
            Self::Fold => "compress: fold",
            Self::Heal => "compress: heal",
            Self::Evaluate => "compress: evaluate",
            Self::Save => "compress: save",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
