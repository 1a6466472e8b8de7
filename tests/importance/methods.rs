//! What each method computes, on every family.

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::importance::{
    AngularDistance, BlockInfluence, GreedyPerplexity, MacroInfluence, PerplexityIncrease, Random, Taylor,
};
use foldgpt::model::{BlockParam, Param, Unit};
use foldgpt::{Decoder, Importance};

use super::{gates, gates_with_coupling, loss_without, timeless, windows};
use crate::support::{FAMILIES, load};

pub(crate) fn methods(remove: usize) -> Vec<Box<dyn Importance>> {
    vec![
        Box::new(AngularDistance { remove, protected: vec![] }),
        Box::new(BlockInfluence::default()),
        Box::new(gates(remove)),
        Box::new(gates_with_coupling(remove)),
        Box::new(GreedyPerplexity { remove, ..GreedyPerplexity::default() }),
        Box::new(MacroInfluence { remove, ..MacroInfluence::default() }),
        Box::new(PerplexityIncrease::default()),
        Box::new(Random { seed: 1 }),
        Box::new(Taylor::default()),
    ]
}

#[test]
fn every_method_scores_every_family_and_repeats_itself_bit_for_bit() {
    for family in FAMILIES {
        let (decoder, windows) = (load(family), windows(family));
        for method in methods(2) {
            let name = method.method();
            let scores = method.score(&decoder, &windows, &mut ()).unwrap();
            assert_eq!(scores.blocks.len(), decoder.depth(), "{family} {name}");
            assert_eq!(scores.method, name);
            if name != "random" {
                let stability = scores.stability.unwrap();
                assert!((-1.0..=1.0).contains(&stability), "{family} {name}: {stability}");
                assert!(
                    scores.block_runs >= (windows.len() * decoder.depth()) as f64 * 0.5,
                    "{family} {name}"
                );
            }
            if let Some(chosen) = &scores.chosen {
                assert_eq!(chosen.len(), 2, "{family} {name}");
            }
            let again = method.score(&decoder, &windows, &mut ()).unwrap();
            assert_eq!(timeless(scores), timeless(again), "{family} {name}");
        }
    }
}

#[test]
fn perplexity_scores_are_the_losses_without_each_block() {
    let (decoder, windows) = (load("llama"), windows("llama"));
    let scores = PerplexityIncrease::default().score(&decoder, &windows, &mut ()).unwrap();
    for block in &scores.blocks {
        let expected = loss_without(&decoder, &windows, &[block.index]);
        assert!((block.importance - expected).abs() < 1e-6, "block {}", block.index);
    }
}

#[test]
fn greedy_perplexity_chooses_as_plain_forwards_would_and_runs_less() {
    let mut deep = load("llama").architecture().clone();
    deep.blocks = vec![deep.blocks[0]; 9];
    let decoder = Decoder::random(deep, 5, DType::F32, &Device::Cpu).unwrap();
    let windows = windows("llama");
    let scores = GreedyPerplexity { remove: 4, protected: vec![3], ..Default::default() }
        .score(&decoder, &windows, &mut ())
        .unwrap();
    let (mut order, mut separate) = (Vec::new(), 0);
    for round in 0..4 {
        let candidates: Vec<usize> = (1..8).filter(|block| *block != 3 && !order.contains(block)).collect();
        separate += (if round == 0 { 9 } else { candidates.len() }) * (9 - round - 1) * windows.len();
        let cost = |block: usize| loss_without(&decoder, &windows, &[order.as_slice(), &[block]].concat());
        let costs: Vec<(f64, usize)> = candidates.into_iter().map(|block| (cost(block), block)).collect();
        order.push(costs.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).unwrap().1);
    }
    assert_eq!(scores.chosen.unwrap(), order);
    let share = scores.block_runs / separate as f64;
    assert!(share < 0.65, "{share} of the block runs of separate forwards");
}

#[test]
fn one_window_has_no_stability() {
    let (decoder, windows) = (load("llama"), windows("llama").spread(1).unwrap());
    for method in methods(1) {
        assert_eq!(method.score(&decoder, &windows, &mut ()).unwrap().stability, None, "{}", method.method());
    }
}

#[test]
fn matrices_in_bf16_are_scored_by_every_method() {
    let decoder = load("llama").to_dtype(DType::BF16).unwrap();
    for method in methods(1) {
        method.score(&decoder, &windows("llama"), &mut ()).unwrap();
    }
}

#[test]
fn taylor_scores_are_those_of_the_whole_graph() {
    let (decoder, windows) = (load("llama"), windows("llama"));
    let mut vars: Vec<(usize, Tensor)> = Vec::new();
    let tracked = decoder
        .map(|param, tensor| match param {
            Param::Block(block, BlockParam::Weight(_)) => {
                let var = foldgpt::candle::Var::from_tensor(tensor)?.into_inner();
                vars.push((block, var.clone()));
                Ok(var)
            }
            _ => Ok(tensor.clone()),
        })
        .unwrap();
    let mut total = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
    for ids in windows.iter() {
        let logits =
            tracked.forward(&Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap()).unwrap();
        let rows = logits.squeeze(0).unwrap().narrow(0, 0, ids.len() - 1).unwrap();
        let targets = Tensor::from_slice(&ids[1..], ids.len() - 1, &Device::Cpu).unwrap();
        let loss = candle_nn::loss::cross_entropy(&rows, &targets).unwrap();
        total = (total + (loss / windows.len() as f64).unwrap()).unwrap();
    }
    let gradients = total.backward().unwrap();
    let mut expected = vec![0.0; decoder.depth()];
    for (block, var) in &vars {
        let product = (var * gradients.get(var).unwrap()).unwrap().abs().unwrap().sum_all().unwrap();
        expected[*block] += f64::from(product.to_scalar::<f32>().unwrap());
    }
    // All four blocks are among the first four or the last two, and raised alike.
    let highest = expected.iter().copied().fold(0.0, f64::max);
    let scores = Taylor::default().score(&decoder, &windows, &mut ()).unwrap().importance();
    for (block, (score, expected)) in scores.iter().zip(&expected).enumerate() {
        let expected = expected + highest;
        assert!((score / expected - 1.0).abs() < 1e-4, "block {block}: {score}, expected {expected}");
    }
}

/// The cosine of two vectors, in f64.
fn cosine(x: &[f32], y: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(x, y) / (dot(x, x) * dot(y, y)).sqrt()
}

/// The state after every block, token by token, the embedding first.
fn states(decoder: &Decoder, ids: &[u32]) -> Vec<Vec<Vec<f32>>> {
    let tensor = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
    let states = decoder.hidden_states(&tensor).unwrap();
    states.iter().map(|state| state.squeeze(0).unwrap().to_vec2().unwrap()).collect()
}

#[test]
fn angular_distance_is_that_of_the_last_token_and_passes_over_protected_blocks() {
    let (decoder, windows) = (load("llama"), windows("llama"));
    let distance = |first: usize, n: usize| {
        let angles = windows.iter().map(|ids| {
            let states = states(&decoder, ids);
            cosine(states[first].last().unwrap(), states[first + n].last().unwrap()).acos()
        });
        angles.sum::<f64>() / windows.len() as f64 / std::f64::consts::PI
    };
    let score =
        |protected: Vec<usize>| AngularDistance { remove: 2, protected }.score(&decoder, &windows, &mut ());
    let scores = score(vec![]).unwrap();
    for (block, score) in scores.importance().into_iter().enumerate() {
        assert!((score - distance(block, 1)).abs() < 1e-4, "block {block}: {score}");
    }
    let nearest = |firsts: &[usize]| {
        let by_distance = |a: &&usize, b: &&usize| distance(**a, 2).total_cmp(&distance(**b, 2));
        let first = *firsts.iter().min_by(by_distance).unwrap();
        Some(vec![first, first + 1])
    };
    assert_eq!(scores.chosen, nearest(&[0, 1, 2]));
    assert_eq!(score(vec![0]).unwrap().chosen, nearest(&[1, 2]));
    assert_eq!(score(vec![3]).unwrap().chosen, nearest(&[0, 1]));
    let error = score(vec![1, 3]).unwrap_err().to_string();
    assert!(error.contains("[1, 3]") && error.contains("2 consecutive"), "{error}");
}

#[test]
fn macro_influence_is_the_change_of_the_last_state() {
    let (decoder, windows) = (load("llama"), windows("llama"));
    let method = MacroInfluence { remove: 1, ..MacroInfluence::default() };
    let scores = method.score(&decoder, &windows, &mut ()).unwrap();
    let expected = |block: usize| {
        let without = decoder.without(&[Unit::whole(block)]).unwrap();
        let mut sum = 0.0;
        for ids in windows.iter() {
            let (whole, cut) = (states(&decoder, ids), states(&without, ids));
            let pairs = whole.last().unwrap().iter().zip(cut.last().unwrap());
            sum += pairs.map(|(x, y)| 1.0 - cosine(x, y)).sum::<f64>() / ids.len() as f64;
        }
        sum / windows.len() as f64
    };
    for (block, score) in scores.importance().into_iter().enumerate() {
        assert!(
            (score - expected(block)).abs() < 1e-5,
            "block {block}: {score}, expected {}",
            expected(block)
        );
    }
    let least = (0..4).min_by(|a, b| expected(*a).total_cmp(&expected(*b))).unwrap();
    assert_eq!(scores.chosen, Some(vec![least]));
}

#[test]
fn removing_more_than_there_is_is_refused() {
    let (decoder, windows) = (load("llama"), windows("llama"));
    for method in methods(5) {
        let chooses = !["block-influence", "perplexity", "random", "taylor"].contains(&method.method());
        assert_eq!(method.score(&decoder, &windows, &mut ()).is_err(), chooses, "{}", method.method());
    }
    assert!(
        GreedyPerplexity { remove: 1, protected: vec![7], ..Default::default() }
            .score(&decoder, &windows, &mut ())
            .is_err()
    );
}
