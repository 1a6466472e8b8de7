//! How each family stores its parameters: tensor names, fused projections, transposed matrices.

use std::collections::HashMap;

use candle_core::{D, DType, Tensor};

use crate::error::Result;
use crate::model::{
    Architecture, BlockParam, NormPart, NormPlacement, NormSite, Param, Projection, StoredTypes,
};

/// One tensor of a checkpoint, and the parameters that it holds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stored {
    /// The tensor's name in a Hugging Face checkpoint.
    pub name: String,
    /// Its shape there.
    pub shape: Vec<usize>,
    /// The parameters in it, one below the other, with the size of each one's first dimension.
    pub params: Vec<(Param, usize)>,
    /// Stored as `(in, out)` where the decoder has `(out, in)`.
    pub transposed: bool,
}

impl Stored {
    fn absorb(&mut self, below: Stored) {
        if let (Some(rows), Some(more)) = (self.shape.first_mut(), below.shape.first()) {
            *rows += more;
        }
        self.params.extend(below.params);
    }

    /// The bytes it takes in this type.
    pub(crate) fn bytes(&self, dtype: DType) -> u64 {
        (self.shape.iter().product::<usize>() * dtype.size_in_bytes()) as u64
    }

    /// Its type by that of its parameters, which have all the same: they are of one kind, and of one block.
    pub(crate) fn dtype(&self, types: &StoredTypes) -> DType {
        self.params.first().map_or(types.narrowest(), |(param, _)| types.of(*param))
    }

    /// Whether it holds a matrix to which a depth of this architecture adds something.
    pub(crate) fn is_adapted(&self, arch: &Architecture) -> bool {
        self.params.iter().any(|(param, _)| match param {
            Param::Block(depth, BlockParam::Weight(projection)) => {
                arch.fold.block(*depth).adapters.contains_key(projection)
            }
            _ => false,
        })
    }

    /// Whether it is a vector that `dtype` cannot hold: small changes of norms and scales, as healing makes, are not to be
    /// lost, and vectors take little room.
    pub(crate) fn is_vector_beyond(&self, params: &HashMap<Param, &Tensor>, dtype: DType) -> Result<bool> {
        let vectors = self.params.iter().filter(|(param, _)| !param.is_matrix());
        let mut values = vectors.filter_map(|(param, _)| params.get(param));
        values.try_fold(false, |beyond, value| {
            let narrow = value.to_dtype(dtype)?.to_dtype(value.dtype())?;
            Ok(beyond || narrow.ne(*value)?.to_dtype(DType::F32)?.max_all()?.to_scalar::<f32>()? > 0.0)
        })
    }

    fn one(name: impl Into<String>, param: Param, shape: Vec<usize>) -> Self {
        let rows = shape.first().copied().unwrap_or_default();
        Self { name: name.into(), shape, params: vec![(param, rows)], transposed: false }
    }

    /// The parameters of a tensor as it is stored.
    pub(crate) fn split(&self, tensor: &Tensor) -> Result<Vec<(Param, Tensor)>> {
        let upright = if self.transposed { tensor.t()? } else { tensor.clone() };
        let mut start = 0;
        let mut parts = Vec::with_capacity(self.params.len());
        for &(param, rows) in &self.params {
            // A copy where the tensor holds more than this: otherwise the whole would be kept alive.
            let part = upright.narrow(0, start, rows)?;
            let part = if self.params.len() > 1 { part.force_contiguous()? } else { part.contiguous()? };
            parts.push((param, part));
            start += rows;
        }
        Ok(parts)
    }

    /// The tensor as it is stored, from its parameters.
    pub(crate) fn join(&self, mut param: impl FnMut(Param) -> Result<Tensor>) -> Result<Tensor> {
        let parts = self.params.iter().map(|&(part, _)| param(part)).collect::<Result<Vec<_>>>()?;
        let upright = match parts.as_slice() {
            [whole] => whole.clone(),
            parts => Tensor::cat(parts, 0)?,
        };
        Ok(if self.transposed { upright.transpose(D::Minus2, D::Minus1)? } else { upright }.contiguous()?)
    }
}

/// Every tensor of a checkpoint of this architecture, in the order of computation.
pub(crate) fn stored_tensors(arch: &Architecture) -> Vec<Stored> {
    let mut tensors: Vec<Stored> = Vec::new();
    for (param, shape) in arch.params() {
        let name = tensor_name(arch, param);
        let stored = Stored { transposed: is_transposed(arch, param), ..Stored::one(name, param, shape) };
        // What is fused belongs to one block, so that only the latest names can be the same.
        match tensors.iter_mut().rev().take(Projection::ALL.len() * 2).find(|known| known.name == stored.name)
        {
            Some(fused) => fused.absorb(stored),
            None => tensors.push(stored),
        }
    }
    for stored in tensors.iter_mut().filter(|stored| stored.transposed) {
        stored.shape.reverse();
    }
    tensors
}

/// The prefix of all tensors but the head; files of a bare base model lack it.
pub(crate) fn base_prefix(arch: &Architecture) -> &'static str {
    if arch.model_type == "gpt2" { "transformer." } else { "model." }
}

/// Tensors that files carry and the decoder does not need: they are computed, or tied.
pub(crate) fn is_redundant(arch: &Architecture, name: &str) -> bool {
    let computed = name.ends_with(".rotary_emb.inv_freq")
        || (arch.model_type == "gpt2"
            && (name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")));
    computed || (arch.tied && name == HEAD)
}

const HEAD: &str = "lm_head.weight";

/// gpt2 keeps its matrices as `(in, out)`.
fn is_transposed(arch: &Architecture, param: Param) -> bool {
    arch.model_type == "gpt2" && matches!(param, Param::Block(_, BlockParam::Weight(_)))
}

/// The name of the tensor that holds a parameter; parameters with one name are fused.
fn tensor_name(arch: &Architecture, param: Param) -> String {
    let prefix = base_prefix(arch);
    let gpt2 = arch.model_type == "gpt2";
    match param {
        Param::Embedding if gpt2 => format!("{prefix}wte.weight"),
        Param::Embedding => format!("{prefix}embed_tokens.weight"),
        Param::Positions => format!("{prefix}wpe.weight"),
        Param::FinalNorm(part) => format!("{prefix}{}.{}", if gpt2 { "ln_f" } else { "norm" }, suffix(part)),
        Param::Head => HEAD.into(),
        Param::Block(index, part) => {
            let blocks = if gpt2 { "h" } else { "layers" };
            let (module, suffix) = match part {
                BlockParam::Weight(projection) => (projection_name(arch, projection), "weight"),
                BlockParam::Bias(projection) => (projection_name(arch, projection), "bias"),
                BlockParam::Norm(site, part) => (norm_name(arch, site), suffix(part)),
                BlockParam::Scale(projection) => (adapted_name(arch, projection), "scale"),
                BlockParam::LoraA(projection) => (adapted_name(arch, projection), "lora_A.weight"),
                BlockParam::LoraB(projection) => (adapted_name(arch, projection), "lora_B.weight"),
            };
            format!("{prefix}{blocks}.{index}.{module}.{suffix}")
        }
    }
}

fn suffix(part: NormPart) -> &'static str {
    match part {
        NormPart::Gain => "weight",
        NormPart::Bias => "bias",
    }
}

fn projection_name(arch: &Architecture, projection: Projection) -> &'static str {
    use Projection::{Down, Gate, K, O, Q, Up, V};
    match (arch.model_type.as_str(), projection) {
        ("gpt2", Q | K | V) => "attn.c_attn",
        ("gpt2", O) => "attn.c_proj",
        ("gpt2", Gate | Up) => "mlp.c_fc",
        ("gpt2", Down) => "mlp.c_proj",
        ("phi3", Q | K | V) => "self_attn.qkv_proj",
        ("phi3", Gate | Up) => "mlp.gate_up_proj",
        (_, Q) => "self_attn.q_proj",
        (_, K) => "self_attn.k_proj",
        (_, V) => "self_attn.v_proj",
        (_, O) => "self_attn.o_proj",
        (_, Gate) => "mlp.gate_proj",
        (_, Up) => "mlp.up_proj",
        (_, Down) => "mlp.down_proj",
    }
}

/// What adapts a projection is stored under the projection's own name, also where its matrix is fused with others.
fn adapted_name(arch: &Architecture, projection: Projection) -> &'static str {
    use Projection::{Down, Gate, K, O, Q, Up, V};
    match projection {
        Q if arch.model_type == "gpt2" => "attn.q_proj",
        K if arch.model_type == "gpt2" => "attn.k_proj",
        V if arch.model_type == "gpt2" => "attn.v_proj",
        O if arch.model_type == "gpt2" => "attn.o_proj",
        Q => "self_attn.q_proj",
        K => "self_attn.k_proj",
        V => "self_attn.v_proj",
        O => "self_attn.o_proj",
        Gate => "mlp.gate_proj",
        Up => "mlp.up_proj",
        Down => "mlp.down_proj",
    }
}

fn norm_name(arch: &Architecture, site: NormSite) -> &'static str {
    let gpt2 = arch.model_type == "gpt2";
    match site {
        NormSite::AttentionIn if gpt2 => "ln_1",
        NormSite::MlpIn if gpt2 => "ln_2",
        NormSite::AttentionIn => "input_layernorm",
        NormSite::AttentionOut => "post_attention_layernorm",
        // Where only inputs are normalised, this name means the norm after the attention's residual.
        NormSite::MlpIn if arch.norm_placement == NormPlacement::Pre => "post_attention_layernorm",
        NormSite::MlpIn => "pre_feedforward_layernorm",
        NormSite::MlpOut => "post_feedforward_layernorm",
        NormSite::Q => "self_attn.q_norm",
        NormSite::K => "self_attn.k_norm",
    }
}
