//! Block Influence.

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
        let pass = decoder.pass(0, windows.seq_len())?;
        let mut cosines = vec![0.0f64; decoder.depth()];
        progress::steps(self.method(), windows.len(), observer, |window| {
            let mut x = decoder.embed(&windows.tensor(window, decoder.device())?, &pass)?;
            let mut x_norms = norms(&x)?;
            for (index, sum) in cosines.iter_mut().enumerate() {
                let y = decoder.run_block(index, &x, &pass)?;
                let y_norms = norms(&y)?;
                let dots = (x.to_dtype(DType::F32)? * y.to_dtype(DType::F32)?)?.sum(D::Minus1)?;
                let cosine = (dots / (x_norms * &y_norms)?)?;
                *sum += f64::from(cosine.mean_all()?.to_scalar::<f32>()?);
                (x, x_norms) = (y, y_norms);
            }
            Ok(())
        })?;
        let count = windows.len() as f64;
        Scores::new(self.method(), windows, cosines.into_iter().map(|sum| 1.0 - sum / count).collect())
    }
}

/// The length of every token's vector, `(batch, seq)`.
fn norms(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::F32)?.sqr()?.sum(D::Minus1)?.sqrt()?)
}
