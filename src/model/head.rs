//! From the last hidden state to losses and likeliest tokens.

use candle_core::Tensor;

use super::decoder::Decoder;
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
}
