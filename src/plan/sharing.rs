//! Which blocks share matrices, whose matrices these are, and what each block keeps for itself.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::{Architecture, Part, Projection, StoredTypes, Unit};

/// Which of the blocks that stay share their matrices, as it is asked for. Blocks go by their index in the original
/// model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Groups {
    /// Blocks that follow one another among those that stay, `size` at a time; the last group may have fewer.
    Consecutive {
        /// Blocks in a group.
        size: usize,
        /// Only blocks from the first to the last of these.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        within: Option<(usize, usize)>,
    },
    /// These blocks, group by group.
    Explicit(Vec<Vec<usize>>),
    /// Neighbours whose tying costs the least loss, one after the other, until the whole model is as small as that.
    ///
    /// Costs are those of matrices and norms alone: scales and residuals are fitted afterwards, and groups that were chosen
    /// with them could be others. Each cost is measured with all earlier ties in place, but measured again after a tie
    /// only where it is the lowest that is known: a tie that another has made cheaper is overlooked until then.
    Budget {
        /// What the model may take.
        budget: Budget,
        /// Blocks in the largest group, where there is a limit; with one, a budget may be out of reach.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        largest: Option<usize>,
    },
}

/// What a whole model may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Budget {
    /// Parameters, each shared one counted once.
    Parameters(usize),
    /// Bytes of all tensors, in the types in which they are stored, each shared one counted once.
    Bytes(u64),
}

/// Whose matrices a group shares, as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Donor {
    /// Those of its first block.
    First,
    /// The mean of all its blocks' matrices.
    #[default]
    Mean,
    /// Whichever of the mean and its blocks costs the least loss on calibration windows, before scales and residuals make
    /// up for what they can: with them another donor could be the best.
    Best,
}

/// Whose matrices a group shares, as it was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Matrices {
    /// Those of this block.
    Block(usize),
    /// The mean of all its blocks' matrices.
    Mean,
}

/// Blocks that share their matrices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// The blocks, two or more, ascending.
    pub blocks: Vec<usize>,
    /// What they share.
    pub donor: Matrices,
    /// What tying them costs in nats per token on the calibration windows, with all that was decided before in place and
    /// without scales and residuals; of a group that grew, the sum of its steps. Absent where nothing was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
    /// What every donor that was tried would cost, the cheapest first; of a group that grew, at its last step. Donors with
    /// which the loss was not finite are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tried: Vec<(Matrices, f64)>,
}

/// What every block of a group keeps for itself. Biases are always its own.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Own {
    /// The gains (and biases) of its norms.
    pub norms: bool,
    /// A factor for each output of each projection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scales: Option<ScaleStart>,
    /// A residual of low rank for each projection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual: Option<Residual>,
}

impl Default for Own {
    /// Norms alone.
    fn default() -> Self {
        Self { norms: true, scales: None, residual: None }
    }
}

/// What scales are before any training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ScaleStart {
    /// 1: the shared matrix as it is.
    Ones,
    /// The least-squares fit to the original block's outputs on calibration windows.
    LeastSquares,
}

/// A low-rank residual on every projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Residual {
    /// How high its ranks are.
    pub ranks: Ranks,
    /// What it is before any training.
    pub start: ResidualStart,
}

/// The ranks of residuals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Ranks {
    /// The same for every projection, or as high as a smaller projection allows.
    Uniform(usize),
    /// As many parameters in all, each unit of rank going where it removes the most error for each parameter.
    Parameters(usize),
}

/// What a residual is before any training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ResidualStart {
    /// The truncated singular value decomposition of what the shared matrix lacks: least error of the matrix.
    Svd,
    /// The same, whitened by the second moment of the inputs: least error of the outputs on calibration windows.
    Whitened,
}

/// The ranks of the residuals that each block has, by its index in the original model.
pub type RankTable = BTreeMap<usize, BTreeMap<Projection, usize>>;

/// All that a plan says about sharing: what was asked for, and what was decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Sharing {
    /// The groups that were asked for.
    pub asked: Groups,
    /// The donors that were asked for.
    pub donor: Donor,
    /// What every block of a group keeps for itself.
    pub own: Own,
    /// The groups.
    pub groups: Vec<Group>,
    /// The ranks of residuals.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ranks: RankTable,
    /// What was measured on, where anything was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Calibration>,
}

/// The windows that something was measured on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Calibration {
    /// Number of windows.
    pub windows: usize,
    /// Tokens in each window.
    pub seq_len: usize,
    /// Whether each window began with the begin-of-text token.
    pub bos: bool,
    /// Whether special tokens that the text writes out were read as any other characters.
    #[serde(default)]
    pub split_special_tokens: bool,
    /// Whether so many tokens are the unknown one that they may decide the loss: [`Windows::has_many_unknown`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub many_unknown: bool,
    /// SHA-256 of the text.
    pub text_sha256: String,
}

impl From<&Windows> for Calibration {
    fn from(windows: &Windows) -> Self {
        Self {
            windows: windows.len(),
            seq_len: windows.seq_len(),
            bos: windows.bos(),
            split_special_tokens: windows.split_special_tokens(),
            many_unknown: windows.has_many_unknown(),
            text_sha256: windows.text_sha256().into(),
        }
    }
}

impl fmt::Display for Matrices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block(block) => write!(f, "those of block {block}"),
            Self::Mean => f.write_str("their mean"),
        }
    }
}

impl fmt::Display for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.norms { "norms of their own" } else { "no norms of their own" })?;
        if self.scales.is_some() {
            f.write_str(", scales")?;
        }
        match self.residual.map(|residual| residual.ranks) {
            Some(Ranks::Uniform(rank)) => write!(f, ", residuals of rank {rank}"),
            Some(Ranks::Parameters(count)) => write!(f, ", residuals of up to {count} parameters in all"),
            None => Ok(()),
        }
    }
}

impl Budget {
    /// The most that a model may take.
    pub(crate) fn limit(self) -> usize {
        match self {
            Self::Parameters(count) => count,
            Self::Bytes(bytes) => bytes as usize,
        }
    }

    /// This budget, or one that is as large.
    pub(crate) fn raised_to(self, size: usize) -> Self {
        match self {
            Self::Parameters(count) => Self::Parameters(count.max(size)),
            Self::Bytes(bytes) => Self::Bytes(bytes.max(size as u64)),
        }
    }

    /// What a model of this architecture takes, stored in these types, with so many parameters more.
    pub(crate) fn taken(self, arch: &Architecture, more: usize, types: &StoredTypes) -> usize {
        match self {
            Self::Parameters(_) => arch.parameter_count() + more,
            Self::Bytes(_) => types.bytes_of(arch) as usize + more * types.narrowest().size_in_bytes(),
        }
    }

    /// What it counts.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Parameters(_) => "parameters",
            Self::Bytes(_) => "bytes",
        }
    }
}

impl Groups {
    /// Blocks that follow one another among those that stay, `size` at a time.
    #[must_use]
    pub fn of(size: usize) -> Self {
        Self::Consecutive { size, within: None }
    }

    /// The same, of blocks of this range alone.
    #[must_use]
    pub fn of_within(size: usize, blocks: RangeInclusive<usize>) -> Self {
        Self::Consecutive { size, within: Some((*blocks.start(), *blocks.end())) }
    }

    /// Neighbours whose tying costs the least loss, until the whole model fits the budget; groups grow as they come.
    #[must_use]
    pub fn until(budget: Budget) -> Self {
        Self::Budget { budget, largest: None }
    }

    /// Fails for groups that tie nothing, whatever the model.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Consecutive { size, .. } if *size < 2 => {
                Err(Error::argument("group size", size, "at least 2"))
            }
            Self::Consecutive { within: Some((first, last)), .. } if first >= last => {
                let found = format!("{first} to {last}");
                Err(Error::argument(
                    "range of blocks",
                    found,
                    "two blocks or more, the first before the last",
                ))
            }
            Self::Budget { largest: Some(largest), .. } if *largest < 2 => {
                Err(Error::argument("largest group", largest, "at least 2"))
            }
            _ => Ok(()),
        }
    }

    /// Fails for blocks that a model of this depth does not have.
    pub(crate) fn check_depth(&self, depth: usize) -> Result<()> {
        let largest = match self {
            Self::Consecutive { within, .. } => within.map(|(_, last)| last),
            Self::Explicit(groups) => groups.iter().flatten().copied().find(|&block| block >= depth),
            Self::Budget { .. } => None,
        };
        match largest {
            Some(index) if index >= depth => Err(Error::NoSuchBlock { index, depth }),
            _ => Ok(()),
        }
    }

    /// The blocks of each group of two or more, of those that stay with the halves that each will have; `None` where
    /// they have to be measured. Blocks that lost a half share only with others that have the same one.
    pub(crate) fn decide(&self, kept: &[(usize, Part)]) -> Option<Vec<Vec<usize>>> {
        match self {
            Self::Budget { .. } => None,
            Self::Explicit(groups) => Some(groups.clone()),
            Self::Consecutive { size, within } => {
                let inside =
                    |(block, _): &&(usize, Part)| within.is_none_or(|(a, b)| (a..=b).contains(block));
                let blocks: Vec<(usize, Part)> = kept.iter().filter(inside).copied().collect();
                let runs = blocks.chunk_by(|a, b| a.1 == b.1);
                let groups = runs.flat_map(|run| run.chunks((*size).max(1))).filter(|group| group.len() > 1);
                Some(groups.map(|group| group.iter().map(|(block, _)| *block).collect()).collect())
            }
        }
    }
}

impl Ranks {
    /// Fails where no residual gets any rank; `unit` is what the smallest one of rank 1 has of parameters.
    pub(crate) fn check(self, unit: usize) -> Result<()> {
        match self {
            Self::Uniform(0) => Err(Error::argument("rank", 0, "at least 1")),
            Self::Parameters(count) if count < unit => {
                let expected = format!("at least {unit}, the parameters of one unit of rank");
                Err(Error::argument("parameters for ranks", count, expected))
            }
            _ => Ok(()),
        }
    }
}

/// The half that a block lost.
pub(super) fn lost(block: usize, halves: &[Unit]) -> Option<&Unit> {
    halves.iter().find(|unit| unit.block == block)
}

impl Own {
    /// Whether blocks get scales or residuals.
    #[must_use]
    pub fn adapts(&self) -> bool {
        self.scales.is_some() || self.residual.is_some()
    }

    /// Whether its starts depend on calibration windows.
    #[must_use]
    pub fn needs_windows(&self) -> bool {
        let whitened = self.residual.is_some_and(|residual| residual.start == ResidualStart::Whitened);
        whitened || self.scales == Some(ScaleStart::LeastSquares)
    }
}

impl Group {
    /// The blocks that do not use their own matrices, and so may need adapting.
    pub fn strangers(&self) -> impl Iterator<Item = usize> {
        self.blocks.iter().copied().filter(|&block| self.donor != Matrices::Block(block))
    }
}
