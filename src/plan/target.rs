//! How much is to be removed.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::{Architecture, Part};

/// How much is to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Target {
    /// This many blocks.
    Blocks(usize),
    /// This share of the blocks, from 0 to below 1; the number is rounded to the nearest, halves up.
    Rate(f64),
    /// As few blocks as leave at most this many parameters in the whole model.
    Parameters(usize),
}

impl Target {
    /// The number of blocks that have to go.
    ///
    /// # Errors
    /// A target that no number of blocks meets.
    pub fn blocks(self, arch: &Architecture) -> Result<usize> {
        let depth = arch.depth();
        match self {
            Self::Blocks(count) if count < depth => Ok(count),
            Self::Blocks(count) => {
                Err(Error::argument("blocks to remove", count, format!("fewer than the {depth} there are")))
            }
            Self::Rate(rate) if (0.0..1.0).contains(&rate) => {
                // The product of 0.15 and 30 lies a hair below 4.5; the tolerance lets it round as it reads.
                let count = (rate * depth as f64 + 0.5 + 1e-9).floor() as usize;
                if count < depth {
                    return Ok(count);
                }
                let expected = format!("a rate that leaves one of the {depth} blocks");
                Err(Error::argument("removal rate", rate, expected))
            }
            Self::Rate(rate) => Err(Error::argument("removal rate", rate, "at least 0 and below 1")),
            Self::Parameters(budget) => {
                let total = arch.parameter_count();
                let block = arch.parameters_of(Part::Whole);
                let count = total.saturating_sub(budget).div_ceil(block.max(1));
                if count < depth {
                    return Ok(count);
                }
                let least = total - (depth - 1) * block;
                Err(Error::argument(
                    "parameter budget",
                    budget,
                    format!("at least {least}, with one block left"),
                ))
            }
        }
    }
}
