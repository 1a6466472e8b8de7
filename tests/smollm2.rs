//! SmolLM2 against what transformers computes on it. Run on purpose, with the files of a real model:
//!
//! ```text
//! FOLDGPT_SMOLLM2=model.gguf FOLDGPT_REFERENCE=reference.json FOLDGPT_TEXT=text.txt \
//!     cargo test --release --test smollm2 -- --ignored
//! ```
//!
//! The model is SmolLM2-135M-Instruct as a GGUF file; the reference holds `token_ids`, `mean_nll` and
//! `block_influence` of its first four windows of 512 tokens, computed by transformers 4.57 with torch 2.9 in f32 from
//! the weights in bf16; the text begins with what those tokens say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use foldgpt::candle::{DType, Device};
use foldgpt::importance::{BlockInfluence, Importance};
use foldgpt::{Bos, Checkpoint, Windows, perplexity};

fn path(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("set {variable}"))
}

#[test]
#[ignore = "needs the files of a real model"]
fn loss_influence_and_tokens_are_those_of_transformers() {
    let reference = std::fs::read_to_string(path("FOLDGPT_REFERENCE")).unwrap();
    let reference: serde_json::Value = serde_json::from_str(&reference).unwrap();
    let numbers = |key: &str| -> Vec<f64> {
        reference[key].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
    };
    let checkpoint = Checkpoint::open(path("FOLDGPT_SMOLLM2")).unwrap();
    let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();

    let text = std::fs::read_to_string(path("FOLDGPT_TEXT")).unwrap();
    let windows =
        Windows::from_text(&checkpoint.tokenizer().unwrap(), &text, 512, Some(4), Bos::Auto).unwrap();
    let ids: Vec<u32> = windows.iter().flatten().copied().collect();
    let expected: Vec<u32> = numbers("token_ids").into_iter().map(|id| id as u32).collect();
    assert_eq!(ids, expected);

    let nll = perplexity(&decoder, &windows, &mut ()).unwrap().mean_nll;
    assert!((nll - reference["mean_nll"].as_f64().unwrap()).abs() < 0.01, "{nll}");

    let scores = BlockInfluence::default().score(&decoder, &windows, &mut ()).unwrap();
    for (found, expected) in scores.blocks.iter().zip(numbers("block_influence")) {
        assert!((found.importance - expected).abs() < 0.002, "block {}: {}", found.index, found.importance);
    }
}
