//! Healing as its users see it: what it trains, what it keeps, how it goes on and how it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod going_on;
#[cfg(unix)]
mod killed;
#[path = "../support/mod.rs"]
mod support;
mod teacher_file;
mod training;

use foldgpt::candle::{DType, Tensor};
use foldgpt::heal::{Budget, Decay, Heal};
use foldgpt::{Decoder, Windows, perplexity};

/// Windows of a text in which tokens follow each other by a rule.
fn windows(count: usize, seed: u32, decoder: &Decoder) -> Windows {
    let vocab = decoder.architecture().vocab_size as u32;
    let window = |index: u32| (0..24).map(|i| ((index + seed) * 5 + i * 3) % vocab).collect();
    Windows::from_ids((0..count as u32).map(window).collect()).unwrap()
}

/// The fixture without one of its blocks.
fn cut(decoder: &Decoder) -> Decoder {
    decoder.with_blocks(&[0, 1, 3]).unwrap()
}

fn heal(steps: usize) -> Heal {
    let mut heal = Heal::default();
    (heal.budget, heal.batch, heal.micro_batch) = (Budget::Steps(steps), 4, 2);
    (heal.evaluate_every, heal.save_every) = (5, 4);
    heal.schedule.decay = Decay::Constant;
    heal
}

fn nll(decoder: &Decoder, windows: &Windows) -> f64 {
    perplexity(decoder, windows, &mut ()).unwrap().mean_nll
}

fn same(a: &Decoder, b: &Decoder) -> bool {
    let values = |decoder: &Decoder| -> Vec<Vec<u32>> {
        let bits = |tensor: &Tensor| {
            let values =
                tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values.into_iter().map(f32::to_bits).collect()
        };
        decoder.tensors().map(bits).collect()
    };
    values(a) == values(b)
}
