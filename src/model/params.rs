//! The names of a decoder's parameters, the same for every family.

use std::fmt;
use std::ops::{Index, IndexMut};

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};

use super::architecture::{Architecture, MlpKind, NormKind, NormPlacement, Positions, QkNorm};
use super::unit::Part;

/// One parameter tensor of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Param {
    /// Token embedding, `(vocab, hidden)`.
    Embedding,
    /// Learned position embedding, `(max_position_embeddings, hidden)`.
    Positions,
    /// A parameter of the block at this depth.
    Block(usize, BlockParam),
    /// Gain or bias of the norm after the last block, `(hidden)`.
    FinalNorm(NormPart),
    /// Output projection where it is not tied to the embedding, `(vocab, hidden)`.
    Head,
}

/// One parameter tensor of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum BlockParam {
    /// The matrix of a projection, `(out, in)`.
    Weight(Projection),
    /// The bias of a projection, `(out)`.
    Bias(Projection),
    /// Gain or bias of a norm.
    Norm(NormSite, NormPart),
    /// What a depth multiplies a projection's output by, `(out)`.
    Scale(Projection),
    /// The way down of a depth's low-rank residual, `(rank, in)`.
    LoraA(Projection),
    /// The way up of a depth's low-rank residual, `(out, rank)`.
    LoraB(Projection),
}

/// The linear maps of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Projection {
    /// Queries.
    #[serde(rename = "q_proj")]
    Q,
    /// Keys.
    #[serde(rename = "k_proj")]
    K,
    /// Values.
    #[serde(rename = "v_proj")]
    V,
    /// The attention's output.
    #[serde(rename = "o_proj")]
    O,
    /// The gate of a gated MLP.
    #[serde(rename = "gate_proj")]
    Gate,
    /// The MLP's way up.
    #[serde(rename = "up_proj")]
    Up,
    /// The MLP's way down.
    #[serde(rename = "down_proj")]
    Down,
}

/// Where a block may normalise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum NormSite {
    /// The attention's input.
    AttentionIn,
    /// The attention's output, before it joins the residual stream.
    AttentionOut,
    /// The MLP's input.
    MlpIn,
    /// The MLP's output, before it joins the residual stream.
    MlpOut,
    /// Queries, before RoPE.
    Q,
    /// Keys, before RoPE.
    K,
}

/// The two tensors a norm may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum NormPart {
    /// The factor.
    Gain,
    /// The summand (LayerNorm only).
    Bias,
}

impl Param {
    /// Whether this is a matrix, which products or lookups read row by row.
    #[must_use]
    pub fn is_matrix(self) -> bool {
        use BlockParam::{Bias, Norm, Scale};
        !matches!(self, Self::FinalNorm(_) | Self::Block(_, Bias(_) | Norm(..) | Scale(_)))
    }

    /// The type that a decoder with matrices of `dtype` holds this in: on the CPU vectors stay in f32 beside
    /// matrices of half precision.
    pub(crate) fn dtype_in_memory(self, dtype: DType, device: &Device) -> DType {
        if device.is_cpu() { self.dtype_on_cpu(dtype) } else { dtype }
    }

    /// As [`dtype_in_memory`](Self::dtype_in_memory), on the CPU.
    pub(crate) fn dtype_on_cpu(self, dtype: DType) -> DType {
        let half = matches!(dtype, DType::BF16 | DType::F16);
        if half && !self.is_matrix() { DType::F32 } else { dtype }
    }
}

impl BlockParam {
    /// The half of a block that it belongs to.
    #[must_use]
    pub fn half(self) -> Part {
        match self {
            Self::Weight(projection)
            | Self::Bias(projection)
            | Self::Scale(projection)
            | Self::LoraA(projection)
            | Self::LoraB(projection) => projection.half(),
            Self::Norm(site, _) => site.half(),
        }
    }
}

impl Projection {
    /// All projections, in the order in which a block applies them.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The half of a block that it belongs to.
    #[must_use]
    pub fn half(self) -> Part {
        match self {
            Self::Q | Self::K | Self::V | Self::O => Part::Attention,
            Self::Gate | Self::Up | Self::Down => Part::Mlp,
        }
    }

    /// The field's name for it: `q_proj`, …
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }
}

impl NormSite {
    /// All sites, in the order in which a block passes them.
    pub const ALL: [Self; 6] =
        [Self::AttentionIn, Self::Q, Self::K, Self::AttentionOut, Self::MlpIn, Self::MlpOut];

    /// The half of a block that it belongs to.
    #[must_use]
    pub fn half(self) -> Part {
        match self {
            Self::AttentionIn | Self::Q | Self::K | Self::AttentionOut => Part::Attention,
            Self::MlpIn | Self::MlpOut => Part::Mlp,
        }
    }
}

/// One value for each of a block's projections.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PerProjection<T>([T; 7]);

impl<T> Index<Projection> for PerProjection<T> {
    type Output = T;
    fn index(&self, projection: Projection) -> &T {
        &self.0[projection as usize]
    }
}

impl<T> IndexMut<Projection> for PerProjection<T> {
    fn index_mut(&mut self, projection: Projection) -> &mut T {
        &mut self.0[projection as usize]
    }
}

/// One value for each place where a block may normalise.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PerNormSite<T>([T; 6]);

impl<T> Index<NormSite> for PerNormSite<T> {
    type Output = T;
    fn index(&self, site: NormSite) -> &T {
        &self.0[site as usize]
    }
}

impl<T> IndexMut<NormSite> for PerNormSite<T> {
    fn index_mut(&mut self, site: NormSite) -> &mut T {
        &mut self.0[site as usize]
    }
}

impl fmt::Display for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => write!(f, "embedding"),
            Self::Positions => write!(f, "positions"),
            Self::Block(index, part) => write!(f, "block {index} {part}"),
            Self::FinalNorm(part) => write!(f, "final norm {}", part.name()),
            Self::Head => write!(f, "head"),
        }
    }
}

impl fmt::Display for BlockParam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Weight(projection) => write!(f, "{} weight", projection.name()),
            Self::Bias(projection) => write!(f, "{} bias", projection.name()),
            Self::Norm(site, part) => write!(f, "{site:?} norm {}", part.name()),
            Self::Scale(projection) => write!(f, "{} scale", projection.name()),
            Self::LoraA(projection) => write!(f, "{} residual A", projection.name()),
            Self::LoraB(projection) => write!(f, "{} residual B", projection.name()),
        }
    }
}

impl NormPart {
    fn name(self) -> &'static str {
        match self {
            Self::Gain => "gain",
            Self::Bias => "bias",
        }
    }
}

impl Architecture {
    /// Every parameter of a decoder of this architecture with its shape, in the order of computation; what depths share
    /// once, at the first of them.
    #[must_use]
    pub fn params(&self) -> Vec<(Param, Vec<usize>)> {
        let mut params = vec![(Param::Embedding, vec![self.vocab_size, self.hidden_size])];
        if self.positions == Positions::Learned {
            params.push((Param::Positions, vec![self.max_position_embeddings, self.hidden_size]));
        }
        for index in 0..self.depth() {
            let block = self.params_at(index).into_iter();
            params.extend(block.map(|(part, shape)| (Param::Block(index, part), shape)));
        }
        for part in self.norm_parts() {
            params.push((Param::FinalNorm(*part), vec![self.hidden_size]));
        }
        if !self.tied {
            params.push((Param::Head, vec![self.vocab_size, self.hidden_size]));
        }
        params
    }

    /// Every parameter of one whole block that is not folded, with its shape: matrices, biases, norms.
    #[must_use]
    pub fn block_params(&self) -> Vec<(BlockParam, Vec<usize>)> {
        let mut params = Vec::new();
        for projection in Projection::ALL {
            if let Some((output, input)) = self.projection_shape(projection) {
                params.push((BlockParam::Weight(projection), vec![output, input]));
                if self.has_bias(projection) {
                    params.push((BlockParam::Bias(projection), vec![output]));
                }
            }
        }
        for site in NormSite::ALL {
            if let Some(width) = self.norm_width(site) {
                for part in self.norm_parts() {
                    params.push((BlockParam::Norm(site, *part), vec![width]));
                }
            }
        }
        params
    }

    /// The number of parameters of a decoder of this architecture; what depths share counts once.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.params().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// The parameters of one block, or of one of its halves.
    #[must_use]
    pub fn parameters_of(&self, part: Part) -> usize {
        let belongs = |param: BlockParam| part == Part::Whole || part == param.half();
        let params = self.block_params();
        params
            .iter()
            .filter(|(param, _)| belongs(*param))
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum()
    }

    /// `(out, in)` of a projection's matrix, or `None` where the family has no such projection.
    #[must_use]
    pub fn projection_shape(&self, projection: Projection) -> Option<(usize, usize)> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        match projection {
            Projection::Q => Some((self.query_width(), hidden)),
            Projection::K | Projection::V => Some((self.key_width(), hidden)),
            Projection::O => Some((hidden, self.query_width())),
            Projection::Gate => (self.mlp == MlpKind::Gated).then_some((inner, hidden)),
            Projection::Up => Some((inner, hidden)),
            Projection::Down => Some((hidden, inner)),
        }
    }

    /// Whether a projection adds a bias.
    #[must_use]
    pub fn has_bias(&self, projection: Projection) -> bool {
        match projection {
            Projection::Q | Projection::K | Projection::V => self.qkv_bias,
            Projection::O => self.output_bias,
            Projection::Gate | Projection::Up | Projection::Down => self.mlp_bias,
        }
    }

    /// Width of the norm at a site, or `None` where the family does not normalise there.
    #[must_use]
    pub fn norm_width(&self, site: NormSite) -> Option<usize> {
        let before = matches!(self.norm_placement, NormPlacement::Pre | NormPlacement::Sandwich);
        let after = matches!(self.norm_placement, NormPlacement::Post | NormPlacement::Sandwich);
        match site {
            NormSite::AttentionIn | NormSite::MlpIn => before.then_some(self.hidden_size),
            NormSite::AttentionOut | NormSite::MlpOut => after.then_some(self.hidden_size),
            NormSite::Q => self.qk_norm.map(|kind| self.qk_norm_width(kind, self.query_width())),
            NormSite::K => self.qk_norm.map(|kind| self.qk_norm_width(kind, self.key_width())),
        }
    }

    fn qk_norm_width(&self, kind: QkNorm, full: usize) -> usize {
        match kind {
            QkNorm::PerHead => self.head_dim,
            QkNorm::Full => full,
        }
    }

    fn norm_parts(&self) -> &'static [NormPart] {
        match self.norm {
            NormKind::Rms { .. } => &[NormPart::Gain],
            NormKind::Layer => &[NormPart::Gain, NormPart::Bias],
        }
    }
}
