//! Block Influence.

use std::time::Instant;

use candle_core::Tensor;

use super::sweep::sweep_all;
use super::{Importance, Scores};
use crate::checkpoint::StreamedDecoder;
use crate::data::Windows;
use crate::error::Result;
use crate::model::{BlockSource, Decoder};
use crate::progress::Observer;

/// Block Influence: `1 − E[cos(x, block(x))]`, the mean over all tokens of one forward pass.
///
/// The last block's output is taken before the final norm. From ShortGPT (Men et al., 2024, arXiv 2403.03853).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockInfluence;

impl Importance for BlockInfluence {
    fn method(&self) -> &'static str {
        "block-influence"
    }

    fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores> {
        self.measure(decoder, windows, observer)
    }

    fn score_streamed(
        &self,
        model: &StreamedDecoder<'_>,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Scores> {
        self.measure(model, windows, observer)
    }
}

impl BlockInfluence {
    fn measure(
        self,
        source: &dyn BlockSource,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Scores> {
        let start = Instant::now();
        let mut by_window: Vec<Vec<f64>> = vec![Vec::new(); windows.len()];
        let kernels = source.kernels();
        let influence = |x: &Tensor, y: &Tensor| Ok(1.0 - kernels.mean_cosine(x, y)?);
        sweep_all(source, windows, self.method(), observer, &influence, &mut |window, influence| {
            if let Some(row) = by_window.get_mut(window) {
                row.push(influence);
            }
        })?;
        let runs = (windows.len() * source.architecture().depth()) as f64;
        Ok(Scores::of_windows(self.method(), windows, &by_window)?.costing(start, runs))
    }
}
