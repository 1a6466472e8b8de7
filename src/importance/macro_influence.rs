//! Macro Influence.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::Tensor;
use serde::Serialize;

use super::greedy::{Greedy, final_states};
use super::{Importance, Scores};
use crate::data::Windows;
use crate::error::Result;
use crate::model::{BlockSource, Decoder};
use crate::progress::Observer;

/// Macro Influence: `1 − E[cos(X, X without the block)]` on the last block's output, measured anew after each
/// removal.
///
/// From FuseGPT (Pei et al., 2024, arXiv 2411.14507).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct MacroInfluence {
    /// How many blocks to choose.
    pub remove: usize,
    /// Blocks that stay.
    pub protected: Vec<usize>,
    /// Where measured values are kept, and gone on from.
    #[serde(skip)]
    pub values_file: Option<PathBuf>,
}

impl Importance for MacroInfluence {
    fn method(&self) -> &'static str {
        "macro-influence"
    }

    fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores> {
        let start = Instant::now();
        let wholes = final_states(decoder, windows, observer)?;
        let before = start.elapsed().as_secs_f64();
        let greedy = Greedy {
            method: self.method(),
            remove: self.remove,
            kept: &self.protected,
            file: self.values_file.as_deref(),
        };
        let kernels = BlockSource::kernels(decoder);
        let mut scores = greedy.run(decoder, windows, observer, |removals, sets, report| {
            let leaf = |window: usize, _: &[u32], state: &Tensor| {
                let Some(whole) = wholes.get(window) else { return Ok(0.0) };
                Ok(1.0 - kernels.mean_cosine(whole, state)?)
            };
            removals.values(sets, &leaf, report)
        })?;
        scores.block_runs += (windows.len() * decoder.depth()) as f64;
        scores.seconds += before;
        scores.with_options(self)
    }
}
