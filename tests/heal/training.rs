//! What is trained and by what, what is kept, and what ends a healing.

use std::path::Path;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::heal::{Budget, Heal, Lora, Losses, ParamGroup, Teacher, Trainable};
use foldgpt::model::Block;
use foldgpt::{Checkpoint, Decoder, Error, SaveOptions, Windows};

use super::{cut, heal, nll, same, windows};
use crate::support::{distance, input_ids, load, open};

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
    refused(|heal| heal.patience = Some(0), "patience");
    refused(|heal| heal.patience = Some(2), "held-out windows");
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
