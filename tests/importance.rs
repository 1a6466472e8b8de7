//! The methods: what they compute, what they cost, and that the same seed gives the same scores.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/stories/mod.rs"]
mod stories;
mod support;

use std::ops::ControlFlow;
use std::path::Path;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::importance::{
    AngularDistance, BlockInfluence, Coupling, GateKind, Gates, GatesWithCoupling, GreedyPerplexity,
    MacroInfluence, PerplexityIncrease, Random, Taylor, losses_without,
};
use foldgpt::model::{BlockParam, Param, Part, Unit, Walk};
use foldgpt::{
    Bos, Checkpoint, Decoder, Error, Importance, Observer, Plan, SaveOptions, Scores, Target, Windows, fold,
    perplexity,
};
use support::{FAMILIES, input_ids, load};

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

fn methods(remove: usize) -> Vec<Box<dyn Importance>> {
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

/// What does not depend on the clock.
fn timeless(mut scores: Scores) -> Scores {
    scores.seconds = 0.0;
    scores
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
    let text = stories::corpus(5, 3_000);
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
fn gates_close_on_blocks_that_do_nothing() {
    // The embedded model, of which blocks 3 and 8 are made idle: nothing else can go for so little.
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-stories");
    let checkpoint = Checkpoint::open(tiny).unwrap();
    let idle = checkpoint
        .decoder(DType::F32, &Device::Cpu)
        .unwrap()
        .map(|param, tensor| {
            let idle = matches!(param, Param::Block(3 | 8, BlockParam::Weight(p))
                if ["o_proj", "down_proj"].contains(&p.name()));
            Ok(if idle { (tensor * 1e-3)? } else { tensor.clone() })
        })
        .unwrap();
    let text = stories::corpus(21, 6_000);
    let windows =
        Windows::from_text(&checkpoint.tokenizer().unwrap(), &text, 64, Some(8), Bos::Auto).unwrap();
    for kind in [GateKind::HardConcrete, GateKind::StraightThrough] {
        let mut gates = gates(2);
        (gates.kind, gates.steps, gates.batch) = (kind, 80, 2);
        let scores = gates.score(&idle, &windows, &mut ()).unwrap();
        let mut low: Vec<usize> = scores.ascending()[..2].iter().map(|unit| unit.block).collect();
        low.sort_unstable();
        assert_eq!(low, [3, 8], "{kind:?}: {:?}", scores.importance());
    }
}

#[test]
fn gates_stop_early_once_they_are_polarised() {
    let (decoder, windows) = (load("llama"), windows("llama"));
    let mut gates = gates(1);
    // Every gate is within a half of 0 or 1; each set of gates has had its step.
    (gates.steps, gates.polarised) = (40, 0.5);
    let scores = gates.score(&decoder, &windows, &mut ()).unwrap();
    assert_eq!(scores.trajectory.len(), 4);
    gates.polarised = 0.0;
    assert_eq!(gates.score(&decoder, &windows, &mut ()).unwrap().trajectory.len(), 40);
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
fn without_a_number_to_remove_coupling_scores_singles_and_gates_refuse() {
    let (decoder, windows) = (load("llama"), windows("llama"));
    let scores = gates_with_coupling(0).score(&decoder, &windows, &mut ()).unwrap();
    let dense = loss_without(&decoder, &windows, &[]);
    for (block, score) in scores.importance().into_iter().enumerate() {
        let expected = loss_without(&decoder, &windows, &[block]) - dense;
        assert!((score - expected).abs() < 1e-5, "block {block}: {score}, expected {expected}");
    }
    assert!(scores.chosen.is_none() && scores.coupling.is_some());
    let error = gates(0).score(&decoder, &windows, &mut ()).unwrap_err().to_string();
    assert!(error.contains("blocks to remove") && error.contains("at least 1"), "{error}");
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

#[test]
fn a_cancelled_stage_is_finished() {
    struct Stages(Vec<&'static str>);
    impl Observer for Stages {
        fn started(&mut self, stage: &'static str, _: u64) {
            self.0.push(stage);
        }
        fn advanced(&mut self, _: &'static str, _: u64, _: u64) -> ControlFlow<()> {
            ControlFlow::Break(())
        }
        fn finished(&mut self, stage: &'static str) {
            assert_eq!(self.0.pop(), Some(stage));
        }
    }
    let (decoder, windows) = (load("llama"), windows("llama"));
    for method in methods(1).into_iter().filter(|method| method.method() != "random") {
        let mut stages = Stages(Vec::new());
        let result = method.score(&decoder, &windows, &mut stages);
        assert!(matches!(result, Err(Error::Cancelled { .. })), "{}", method.method());
        assert!(stages.0.is_empty(), "{} left {:?} open", method.method(), stages.0);
    }
}

#[test]
fn interrupted_gates_go_on_as_if_nothing_had_happened() {
    struct StopAt(u64);
    impl Observer for StopAt {
        fn advanced(&mut self, _: &'static str, done: u64, _: u64) -> ControlFlow<()> {
            if done == self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }
    let (decoder, windows) = (load("qwen3"), windows("qwen3"));
    for kind in [GateKind::HardConcrete, GateKind::StraightThrough, GateKind::SmoothedL0] {
        let scratch = tempfile::tempdir().unwrap();
        let mut plain = gates(2);
        (plain.kind, plain.steps) = (kind, 24);
        let mut kept = plain.clone();
        kept.state_file = Some(scratch.path().join("gates.json"));
        let cancelled = kept.score(&decoder, &windows, &mut StopAt(13));
        assert!(matches!(cancelled, Err(Error::Cancelled { .. })));
        let resumed = kept.score(&decoder, &windows, &mut ()).unwrap();
        let whole = plain.score(&decoder, &windows, &mut ()).unwrap();
        assert_eq!(resumed.importance(), whole.importance(), "{kind:?}");
        assert!((resumed.block_runs - whole.block_runs).abs() < f64::EPSILON);
        let mut other = kept.clone();
        other.learning_rate = 0.2;
        let error = other.score(&decoder, &windows, &mut ()).unwrap_err().to_string();
        assert!(error.contains("another training"), "{error}");
    }
}

#[test]
fn an_interrupted_search_goes_on_from_what_it_measured() {
    struct StopAt(&'static str, u64);
    impl Observer for StopAt {
        fn advanced(&mut self, stage: &'static str, done: u64, _: u64) -> ControlFlow<()> {
            if stage == self.0 && done >= self.1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }
    type Case = (&'static str, Box<dyn Importance>, Box<dyn Importance>, StopAt);
    let (decoder, windows) = (load("llama"), windows("llama"));
    let scratch = tempfile::tempdir().unwrap();
    let file = |name: &str| Some(scratch.path().join(name));
    let greedy = |losses_file| GreedyPerplexity { remove: 2, protected: vec![], losses_file };
    let coupled = |losses_file| {
        let mut method = gates_with_coupling(2);
        method.losses_file = losses_file;
        method
    };
    let cases: [Case; 2] = [
        ("greedy", Box::new(greedy(file("greedy"))), Box::new(greedy(None)), StopAt("greedy-perplexity", 20)),
        ("coupled", Box::new(coupled(file("coupled"))), Box::new(coupled(None)), StopAt("finalists", 0)),
    ];
    for (name, kept, plain, mut stop) in cases {
        let cancelled = kept.score(&decoder, &windows, &mut stop);
        assert!(matches!(cancelled, Err(Error::Cancelled { .. })), "{name}: {cancelled:?}");
        // As a crash leaves it: the last line is not whole.
        let path = scratch.path().join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().count() > 2, "{name}: {text}");
        std::fs::write(&path, &text[..text.len() - 10]).unwrap();
        let lines = || std::fs::read_to_string(&path).unwrap().lines().count();
        let left = lines() - 1;
        let resumed = kept.score(&decoder, &windows, &mut ()).unwrap();
        let whole = plain.score(&decoder, &windows, &mut ()).unwrap();
        assert_eq!((resumed.importance(), &resumed.chosen), (whole.importance(), &whole.chosen), "{name}");
        // The finalists are measured on windows that the search has seen, which kept losses do not run again.
        let least = if name == "greedy" { whole.block_runs } else { 0.0 };
        assert!(resumed.block_runs > least, "{name}: what was lost was run again");
        let grown = lines();
        assert!(grown > left, "{name}: what was lost was not measured again");
        // Everything is known: nothing of a third run's losses is measured.
        let again = kept.score(&decoder, &windows, &mut ()).unwrap();
        assert_eq!(again.chosen, whole.chosen, "{name}");
        assert_eq!(lines(), grown, "{name}: what was known was measured again");
        let error = kept.score(&load("qwen3"), &windows, &mut ()).unwrap_err().to_string();
        assert!(error.contains("another model"), "{name}: {error}");
    }
}

#[test]
fn halves_of_blocks_have_gates_of_their_own() {
    let (decoder, windows) = (load("gemma2"), windows("gemma2"));
    let mut gates = gates(3);
    gates.protected = vec![0];
    let trained = gates.train(&decoder, &windows, &Unit::halves(4), &mut ()).unwrap();
    assert_eq!(trained.gates.len(), 8);
    assert!(trained.gates[..2].iter().all(|gate| *gate > 0.999), "protected gates stay open");
    assert!(trained.gates[2..].iter().all(|gate| (0.0..=1.0).contains(gate)));
    let arch = decoder.architecture();
    let expected: f64 = trained
        .units
        .iter()
        .zip(&trained.gates)
        .map(|(unit, gate)| gate * arch.parameters_of(unit.part) as f64)
        .sum();
    let target = arch.parameters_of(Part::Whole) as f64;
    assert!(
        (expected / target - 1.0).abs() < 1e-6,
        "one block's worth of four is open: {expected} of {target}"
    );
}

#[test]
fn scores_of_halves_make_a_plan_of_halves() {
    let (decoder, windows) = (load("gemma2"), windows("gemma2"));
    let mut gates = gates(1);
    gates.halves = true;
    let scores = gates.score(&decoder, &windows, &mut ()).unwrap();
    assert_eq!(scores.blocks.len(), 8);
    let plan = Plan::new(decoder.architecture(), &scores, Target::Blocks(1), &[0]).unwrap();
    assert_eq!(Plan::from_json(&plan.to_json().unwrap()).unwrap(), plan);
    let folded = fold(&decoder, &plan).unwrap();
    let removed = decoder.parameter_count() - folded.parameter_count();
    let block = decoder.architecture().parameters_of(Part::Whole);
    assert!(removed.abs_diff(block) <= block / 2, "{removed} of about {block} parameters");
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("out");
    let checkpoint = support::open("gemma2");
    checkpoint.save(&folded, Some(&plan), &directory, &SaveOptions::default(), &mut ()).unwrap();
    let reloaded = Checkpoint::open(&directory).unwrap().decoder(DType::F32, &Device::Cpu).unwrap();
    let ids = input_ids("gemma2");
    assert!(support::distance(&reloaded.forward(&ids).unwrap(), &folded.forward(&ids).unwrap()) < 1e-6);
}

#[test]
fn halves_that_make_a_block_remove_the_block() {
    let decoder = load("llama");
    let windows = windows("llama");
    let units = Unit::halves(4);
    let importance = vec![9.0, 9.0, 0.1, 0.2, 0.3, 10.0, 9.0, 9.0];
    let scores = Scores::of_units("test", &windows, &units, importance).unwrap();
    let plan = Plan::new(decoder.architecture(), &scores, Target::Rate(0.3), &[]).unwrap();
    assert_eq!((plan.removed(), plan.removed_halves()), (&[1][..], &[][..]));
    let more = Plan::new(decoder.architecture(), &scores, Target::Blocks(2), &[3]).unwrap();
    assert_eq!(more.removed(), [1]);
    assert!(more.removed_halves().contains(&units[4]));
    let json = more.to_json().unwrap().replace("\"part\": \"attention\"", "\"part\": \"whole\"");
    assert!(Plan::from_json(&json).is_err());
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
