//! Block Influence.

use std::time::Instant;

use candle_core::{D, DType, Tensor};

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
        // The lengths of a block's output are those of the next one's input.
        let mut lengths: Vec<Option<Tensor>> = vec![None; windows.len()];
        sweep_all(source, windows, self.method(), observer, &mut |window, x, y| {
            let (Some(row), Some(kept)) = (by_window.get_mut(window), lengths.get_mut(window)) else {
                return Ok(());
            };
            let x_norms = kept.take().map_or_else(|| norms(x), Ok)?;
            let y_norms = norms(y)?;
            let cosines = (dots(x, y)? / (x_norms * &y_norms)?)?;
            row.push(1.0 - f64::from(cosines.mean_all()?.to_scalar::<f32>()?));
            *kept = Some(y_norms);
            Ok(())
        })?;
        let runs = (windows.len() * source.architecture().depth()) as f64;
        Ok(Scores::of_windows(self.method(), windows, &by_window)?.costing(start, runs))
    }
}

/// The inner product of every token's two vectors, `(batch, seq)`.
pub(super) fn dots(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok((x.to_dtype(DType::F32)? * y.to_dtype(DType::F32)?)?.sum(D::Minus1)?)
}

/// The length of every token's vector, `(batch, seq)`; at least 1e-8, so that the cosine with a zero vector (the
/// embedding of a padding token) is 0, as in PyTorch.
pub(super) fn norms(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::F32)?.sqr()?.sum(D::Minus1)?.sqrt()?.maximum(1e-8)?)
}
