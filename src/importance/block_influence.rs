//! Block Influence.

use std::time::Instant;

use candle_core::{D, DType, Tensor};

use super::{Importance, Scores};
use crate::data::Windows;
use crate::error::Result;
use crate::model::Decoder;
use crate::progress::{self, Observer};

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
        let start = Instant::now();
        let pass = decoder.pass(0, windows.seq_len())?;
        let mut by_window = Vec::with_capacity(windows.len());
        progress::steps(self.method(), windows.len(), observer, |window| {
            let mut x = decoder.embed(&windows.tensor(window, decoder.device())?, &pass)?;
            let mut x_norms = norms(&x)?;
            let mut influences = Vec::with_capacity(decoder.depth());
            for index in 0..decoder.depth() {
                let y = decoder.run_block(index, &x, &pass)?;
                let y_norms = norms(&y)?;
                let cosines = (dots(&x, &y)? / (x_norms * &y_norms)?)?;
                influences.push(1.0 - f64::from(cosines.mean_all()?.to_scalar::<f32>()?));
                (x, x_norms) = (y, y_norms);
            }
            by_window.push(influences);
            Ok(())
        })?;
        let runs = (windows.len() * decoder.depth()) as f64;
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
