//! From the last hidden state to the loss, and back.

use candle_core::{Tensor, Var};

use super::decoder::Decoder;
use crate::error::{Error, Result};
use crate::ops::{Head, HeadLoss, HeadWeights, Soft, TopTokens};

impl Decoder {
    /// The output projection.
    pub(crate) fn head(&self) -> Head<'_> {
        Head { weight: self.head_weight(), softcap: self.architecture.logit_softcap }
    }

    /// The losses at the head for states after the last block, `(rows, hidden)`, before the final norm, with their
    /// gradients with respect to the normalised states and, where wanted, to the head.
    pub(crate) fn head_loss(
        &self,
        normalised: &Tensor,
        targets: &[u32],
        soft: Option<Soft<'_>>,
        weights: HeadWeights,
        wants_weight: bool,
    ) -> Result<HeadLoss> {
        Ok(self.kernels.head_loss(normalised, self.head(), targets, soft, weights, wants_weight)?)
    }

    /// The likeliest next tokens for normalised states, `(rows, hidden)`.
    pub(crate) fn top_tokens(
        &self,
        normalised: &Tensor,
        count: usize,
        temperature: f64,
    ) -> Result<TopTokens> {
        Ok(self.kernels.top_tokens(normalised, self.head(), count, temperature)?)
    }

    /// Runs `f` on `x` and takes `upstream`, the gradient of `f`'s output, back through it: the gradients of `x` and
    /// of all of `wanted` that `f` uses.
    pub(crate) fn vjp(
        &self,
        x: &Tensor,
        upstream: &Tensor,
        wanted: impl IntoIterator<Item = Tensor>,
        f: impl FnOnce(&Self, &Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Vec<Option<Tensor>>)> {
        let x = Var::from_tensor(x)?;
        let y = f(self, x.as_tensor())?;
        let mut gradients = self.kernels.inner(&y, upstream)?.backward()?;
        let missing = || Error::NoGradient { tensor: "the input of a block or of the final norm".into() };
        let through = gradients.remove(x.as_tensor()).ok_or_else(missing)?;
        Ok((through, wanted.into_iter().map(|tensor| gradients.remove(&tensor)).collect()))
    }

    /// As [`vjp`](Self::vjp), of the embedding of `(batch, seq)` ids.
    pub(crate) fn embedding_vjp(
        &self,
        ids: &Tensor,
        upstream: &Tensor,
        wanted: impl IntoIterator<Item = Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let pass = self.pass(0, ids.dims2()?.1)?;
        let mut gradients = self.kernels.inner(&self.embed(ids, &pass)?, upstream)?.backward()?;
        Ok(wanted.into_iter().map(|tensor| gradients.remove(&tensor)).collect())
    }
}
