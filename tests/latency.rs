//! Speed and memory, side by side; what times are is never asserted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ops::ControlFlow;

use foldgpt::candle::DType;
use foldgpt::eval::Throughput;
use foldgpt::{Account, Decoder, Error, Latency, LatencyOptions, Observer, latency};
use support::{FAMILIES, adapted, folded, kinds, load};

fn options(prompt: usize, new_tokens: usize, runs: usize) -> LatencyOptions {
    let mut options = LatencyOptions::default();
    (options.prompt, options.new_tokens, options.runs) = (prompt, new_tokens, runs);
    options
}

/// Counts passes, and stops after so many.
struct Passes {
    heard: Vec<u64>,
    total: u64,
    finished: bool,
    stop: u64,
}

impl Passes {
    fn stopping_after(stop: u64) -> Self {
        Self { heard: Vec::new(), total: 0, finished: false, stop }
    }
}

impl Observer for Passes {
    fn started(&mut self, stage: &'static str, total: u64) {
        assert_eq!(stage, "latency");
        self.total = total;
    }

    fn advanced(&mut self, _: &'static str, done: u64, _: u64) -> ControlFlow<()> {
        self.heard.push(done);
        if done >= self.stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn finished(&mut self, _: &'static str) {
        self.finished = true;
    }
}

fn check(found: &Latency, model: &Decoder, options: &LatencyOptions) {
    for Throughput { median, min, max, runs, .. } in [found.prefill, found.decode] {
        assert_eq!(runs, options.runs);
        assert!(min > 0.0 && min <= median && median <= max && max.is_finite(), "{found:?}");
    }
    let account = Account::counted(model, 1).unwrap();
    assert_eq!(found.resident_bytes, account.resident_bytes);
    assert_eq!(found.kv_bytes_per_token, account.kv_bytes_per_token);
    assert_eq!((found.prompt, found.new_tokens), (options.prompt, options.new_tokens));
}

#[test]
fn every_family_and_kind_of_model_is_measured_beside_the_dense_one() {
    let options = options(5, 3, 2);
    for family in FAMILIES {
        let dense = load(family);
        let (cut, adapted) = (dense.with_blocks(&[0, 3]).unwrap(), adapted(&dense));
        let models = [&dense, &cut, &adapted];
        let found = latency(&models, &options, &mut ()).unwrap();
        assert_eq!(found.len(), 3);
        found.iter().zip(models).for_each(|(found, model)| check(found, model, &options));
        assert_eq!(2 * found[1].kv_bytes_per_token, found[0].kv_bytes_per_token);
    }
    for (name, plan) in kinds("llama") {
        let tied = folded("llama", &plan);
        let found = latency(&[&tied], &options, &mut ()).unwrap();
        check(&found[0], &tied, &options);
        assert_eq!(found[0].dtype, "f32", "{name}");
    }
    let narrow = load("llama").to_dtype(DType::BF16).unwrap();
    assert_eq!(latency(&[&narrow], &options, &mut ()).unwrap()[0].dtype, "bf16");
    assert!(latency(&[], &options, &mut ()).unwrap().is_empty());
}

#[test]
fn every_pass_of_every_run_is_told_and_can_be_the_last() {
    let dense = load("llama");
    let cut = dense.with_blocks(&[0, 1]).unwrap();
    let all = 2 * (1 + 3) * (1 + 4);
    let mut passes = Passes::stopping_after(u64::MAX);
    latency(&[&dense, &cut], &options(6, 4, 3), &mut passes).unwrap();
    assert_eq!(passes.heard, (1..=all).collect::<Vec<u64>>());
    assert!(passes.total == all && passes.finished);
    for stop in [1, 2, 7, all] {
        let mut passes = Passes::stopping_after(stop);
        let error = latency(&[&dense, &cut], &options(6, 4, 3), &mut passes).unwrap_err();
        assert!(matches!(error, Error::Cancelled { stage: "latency" }), "{error}");
        assert!(passes.heard.len() as u64 == stop && passes.finished);
    }
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    let (llama, gpt2) = (load("llama"), load("gpt2"));
    let most = gpt2.architecture().position_limit().unwrap();
    for (model, options, name) in [
        (&llama, options(0, 1, 1), "prompt is 0"),
        (&llama, options(1, 0, 1), "new_tokens is 0"),
        (&llama, options(1, 1, 0), "runs is 0"),
        (&llama, options(usize::MAX, usize::MAX, usize::MAX), "prompt is"),
        (&gpt2, options(most, 1, 1), "prompt and new tokens together"),
    ] {
        let mut passes = Passes::stopping_after(0);
        let error = latency(&[&llama, model], &options, &mut passes).unwrap_err();
        assert!(matches!(error, Error::Argument { .. }), "{error}");
        assert!(error.to_string().contains(name), "{error}");
        assert!(passes.heard.is_empty());
    }
    // All positions that there are can be used.
    latency(&[&gpt2], &options(most - 1, 1, 1), &mut ()).unwrap();
}
