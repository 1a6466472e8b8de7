//! What a block adds to the residual stream.

use candle_core::Tensor;

use super::architecture::{MlpKind, NormKind, QkNorm};
use super::block::{Block, Norm};
use super::cache::Slot;
use super::decoder::Pass;
use super::params::{NormSite, Projection};
use super::unit::Part;
use crate::error::{Error, Result};
use crate::ops::AttentionShape;

impl Block {
    /// `x + attention(x)`, then `+ mlp(·)`: `(batch, seq, hidden)` in and out. A removed half adds nothing.
    pub(super) fn forward(&self, x: &Tensor, pass: &Pass<'_>, slot: Option<&mut Slot>) -> Result<Tensor> {
        let x = self.forward_part(Part::Attention, x, pass, slot)?;
        self.forward_part(Part::Mlp, &x, pass, None)
    }

    /// As [`forward`](Self::forward), of one half alone.
    pub(super) fn forward_part(
        &self,
        part: Part,
        x: &Tensor,
        pass: &Pass<'_>,
        slot: Option<&mut Slot>,
    ) -> Result<Tensor> {
        match part {
            Part::Whole => self.forward(x, pass, slot),
            _ if !self.has(part) => Ok(x.clone()),
            Part::Attention => Ok((x + self.attention(x, pass, slot)?)?),
            Part::Mlp => Ok((x + self.mlp(x, pass)?)?),
        }
    }

    /// What the attention adds to the residual stream.
    fn attention(&self, x: &Tensor, pass: &Pass<'_>, slot: Option<&mut Slot>) -> Result<Tensor> {
        let arch = pass.architecture;
        let x = self.norm(NormSite::AttentionIn, x, pass)?;
        let q = self.qk_norm(NormSite::Q, self.linear(Projection::Q, &x, pass)?, pass)?;
        let k = self.qk_norm(NormSite::K, self.linear(Projection::K, &x, pass)?, pass)?;
        let v = self.linear(Projection::V, &x, pass)?;
        let (q, k) = match pass.rope(&self.own.spec.rope) {
            Some((cos, sin)) => (
                pass.kernels.rope(&q, cos, sin, arch.head_dim)?,
                pass.kernels.rope(&k, cos, sin, arch.head_dim)?,
            ),
            None => (q, k),
        };
        let (k, v) = match slot {
            Some(slot) => slot.append(&k, &v)?,
            None => (k, v),
        };
        let shape = AttentionShape {
            heads: arch.num_attention_heads,
            kv_heads: arch.num_key_value_heads,
            head_dim: arch.head_dim,
            scale: arch.attention_scale,
            softcap: arch.attention_softcap,
            window: self.own.spec.window,
        };
        let mixed = pass.kernels.attention(&q, &k, &v, shape)?;
        self.norm(NormSite::AttentionOut, &self.linear(Projection::O, &mixed, pass)?, pass)
    }

    /// What the MLP adds to the residual stream.
    fn mlp(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let arch = pass.architecture;
        let x = self.norm(NormSite::MlpIn, x, pass)?;
        let up = self.linear(Projection::Up, &x, pass)?; // (batch, seq, intermediate)
        let inner = match arch.mlp {
            MlpKind::Gated => {
                let gate = self.linear(Projection::Gate, &x, pass)?;
                pass.kernels.gated(arch.activation, &gate, &up)?
            }
            MlpKind::Plain => pass.kernels.activation(arch.activation, &up)?,
        };
        self.norm(NormSite::MlpOut, &self.linear(Projection::Down, &inner, pass)?, pass)
    }

    fn linear(&self, projection: Projection, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let weight = self.weights.get(projection).ok_or_else(|| {
            Error::config("model_type", format!("block {} has no {}", self.own.origin, projection.name()))
        })?;
        Ok(pass.kernels.linear(x, weight, self.own.biases[projection].as_ref())?)
    }

    fn norm(&self, site: NormSite, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        match &self.own.norms[site] {
            Some(norm) => norm.apply(x, pass),
            None => Ok(x.clone()),
        }
    }

    fn qk_norm(&self, site: NormSite, x: Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        match (&self.own.norms[site], pass.architecture.qk_norm) {
            (Some(norm), Some(QkNorm::PerHead)) => {
                let (batch, seq, width) = x.dims3()?;
                let head_dim = pass.architecture.head_dim;
                let heads = x.reshape((batch, seq, width / head_dim, head_dim))?;
                Ok(norm.apply(&heads, pass)?.reshape((batch, seq, width))?)
            }
            (Some(norm), _) => norm.apply(&x, pass),
            (None, _) => Ok(x),
        }
    }
}

impl Norm {
    /// Normalises the last dimension of `x`.
    pub(super) fn apply(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let arch = pass.architecture;
        Ok(match (arch.norm, &self.bias) {
            (NormKind::Rms { unit_offset }, _) => {
                let offset = if unit_offset { 1.0 } else { 0.0 };
                pass.kernels.rms_norm(x, &self.gain, arch.norm_eps, offset)?
            }
            (NormKind::Layer, Some(bias)) => pass.kernels.layer_norm(x, &self.gain, bias, arch.norm_eps)?,
            (NormKind::Layer, None) => {
                pass.kernels.layer_norm(x, &self.gain, &self.gain.zeros_like()?, arch.norm_eps)?
            }
        })
    }
}
