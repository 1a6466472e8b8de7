//! What differs between families of decoders, as data.

use super::fold_map::FoldMap;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Everything the decoder needs to know about a family and a size: shapes, kinds, and one [`BlockSpec`] a block.
///
/// Made from a `config.json` by [`Checkpoint::open`](crate::Checkpoint::open); the fields carry the names that
/// transformers gives them where it has one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
#[allow(clippy::struct_excessive_bools)] // each is a switch of its own in config.json
pub struct Architecture {
    /// The family, as `model_type` in `config.json`.
    pub model_type: String,
    /// Number of rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP between its projections.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Longest sequence the model was made for; a hard limit only for [`Positions::Learned`].
    pub max_position_embeddings: usize,
    /// Kind of normalisation.
    pub norm: NormKind,
    /// Added to the variance before the root.
    pub norm_eps: f64,
    /// Where a block normalises.
    pub norm_placement: NormPlacement,
    /// Normalisation of queries and keys before RoPE.
    pub qk_norm: Option<QkNorm>,
    /// Gated or plain MLP.
    pub mlp: MlpKind,
    /// The MLP's nonlinearity.
    pub activation: Activation,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub output_bias: bool,
    /// Biases on the MLP's projections.
    pub mlp_bias: bool,
    /// How positions enter.
    pub positions: Positions,
    /// The embedding's output is multiplied by this.
    pub embedding_scale: Option<f64>,
    /// Attention scores are multiplied by this.
    pub attention_scale: f64,
    /// Attention scores are bounded by `cap · tanh(score / cap)`.
    pub attention_softcap: Option<f64>,
    /// Logits are bounded by `cap · tanh(logit / cap)`.
    pub logit_softcap: Option<f64>,
    /// The head is the embedding.
    pub tied: bool,
    /// What differs from block to block, first to last.
    pub blocks: Vec<BlockSpec>,
    /// What blocks share, and what they add to it.
    #[serde(default, skip_serializing_if = "FoldMap::is_plain")]
    pub fold: FoldMap,
}

/// What is a block's own in the architecture, whatever its weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BlockSpec {
    /// A token sees itself and the `window − 1` tokens before it; `None` sees all.
    pub window: Option<usize>,
    /// The block's rotary embedding; unused where positions are learned.
    pub rope: RopeSpec,
}

/// A rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RopeSpec {
    /// Base of the geometric sequence of frequencies.
    pub theta: f64,
    /// How many of a head's leading dimensions rotate (all of them, or fewer: partial rotary).
    pub rotary_dim: usize,
    /// How frequencies are stretched for contexts longer than trained.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency is divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Low frequencies are divided by `factor`, high ones kept, those between interpolated (Llama 3.1).
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The context length of the first training.
        original_max_position_embeddings: usize,
    },
}

/// Kind of normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum NormKind {
    /// `x / rms(x) · w`, or `· (1 + w)` where `unit_offset`.
    Rms {
        /// The stored gain is the distance from 1 (Gemma).
        unit_offset: bool,
    },
    /// `(x − mean) / std · w + b`.
    Layer,
}

/// Where a block normalises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum NormPlacement {
    /// Before attention and before the MLP.
    Pre,
    /// After attention and after the MLP, before each joins the residual stream.
    Post,
    /// Both before and after.
    Sandwich,
}

/// Normalisation of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum QkNorm {
    /// Each head on its own; the gain has `head_dim` entries.
    PerHead,
    /// All heads together; the gain is as wide as the projection.
    Full,
}

/// Gated or plain MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum MlpKind {
    /// `down(act(gate(x)) ⊙ up(x))`.
    Gated,
    /// `down(act(up(x)))`.
    Plain,
}

/// The MLP's nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU with the tanh approximation (`gelu_pytorch_tanh`, `gelu_new`).
    GeluTanh,
    /// GELU with the error function (`gelu`).
    GeluErf,
    /// `max(0, x)`.
    Relu,
}

/// How positions enter the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Positions {
    /// Queries and keys are rotated (RoPE).
    Rotary,
    /// A learned vector per position is added to the embedding.
    Learned,
}

impl Architecture {
    /// The number of blocks.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.blocks.len()
    }

    /// Width of the queries of all heads together.
    #[must_use]
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of the keys (and of the values) of all heads together.
    #[must_use]
    pub fn key_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// The longest sequence that can be computed at all, where there is a limit.
    #[must_use]
    pub fn position_limit(&self) -> Option<usize> {
        (self.positions == Positions::Learned).then_some(self.max_position_embeddings)
    }

    /// A block's specification.
    ///
    /// # Errors
    /// [`Error::NoSuchBlock`] for an index beyond the depth.
    pub fn block(&self, index: usize) -> Result<&BlockSpec> {
        self.blocks.get(index).ok_or(Error::NoSuchBlock { index, depth: self.depth() })
    }

    /// The same architecture with only the blocks of `kept`, in that order; each keeps its own specification.
    ///
    /// # Errors
    /// [`Error::NoSuchBlock`] for an index beyond the depth.
    pub fn with_blocks(&self, kept: &[usize]) -> Result<Self> {
        let blocks = kept.iter().map(|&index| self.block(index).copied()).collect::<Result<_>>()?;
        Ok(Self { blocks, fold: self.fold.with_blocks(kept), ..self.clone() })
    }
}
