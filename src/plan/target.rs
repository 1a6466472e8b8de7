//! How much is to be removed.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::Architecture;

/// How much is to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Target {
    /// This many blocks.
    Blocks(usize),
    /// This share of the blocks, from 0 to below 1; the number is rounded to the nearest, halves up.
    Rate(f64),
    /// As few blocks as leave at most this many parameters in the whole model; of scores of halves, as few halves as
    /// make up whole blocks.
    Parameters(usize),
}

impl Target {
    /// The number of blocks that have to go; of [`Parameters`](Self::Parameters) the number that is enough whichever
    /// they are: where blocks differ in size, or share, a plan may need fewer.
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
                let freed = arch.freed(|_, shape| shape.iter().product::<usize>() as u64);
                fewest(&freed, arch.parameter_count() as u64, budget as u64)
                    .map_err(|least| unmet(budget, least as usize))
            }
        }
    }
}

/// How many of `freed`, first to last, leave at most `most` of `total`. One has to stay: where all others are too few,
/// what they leave.
pub(crate) fn fewest(freed: &[u64], total: u64, most: u64) -> std::result::Result<usize, u64> {
    let (mut left, mut count) = (total, 0);
    for size in freed.iter().take(freed.len().saturating_sub(1)) {
        if left <= most {
            break;
        }
        left -= size;
        count += 1;
    }
    if left <= most { Ok(count) } else { Err(left) }
}

/// A number of parameters that removal cannot meet.
pub(super) fn unmet(budget: usize, least: usize) -> Error {
    let reason = "all blocks that may go are gone, and one has to stay";
    Error::Budget { what: "removal", unit: "parameters", budget, least, reason }
}
