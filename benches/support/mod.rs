//! What the benches have in common: a SmolLM2-shaped random model, the work that is timed, and times within one run.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used, clippy::expect_used)]

pub mod bound;
pub mod work;

use std::time::Instant;

use foldgpt::candle::{DType, Device};
use foldgpt::model::Architecture;
use foldgpt::{Decoder, Windows};

pub const TOKENS: usize = 512;

/// SmolLM2-135M: 30 of its blocks, vocabulary 49152.
pub fn architecture() -> Architecture {
    smollm2(30, 49152)
}

/// Blocks of SmolLM2-135M's shape: 576 wide, 9 query heads and 3 key heads of 64.
pub fn smollm2(blocks: usize, vocab: usize) -> Architecture {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": blocks,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": vocab,
        "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "tie_word_embeddings": true,
    });
    Architecture::from_config(&config).unwrap()
}

pub fn decoder() -> Decoder {
    random(architecture())
}

pub fn random(architecture: Architecture) -> Decoder {
    Decoder::random(architecture, 0, DType::F32, &Device::Cpu).unwrap()
}

/// Windows of tokens; which ones makes no difference to the work.
pub fn windows(count: usize) -> Windows {
    windows_of(count, TOKENS, architecture().vocab_size)
}

/// The same of any length and vocabulary.
pub fn windows_of(count: usize, tokens: usize, vocab: usize) -> Windows {
    let id = |place: usize, window: usize| ((place * 97 + window * 31) % vocab) as u32;
    let window = |index| (0..tokens).map(|place| id(place, index)).collect();
    Windows::from_ids((0..count).map(window).collect()).unwrap()
}

pub fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The median over interleaved pairs of the time of `a` by that of `b`: seven pairs, fewer where they take long.
pub fn ratio(a: &dyn Fn(), b: &dyn Fn()) -> f64 {
    let (start, mut ratios) = (Instant::now(), Vec::new());
    while ratios.len() < 3 || (ratios.len() < 7 && start.elapsed().as_secs() < 60) {
        ratios.push(seconds(a) / seconds(b));
    }
    median(ratios)
}
