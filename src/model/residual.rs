//! What a block adds to the residual stream.

use candle_core::Tensor;

use super::adapter::LowRank;
use super::architecture::{MlpKind, NormKind, QkNorm};
use super::block::{Block, Norm};
use super::cache::Slot;
use super::decoder::Pass;
use super::params::{NormSite, Projection};
use super::unit::Part;
use crate::error::{Error, Result};
use crate::ops::{AttentionShape, Matrix};

/// The product that a block's half ends with.
#[derive(Debug)]
pub(super) struct Ending {
    half: Part,
    pub(super) weight: Matrix,
    pub(super) bias: Option<Tensor>,
}

impl Ending {
    /// The state with what the product makes of `inside` added to it.
    pub(super) fn joined(&self, state: &Tensor, inside: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let product = pass.kernels.linear(inside, &self.weight, self.bias.as_ref())?;
        Ok(pass.kernels.add(state, &product)?)
    }
}

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
            Part::Attention => self.attended(x, &self.attention(x, pass, slot)?, pass),
            Part::Mlp => {
                let out = self.linear(Projection::Down, &self.mlp(x, pass)?, pass)?;
                Ok(pass.kernels.add(x, &self.norm(NormSite::MlpOut, &out, pass)?)?)
            }
        }
    }

    /// The half that computes last in `part`, where its product is added to the residual stream as it is: without a
    /// norm after it.
    pub(super) fn plain_ending(&self, part: Part) -> Option<Ending> {
        let (half, projection, norm) = match part {
            Part::Whole | Part::Mlp if self.has(Part::Mlp) => (Part::Mlp, Projection::Down, NormSite::MlpOut),
            Part::Whole | Part::Attention if self.has(Part::Attention) => {
                (Part::Attention, Projection::O, NormSite::AttentionOut)
            }
            _ => return None,
        };
        // What an adapter adds is no part of the one product that is left out.
        if !self.own.adapters[projection].is_empty() {
            return None;
        }
        let weight = self.weights.get(projection)?.clone();
        let bias = self.own.biases[projection].clone();
        self.own.norms[norm].is_none().then_some(Ending { half, weight, bias })
    }

    /// What `part` computes before its last product: the state that the product is added to, and what goes into it.
    pub(super) fn before(
        &self,
        ending: &Ending,
        part: Part,
        x: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let state = match (part, ending.half) {
            (Part::Whole, Part::Mlp) => self.forward_part(Part::Attention, x, pass, None)?,
            _ => x.clone(),
        };
        let inner = match ending.half {
            Part::Attention => self.attention(&state, pass, None)?,
            Part::Whole | Part::Mlp => self.mlp(&state, pass)?,
        };
        Ok((state, inner))
    }

    /// `x` and what the attention makes of what it has gathered.
    fn attended(&self, x: &Tensor, gathered: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let out = self.linear(Projection::O, gathered, pass)?;
        Ok(pass.kernels.add(x, &self.norm(NormSite::AttentionOut, &out, pass)?)?)
    }

    /// What goes into each of the block's projections for an input `x`, `(batch, seq, hidden)`; projections with one
    /// input together.
    pub(crate) fn projection_inputs(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<Vec<(Vec<Projection>, Tensor)>> {
        use Projection::{Down, Gate, K, O, Q, Up, V};
        let mut inputs = Vec::new();
        let mut state = x.clone();
        if self.has(Part::Attention) {
            let gathered = self.attention(x, pass, None)?;
            state = self.attended(x, &gathered, pass)?;
            inputs.push((vec![Q, K, V], self.norm(NormSite::AttentionIn, x, pass)?));
            inputs.push((vec![O], gathered));
        }
        if self.has(Part::Mlp) {
            inputs.push((vec![Gate, Up], self.norm(NormSite::MlpIn, &state, pass)?));
            inputs.push((vec![Down], self.mlp(&state, pass)?));
        }
        Ok(inputs)
    }

    /// What the attention gathers, before its output projection.
    fn attention(&self, x: &Tensor, pass: &Pass<'_>, slot: Option<&mut Slot>) -> Result<Tensor> {
        let arch = pass.architecture;
        let x = self.norm(NormSite::AttentionIn, x, pass)?;
        let [q, k, v] = self.linears([Projection::Q, Projection::K, Projection::V], &x, pass)?;
        let q = self.qk_norm(NormSite::Q, q, pass)?;
        let k = self.qk_norm(NormSite::K, k, pass)?;
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
        Ok(pass.kernels.attention(&q, &k, &v, shape)?)
    }

    /// What the MLP computes before its way down: `(batch, seq, intermediate)`.
    fn mlp(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let arch = pass.architecture;
        let x = self.norm(NormSite::MlpIn, x, pass)?;
        Ok(match arch.mlp {
            MlpKind::Gated => {
                let [up, gate] = self.linears([Projection::Up, Projection::Gate], &x, pass)?;
                pass.kernels.gated(arch.activation, &gate, &up)?
            }
            MlpKind::Plain => {
                pass.kernels.activation(arch.activation, &self.linear(Projection::Up, &x, pass)?)?
            }
        })
    }

    fn linear(&self, projection: Projection, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let [y] = self.linears([projection], x, pass)?;
        Ok(y)
    }

    /// What projections make of one input: `(batch, seq, out)` each.
    fn linears<const N: usize>(
        &self,
        projections: [Projection; N],
        x: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<[Tensor; N]> {
        let map = |&projection: &Projection| {
            let weight = self.weights.get(projection).ok_or_else(|| {
                Error::config("model_type", format!("block {} has no {}", self.own.origin, projection.name()))
            })?;
            let is_plain = self.own.adapters[projection].is_empty();
            Ok((weight, self.own.biases[projection].as_ref().filter(|_| is_plain)))
        };
        let maps = projections.iter().map(map).collect::<Result<Vec<_>>>()?;
        let products = projections.into_iter().zip(pass.kernels.linears(x, &maps)?);
        let results = products.map(|(projection, y)| self.adapted(projection, x, y, pass));
        <[Tensor; N]>::try_from(results.collect::<Result<Vec<_>>>()?).map_err(|results| {
            candle_core::Error::Msg(format!("{} results of {N} projections", results.len())).into()
        })
    }

    /// A projection's product with what its adapter does to it, and the bias, which comes after that.
    fn adapted(
        &self,
        projection: Projection,
        x: &Tensor,
        product: Tensor,
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        let (kernels, adapter) = (pass.kernels, &self.own.adapters[projection]);
        if adapter.is_empty() {
            return Ok(product);
        }
        let bias = self.own.biases[projection].as_ref();
        let y = match &adapter.scale {
            Some(scale) => kernels.scale(&product, scale)?,
            None => product,
        };
        Ok(match (&adapter.low_rank, bias) {
            (Some(LowRank { a, b }), _) => {
                kernels.add(&y, &kernels.linear(&kernels.linear(x, a, None)?, b, bias)?)?
            }
            (None, Some(bias)) => y.broadcast_add(bias)?,
            (None, None) => y,
        })
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
