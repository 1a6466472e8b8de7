//! A block: matrices that several depths may share, and what is a depth's own.

use std::sync::Arc;

use candle_core::Tensor;

use super::architecture::{Architecture, BlockSpec, NormKind};
use super::params::{BlockParam, NormPart, NormSite, PerNormSite, PerProjection, Projection};
use super::unit::Part;
use crate::error::Result;

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

    /// The matrices of the block, in the order in which it applies them.
    pub fn matrices(&self) -> impl Iterator<Item = &Tensor> {
        Projection::ALL.into_iter().filter_map(|projection| self.weights.get(projection))
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
