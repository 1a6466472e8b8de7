//! What planning and folding hold in memory, counted by the allocator, is what a dry run says and a limit goes by.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use foldgpt::candle::{DType, Device};
use foldgpt::importance::Method;
use foldgpt::pipeline::{Share, Stage};
use foldgpt::plan::{Groups, Ranks, Residual, ResidualStart, ScaleStart};
use foldgpt::{Bytes, Compressor, Decoder, Error, Observer, SaveOptions};
use peak_alloc::PeakAlloc;
use support::new_llama;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const SEQ: usize = 128;
const WINDOWS: usize = 24;
const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 512;
const DEPTH: usize = 6;
const F32: usize = size_of::<f32>();

/// A random model on disk, with the tokenizer of the embedded one.
fn write(directory: &Path) {
    let checkpoint = new_llama(serde_json::json!({
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": DEPTH,
        "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": true,
    }));
    let decoder = Decoder::random(checkpoint.architecture().clone(), 0, DType::F32, &Device::Cpu).unwrap();
    checkpoint.save(&decoder, None, directory, &SaveOptions::default(), &mut ()).unwrap();
}

/// The most bytes that there were in each stage.
#[derive(Default)]
struct Peaks(BTreeMap<&'static str, usize>);

impl Observer for Peaks {
    fn started(&mut self, stage: &'static str, _: u64) {
        if stage.starts_with("compress: ") {
            ALLOCATOR.reset_peak_usage();
        }
    }

    fn finished(&mut self, stage: &'static str) {
        self.0.insert(stage, ALLOCATOR.peak_usage());
    }
}

fn compressor(directory: &Path, out: &str, ranks: Ranks) -> Compressor {
    let mut share = Share::new(Groups::of(2));
    share.own.scales = Some(ScaleStart::LeastSquares);
    share.own.residual = Some(Residual { ranks, start: ResidualStart::Whitened });
    let mut compressor = Compressor::new(
        directory.join("model").to_str().unwrap(),
        directory.join("text.txt"),
        directory.join(out),
    )
    .method(Method::BlockInfluence)
    .share(share);
    let recipe = &mut compressor.recipe;
    (recipe.windows.seq_len, recipe.windows.calibrate, recipe.windows.evaluate) = (SEQ, WINDOWS, 2);
    recipe.samples.tokens = 0;
    compressor
}

// One test: others would be counted too.
#[test]
fn planning_and_folding_take_what_is_counted_and_a_limit_below_it_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path();
    write(&path.join("model"));
    let line = "Anna lost the red kite near the old bridge, and Ben was sad.\n";
    std::fs::write(path.join("text.txt"), line.repeat(400)).unwrap();
    for (out, ranks) in [("uniform", Ranks::Uniform(4)), ("spread", Ranks::Parameters(20_000))] {
        let forecast = compressor(path, out, ranks).dry_run(&mut ()).unwrap();
        let expected = |stage: Stage| {
            let stage = forecast.stages.iter().find(|forecast| forecast.stage == stage).unwrap();
            (stage.peak_bytes - forecast.process_bytes.unwrap_or_default()) as usize
        };
        // A state of every window before every block and behind the last is there at once, beside the weights.
        let states = (DEPTH + 1) * WINDOWS * SEQ * HIDDEN * F32;
        let weights = DEPTH * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE) * F32;
        assert!(expected(Stage::Plan) > weights + states, "{out}");
        let mut peaks = Peaks::default();
        compressor(path, out, ranks).run(&mut peaks).unwrap();
        for (stage, name) in [(Stage::Plan, "compress: plan"), (Stage::Fold, "compress: fold")] {
            let (found, expected) = (peaks.0[name], expected(stage));
            // What is counted leaves out the text, its tokenizer and the allocator's own.
            let limit = expected + expected / 16;
            assert!(found < limit, "{out} {name}: {found} bytes, expected fewer than {limit}");
            assert!(found > expected / 2, "{out} {name}: {found} bytes, {expected} counted");
        }
    }
    let (least, ranks) = (2 * WINDOWS * SEQ * HIDDEN * F32, Ranks::Uniform(4));
    let limited = |limit: usize| {
        let limit = Bytes(limit as u64);
        compressor(path, "limited", ranks).max_memory(limit).dry_run(&mut ())
    };
    let forecast = compressor(path, "limited", ranks).dry_run(&mut ()).unwrap();
    let counted = (forecast.peak_bytes() - forecast.process_bytes.unwrap_or_default()) as usize;
    assert!(limited(2 * counted).is_ok());
    let error = limited(counted - least).unwrap_err();
    let Error::Recipe { field: Some(field), reason } = &error else { panic!("{error}") };
    assert_eq!(field, "max_memory");
    assert!(reason.contains("`share` has to have the model in memory"), "{error}");
}
