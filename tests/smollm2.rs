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
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use foldgpt::candle::{DType, Device};
use foldgpt::importance::{BlockInfluence, Importance};
use foldgpt::plan::{Donor, Groups, Ranks, ResidualStart};
use foldgpt::{
    Account, Bos, Checkpoint, Format, Plan, SaveOptions, Windows, fold_on, output_errors, perplexity,
};

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

/// Pairs with residuals of rank 8: in memory and on disk as large as its parameters, and on text that none has seen the
/// whitened start is nearer to the original than the plain one.
#[test]
#[ignore = "needs the files of a real model"]
fn folded_in_pairs_it_takes_what_it_stores_and_whitening_lowers_the_output_error() {
    let checkpoint = Checkpoint::open(path("FOLDGPT_SMOLLM2")).unwrap();
    let dense = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    let text = std::fs::read_to_string(path("FOLDGPT_TEXT")).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let middle = text.len() / 2;
    let middle = (middle..text.len()).find(|&at| text.is_char_boundary(at)).unwrap();
    let cut = |text: &str| Windows::from_text(&tokenizer, text, 256, Some(8), Bos::Auto).unwrap();
    let (calibration, held_out) = (cut(&text[..middle]), cut(&text[middle..]));
    let mut errors = Vec::new();
    for start in [ResidualStart::Svd, ResidualStart::Whitened] {
        let plan = Plan::builder().share(Groups::of(2)).donor(Donor::Mean);
        let plan = plan.residual(Ranks::Uniform(8), start).build(dense.architecture()).unwrap();
        let folded = fold_on(&dense, &plan, &calibration, &mut ()).unwrap();
        let found = output_errors(&dense, &folded, &held_out, &mut ()).unwrap();
        errors.push(found.iter().map(|error| error.relative).sum::<f64>() / found.len() as f64);
        if start == ResidualStart::Svd {
            continue;
        }
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("pairs");
        let options = SaveOptions::from(Format::Compact);
        let saved = checkpoint.save(&folded, Some(&plan), &directory, &options, &mut ()).unwrap();
        let file = std::fs::metadata(directory.join("foldgpt.safetensors")).unwrap().len();
        assert!((file as f64) < 1.01 * 2.0 * folded.parameter_count() as f64, "{file}");
        let narrow = Checkpoint::open(&directory).unwrap().decoder(DType::BF16, &Device::Cpu).unwrap();
        let resident = Account::counted(&narrow, 1).unwrap().resident_bytes as f64;
        assert!(
            (resident / saved.tensor_bytes as f64 - 1.0).abs() < 0.05,
            "{resident} of {}",
            saved.tensor_bytes
        );
    }
    assert!(errors[1] < errors[0], "output error {} whitened, {} plain", errors[1], errors[0]);
    eprintln!(
        "relative output error at rank 8 on text that none has seen: {} plain, {} whitened",
        errors[0], errors[1]
    );
}
