//! The residual parts that a decoder is a chain of.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A part of a decoder that adds to the residual stream, and that can be gated or removed by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Unit {
    /// The block's index, from 0.
    pub block: usize,
    /// Which part of the block.
    #[serde(default, skip_serializing_if = "Part::is_whole")]
    pub part: Part,
}

/// A whole block, or one of its halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// Attention and MLP.
    #[default]
    Whole,
    /// The attention alone.
    Attention,
    /// The MLP alone.
    Mlp,
}

impl Part {
    #[allow(clippy::trivially_copy_pass_by_ref)] // serde asks with a reference
    pub(crate) fn is_whole(&self) -> bool {
        *self == Self::Whole
    }
}

impl Unit {
    /// A whole block.
    #[must_use]
    pub fn whole(block: usize) -> Self {
        Self { block, part: Part::Whole }
    }

    /// All blocks of a decoder of this depth, first to last.
    #[must_use]
    pub fn blocks(depth: usize) -> Vec<Self> {
        (0..depth).map(Self::whole).collect()
    }

    /// The attention and the MLP of every block of a decoder of this depth, in the order of computation.
    #[must_use]
    pub fn halves(depth: usize) -> Vec<Self> {
        let halves = |block| [Part::Attention, Part::Mlp].map(|part| Self { block, part });
        (0..depth).flat_map(halves).collect()
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.part {
            Part::Whole => write!(f, "{}", self.block),
            Part::Attention => write!(f, "{}a", self.block),
            Part::Mlp => write!(f, "{}m", self.block),
        }
    }
}
