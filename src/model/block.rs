//! A block: matrices that several depths may share, and what is a depth's own.

use std::sync::Arc;

use candle_core::Tensor;

use super::architecture::{Architecture, BlockSpec, MlpKind, NormKind, QkNorm};
use super::cache::Slot;
use super::decoder::Pass;
use super::params::{BlockParam, NormPart, NormSite, PerNormSite, PerProjection, Projection};
use crate::error::{Error, Result};
use crate::ops::AttentionShape;

/// One depth of a decoder.
#[derive(Debug, Clone)]
pub struct Block {
    /// The matrices; two depths share them where they hold the same `Arc`.
    pub weights: Arc<BlockWeights>,
    /// What this depth has for itself.
    pub own: PerDepth,
}

/// The matrices of a block, `(out, in)` each.
#[derive(Debug, Clone, Default)]
pub struct BlockWeights(PerProjection<Option<Tensor>>);

/// What a depth has for itself, whichever matrices it uses.
#[derive(Debug, Clone)]
pub struct PerDepth {
    /// The index that this block has in the original model.
    pub origin: usize,
    /// Its attention window and rotary embedding.
    pub spec: BlockSpec,
    /// Biases of the projections.
    pub biases: PerProjection<Option<Tensor>>,
    /// Norms, where the family has any.
    pub norms: PerNormSite<Option<Norm>>,
}

/// A normalisation's parameters, `(width)` each.
#[derive(Debug, Clone)]
pub struct Norm {
    /// The factor.
    pub gain: Tensor,
    /// The summand (LayerNorm only).
    pub bias: Option<Tensor>,
}

impl BlockWeights {
    /// A projection's matrix, `(out, in)`, where the family has that projection.
    #[must_use]
    pub fn get(&self, projection: Projection) -> Option<&Tensor> {
        self.0[projection].as_ref()
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

    pub(super) fn map(&self, mut tensor: impl FnMut(NormPart, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let gain = tensor(NormPart::Gain, &self.gain)?;
        let bias = self.bias.as_ref().map(|bias| tensor(NormPart::Bias, bias)).transpose()?;
        Ok(Self { gain, bias })
    }

    pub(super) fn params(&self) -> impl Iterator<Item = (NormPart, &Tensor)> {
        std::iter::once((NormPart::Gain, &self.gain))
            .chain(self.bias.as_ref().map(|bias| (NormPart::Bias, bias)))
    }

    /// A norm whose tensors `tensor` gives, with a bias where the kind has one.
    pub(super) fn build(kind: NormKind, mut tensor: impl FnMut(NormPart) -> Result<Tensor>) -> Result<Self> {
        let gain = tensor(NormPart::Gain)?;
        let bias = (kind == NormKind::Layer).then(|| tensor(NormPart::Bias)).transpose()?;
        Ok(Self { gain, bias })
    }
}

impl Block {
    /// A block whose tensors `tensor` gives, asked for in the order of [`Architecture::block_params`].
    pub(super) fn build(
        arch: &Architecture,
        origin: usize,
        spec: BlockSpec,
        mut tensor: impl FnMut(BlockParam, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut weights = BlockWeights::default();
        let mut own =
            PerDepth { origin, spec, biases: PerProjection::default(), norms: PerNormSite::default() };
        for (param, shape) in arch.block_params() {
            let value = tensor(param, &shape)?;
            match param {
                BlockParam::Weight(projection) => weights.0[projection] = Some(value),
                BlockParam::Bias(projection) => own.biases[projection] = Some(value),
                BlockParam::Norm(site, NormPart::Gain) => {
                    own.norms[site] = Some(Norm { gain: value, bias: None });
                }
                BlockParam::Norm(site, NormPart::Bias) => {
                    if let Some(norm) = &mut own.norms[site] {
                        norm.bias = Some(value);
                    }
                }
            }
        }
        Ok(Self { weights: Arc::new(weights), own })
    }

    /// The block with its tensors replaced; with `shared`, its matrices are those and only its own are mapped.
    pub(super) fn map(
        &self,
        shared: Option<&Arc<BlockWeights>>,
        mut tensor: impl FnMut(BlockParam, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut mapped = self.clone();
        mapped.weights = match shared {
            Some(weights) => Arc::clone(weights),
            None => {
                let mut weights = BlockWeights::default();
                for projection in Projection::ALL {
                    let value = self.weights.get(projection);
                    let value = value.map(|value| tensor(BlockParam::Weight(projection), value));
                    weights.0[projection] = value.transpose()?;
                }
                Arc::new(weights)
            }
        };
        for projection in Projection::ALL {
            if let Some(bias) = &mut mapped.own.biases[projection] {
                *bias = tensor(BlockParam::Bias(projection), bias)?;
            }
        }
        for site in NormSite::ALL {
            if let Some(norm) = &mut mapped.own.norms[site] {
                *norm = norm.map(|part, value| tensor(BlockParam::Norm(site, part), value))?;
            }
        }
        Ok(mapped)
    }

    /// Every tensor of the block, shared or own.
    pub fn params(&self) -> impl Iterator<Item = (BlockParam, &Tensor)> {
        let weights = Projection::ALL
            .into_iter()
            .filter_map(|projection| Some((BlockParam::Weight(projection), self.weights.get(projection)?)));
        let biases = Projection::ALL.into_iter().filter_map(|projection| {
            Some((BlockParam::Bias(projection), self.own.biases[projection].as_ref()?))
        });
        let norms = NormSite::ALL.into_iter().filter_map(|site| Some((site, self.own.norms[site].as_ref()?)));
        let norms = norms.flat_map(|(site, norm)| {
            norm.params().map(move |(part, value)| (BlockParam::Norm(site, part), value))
        });
        weights.chain(biases).chain(norms)
    }

    /// `x + attention(x)`, then `+ mlp(·)`: `(batch, seq, hidden)` in and out.
    pub(super) fn forward(&self, x: &Tensor, pass: &Pass<'_>, slot: Option<&mut Slot>) -> Result<Tensor> {
        let x = (x + self.attention(x, pass, slot)?)?;
        Ok((&x + self.mlp(&x, pass)?)?)
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
