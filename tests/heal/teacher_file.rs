//! A teacher whose answers lie in a file.

use std::ops::ControlFlow;

use foldgpt::candle::DType;
use foldgpt::heal::{CacheOptions, Losses, Record, Teacher, TeacherCache, Trainable};
use foldgpt::model::Param;
use foldgpt::plan::{Groups, Ranks, ResidualStart, ScaleStart};
use foldgpt::{Error, Observer, Plan, Windows};

use super::going_on::{StopAt, records};
use super::{cut, heal, same, windows};
use crate::support::{distance, folded, input_ids, load};

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
    std::fs::write(&path, b"foldtch2").unwrap();
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
fn a_teacher_without_finite_words_leaves_no_file() {
    let dense = load("llama");
    let broken = dense.map(|param, value| match param {
        Param::FinalNorm(_) => Ok((value * f64::NAN)?),
        _ => Ok(value.clone()),
    });
    let broken = broken.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("teacher");
    let options = CacheOptions::default();
    let error =
        TeacherCache::write(&path, &broken, "it", &windows(2, 0, &dense), &options, &mut ()).unwrap_err();
    assert!(matches!(&error, Error::NotFinite { what, .. } if what.contains("window 0")), "{error}");
    assert!(!path.exists());
}
