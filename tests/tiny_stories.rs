//! The committed model is small, and worth pruning: it has learned more than neighbouring tokens, and needs every block.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/stories/mod.rs"]
mod stories;

use std::path::Path;

use candle_core::{DType, Device};
use foldgpt::plan::{Donor, Groups, Ranks, ResidualStart};
use foldgpt::{Bos, Checkpoint, Decoder, Plan, Windows, fold_on, output_errors, perplexity};

/// `examples/pretrain.rs` holds out the stories of this seed.
const HELD_OUT: u64 = 2;

fn checkpoint() -> Checkpoint {
    Checkpoint::open(directory()).unwrap()
}

fn directory() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-stories"))
}

fn nll(decoder: &Decoder, bytes: usize) -> f64 {
    let text = stories::corpus(HELD_OUT, bytes);
    let tokenizer = checkpoint().tokenizer().unwrap();
    let windows = Windows::from_text(&tokenizer, &text, 256, None, Bos::Never).unwrap();
    perplexity(decoder, &windows, &mut ()).unwrap().mean_nll
}

#[test]
fn the_files_fit_into_six_megabytes() {
    let sizes = directory().read_dir().unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
    assert!(sizes.sum::<u64>() <= 6_000_000);
}

#[test]
fn the_loss_is_below_that_of_bigrams() {
    let checkpoint = checkpoint();
    let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    let encode = |seed, bytes| checkpoint.tokenizer().unwrap().encode(&stories::corpus(seed, bytes)).unwrap();
    let vocab = checkpoint.architecture().vocab_size;
    let bigrams = stories::ngram::bigram_nll(&encode(1, 500_000), &encode(HELD_OUT, 10_000), vocab);
    let model = nll(&decoder, 10_000);
    assert!(model + 0.5 < bigrams, "model {model:.3}, bigrams {bigrams:.3}");
}

/// On stories that none has seen the whitened start is nearer to the original than the plain one, whatever the rank:
/// it weighs directions by what calibration stories do in them, and these are stories too.
#[test]
fn whitening_lowers_the_output_error_on_stories_that_none_has_seen() {
    let checkpoint = checkpoint();
    let dense = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let cut = |seed| {
        let text = stories::corpus(seed, 12_000);
        Windows::from_text(&tokenizer, &text, 128, Some(8), Bos::Auto).unwrap()
    };
    let (calibration, held_out) = (cut(1), cut(HELD_OUT));
    for rank in [2, 8, 16] {
        let error = |start| {
            let plan = Plan::builder().share(Groups::of(2)).donor(Donor::Mean);
            let plan = plan.residual(Ranks::Uniform(rank), start).build(dense.architecture()).unwrap();
            let folded = fold_on(&dense, &plan, &calibration, &mut ()).unwrap();
            let errors = output_errors(&dense, &folded, &held_out, &mut ()).unwrap();
            errors.iter().map(|error| error.relative).sum::<f64>() / errors.len() as f64
        };
        let (plain, whitened) = (error(ResidualStart::Svd), error(ResidualStart::Whitened));
        assert!(whitened < 0.99 * plain, "rank {rank}: {whitened} whitened, {plain} plain");
    }
}

#[test]
fn every_block_is_needed() {
    let decoder = checkpoint().decoder(DType::F32, &Device::Cpu).unwrap();
    assert!(decoder.depth() >= 12);
    let whole = nll(&decoder, 6_000);
    for removed in 0..decoder.depth() {
        let kept: Vec<usize> = (0..decoder.depth()).filter(|&index| index != removed).collect();
        let cost = nll(&decoder.with_blocks(&kept).unwrap(), 6_000) - whole;
        assert!(cost > 0.01, "without block {removed} the loss rises by {cost:.4}");
    }
}
