//! Walking back unit by unit against differentiating the whole graph at once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use foldgpt::candle::{DType, Tensor, Var};
use foldgpt::model::{Unit, Walk};
use support::{FAMILIES, input_ids, load};

/// One window of a family's fixture, and what its tokens predict.
fn window(family: &str) -> (Tensor, Vec<u32>) {
    let ids = input_ids(family).narrow(0, 0, 1).unwrap();
    let tokens = ids.squeeze(0).unwrap().to_vec1::<u32>().unwrap();
    (ids, tokens[1..].to_vec())
}

/// Loss and gate gradients of one window by whole-graph autograd through `units`.
fn whole_graph(decoder: &foldgpt::Decoder, units: &[Unit], gates: &[f64], ids: &Tensor) -> (f64, Vec<f64>) {
    let vars: Vec<Var> = gates.iter().map(|&g| Var::new(&[g as f32], ids.device()).unwrap()).collect();
    let pass = decoder.pass(0, ids.dim(1).unwrap()).unwrap();
    let mut x = decoder.embed(ids, &pass).unwrap();
    for (unit, gate) in units.iter().zip(&vars) {
        let y = decoder.run_unit(*unit, &x, &pass).unwrap();
        x = (&x + (y - &x).unwrap().broadcast_mul(gate.as_tensor()).unwrap()).unwrap();
    }
    let ids = ids.squeeze(0).unwrap().to_vec1::<u32>().unwrap();
    let rows = x.squeeze(0).unwrap().narrow(0, 0, ids.len() - 1).unwrap();
    let loss = decoder.nll(&rows, &ids[1..]).unwrap().sum_all().unwrap();
    let store = loss.backward().unwrap();
    let gradient = |var: &Var| f64::from(store.get(var).unwrap().to_vec1::<f32>().unwrap()[0]);
    (f64::from(loss.to_scalar::<f32>().unwrap()), vars.iter().map(gradient).collect())
}

#[test]
fn gate_gradients_are_those_of_the_whole_graph() {
    for family in FAMILIES {
        let decoder = load(family);
        let (ids, targets) = window(family);
        for units in [Unit::blocks(decoder.depth()), Unit::halves(decoder.depth())] {
            for pattern in [[1.0, 1.0, 1.0], [0.9, 0.3, 1.0], [1.0, 0.0, 0.5]] {
                let gates: Vec<f64> = (0..units.len()).map(|i| pattern[i % 3]).collect();
                let (loss, expected) = whole_graph(&decoder, &units, &gates, &ids);
                let walk = Walk::forward(&decoder, &units, &gates, &ids).unwrap();
                let (found, upstream) = decoder.loss_vjp(walk.output(), &targets).unwrap();
                assert!((found - loss).abs() < 1e-4 * loss, "{family}: loss {found}, expected {loss}");
                let gradients = walk.gate_gradients(&upstream, |_| true).unwrap();
                let largest = expected.iter().fold(0.0f64, |m, g| m.max(g.abs()));
                for (unit, (found, expected)) in units.iter().zip(gradients.iter().zip(&expected)) {
                    let off = (found - expected).abs() / largest;
                    assert!(off < 1e-4, "{family} unit {unit}: {found}, expected {expected}");
                }
            }
        }
    }
}

#[test]
fn keeping_activations_changes_no_bit_of_the_gate_gradients() {
    for family in FAMILIES {
        let decoder = load(family);
        let (ids, targets) = window(family);
        for units in [Unit::blocks(decoder.depth()), Unit::halves(decoder.depth())] {
            let gates: Vec<f64> = (0..units.len()).map(|i| [0.9, 1.0, 0.0][i % 3]).collect();
            let found = [Walk::forward, Walk::forward_keeping_activations].map(|forward| {
                let walk = forward(&decoder, &units, &gates, &ids).unwrap();
                let output = walk.output().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let (_, upstream) = decoder.loss_vjp(walk.output(), &targets).unwrap();
                (output, walk.gate_gradients(&upstream, |_| true).unwrap())
            });
            assert_eq!(found[0], found[1], "{family}");
        }
    }
}

#[test]
fn gate_gradients_with_matrices_in_bf16_are_those_in_f32_but_for_rounding() {
    for family in FAMILIES {
        let (ids, targets) = window(family);
        let narrow = load(family).to_dtype(DType::BF16).unwrap();
        let units = Unit::blocks(narrow.depth());
        let gradients = |decoder: &foldgpt::Decoder| {
            let walk = Walk::forward(decoder, &units, &[0.9, 1.0, 0.5, 0.7], &ids).unwrap();
            let (_, upstream) = decoder.loss_vjp(walk.output(), &targets).unwrap();
            walk.gate_gradients(&upstream, |_| true).unwrap()
        };
        let (found, expected) = (gradients(&narrow), gradients(&narrow.to_dtype(DType::F32).unwrap()));
        let largest = expected.iter().fold(0.0f64, |m, g| m.max(g.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 0.05 * largest, "{family}: {found}, expected {expected}");
        }
    }
}

#[test]
fn gates_of_zero_are_removed_units() {
    for family in FAMILIES {
        let decoder = load(family);
        let ids = input_ids(family).narrow(0, 0, 1).unwrap();
        let units = Unit::halves(decoder.depth());
        let gates: Vec<f64> = (0..units.len()).map(|i| if i == 2 || i == 5 { 0.0 } else { 1.0 }).collect();
        let walk = Walk::forward(&decoder, &units, &gates, &ids).unwrap();
        let removed = decoder.without(&[units[2], units[5]]).unwrap();
        assert_eq!(removed.depth(), decoder.depth());
        let expected = removed.hidden(&ids).unwrap();
        assert!(support::distance(walk.output(), &expected) == 0.0, "{family}");
        assert!(removed.parameter_count() < decoder.parameter_count());
    }
}
