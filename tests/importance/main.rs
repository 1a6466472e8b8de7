//! The methods: what they compute, what they cost, and that the same seed gives the same scores.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod coupling;
mod gates;
mod interrupted;
mod methods;
#[path = "../../examples/stories/mod.rs"]
mod stories;
#[path = "../support/mod.rs"]
mod support;

use foldgpt::importance::{Gates, GatesWithCoupling};
use foldgpt::model::Unit;
use foldgpt::{Decoder, Scores, Windows, perplexity};

use crate::support::input_ids;

fn windows(family: &str) -> Windows {
    let ids = input_ids(family).to_vec2::<u32>().unwrap();
    let shifted: Vec<Vec<u32>> = ids.iter().map(|row| row.iter().map(|id| (id + 3) % 96).collect()).collect();
    Windows::from_ids([ids, shifted].concat()).unwrap()
}

fn loss_without(decoder: &Decoder, windows: &Windows, removed: &[usize]) -> f64 {
    let units: Vec<Unit> = removed.iter().copied().map(Unit::whole).collect();
    perplexity(&decoder.without(&units).unwrap(), windows, &mut ()).unwrap().mean_nll
}

fn gates(remove: usize) -> Gates {
    let mut gates = Gates::default();
    (gates.remove, gates.steps, gates.batch) = (remove, 12, 1);
    gates
}

fn gates_with_coupling(remove: usize) -> GatesWithCoupling {
    let mut method = GatesWithCoupling::default();
    (method.gates, method.search_windows) = (gates(remove), 2);
    method
}

/// What does not depend on the clock.
fn timeless(mut scores: Scores) -> Scores {
    scores.seconds = 0.0;
    scores
}
