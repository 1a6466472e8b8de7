//! What the benches have in common: a SmolLM2-shaped random model, and ratios within one run.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::time::Instant;

use foldgpt::Decoder;
use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::model::Architecture;

pub const TOKENS: usize = 512;

/// SmolLM2-135M: 30 blocks of 576, 9 query heads and 3 key heads of 64, vocabulary 49152.
pub fn architecture() -> Architecture {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
        "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "tie_word_embeddings": true,
    });
    Architecture::from_config(&config).unwrap()
}

pub fn decoder() -> Decoder {
    Decoder::random(architecture(), 0, DType::F32, &Device::Cpu).unwrap()
}

/// A window of tokens, and the same as a batch of one.
pub fn window() -> (Vec<u32>, Tensor) {
    let vocab = architecture().vocab_size as u32;
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i * 97 % vocab).collect();
    let ids = Tensor::from_slice(&tokens, (1, TOKENS), &Device::Cpu).unwrap();
    (tokens, ids)
}

/// The median over interleaved pairs of the time of `a` by that of `b`.
pub fn ratio(a: &dyn Fn(), b: &dyn Fn()) -> f64 {
    let time = |f: &dyn Fn()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    let mut ratios: Vec<f64> = (0..7).map(|_| time(a) / time(b)).collect();
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}
