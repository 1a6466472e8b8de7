//! How much each block matters: one file a method, behind one trait.

mod block_influence;

pub use block_influence::BlockInfluence;

use serde::{Deserialize, Serialize};

use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::progress::Observer;

/// A method that scores the blocks of a decoder on calibration windows.
///
/// ```
/// use foldgpt::importance::{Importance, Scores};
/// use foldgpt::{Decoder, Observer, Result, Windows};
///
/// /// Says that later blocks matter more.
/// struct Depth;
///
/// impl Importance for Depth {
///     fn method(&self) -> &'static str {
///         "depth"
///     }
///     fn score(&self, decoder: &Decoder, windows: &Windows, _: &mut dyn Observer) -> Result<Scores> {
///         Scores::new(self.method(), windows, (0..decoder.depth()).map(|index| index as f64).collect())
///     }
/// }
/// ```
pub trait Importance {
    /// The method's name, as the command line and results spell it.
    fn method(&self) -> &'static str;

    /// Scores every block; the least important go first. Weights are read, never written.
    ///
    /// # Errors
    /// A failed computation, a score that is not finite, or a cancelling observer.
    fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores>;
}

/// What a method found, and on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Scores {
    /// The method's name.
    pub method: String,
    /// Number of calibration windows.
    pub windows: usize,
    /// Tokens in each window.
    pub seq_len: usize,
    /// Whether each window began with the begin-of-text token.
    pub bos: bool,
    /// SHA-256 of the calibration text.
    pub text_sha256: String,
    /// One score a block, first to last.
    pub blocks: Vec<BlockScore>,
}

/// A block's score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BlockScore {
    /// The block's index in the scored model, from 0.
    pub index: usize,
    /// How much it matters, in the method's own unit; higher matters more.
    pub importance: f64,
}

impl Scores {
    /// Scores by `method` on `windows`: `importance[i]` is block i's.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for a score that is NaN or infinite.
    pub fn new(method: &str, windows: &Windows, importance: Vec<f64>) -> Result<Self> {
        let blocks = importance.into_iter().enumerate().map(|(index, importance)| {
            if importance.is_finite() {
                return Ok(BlockScore { index, importance });
            }
            Err(Error::NotFinite { what: format!("{method} of block {index}"), value: importance })
        });
        Ok(Self {
            method: method.into(),
            windows: windows.len(),
            seq_len: windows.seq_len(),
            bos: windows.bos(),
            text_sha256: windows.text_sha256().into(),
            blocks: blocks.collect::<Result<_>>()?,
        })
    }

    /// Block indices from the least important to the most; of equals the later block comes first.
    #[must_use]
    pub fn ascending(&self) -> Vec<usize> {
        let mut order: Vec<&BlockScore> = self.blocks.iter().rev().collect();
        order.sort_by(|a, b| a.importance.total_cmp(&b.importance));
        order.into_iter().map(|block| block.index).collect()
    }
}
