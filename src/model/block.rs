//! A block: matrices that several depths may share, and what is a depth's own.

use std::sync::Arc;

use candle_core::Tensor;

use super::adapter::{Adapter, LowRank};
use super::architecture::{BlockSpec, NormKind};
use super::params::{BlockParam, NormPart, NormSite, PerNormSite, PerProjection, Projection};
use super::unit::Part;
use crate::error::{Error, Result};
use crate::ops::Matrix;

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
pub struct BlockWeights(PerProjection<Option<Matrix>>);

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
    /// What is added to the projections' matrices.
    pub adapters: PerProjection<Adapter>,
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
    /// The matrices that `matrix` gives, for the projections for which it gives one.
    pub(crate) fn from_fn(mut matrix: impl FnMut(Projection) -> Result<Option<Matrix>>) -> Result<Self> {
        let mut weights = Self::default();
        for projection in Projection::ALL {
            weights.0[projection] = matrix(projection)?;
        }
        Ok(weights)
    }

    /// A projection's matrix, `(out, in)`, where the family has that projection.
    #[must_use]
    pub fn get(&self, projection: Projection) -> Option<&Matrix> {
        self.0[projection].as_ref()
    }

    /// As [`get`](Self::get), of a matrix that has one number for each element.
    ///
    /// # Errors
    /// [`Error::Quantized`] where it is quantised.
    pub fn tensor(&self, projection: Projection) -> Result<Option<&Tensor>> {
        let Some(matrix) = self.get(projection) else { return Ok(None) };
        let tensor = matrix.as_tensor();
        tensor.map(Some).ok_or_else(|| Error::quantized(format!("a block's {}", projection.name()), matrix))
    }
}

impl PerDepth {
    /// Whether the norms are the other's, and not only as large.
    pub(super) fn has_norms_of(&self, other: &Self) -> bool {
        let gain = |own: &Self, site| own.norms[site].as_ref().map(|norm: &Norm| norm.gain.id());
        let mut sites = NormSite::ALL.into_iter().filter(|&site| gain(self, site).is_some()).peekable();
        sites.peek().is_some() && sites.all(|site| gain(self, site) == gain(other, site))
    }
}

impl Norm {
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
    /// A block whose tensors `tensor` gives, asked for in the order of `params`; with `shared`, its matrices are that
    /// block's, and its norms where it has none of its own.
    pub(super) fn build(
        params: Vec<(BlockParam, Vec<usize>)>,
        origin: usize,
        spec: BlockSpec,
        shared: Option<&Block>,
        mut tensor: impl FnMut(BlockParam, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut weights = BlockWeights::default();
        let mut own = PerDepth {
            origin,
            spec,
            biases: PerProjection::default(),
            norms: PerNormSite::default(),
            adapters: PerProjection::default(),
        };
        for (param, shape) in params {
            let value = tensor(param, &shape)?;
            match param {
                BlockParam::Weight(projection) => weights.0[projection] = Some(value.into()),
                BlockParam::Bias(projection) => own.biases[projection] = Some(value),
                BlockParam::Norm(site, NormPart::Gain) => {
                    own.norms[site] = Some(Norm { gain: value, bias: None });
                }
                BlockParam::Norm(site, NormPart::Bias) => {
                    if let Some(norm) = &mut own.norms[site] {
                        norm.bias = Some(value);
                    }
                }
                BlockParam::Scale(projection) => own.adapters[projection].scale = Some(value),
                BlockParam::LoraA(projection) => {
                    own.adapters[projection].low_rank = Some(LowRank { b: value.clone(), a: value });
                }
                BlockParam::LoraB(projection) => {
                    if let Some(residual) = &mut own.adapters[projection].low_rank {
                        residual.b = value;
                    }
                }
            }
        }
        let Some(shared) = shared else { return Ok(Self { weights: Arc::new(weights), own }) };
        if NormSite::ALL.iter().all(|&site| own.norms[site].is_none()) {
            own.norms = shared.own.norms.clone();
        }
        Ok(Self { weights: Arc::clone(&shared.weights), own })
    }

    /// The block with its tensors replaced; with `shared`, its matrices are those and only its own are mapped. What is
    /// quantised stays.
    pub(super) fn map(
        &self,
        shared: Option<&Arc<BlockWeights>>,
        mut tensor: impl FnMut(BlockParam, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut mapped = self.clone();
        mapped.weights = match shared {
            Some(weights) => Arc::clone(weights),
            None => {
                let weights = BlockWeights::from_fn(|projection| {
                    let matrix = self.weights.get(projection);
                    matrix
                        .map(|matrix| matrix.map(|value| tensor(BlockParam::Weight(projection), value)))
                        .transpose()
                });
                Arc::new(weights?)
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
        for projection in Projection::ALL {
            let adapter = &mut mapped.own.adapters[projection];
            if let Some(scale) = &mut adapter.scale {
                *scale = tensor(BlockParam::Scale(projection), scale)?;
            }
            if let Some(residual) = &mut adapter.low_rank {
                residual.a = tensor(BlockParam::LoraA(projection), &residual.a)?;
                residual.b = tensor(BlockParam::LoraB(projection), &residual.b)?;
            }
        }
        Ok(mapped)
    }

    /// The matrices of the block, in the order in which it applies them, but for quantised ones.
    pub fn matrices(&self) -> impl Iterator<Item = &Tensor> {
        Projection::ALL.into_iter().filter_map(|projection| self.weights.get(projection)?.as_tensor())
    }

    /// Every tensor of the block, shared or own; quantised matrices are none.
    pub fn params(&self) -> impl Iterator<Item = (BlockParam, &Tensor)> {
        let weights = Projection::ALL
            .into_iter()
            .filter_map(|at| Some((BlockParam::Weight(at), self.weights.get(at)?.as_tensor()?)));
        let biases = Projection::ALL.into_iter().filter_map(|projection| {
            Some((BlockParam::Bias(projection), self.own.biases[projection].as_ref()?))
        });
        let norms = NormSite::ALL.into_iter().filter_map(|site| Some((site, self.own.norms[site].as_ref()?)));
        let norms = norms.flat_map(|(site, norm)| {
            norm.params().map(move |(part, value)| (BlockParam::Norm(site, part), value))
        });
        let adapters = Projection::ALL.into_iter().flat_map(|projection| {
            let adapter = &self.own.adapters[projection];
            let scale = adapter.scale.iter().map(move |value| (BlockParam::Scale(projection), value));
            let residual = adapter.low_rank.iter().flat_map(move |residual| {
                [(BlockParam::LoraA(projection), &residual.a), (BlockParam::LoraB(projection), &residual.b)]
            });
            scale.chain(residual)
        });
        weights.chain(biases).chain(norms).chain(adapters)
    }

    /// The block without its attention or without its MLP; `None` where nothing would be left.
    pub(super) fn without(&self, part: Part) -> Option<Self> {
        let rest = self.clone().drop_half(part);
        Projection::ALL.iter().any(|&projection| rest.weights.get(projection).is_some()).then_some(rest)
    }

    fn drop_half(mut self, part: Part) -> Self {
        let goes = |half: Part| part == Part::Whole || part == half;
        let mut weights = (*self.weights).clone();
        for projection in Projection::ALL {
            if goes(projection.half()) {
                weights.0[projection] = None;
                self.own.biases[projection] = None;
                self.own.adapters[projection] = Adapter::default();
            }
        }
        for site in NormSite::ALL {
            if goes(site.half()) {
                self.own.norms[site] = None;
            }
        }
        self.weights = Arc::new(weights);
        self
    }

    /// What the block has: both halves, or the one that is left.
    #[must_use]
    pub fn part(&self) -> Part {
        match (self.has(Part::Attention), self.has(Part::Mlp)) {
            (true, false) => Part::Attention,
            (false, true) => Part::Mlp,
            _ => Part::Whole,
        }
    }

    /// The matrix that does what this depth's projection does, adapter included: `(out, in)`, where it has one.
    ///
    /// # Errors
    /// [`Error::Quantized`], or a failed computation.
    pub fn merged(&self, projection: Projection) -> Result<Option<Tensor>> {
        let weight = self.weights.tensor(projection)?;
        weight.map(|weight| self.own.adapters[projection].merged(weight)).transpose()
    }

    /// Whether the block has its attention, or its MLP; of the whole, whether it has both.
    #[must_use]
    pub fn has(&self, part: Part) -> bool {
        match part {
            Part::Whole => self.has(Part::Attention) && self.has(Part::Mlp),
            Part::Attention => self.weights.get(Projection::O).is_some(),
            Part::Mlp => self.weights.get(Projection::Down).is_some(),
        }
    }
}
