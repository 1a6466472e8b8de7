//! From the last hidden state to the loss, and back to what is trained.

use candle_core::{Tensor, Var};

use super::adapter::LowRank;
use super::decoder::{Decoder, Pass};
use super::params::Projection;
use super::residual::Ending;
use super::unit::Part;
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

    /// The summed loss of one window in nats, from its states after the last block, `(1, seq, hidden)`; `targets` are its
    /// tokens but the first.
    pub(crate) fn window_nll(&self, states: &Tensor, targets: &[u32]) -> Result<f64> {
        let losses = self.nll(&states.squeeze(0)?.narrow(0, 0, targets.len())?, targets)?;
        Ok(losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum())
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

    /// Takes `upstream`, the gradient of a block's output, back through the block: the gradients of its input `x` and
    /// of all of `wanted` that it uses.
    ///
    /// Where the block ends with a frozen product that joins the residual stream as it is, that product is never made:
    /// its part in the gradient is `upstream` taken back through its matrix.
    pub(crate) fn block_vjp(
        &self,
        index: usize,
        x: &Tensor,
        upstream: &Tensor,
        wanted: impl IntoIterator<Item = Tensor>,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Vec<Option<Tensor>>)> {
        let (block, kernels) = (self.block(index)?, self.kernels);
        let x = Var::from_tensor(x)?;
        let last = if block.has(Part::Mlp) { Projection::Down } else { Projection::O };
        let mut bare = block.clone();
        let adapter = std::mem::take(&mut bare.own.adapters[last]);
        let frozen = |ending: &Ending| {
            let bias = ending.bias.as_ref().is_some_and(Tensor::track_op);
            !ending.weight.track_op() && !bias && adapter.scale.is_none()
        };
        let total = match bare.plain_ending(Part::Whole).filter(frozen) {
            Some(ending) => {
                let (state, inside) = bare.before(&ending, Part::Whole, x.as_tensor(), pass)?;
                let into = kernels.linear_back(upstream, &ending.weight)?;
                let mut total = (kernels.inner(&state, upstream)? + kernels.inner(&inside, &into)?)?;
                if let Some(LowRank { a, b }) = &adapter.low_rank {
                    let residual = kernels.linear(&kernels.linear(&inside, a, None)?, b, None)?;
                    total = (total + kernels.inner(&residual, upstream)?)?;
                }
                total
            }
            None => kernels.inner(&block.forward(x.as_tensor(), pass, None)?, upstream)?,
        };
        through(&total, &x, wanted)
    }

    /// As [`block_vjp`](Self::block_vjp), of the final norm: `(rows, hidden)`.
    pub(crate) fn final_norm_vjp(
        &self,
        x: &Tensor,
        upstream: &Tensor,
        wanted: impl IntoIterator<Item = Tensor>,
    ) -> Result<(Tensor, Vec<Option<Tensor>>)> {
        let x = Var::from_tensor(x)?;
        through(&self.kernels.inner(&self.normalised(x.as_tensor())?, upstream)?, &x, wanted)
    }

    /// As [`block_vjp`](Self::block_vjp), of the embedding of `(batch, seq)` ids.
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

/// The gradients of `total` with respect to `x` and to all of `wanted` that it depends on.
fn through(
    total: &Tensor,
    x: &Var,
    wanted: impl IntoIterator<Item = Tensor>,
) -> Result<(Tensor, Vec<Option<Tensor>>)> {
    let mut gradients = total.backward()?;
    let missing = || Error::NoGradient { tensor: "the input of a block or of the final norm".into() };
    let through = gradients.remove(x.as_tensor()).ok_or_else(missing)?;
    Ok((through, wanted.into_iter().map(|tensor| gradients.remove(&tensor)).collect()))
}
