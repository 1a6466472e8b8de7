//! From the last hidden state to the loss, and back to what is trained.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::adapter::LowRank;
use super::decoder::{Decoder, Pass};
use super::params::Projection;
use super::residual::Ending;
use super::unit::Part;
use crate::error::{Error, Result};
use crate::ops::{Head, HeadLoss, HeadWeights, Soft, TopTokens};

impl Decoder {
    /// The output projection; fails where it is quantised.
    pub(crate) fn head(&self) -> Result<Head<'_>> {
        let matrix = self.head_weight();
        let weight = matrix.as_tensor().ok_or_else(|| Error::quantized("the head", matrix))?;
        Ok(Head { weight, softcap: self.architecture.logit_softcap })
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
        Ok(self.kernels.head_loss(normalised, self.head()?, targets, soft, weights, wants_weight)?)
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
        Ok(self.kernels.top_tokens(normalised, self.head()?, count, temperature)?)
    }

    /// Takes `upstream`, the gradient of a block's output, back through the block: the gradients of its input `x`,
    /// where it is wanted, and of all of `wanted` that it uses.
    ///
    /// Where the block ends with a frozen product that joins the residual stream as it is, or by a frozen scale, that
    /// product is never made: its part in the gradient is `upstream` taken back through its matrix. The gradient of a
    /// scale needs what it scales.
    pub(crate) fn block_vjp(
        &self,
        index: usize,
        (x, wants_input): (&Tensor, bool),
        upstream: &Tensor,
        wanted: impl IntoIterator<Item = Tensor>,
        pass: &Pass<'_>,
    ) -> Result<(Option<Tensor>, Vec<Option<Tensor>>)> {
        let (block, kernels) = (self.block(index)?, self.kernels);
        let x = if wants_input { Var::from_tensor(x)?.into_inner() } else { x.detach() };
        let last = if block.has(Part::Mlp) { Projection::Down } else { Projection::O };
        let mut bare = block.clone();
        let adapter = std::mem::take(&mut bare.own.adapters[last]);
        let frozen = |ending: &Ending| {
            let bias = ending.bias.as_ref().is_some_and(Tensor::track_op);
            !ending.weight.track_op() && !bias && !adapter.scale.as_ref().is_some_and(Tensor::track_op)
        };
        let total = match bare.plain_ending(Part::Whole).filter(frozen) {
            Some(ending) => {
                let (state, inside) = bare.before(&ending, Part::Whole, &x, pass)?;
                let scaled = match &adapter.scale {
                    Some(scale) => kernels.scale(upstream, scale)?,
                    None => upstream.clone(),
                };
                let into = kernels.linear_back(&scaled, &ending.weight)?;
                let mut total = (kernels.inner(&state, upstream)? + kernels.inner(&inside, &into)?)?;
                if let Some(LowRank { a, b }) = &adapter.low_rank {
                    let residual = kernels.linear(&kernels.linear(&inside, a, None)?, b, None)?;
                    total = (total + kernels.inner(&residual, upstream)?)?;
                }
                total
            }
            None => kernels.inner(&block.forward(&x, pass, None)?, upstream)?,
        };
        let mut gradients = total.backward()?;
        let through = wants_input.then(|| of_input(&mut gradients, &x)).transpose()?;
        Ok((through, of_wanted(&mut gradients, wanted)))
    }

    /// As [`block_vjp`](Self::block_vjp), of the final norm: `(rows, hidden)`.
    pub(crate) fn final_norm_vjp(
        &self,
        x: &Tensor,
        upstream: &Tensor,
        wanted: impl IntoIterator<Item = Tensor>,
    ) -> Result<(Tensor, Vec<Option<Tensor>>)> {
        let x = Var::from_tensor(x)?;
        let mut gradients = self.kernels.inner(&self.normalised(x.as_tensor())?, upstream)?.backward()?;
        Ok((of_input(&mut gradients, x.as_tensor())?, of_wanted(&mut gradients, wanted)))
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
        Ok(of_wanted(&mut gradients, wanted))
    }
}

/// The gradient with respect to an input, which has to be there.
fn of_input(gradients: &mut GradStore, x: &Tensor) -> Result<Tensor> {
    let missing = || Error::NoGradient { tensor: "the input of a block or of the final norm".into() };
    gradients.remove(x).ok_or_else(missing)
}

/// The gradients with respect to all of `wanted` that the result depends on.
fn of_wanted(gradients: &mut GradStore, wanted: impl IntoIterator<Item = Tensor>) -> Vec<Option<Tensor>> {
    wanted.into_iter().map(|tensor| gradients.remove(&tensor)).collect()
}
