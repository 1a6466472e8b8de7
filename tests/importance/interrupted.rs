//! Scoring that is cancelled, and what it keeps.

use std::ops::ControlFlow;

use foldgpt::importance::{GateKind, GatesWithCoupling, GreedyPerplexity};
use foldgpt::{Error, Importance, Observer};

use super::methods::methods;
use super::{gates, gates_with_coupling, windows};
use crate::support::load;

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
        assert!(error.contains("another training") && error.contains("other options"), "{error}");
        let mut other = kept.clone();
        other.warm_start = Some(vec![1.0, 2.0, 3.0, 4.0]);
        let error = other.score(&decoder, &windows, &mut ()).unwrap_err().to_string();
        assert!(error.contains("other options") && error.contains("delete it"), "{error}");
    }
}

#[test]
fn a_state_of_another_training_is_told_before_pairs_are_measured() {
    struct Stop;
    impl Observer for Stop {
        fn advanced(&mut self, _: &'static str, _: u64, _: u64) -> ControlFlow<()> {
            ControlFlow::Break(())
        }
    }
    let (decoder, windows, scratch) = (load("llama"), windows("llama"), tempfile::tempdir().unwrap());
    let mut coupling = GatesWithCoupling::default();
    (coupling.gates.remove, coupling.gates.steps) = (1, 4);
    coupling.gates.state_file = Some(scratch.path().join("gates.json"));
    coupling.score(&decoder, &windows, &mut ()).unwrap();
    let mut other = coupling.clone();
    other.gates.steps = 6;
    let error = other.score(&decoder, &windows, &mut Stop).unwrap_err().to_string();
    assert!(error.contains("gates.json") && error.contains("other options"), "{error}");

    // Where the gates started is known only once single blocks are measured.
    let file = scratch.path().join("gates.json");
    let mut state: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    state["starts"] = "of others".into();
    std::fs::write(&file, state.to_string()).unwrap();
    let error = coupling.score(&decoder, &windows, &mut ()).unwrap_err().to_string();
    assert!(error.contains("gates.json") && error.contains("other scores to start from"), "{error}");
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
