//! Whether a model is in memory while it is scored, or read from disk.

use std::fmt;

use candle_core::DType;

use super::{Footprint, Method, MethodOptions, with_overhead, without_overhead};
use crate::bytes::Bytes;
use crate::checkpoint::{Checkpoint, StreamOptions};
use crate::data::Windows;
use crate::error::{Error, Result};

/// Where a model's weights are while its blocks are scored; says so when it is printed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Residence {
    /// All in memory: [`Checkpoint::decoder`], [`Importance::score`](super::Importance::score).
    Memory {
        /// About how many bytes scoring takes.
        bytes: u64,
    },
    /// On disk: [`Checkpoint::streamed`], [`Importance::score_streamed`](super::Importance::score_streamed).
    Streamed {
        /// About how many bytes scoring takes at most.
        bytes: u64,
        /// With what the model is to be streamed for that.
        options: StreamOptions,
    },
}

impl Method {
    /// Where the weights of a model, with matrices of `dtype` on the CPU, are to be so that scoring with this method on
    /// these windows takes at most `most` bytes: in memory where that is enough, and else on disk.
    ///
    /// Counted are weights, states and activations; what the allocator keeps beside them and all else is taken for a
    /// sixteenth of that.
    ///
    /// # Errors
    /// [`Error::Memory`] where neither fits, or the method cannot read block after block.
    pub fn residence(
        self,
        checkpoint: &Checkpoint,
        dtype: DType,
        windows: &Windows,
        options: &MethodOptions,
        most: Bytes,
    ) -> Result<Residence> {
        let footprint = Footprint::new(checkpoint.architecture(), dtype, windows);
        let bytes = with_overhead(footprint.in_memory(checkpoint, footprint.kept(self, options)));
        if bytes <= most.0 {
            return Ok(Residence::Memory { bytes });
        }
        let refuse = |needed: u64, reason: String| Error::Memory {
            what: format!("scoring by {self}"),
            needed: Bytes(needed),
            limit: most,
            reason,
        };
        let mut checkpointing = options.clone();
        checkpointing.gates.gradient_checkpointing = true;
        checkpointing.coupling.gates.gradient_checkpointing = true;
        if footprint.kept(self, &checkpointing) < footprint.kept(self, options) {
            let reason = "gates keep all activations; with gradient checkpointing they would not";
            return Err(refuse(bytes, reason.into()));
        }
        if !self.streams() {
            let reason = format!("only {} can read block after block", Self::streaming());
            return Err(refuse(bytes, reason));
        }
        let least = with_overhead(footprint.streamed(checkpoint, self, options));
        let Some(spare) = most.0.checked_sub(least) else {
            let narrow = Footprint::new(checkpoint.architecture(), DType::BF16, windows);
            let bytes = with_overhead(narrow.streamed(checkpoint, self, options));
            let mut reason = "blocks are read one at a time already".to_owned();
            if bytes < least {
                reason = format!("{reason}; with matrices in bf16 it would take about {}", Bytes(bytes));
            }
            return Err(refuse(least, reason));
        };
        let (room, all) = (without_overhead(spare), footprint.states(self, options));
        let options = StreamOptions { state_bytes: (room < all).then_some(room), ..StreamOptions::default() };
        Ok(Residence::Streamed { bytes: least + with_overhead(room.min(all)), options })
    }
}

impl fmt::Display for Residence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { bytes } => write!(f, "the model is in memory, about {} in all", Bytes(*bytes)),
            Self::Streamed { bytes, options } => {
                write!(f, "blocks are read from disk one at a time, about {} in all", Bytes(*bytes))?;
                match options.state_bytes {
                    Some(room) => write!(f, ", states beyond {} in a scratch file", Bytes(room)),
                    None => Ok(()),
                }
            }
        }
    }
}
