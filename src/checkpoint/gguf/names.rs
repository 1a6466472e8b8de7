//! The architectures read from GGUF, and how their tensors' names and layouts map to Hugging Face's.

use crate::error::{Error, Result};

/// A `general.architecture` that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    /// Llama; Mistral and `SmolLM` are stored under this name too.
    Llama,
    Qwen2,
    Qwen3,
    Gemma,
    Gemma2,
    Gemma3,
    Phi3,
    Olmo2,
    Gpt2,
}

/// How a stored tensor differs from the Hugging Face one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Not at all.
    Same,
    /// Rows of each query head permuted for interleaved `RoPE`.
    InterleavedQuery,
    /// Rows of each key head permuted for interleaved `RoPE`.
    InterleavedKey,
    /// A norm weight stored with the 1 that Gemma's norm adds.
    PlusOne,
    /// A `Conv1D` weight, stored as (out, in).
    Transposed,
}

const ALL: [Architecture; 9] = [
    Architecture::Llama,
    Architecture::Qwen2,
    Architecture::Qwen3,
    Architecture::Gemma,
    Architecture::Gemma2,
    Architecture::Gemma3,
    Architecture::Phi3,
    Architecture::Olmo2,
    Architecture::Gpt2,
];

impl Architecture {
    /// The architecture of that name in `general.architecture`.
    pub(super) fn parse(name: &str) -> Result<Self> {
        ALL.into_iter().find(|known| known.key() == name).ok_or_else(|| {
            let known: Vec<_> = ALL.into_iter().map(Self::key).collect();
            Error::config("general.architecture", format!("`{name}`, expected one of {}", known.join(", ")))
        })
    }

    /// The name in `general.architecture`, which also begins the keys of its metadata.
    pub(super) fn key(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
            Self::Olmo2 => "olmo2",
            Self::Gpt2 => "gpt2",
        }
    }

    /// Any of the three Gemmas, which share the norm, the activation and the embedding's scale.
    pub(super) fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma | Self::Gemma2 | Self::Gemma3)
    }

    /// The Hugging Face name of a stored tensor, `None` where the architecture has no such tensor.
    pub(super) fn hugging_face_name(self, stored: &str) -> Option<String> {
        let (part, kind) = stored.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
        let Some(block) = part.strip_prefix("blk.") else {
            return Some(format!("{}.{kind}", self.outer_part(part)?));
        };
        let (index, part) = block.split_once('.')?;
        let number: usize = index.parse().ok()?;
        // `blk.01` and `blk.+1` would be second names of block 1.
        if number.to_string() != index {
            return None;
        }
        let stack = if self == Self::Gpt2 { "transformer.h" } else { "model.layers" };
        Some(format!("{stack}.{number}.{}.{kind}", self.block_part(part)?))
    }

    /// The Hugging Face name of a part outside of the blocks.
    fn outer_part(self, part: &str) -> Option<&'static str> {
        Some(match (self, part) {
            (Self::Gpt2, "token_embd") => "transformer.wte",
            (Self::Gpt2, "position_embd") => "transformer.wpe",
            (Self::Gpt2, "output_norm") => "transformer.ln_f",
            (_, "token_embd") => "model.embed_tokens",
            (_, "output_norm") => "model.norm",
            (_, "output") => "lm_head",
            _ => return None,
        })
    }

    /// The Hugging Face name of a part of a block.
    fn block_part(self, part: &str) -> Option<&'static str> {
        if self == Self::Gpt2 {
            return Some(match part {
                "attn_norm" => "ln_1",
                "attn_qkv" => "attn.c_attn",
                "attn_output" => "attn.c_proj",
                "ffn_norm" => "ln_2",
                "ffn_up" => "mlp.c_fc",
                "ffn_down" => "mlp.c_proj",
                _ => return None,
            });
        }
        // Gemma 2, Gemma 3 and OLMo 2 also norm what a sublayer puts out.
        let output_norms = matches!(self, Self::Gemma2 | Self::Gemma3 | Self::Olmo2);
        Some(match part {
            "attn_norm" if self != Self::Olmo2 => "input_layernorm",
            "attn_qkv" if self == Self::Phi3 => "self_attn.qkv_proj",
            "attn_q" => "self_attn.q_proj",
            "attn_k" => "self_attn.k_proj",
            "attn_v" => "self_attn.v_proj",
            "attn_output" => "self_attn.o_proj",
            "attn_q_norm" => "self_attn.q_norm",
            "attn_k_norm" => "self_attn.k_norm",
            "ffn_norm" if !output_norms => "post_attention_layernorm",
            "ffn_norm" if self != Self::Olmo2 => "pre_feedforward_layernorm",
            "post_attention_norm" if output_norms => "post_attention_layernorm",
            "post_ffw_norm" if output_norms => "post_feedforward_layernorm",
            "ffn_up" if self == Self::Phi3 => "mlp.gate_up_proj",
            "ffn_gate" => "mlp.gate_proj",
            "ffn_up" => "mlp.up_proj",
            "ffn_down" => "mlp.down_proj",
            _ => return None,
        })
    }

    /// How the stored tensor of that name has to be changed back.
    pub(super) fn layout(self, stored: &str) -> Layout {
        let part = stored.rsplit('.').nth(1).unwrap_or_default();
        match (self, part) {
            (Self::Llama, "attn_q") => Layout::InterleavedQuery,
            (Self::Llama, "attn_k") => Layout::InterleavedKey,
            (Self::Gpt2, "attn_qkv" | "attn_output" | "ffn_up" | "ffn_down")
                if stored.ends_with(".weight") =>
            {
                Layout::Transposed
            }
            (gemma, norm) if gemma.is_gemma() && norm.ends_with("norm") => Layout::PlusOne,
            _ => Layout::Same,
        }
    }
}

/// Whether a stored tensor is `RoPE`'s, which Hugging Face keeps in its configuration.
pub(super) fn is_rope_table(stored: &str) -> bool {
    matches!(stored, "rope_freqs.weight" | "rope_factors_long.weight" | "rope_factors_short.weight")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_architecture() {
        for (architecture, stored, expected) in [
            (Architecture::Llama, "blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
            (Architecture::Llama, "blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
            (
                Architecture::Gemma3,
                "blk.3.ffn_norm.weight",
                "model.layers.3.pre_feedforward_layernorm.weight",
            ),
            (
                Architecture::Olmo2,
                "blk.0.post_ffw_norm.weight",
                "model.layers.0.post_feedforward_layernorm.weight",
            ),
            (Architecture::Phi3, "blk.0.ffn_up.weight", "model.layers.0.mlp.gate_up_proj.weight"),
            (Architecture::Gpt2, "blk.3.attn_qkv.bias", "transformer.h.3.attn.c_attn.bias"),
            (Architecture::Gpt2, "output_norm.bias", "transformer.ln_f.bias"),
            (Architecture::Qwen2, "output.weight", "lm_head.weight"),
        ] {
            assert_eq!(architecture.hugging_face_name(stored).as_deref(), Some(expected));
        }
        for stored in
            ["blk.01.attn_q.weight", "blk.0.ffn_gate_inp.weight", "blk.0", "blk.0.attn_q.scale", "x"]
        {
            assert_eq!(Architecture::Llama.hugging_face_name(stored), None, "{stored}");
        }
    }

    #[test]
    fn an_unknown_architecture_is_named() {
        let message = Architecture::parse("mamba").unwrap_err().to_string();
        assert!(message.contains("general.architecture") && message.contains("mamba"), "{message}");
    }
}
