//! Healings that are cancelled and go on, and what they leave behind.

use std::ops::ControlFlow;
use std::path::Path;

use foldgpt::heal::{Heal, Losses, Record, Teacher};
use foldgpt::{Decoder, Error, Observer, Windows};

use super::{heal, same, windows};
use crate::support::load;

/// Stops when a number of windows are read.
pub(crate) struct StopAt(pub(crate) u64);

impl Observer for StopAt {
    fn advanced(&mut self, stage: &'static str, done: u64, _: u64) -> ControlFlow<()> {
        if stage == "heal" && done >= self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

pub(crate) fn records(path: &Path) -> Vec<Record> {
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
            Record::Step { step, tokens, loss, terms, gradient_norm, rate_factor, .. } => {
                format!("{step} {tokens} {loss} {terms:?} {gradient_norm} {rate_factor}")
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
    let refused = |heal: &Heal, decoder: &Decoder, train: &Windows, differs: &str| {
        let error = heal.run(decoder, train, None, None, &mut ()).unwrap_err().to_string();
        assert!(error.contains(&format!("another healing ({differs})")), "{error}");
    };
    refused(&heal, &dense, &windows(7, 1, &dense), "text");
    refused(&heal, &dense.with_blocks(&[0, 1]).unwrap(), &train, "model");
    heal.seed = 1;
    refused(&heal, &dense, &train, "seed");
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
