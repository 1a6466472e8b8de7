//! Gates of blocks and of halves of blocks.

use std::path::Path;

use foldgpt::candle::{DType, Device};
use foldgpt::importance::GateKind;
use foldgpt::model::{BlockParam, Param, Part, Unit};
use foldgpt::{Bos, Checkpoint, Importance, Plan, SaveOptions, Scores, Target, Windows, fold};

use super::{gates, gates_with_coupling, loss_without, windows};
use crate::support::{distance, input_ids, load, open};

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
    let text = crate::stories::corpus(21, 6_000);
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
fn gradient_checkpointing_changes_no_bit_of_what_is_trained() {
    for family in ["llama", "gemma2"] {
        let (decoder, windows) = (load(family), windows(family));
        let mut gates = gates(1);
        gates.steps = 6;
        assert!(gates.gradient_checkpointing);
        let expected = gates.score(&decoder, &windows, &mut ()).unwrap();
        gates.gradient_checkpointing = false;
        let found = gates.score(&decoder, &windows, &mut ()).unwrap();
        assert_eq!(found.trajectory, expected.trajectory, "{family}");
        assert_eq!(
            (found.importance(), found.options),
            (expected.importance(), expected.options),
            "{family}"
        );
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
    let checkpoint = open("gemma2");
    checkpoint.save(&folded, Some(&plan), &directory, &SaveOptions::default(), &mut ()).unwrap();
    let reloaded = Checkpoint::open(&directory).unwrap().decoder(DType::F32, &Device::Cpu).unwrap();
    let ids = input_ids("gemma2");
    assert!(distance(&reloaded.forward(&ids).unwrap(), &folded.forward(&ids).unwrap()) < 1e-6);
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
