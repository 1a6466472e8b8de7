//! What a depth adds to its matrices: values, gradients, merging.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use foldgpt::Decoder;
use foldgpt::candle::{DType, Device, Tensor, Var};
use foldgpt::model::{Adapter, BlockParam, LowRank, Param, Projection, Unit, Walk};
use support::{FAMILIES, adapted, distance, input_ids, load};

fn is_own(param: Param) -> bool {
    use BlockParam::{LoraA, LoraB, Scale};
    matches!(param, Param::Block(_, Scale(_) | LoraA(_) | LoraB(_)))
}

/// The decoder with everything of `trained` as a variable, and those variables.
fn tracked(decoder: &Decoder) -> (Decoder, Vec<(Param, Var)>) {
    let mut vars = Vec::new();
    let tracked = decoder.map(|param, value| {
        if !is_own(param) {
            return Ok(value.clone());
        }
        let var = Var::from_tensor(value)?;
        vars.push((param, var.clone()));
        Ok(var.as_tensor().clone())
    });
    (tracked.unwrap(), vars)
}

fn loss(decoder: &Decoder, ids: &Tensor) -> Tensor {
    let ids = ids.narrow(0, 0, 1).unwrap();
    let targets = ids.squeeze(0).unwrap().to_vec1::<u32>().unwrap();
    let hidden = decoder.hidden(&ids).unwrap().squeeze(0).unwrap();
    let rows = hidden.narrow(0, 0, targets.len() - 1).unwrap();
    decoder.nll(&rows, &targets[1..]).unwrap().mean_all().unwrap()
}

fn scalar(tensor: &Tensor) -> f64 {
    f64::from(tensor.to_scalar::<f32>().unwrap())
}

#[test]
fn an_adapted_decoder_computes_what_its_merged_matrices_do() {
    for family in FAMILIES {
        let decoder = adapted(&load(family));
        let merged = decoder.map(|param, value| match param {
            Param::Block(depth, BlockParam::Weight(projection)) => {
                Ok(decoder.blocks()[depth].merged(projection)?.unwrap())
            }
            Param::Block(_, BlockParam::Scale(_)) => Ok(value.ones_like()?),
            Param::Block(_, BlockParam::LoraB(_)) => Ok(value.zeros_like()?),
            _ => Ok(value.clone()),
        });
        let ids = input_ids(family);
        let expected = merged.unwrap().forward(&ids).unwrap();
        let found = decoder.forward(&ids).unwrap();
        assert!(distance(&found, &expected) < 1e-5, "{family}");
        assert!(
            distance(&found, &load(family).forward(&ids).unwrap()) > 1e-3,
            "{family}: adapters do nothing"
        );
        let primitive = decoder.with_kernels(foldgpt::ops::Kernels::Primitive).forward(&ids).unwrap();
        assert!(distance(&found, &primitive) < 1e-5, "{family}");
    }
}

#[test]
fn every_adapter_has_the_gradient_of_finite_differences() {
    for family in FAMILIES {
        let ids = input_ids(family);
        let (decoder, vars) = tracked(&adapted(&load(family)));
        assert!(vars.len() >= 6 * decoder.depth(), "{family}");
        let gradients = loss(&decoder, &ids).backward().unwrap();
        // One direction for each kind: the gradient itself, along which the slope is largest.
        for kind in [0, 1, 2] {
            let of_kind = |param: &Param| match param {
                Param::Block(_, BlockParam::Scale(_)) => kind == 0,
                Param::Block(_, BlockParam::LoraA(_)) => kind == 1,
                _ => kind == 2,
            };
            let chosen: Vec<_> = vars.iter().filter(|(param, _)| of_kind(param)).collect();
            let directions: Vec<Tensor> = chosen
                .iter()
                .map(|(param, var)| {
                    gradients.get(var).unwrap_or_else(|| panic!("{family}: no gradient of {param}")).clone()
                })
                .collect();
            let square: f64 = directions.iter().map(|g| scalar(&g.sqr().unwrap().sum_all().unwrap())).sum();
            let originals: Vec<Tensor> =
                chosen.iter().map(|(_, var)| var.as_tensor().copy().unwrap()).collect();
            let step = 3e-2 / square.sqrt();
            let at = |times: f64| {
                for (((_, var), direction), original) in chosen.iter().zip(&directions).zip(&originals) {
                    var.set(&(original + (direction * (times * step)).unwrap()).unwrap()).unwrap();
                }
                scalar(&loss(&decoder, &ids))
            };
            let slope = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * step);
            at(0.0);
            assert!(
                (slope - square).abs() < 0.01 * square,
                "{family} kind {kind}: {slope}, expected {square}"
            );
        }
    }
}

#[test]
fn walking_back_through_adapted_blocks_is_the_whole_graph() {
    for family in FAMILIES {
        let decoder = adapted(&load(family));
        let ids = input_ids(family).narrow(0, 0, 1).unwrap();
        let targets = &ids.squeeze(0).unwrap().to_vec1::<u32>().unwrap()[1..];
        let units = Unit::blocks(decoder.depth());
        let gates = vec![1.0; units.len()];
        let walk = Walk::forward(&decoder, &units, &gates, &ids).unwrap();
        let (_, upstream) = decoder.loss_vjp(walk.output(), targets).unwrap();
        let found = walk.gate_gradients(&upstream, |_| true).unwrap();
        for (index, found) in found.iter().enumerate() {
            let at = |gate: f64| {
                let mut gates = gates.clone();
                gates[index] = gate;
                let walk = Walk::forward(&decoder, &units, &gates, &ids).unwrap();
                decoder.loss_vjp(walk.output(), targets).unwrap().0
            };
            let expected = (8.0 * (at(1.03) - at(0.97)) - (at(1.06) - at(0.94))) / 0.36;
            let scale = expected.abs().max(0.5);
            assert!(
                (found - expected).abs() < 0.02 * scale,
                "{family} {index}: {found}, expected {expected}"
            );
        }
    }
}

#[test]
fn adapters_of_other_shapes_are_refused() {
    let decoder = load("llama");
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let hidden = decoder.architecture().hidden_size;
    let low_rank = |a: &[usize], b: &[usize]| Adapter::new(None, Some(LowRank { a: zeros(a), b: zeros(b) }));
    for adapter in [
        Adapter::new(Some(zeros(&[hidden + 1])), None),
        low_rank(&[2, hidden + 1], &[hidden, 2]),
        low_rank(&[2, hidden], &[hidden, 3]),
        low_rank(&[0, hidden], &[hidden, 0]),
    ] {
        let error = decoder.with_adapter(0, Projection::O, adapter).unwrap_err().to_string();
        assert!(error.contains("adapter"), "{error}");
    }
    assert!(decoder.with_adapter(9, Projection::O, Adapter::default()).is_err());
}
