//! The pairwise matrix, and the search that it leads.

use std::path::Path;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::importance::{Coupling, losses_without};
use foldgpt::model::{Unit, Walk};
use foldgpt::{Bos, Checkpoint, Decoder, Importance, Windows};

use super::{gates_with_coupling, loss_without, windows};
use crate::support::load;

#[test]
fn coupling_is_that_of_separate_forwards_for_under_half_of_the_block_runs() {
    let mut deep = load("llama").architecture().clone();
    let depth = 12;
    deep.blocks = vec![deep.blocks[0]; depth];
    let decoder = Decoder::random(deep, 5, DType::F32, &Device::Cpu).unwrap();
    let windows = windows("llama");
    let coupling = Coupling::exact(&decoder, &windows, &Unit::blocks(depth), &mut ()).unwrap();
    let loss = |removed: &[usize]| loss_without(&decoder, &windows, removed);
    assert!((coupling.dense_loss - loss(&[])).abs() < 1e-6);
    let mut separate = depth + depth * (depth - 1);
    for i in 0..depth {
        for j in 0..depth {
            let pair = || loss(&[i, j]) - loss(&[i]) - loss(&[j]) + loss(&[]);
            let expected = if i == j { loss(&[i]) - loss(&[]) } else { pair() };
            assert!((coupling.get(i, j) - expected).abs() < 1e-5, "{i}, {j}");
            separate += if i < j { depth - 2 } else { 0 };
        }
    }
    let share = coupling.block_runs / (separate * windows.len()) as f64;
    assert!(share <= 0.45, "{share} of the block runs of separate forwards");
    assert!(Coupling::heat_map(&coupling.matrix).lines().count() == depth + 1);
}

#[test]
fn gates_with_coupling_choose_the_best_of_all_sets() {
    let checkpoint =
        Checkpoint::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-stories")).unwrap();
    let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    let text = crate::stories::corpus(5, 3_000);
    let windows =
        Windows::from_text(&checkpoint.tokenizer().unwrap(), &text, 48, Some(4), Bos::Auto).unwrap();
    for remove in [3, 5] {
        let all = sets_of(remove, decoder.depth());
        let losses = losses_without(&decoder, &windows, &all, &mut ()).unwrap();
        let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
        let scores = gates_with_coupling(remove).score(&decoder, &windows, &mut ()).unwrap();
        let chosen = scores.chosen.unwrap();
        let found = losses[all.iter().position(|set| *set == chosen).unwrap()];
        assert!(found <= best, "{remove} of {}: {chosen:?} costs {found}, the best {best}", decoder.depth());
        let measured = scores.block_runs / (windows.len() * decoder.depth()) as f64;
        assert!(measured < all.len() as f64 / 2.0, "{measured:.0} forwards for {} sets", all.len());
    }
}

/// Every set of `size` places below `depth`, ascending.
fn sets_of(size: usize, depth: usize) -> Vec<Vec<usize>> {
    let sets = (0u32..1 << depth).filter(|set| set.count_ones() as usize == size);
    sets.map(|set| (0..depth).filter(|place| set >> place & 1 == 1).collect()).collect()
}

#[test]
fn estimated_coupling_is_the_change_of_gate_gradients() {
    let (decoder, windows, units) = (load("llama"), windows("llama"), Unit::blocks(4));
    let exact = Coupling::exact(&decoder, &windows, &units, &mut ()).unwrap();
    let estimate = Coupling::from_gate_gradients(&decoder, &windows, &units, &mut ()).unwrap();
    let slopes = |gates: [f64; 4]| {
        let mut sum = [0.0; 4];
        for ids in windows.iter() {
            let tensor = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
            let walk = Walk::forward(&decoder, &units, &gates, &tensor).unwrap();
            let (_, upstream) = decoder.loss_vjp(walk.output(), &ids[1..]).unwrap();
            for (sum, slope) in sum.iter_mut().zip(walk.gate_gradients(&upstream, |_| true).unwrap()) {
                *sum += slope / (windows.len() * (ids.len() - 1)) as f64;
            }
        }
        sum
    };
    let whole = slopes([1.0; 4]);
    let off = |i: usize| slopes(std::array::from_fn(|place| if place == i { 0.0 } else { 1.0 }));
    let rows: Vec<[f64; 4]> = (0..4).map(off).collect();
    for i in 0..4 {
        assert!((exact.get(i, i) - estimate.get(i, i)).abs() < 1e-6);
        for j in (0..4).filter(|j| *j != i) {
            let expected = f64::midpoint(whole[j] - rows[i][j], whole[i] - rows[j][i]);
            assert!((estimate.get(i, j) - expected).abs() < 1e-9, "{i}, {j}");
            assert_eq!(estimate.get(i, j).to_bits(), estimate.get(j, i).to_bits());
        }
    }
}

#[test]
fn coupling_keeps_protected_blocks_and_stays_within_its_budget() {
    let (decoder, windows) = (load("llama"), windows("llama"));
    let mut method = gates_with_coupling(1);
    method.gates.protected = vec![0, 2];
    let chosen = method.score(&decoder, &windows, &mut ()).unwrap().chosen.unwrap();
    assert!(chosen == [1] || chosen == [3], "{chosen:?}");
    // What is measured whatever the budget: singles, pairs, gates, and the sets that these suggest.
    let runs = |budget: f64| {
        let mut method = gates_with_coupling(2);
        method.budget_block_runs = budget;
        method.score(&decoder, &windows, &mut ()).unwrap().block_runs
    };
    // Sets that nothing has measured before.
    let mut large = gates_with_coupling(3);
    large.budget_block_runs = 0.0;
    assert_eq!(large.score(&decoder, &windows, &mut ()).unwrap().chosen.map(|chosen| chosen.len()), Some(3));
    let least = runs(0.0);
    for budget in [30.0, 60.0] {
        let more = runs(budget) - least;
        assert!(more <= budget, "{more} block runs of a budget of {budget}");
    }
    method.budget_block_runs = f64::NAN;
    assert!(method.score(&decoder, &windows, &mut ()).is_err());
}

#[test]
fn kept_losses_change_no_choice() {
    let (decoder, windows) = (load("llama"), windows("llama"));
    let scratch = tempfile::tempdir().unwrap();
    let method = |remove: usize, kept: bool| {
        let mut method = gates_with_coupling(remove);
        // So little that the search ends by it.
        method.budget_block_runs = 40.0;
        method.losses_file = kept.then(|| scratch.path().join("losses"));
        method.score(&decoder, &windows, &mut ()).unwrap()
    };
    let alone = method(2, false);
    for _ in 0..2 {
        method(1, true);
        let kept = method(2, true);
        assert_eq!((kept.chosen, kept.blocks), (alone.chosen.clone(), alone.blocks.clone()));
    }
    let foreign = scratch.path().join("foreign");
    std::fs::write(&foreign, "{\"gates\": 1}").unwrap();
    let mut other = gates_with_coupling(1);
    other.losses_file = Some(foreign.clone());
    assert!(other.score(&decoder, &windows, &mut ()).unwrap_err().to_string().contains("something else"));
    assert_eq!(std::fs::read_to_string(&foreign).unwrap(), "{\"gates\": 1}");
}
