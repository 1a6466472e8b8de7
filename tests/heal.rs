//! Healing as its users see it: what it trains, what it keeps, how it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::heal::{
    Budget, CacheOptions, Decay, Heal, Lora, Losses, ParamGroup, Record, Teacher, TeacherCache, Trainable,
};
use foldgpt::model::Block;
use foldgpt::plan::{Groups, Ranks, ResidualStart, ScaleStart};
use foldgpt::{Checkpoint, Decoder, Error, Observer, Plan, SaveOptions, Windows, perplexity};
use support::{distance, folded, input_ids, load, open};

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

#[test]
fn every_loss_brings_the_student_closer() {
    let dense = load("llama");
    let cut = cut(&dense);
    let (train, held_out) = (windows(16, 0, &dense), windows(4, 100, &dense));
    for (losses, teaches) in [(Losses::default(), false), (Losses::logits(), true), (Losses::tail(), true)] {
        let mut heal = heal(12);
        heal.losses = losses;
        let teacher = teaches.then_some(Teacher::Model(&dense));
        let healed = heal.run(&cut, &train, Some(&held_out), teacher, &mut ()).unwrap();
        let report = &healed.report;
        let (before, after) = (report.held_out[0].1, report.held_out.last().unwrap().1);
        assert!(after < before - 0.02, "{losses:?}: {before} to {after}");
        assert_eq!((report.steps, report.tokens), (12, 12 * 4 * 23));
        // Adapters of matrices that no other depth uses are part of them.
        assert!(healed.decoder.architecture().fold.is_plain());
        assert!((nll(&healed.decoder, &held_out) - after).abs() < 0.02, "rounding costs too much");
    }
}

#[test]
fn the_weights_of_the_lowest_held_out_loss_are_kept() {
    let dense = load("llama");
    let train = windows(8, 0, &dense);
    // A text of another rule: what is learnt of the one is wrong of the other, sooner or later.
    let other = |index: u32| (0..24).map(|i| (index * 3 + i * i * 7) % 64).collect();
    let held_out = Windows::from_ids((0..4).map(other).collect()).unwrap();
    let mut heal = heal(60);
    heal.groups = vec![ParamGroup::new(Trainable::Matrices, 0.01)];
    (heal.evaluate_every, heal.patience, heal.max_grad_norm) = (1, Some(3), None);
    let healed = heal.run(&dense, &train, Some(&held_out), None, &mut ()).unwrap();
    let report = &healed.report;
    assert!(report.stopped_early && report.steps == report.kept + 3 && report.steps < 60, "{report:?}");
    let (_, best) = report.held_out.iter().copied().find(|(step, _)| *step == report.kept).unwrap();
    assert!(report.held_out.iter().all(|(_, loss)| *loss >= best));
    let found = nll(&healed.decoder, &held_out);
    assert!((found - best).abs() < 1e-5, "{found}, expected {best}");
}

#[test]
fn micro_batches_change_nothing_but_rounding() {
    let dense = load("qwen3");
    let train = windows(8, 0, &dense);
    let run = |micro_batch| {
        let mut heal = heal(3);
        heal.micro_batch = micro_batch;
        // Adam makes steps of their length of gradients that are nothing but rounding.
        heal.groups.iter_mut().for_each(|group| group.learning_rate = 1e-3);
        heal.run(&dense, &train, None, None, &mut ()).unwrap().decoder
    };
    let ids = input_ids("qwen3");
    let logits = |decoder: &Decoder| decoder.forward(&ids).unwrap();
    let (one, four) = (logits(&run(1)), logits(&run(4)));
    assert!(distance(&one, &four) < 1e-3);
    assert!(distance(&one, &logits(&dense)) > 1e-3);
    assert!(same(&run(2), &run(2)));
}

#[test]
fn matrices_in_bf16_are_healed_by_f32_adapters() {
    let dense = load("llama").to_dtype(DType::BF16).unwrap();
    let (train, held_out) = (windows(8, 0, &dense), windows(4, 100, &dense));
    let healed = heal(8).run(&dense, &train, Some(&held_out), None, &mut ()).unwrap();
    assert_eq!(healed.decoder.dtype(), DType::BF16);
    let blocks = healed.decoder.blocks();
    assert!(blocks.iter().flat_map(Block::matrices).all(|matrix| matrix.dtype() == DType::BF16));
    assert!(healed.report.held_out.last().unwrap().1 < healed.report.held_out[0].1);
}

#[test]
fn untouched_tensors_are_those_of_the_original() {
    let dense = load("llama");
    let mut heal = heal(2);
    heal.groups = vec![ParamGroup::new(Trainable::Norms, 1e-3)];
    let healed = heal.run(&dense, &windows(4, 0, &dense), None, None, &mut ()).unwrap().decoder;
    for (before, after) in dense.blocks().iter().zip(healed.blocks()) {
        for (before, after) in before.matrices().zip(after.matrices()) {
            assert_eq!(before.id(), after.id());
        }
    }
    assert!(!same(&dense, &healed));
}

#[test]
fn small_steps_of_norms_and_scales_are_saved_with_all_their_digits() {
    let checkpoint = open("llama").stored_as(DType::BF16);
    let dense = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    let mut heal = heal(3);
    heal.groups = vec![ParamGroup::new(Trainable::Norms, 1e-4), ParamGroup::new(Trainable::Scales, 1e-4)];
    let healed = heal.run(&dense, &windows(4, 0, &dense), None, None, &mut ()).unwrap().decoder;
    // Scales are there for the training: what is left has the shape of what was healed.
    assert_eq!(healed.architecture(), dense.architecture());
    // A gain of about 1 moves by less than bf16 can say.
    let moved = |(before, after): (&Tensor, &Tensor)| distance(after, before) > 0.0;
    assert!(dense.tensors().zip(healed.tensors()).filter(|(before, _)| before.rank() == 1).all(moved));
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("healed");
    checkpoint.save(&healed, None, &out, &SaveOptions::default(), &mut ()).unwrap();
    let reloaded = Checkpoint::open(&out).unwrap().decoder(DType::F32, &Device::Cpu).unwrap();
    assert!(same(&healed, &reloaded));
}

#[test]
fn adapters_that_are_not_merged_stay() {
    let dense = load("llama");
    let mut lora = Lora::default();
    (lora.rank, lora.merge) = (2, false);
    let mut heal = heal(3);
    heal.groups = vec![ParamGroup::new(Trainable::Lora(lora), 1e-2)];
    let healed = heal.run(&dense, &windows(4, 0, &dense), None, None, &mut ()).unwrap().decoder;
    assert!(!healed.architecture().fold.is_plain());
    let merged = healed.merge_adapters().unwrap();
    assert!(merged.architecture().fold.is_plain());
    let ids = input_ids("llama");
    assert!(distance(&merged.forward(&ids).unwrap(), &healed.forward(&ids).unwrap()) < 1e-5);
    // They are trained further where they are.
    heal.groups = vec![ParamGroup::new(Trainable::Residuals, 1e-2)];
    let further = heal.run(&healed, &windows(4, 0, &dense), None, None, &mut ()).unwrap();
    assert_eq!(further.decoder.architecture(), healed.architecture());
}

#[test]
fn a_loss_that_is_not_finite_stops_with_its_step_and_leaves_a_good_state() {
    let dense = load("llama");
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let mut heal = heal(40);
    heal.groups = vec![ParamGroup::new(Trainable::Matrices, 1e30)];
    (heal.save_every, heal.max_grad_norm) = (1, None);
    heal.state_file = Some(state.clone());
    let error = heal.run(&dense, &windows(4, 0, &dense), None, None, &mut ()).unwrap_err();
    let Error::NotFinite { what, .. } = &error else { panic!("{error}") };
    assert!(what.contains("of healing step 2"), "{error}");
    assert_finite(&state);
}

fn assert_finite(state: &Path) {
    let kept = foldgpt::candle::safetensors::load(state, &Device::Cpu).unwrap();
    let finite = |tensor: &Tensor| {
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|value| value.is_finite())
    };
    assert!(!kept.is_empty() && kept.values().all(finite));
}

#[test]
fn what_nothing_depends_on_is_named() {
    let dense = load("llama");
    let mut heal = heal(1);
    heal.losses = Losses::tail();
    (heal.losses.cross_entropy, heal.losses.divergence) = (0.0, 0.0);
    let teacher = Some(Teacher::Model(&dense));
    let error = heal.run(&dense, &windows(4, 0, &dense), None, teacher, &mut ()).unwrap_err();
    assert_eq!(error.to_string(), "no gradient reaches final norm gain");
}

#[test]
fn options_outside_of_their_range_are_refused() {
    let dense = load("llama");
    let train = windows(4, 0, &dense);
    let refused = |change: fn(&mut Heal), expected: &str| {
        let mut heal = heal(1);
        change(&mut heal);
        let error = heal.run(&dense, &train, None, None, &mut ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}, expected {expected}");
    };
    refused(|heal| heal.budget = Budget::Steps(0), "budget");
    refused(|heal| heal.budget = Budget::Minutes(f64::NAN), "budget");
    refused(|heal| heal.batch = 0, "batch");
    refused(|heal| heal.adamw.beta2 = 1.0, "beta2");
    refused(|heal| heal.schedule.warmup = -0.1, "warmup");
    refused(|heal| heal.max_grad_norm = Some(0.0), "max_grad_norm");
    refused(|heal| heal.losses = Losses::tail(), "teacher");
    refused(|heal| heal.losses.cross_entropy = f64::NAN, "cross_entropy");
    refused(|heal| heal.groups.clear(), "parameter groups");
    refused(|heal| heal.groups = vec![ParamGroup::new(Trainable::Norms, -1.0)], "learning_rate");
    let mut lora = Lora::default();
    lora.rank = 10_000;
    let mut heal = heal(1);
    heal.groups = vec![ParamGroup::new(Trainable::Lora(lora), 1e-3)];
    let error = heal.run(&dense, &train, None, None, &mut ()).unwrap_err().to_string();
    assert!(error.contains("lora rank is 10000"), "{error}");
}

#[test]
fn a_last_update_that_is_not_finite_is_neither_saved_nor_returned() {
    let dense = load("llama");
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let mut heal = heal(1);
    // Beyond what f32 holds.
    heal.groups = vec![ParamGroup::new(Trainable::Matrices, 1e39)];
    heal.state_file = Some(state.clone());
    let error = heal.run(&dense, &windows(4, 0, &dense), None, None, &mut ()).unwrap_err();
    let Error::NotFinite { what, value } = &error else { panic!("{error}") };
    assert!(what.contains("weight after healing step 1") && !value.is_finite(), "{error}");
    assert_finite(&state);
}

#[test]
fn a_held_out_loss_that_is_not_finite_stops_with_its_step() {
    let dense = load("llama");
    let train = windows(4, 0, &dense);
    let mut heal = heal(3);
    heal.groups = vec![ParamGroup::new(Trainable::Matrices, 1e30)];
    (heal.evaluate_every, heal.max_grad_norm) = (1, None);
    let error = heal.run(&dense, &train, Some(&train), None, &mut ()).unwrap_err();
    let Error::NotFinite { what, value } = &error else { panic!("{error}") };
    assert!(what == "the held-out loss after healing step 1" && !value.is_finite(), "{error}");
}

#[test]
fn a_gradient_that_is_not_finite_stops_with_its_step() {
    let dense = load("llama");
    let mut heal = heal(2);
    // The loss is a number of f64, its gradient one of f32.
    heal.losses.cross_entropy = 1e41;
    let error = heal.run(&dense, &windows(4, 0, &dense), None, None, &mut ()).unwrap_err();
    let Error::NotFinite { what, value } = &error else { panic!("{error}") };
    assert!(what == "the gradient of healing step 1" && !value.is_finite(), "{error}");
}

/// Stops when a number of windows are read.
struct StopAt(u64);

impl Observer for StopAt {
    fn advanced(&mut self, stage: &'static str, done: u64, _: u64) -> ControlFlow<()> {
        if stage == "heal" && done >= self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

fn records(path: &Path) -> Vec<Record> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_cancelled_run_goes_on_to_the_same_weights_and_the_same_log() {
    let dense = load("llama");
    let (train, held_out) = (windows(7, 0, &dense), windows(4, 100, &dense));
    let directory = tempfile::tempdir().unwrap();
    let run = |name: &str, observer: &mut dyn Observer| {
        let mut heal = heal(13);
        heal.losses = Losses::tail();
        heal.state_file = Some(directory.path().join(format!("{name}.state")));
        heal.log_file = Some(directory.path().join(format!("{name}.jsonl")));
        heal.run(&dense, &train, Some(&held_out), Some(Teacher::Model(&dense)), observer)
    };
    let whole = run("whole", &mut ()).unwrap();
    // After steps, and within one.
    for stop in [12, 26, 44] {
        let error = run("cut", &mut StopAt(stop)).unwrap_err();
        assert!(matches!(error, Error::Cancelled { stage: "heal" }), "{error}");
    }
    let resumed = run("cut", &mut ()).unwrap();
    assert!(same(&whole.decoder, &resumed.decoder));
    assert_eq!(whole.report.held_out, resumed.report.held_out);
    let without_time = |name: &str| -> Vec<String> {
        let text = records(&directory.path().join(name)).into_iter().map(|record| match record {
            Record::Step { step, tokens, loss, terms, gradient_norm, learning_rate, .. } => {
                format!("{step} {tokens} {loss} {terms:?} {gradient_norm} {learning_rate}")
            }
            other => format!("{other:?}"),
        });
        text.collect()
    };
    assert_eq!(without_time("whole.jsonl"), without_time("cut.jsonl"));
    assert_eq!(without_time("whole.jsonl").len(), 13 + 4);
    // A finished run is only read.
    assert!(same(&run("cut", &mut ()).unwrap().decoder, &whole.decoder));
}

/// What an observer is told of a healing.
#[derive(Default)]
struct Told {
    done: Vec<(u64, u64)>,
    steps: usize,
    stop: Option<u64>,
}

impl Observer for Told {
    fn advanced(&mut self, stage: &'static str, done: u64, total: u64) -> ControlFlow<()> {
        if stage == "heal" {
            self.done.push((done, total));
        }
        if self.stop.is_some_and(|stop| done >= stop) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    fn measured(&mut self, _: &'static str, what: &'static str, _: f64) {
        self.steps += usize::from(what == "loss");
    }
}

#[test]
fn observers_hear_of_every_micro_batch() {
    let dense = load("llama");
    let mut told = Told::default();
    heal(2).run(&dense, &windows(7, 0, &dense), None, None, &mut told).unwrap();
    assert_eq!(told.done, [(2, 8), (4, 8), (6, 8), (8, 8)]);
}

#[test]
fn cancelling_loses_no_step_that_is_done() {
    let dense = load("llama");
    let train = windows(7, 0, &dense);
    let directory = tempfile::tempdir().unwrap();
    let mut heal = heal(6);
    let whole = heal.run(&dense, &train, None, None, &mut ()).unwrap();
    (heal.save_every, heal.state_file) = (100, Some(directory.path().join("state")));
    let mut told = Told { stop: Some(14), ..Told::default() };
    let error = heal.run(&dense, &train, None, None, &mut told).unwrap_err();
    assert!(matches!(error, Error::Cancelled { stage: "heal" }), "{error}");
    assert_eq!((told.steps, told.done.last()), (3, Some(&(14, 24))));
    // How often it is saved is another matter than what it does.
    heal.save_every = 7;
    let mut told = Told::default();
    let resumed = heal.run(&dense, &train, None, None, &mut told).unwrap();
    assert_eq!((told.steps, resumed.report.steps), (3, 6));
    assert!(same(&whole.decoder, &resumed.decoder));
}

#[test]
fn a_tied_student_in_bf16_goes_on_with_a_teacher_in_a_file() {
    let dense = load("llama").to_dtype(DType::BF16).unwrap();
    let residual = ResidualStart::Svd;
    let plan =
        Plan::builder().share(Groups::of(2)).scales(ScaleStart::Ones).residual(Ranks::Uniform(2), residual);
    let plan = plan.build(dense.architecture()).unwrap();
    let tied = folded("llama", &plan).to_dtype(DType::BF16).unwrap();
    let (train, held_out) = (windows(7, 0, &dense), windows(4, 100, &dense));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("teacher");
    TeacherCache::write(&path, &dense, "the model", &train, &CacheOptions::default(), &mut ()).unwrap();
    let run = |name: &str, observer: &mut dyn Observer| {
        let cache = TeacherCache::open(&path, "the model", &train).unwrap();
        let mut heal = heal(9);
        heal.losses = Losses::tail();
        heal.groups.push(Trainable::SharedMatrices.into());
        heal.state_file = Some(directory.path().join(name));
        heal.run(&tied, &train, Some(&held_out), Some(Teacher::Cache(&cache)), observer)
    };
    let whole = run("whole", &mut ()).unwrap();
    for stop in [6, 20, 32] {
        let error = run("cut", &mut StopAt(stop)).unwrap_err();
        assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    }
    let resumed = run("cut", &mut ()).unwrap();
    assert!(same(&whole.decoder, &resumed.decoder) && !same(&whole.decoder, &tied));
    assert_eq!(whole.report.held_out, resumed.report.held_out);
}

#[test]
fn a_log_that_is_none_is_refused_and_stays() {
    let dense = load("llama");
    let train = windows(4, 0, &dense);
    let directory = tempfile::tempdir().unwrap();
    let mut heal = heal(2);
    let log = directory.path().join("notes");
    heal.log_file = Some(log.clone());
    heal.state_file = Some(directory.path().join("state"));
    for state in [false, true] {
        std::fs::write(&log, "what I did today\n").unwrap();
        let error = heal.run(&dense, &train, None, None, &mut ()).unwrap_err().to_string();
        assert!(error.contains("is no log of a healing"), "with a state, {state}: {error}");
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "what I did today\n");
        std::fs::remove_file(&log).unwrap();
        heal.run(&dense, &train, None, None, &mut ()).unwrap();
    }
}

#[test]
fn the_state_of_another_healing_is_refused() {
    let dense = load("llama");
    let train = windows(7, 0, &dense);
    let directory = tempfile::tempdir().unwrap();
    let mut heal = heal(2);
    heal.state_file = Some(directory.path().join("state"));
    heal.run(&dense, &train, None, None, &mut ()).unwrap();
    let refused = |heal: &Heal, decoder: &Decoder, train: &Windows| {
        let error = heal.run(decoder, train, None, None, &mut ()).unwrap_err().to_string();
        assert!(error.contains("another healing"), "{error}");
    };
    refused(&heal, &dense, &windows(7, 1, &dense));
    refused(&heal, &dense.with_blocks(&[0, 1]).unwrap(), &train);
    heal.seed = 1;
    refused(&heal, &dense, &train);
    let state = directory.path().join("state");
    heal.seed = 0;
    let whole = std::fs::read(&state).unwrap();
    let broken = |bytes: &[u8]| {
        std::fs::write(&state, bytes).unwrap();
        heal.run(&dense, &train, None, None, &mut ()).unwrap_err().to_string()
    };
    for bytes in [&b"nothing"[..], &whole[..whole.len() - 1], &whole[..20], &[0xff; 64]] {
        let error = broken(bytes);
        assert!(error.contains("no state of a healing"), "{error}");
    }
    // A tensor of another name, as long.
    let text = b"mean of block 1 ";
    let place = whole.windows(text.len()).position(|found| found == text).unwrap();
    let mut renamed = whole.clone();
    renamed[place] = b'M';
    let error = broken(&renamed);
    assert!(error.contains("tensor `mean of block 1") && error.contains("missing"), "{error}");
    std::fs::write(&state, &whole).unwrap();
    heal.run(&dense, &train, None, None, &mut ()).unwrap();
}

#[test]
fn a_budget_of_time_ends_and_one_of_tokens_counts() {
    let dense = load("llama");
    let train = windows(7, 0, &dense);
    let mut heal = heal(1);
    heal.budget = Budget::Minutes(0.002);
    let report = heal.run(&dense, &train, None, None, &mut ()).unwrap().report;
    assert!(report.steps > 0 && report.seconds >= 0.12, "{report:?}");
    heal.budget = Budget::Tokens(4 * 23 + 1);
    assert_eq!(heal.run(&dense, &train, None, None, &mut ()).unwrap().report.steps, 2);
}

#[test]
fn a_teacher_in_a_file_teaches_as_one_in_memory() {
    let dense = load("llama");
    let vocab = dense.architecture().vocab_size;
    let cut = cut(&dense);
    let train = windows(7, 0, &dense);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("teacher");
    let mut options = CacheOptions::default();
    (options.tail_blocks, options.top_tokens) = (2, vocab);
    TeacherCache::write(&path, &dense, "the model", &train, &options, &mut ()).unwrap();
    let cache = TeacherCache::open(&path, "the model", &train).unwrap();
    let log = directory.path().join("log");
    let first = |teacher| {
        let mut heal = heal(2);
        heal.losses = Losses::tail();
        heal.losses.tail_blocks = 2;
        heal.log_file = Some(log.clone());
        let decoder = heal.run(&cut, &train, None, Some(teacher), &mut ()).unwrap().decoder;
        match &records(&log)[0] {
            Record::Step { terms, .. } => (*terms, decoder),
            other => panic!("{other:?}"),
        }
    };
    let ((found, from_file), (expected, from_memory)) =
        (first(Teacher::Cache(&cache)), first(Teacher::Model(&dense)));
    // bf16 has 8 bits.
    let close = |a: f64, b: f64| (a - b).abs() < 0.02 * b.abs().max(0.1);
    assert!((found.cross_entropy - expected.cross_entropy).abs() < 1e-9);
    assert!(close(found.divergence, expected.divergence), "{found:?}, expected {expected:?}");
    assert!(close(found.tail, expected.tail), "{found:?}, expected {expected:?}");
    let ids = input_ids("llama");
    let (found, expected) = (from_file.forward(&ids).unwrap(), from_memory.forward(&ids).unwrap());
    assert!(distance(&found, &expected) < 0.02);
}

#[test]
fn a_teacher_that_is_cancelled_leaves_no_file() {
    struct Stop;
    impl Observer for Stop {
        fn advanced(&mut self, _: &'static str, done: u64, _: u64) -> ControlFlow<()> {
            if done == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }
    let dense = load("llama");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("teacher");
    let (train, options) = (windows(3, 0, &dense), CacheOptions::default());
    let error = TeacherCache::write(&path, &dense, "the model", &train, &options, &mut Stop).unwrap_err();
    assert!(matches!(error, Error::Cancelled { stage: "teacher" }), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_teacher_in_a_file_is_refused_for_another_model_or_text_and_where_it_is_damaged() {
    let dense = load("llama");
    let train = windows(7, 0, &dense);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("teacher");
    let mut options = CacheOptions::default();
    options.top_tokens = 5;
    TeacherCache::write(&path, &dense, "the model", &train, &options, &mut ()).unwrap();
    let refused = |model: &str, windows: &Windows, expected: &str| {
        let error = TeacherCache::open(&path, model, windows).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}, expected {expected}");
    };
    refused("another", &train, "sha256 the model, expected another");
    refused("the model", &windows(7, 1, &dense), "is of windows with");
    let cache = TeacherCache::open(&path, "the model", &train).unwrap();
    let run = |losses: Losses| {
        let mut heal = heal(2);
        heal.losses = losses;
        heal.run(&dense, &train, None, Some(Teacher::Cache(&cache)), &mut ()).map(|_| ())
    };
    let (mut deeper, mut warmer) = (Losses::tail(), Losses::tail());
    (deeper.tail_blocks, warmer.temperature) = (2, 3.0);
    assert!(run(deeper).unwrap_err().to_string().contains("tail_blocks is 2"));
    assert!(run(warmer).unwrap_err().to_string().contains("temperature is 3"));
    run(Losses::tail()).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 40;
    bytes[last] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let error = run(Losses::tail()).unwrap_err().to_string();
    assert!(error.contains("window 6 is damaged"), "{error}");
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    refused("the model", &train, "bytes, expected");
    std::fs::write(&path, b"foldtch1").unwrap();
    refused("the model", &train, "too short");
}

#[test]
fn sizes_that_no_machine_can_hold_are_refused_of_a_teacher_in_a_file() {
    let dense = load("llama");
    let train = windows(3, 0, &dense);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("teacher");
    TeacherCache::write(&path, &dense, "the model", &train, &CacheOptions::default(), &mut ()).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let (length, rest) = bytes[8..].split_at(8);
    let (json, records) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
    for (field, value) in [
        ("hidden_size", u64::MAX),
        ("hidden_size", 0),
        ("positions", u64::MAX / 2),
        ("windows", u64::MAX / 2),
    ] {
        let mut header: serde_json::Value = serde_json::from_slice(json).unwrap();
        header[field] = value.into();
        let header = header.to_string();
        let length = (header.len() as u64).to_le_bytes();
        std::fs::write(&path, [&bytes[..8], &length, header.as_bytes(), records].concat()).unwrap();
        let error = TeacherCache::open(&path, "the model", &train).unwrap_err().to_string();
        assert!(error.contains("is no teacher's cache: its header is of"), "{field}: {error}");
    }
}

#[test]
fn models_of_one_origin_share_what_they_have_in_common() {
    let dense = load("llama");
    // As it is when it was read from another file.
    let copy = dense.with_blocks(&[0, 1, 3]).unwrap().map(|_, value| Ok(value.copy()?)).unwrap();
    let shared = copy.sharing(&dense).unwrap();
    let ids = |decoder: &Decoder| decoder.tensors().map(Tensor::id).collect::<Vec<_>>();
    let (known, found) = (ids(&dense), ids(&shared));
    assert!(found.iter().all(|id| known.contains(id)));
    assert!(same(&shared, &copy) && shared.parameter_count() == copy.parameter_count());
    let mut heal = heal(2);
    heal.groups = vec![ParamGroup::new(Trainable::Matrices, 1e-3)];
    let before = dense.map(|_, value| Ok(value.copy()?)).unwrap();
    heal.run(&shared, &windows(4, 0, &dense), None, Some(Teacher::Model(&dense)), &mut ()).unwrap();
    assert!(same(&dense, &before), "the teacher was trained");
}

#[test]
fn windows_are_parted_in_order_and_none_is_lost() {
    let whole = windows(5, 0, &load("llama"));
    let (first, rest) = whole.split_at(3).unwrap();
    assert_eq!((first.len(), rest.len()), (3, 2));
    assert!(first.iter().chain(rest.iter()).eq(whole.iter()));
    for count in [0, 5, 6] {
        let error = whole.split_at(count).unwrap_err().to_string();
        assert_eq!(error, format!("windows is {count}, expected from 1 to 4, to part 5 windows"));
    }
}
