//! What a working directory keeps: what is known again, what is done anew, and what is never taken for one's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod compressions;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use compressions::{MODEL, SEQ_LEN, Watch, compressor, directory, files, heal, weights};
use foldgpt::candle::{DType, Device};
use foldgpt::pipeline::{Goal, Stage};
use foldgpt::{Account, Bos, Checkpoint, Error, LatencyOptions, Observer, Windows};

#[test]
fn a_rerun_does_only_what_changed() {
    let directory = directory();
    let path = directory.path();
    let one = compressor(path, "one").heal(heal(2));
    one.run(&mut ()).unwrap();
    let before = weights(&path.join("one"));
    let mut watch = Watch::default();
    assert!(one.run(&mut watch).unwrap().ran.is_empty());
    assert_eq!(watch.compressing(), [] as [&str; 0]);
    assert!(!watch.stages.contains(&"load"));

    // Another healing begins there; the dense and the folded model's losses are known.
    let other = compressor(path, "other").heal(heal(3)).run(&mut ()).unwrap();
    assert_eq!(other.ran, [Stage::Fold, Stage::Heal, Stage::Evaluate, Stage::Save]);
    // Another place is written to from what is kept, with the same bytes.
    let moved = compressor(path, "moved").heal(heal(2)).run(&mut ()).unwrap();
    assert_eq!(moved.ran, [Stage::Save]);
    assert!(before == weights(&path.join("moved")));
    // A gate changes no result, only whether it is one.
    assert!(
        compressor(path, "one").heal(heal(2)).max_nll_increase(50.0).run(&mut ()).unwrap().ran.is_empty()
    );
    // What is at the destination and not ours stays.
    std::fs::write(path.join("one/model.safetensors"), b"mine").unwrap();
    assert!(one.run(&mut ()).is_err());
    assert_eq!(weights(&path.join("one")), b"mine");
}

#[test]
fn an_interrupted_run_goes_on_and_ends_with_the_same_bytes() {
    let whole = directory();
    compressor(whole.path(), "out").heal(heal(4)).run(&mut ()).unwrap();
    let broken = directory();
    let compressor = compressor(broken.path(), "out").heal(heal(4));
    let stops = [
        ("block-influence", 1),
        ("compress: score", 1),
        ("compress: plan", 1),
        ("heal", 2),
        ("perplexity", 1),
        ("verify", 1),
    ];
    for stop in stops {
        let mut watch = Watch { stop: Some(stop), ..Watch::default() };
        let error = compressor.run(&mut watch).unwrap_err();
        assert!(matches!(error, Error::Cancelled { .. }), "{stop:?}: {error}");
        assert!(!broken.path().join("out").exists(), "{stop:?}");
    }
    let mut watch = Watch::default();
    compressor.run(&mut watch).unwrap();
    assert!(!watch.stages.contains(&"block-influence"));
    assert!(weights(&whole.path().join("out")) == weights(&broken.path().join("out")));
}

#[test]
fn speed_is_measured_where_asked_and_once() {
    let directory = directory();
    let path = directory.path();
    let mut options = LatencyOptions::default();
    (options.prompt, options.new_tokens, options.runs) = (8, 2, 3);
    let plain = || compressor(path, "out").heal(heal(1));
    let timed = || plain().latency(options);
    assert!(timed().dry_run(&mut ()).unwrap().to_string().contains("speed in 3 runs"));
    let report = timed().run(&mut ()).unwrap();
    let (dense, compressed) = (report.dense.latency.unwrap(), report.compressed.latency.clone().unwrap());
    assert!(report.folded.unwrap().latency.is_none());
    assert_eq!((dense.prefill.runs, compressed.decode.runs), (3, 3));
    let reloaded = Checkpoint::open(path.join("out")).unwrap().decoder(DType::F32, &Device::Cpu).unwrap();
    let saved = Account::counted(&reloaded, 1).unwrap();
    assert_eq!(compressed.kv_bytes_per_token, saved.kv_bytes_per_token);
    assert!(dense.resident_bytes > compressed.resident_bytes);

    // What was measured is known, and nothing else depends on it.
    let mut watch = Watch::default();
    let again = timed().run(&mut watch).unwrap();
    assert!(again.ran.is_empty() && !watch.stages.contains(&"latency"));
    assert_eq!(again.compressed.latency, Some(compressed));
    let without = plain().run(&mut ()).unwrap();
    assert!(without.ran.is_empty() && without.dense.latency.is_none());
    let json: serde_json::Value = serde_json::from_str(&again.to_json().unwrap()).unwrap();
    assert_eq!(json["compressed"]["latency"]["decode"]["runs"], 3);

    options.runs = 2;
    let other = plain().latency(options);
    let forecast = other.dry_run(&mut ()).unwrap();
    let unknown: Vec<Stage> =
        forecast.stages.iter().filter(|stage| !stage.known).map(|stage| stage.stage).collect();
    assert_eq!(unknown, [Stage::Evaluate]);
    let mut watch = Watch { stop: Some(("latency", 2)), ..Watch::default() };
    assert!(matches!(other.run(&mut watch).unwrap_err(), Error::Cancelled { stage: "latency" }));
    assert_eq!(other.run(&mut ()).unwrap().ran, [Stage::Evaluate]);
}

#[test]
fn a_model_that_lost_too_much_is_not_saved() {
    let directory = directory();
    let path = directory.path();
    let gated = |limit| compressor(path, "out").target(Goal::Blocks(6)).max_nll_increase(limit);
    let error = gated(0.01).run(&mut ()).unwrap_err();
    let Error::QualityGate { dense, compressed, limit, .. } = &error else { panic!("{error}") };
    assert!(*limit < 0.011 && compressed - dense > *limit);
    for part in [format!("{dense:.4}"), format!("{compressed:.4}"), "0.01".into()] {
        assert!(error.to_string().contains(&part), "{error}");
    }
    assert!(!path.join("out").exists());
    assert!(path.join("work").is_dir());
    let report = gated(f64::from(u16::MAX)).run(&mut ()).unwrap();
    // What evaluates now is the samples, which no model was asked for that is not saved.
    assert_eq!(report.ran, [Stage::Fold, Stage::Evaluate, Stage::Save]);
}

#[test]
fn a_speed_is_known_of_the_same_number_of_threads_alone() {
    let directory = directory();
    let path = directory.path();
    let mut options = LatencyOptions::default();
    (options.prompt, options.new_tokens, options.runs) = (8, 2, 2);
    let timed = compressor(path, "out").latency(options);
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| timed.run(&mut ()).unwrap())
    };
    assert_eq!(with(1).compressed.latency.unwrap().threads, 1);
    let two = with(2);
    assert_eq!(two.ran, [Stage::Fold, Stage::Evaluate]);
    assert_eq!(two.dense.latency.unwrap().threads, 2);
    assert!(with(1).ran.is_empty());
}

#[test]
fn a_text_that_changed_beside_its_windows_is_measured_anew_and_named_as_it_is() {
    let directory = directory();
    let path = directory.path();
    let text = path.join("text.txt");
    let compressor = compressor(path, "out");
    let before = compressor.run(&mut ()).unwrap();
    let old = std::fs::read_to_string(&text).unwrap();
    let new = old.strip_suffix("sad.\n").unwrap().to_string() + "bad.\n";
    std::fs::write(&text, &new).unwrap();
    let tokenizer = Checkpoint::open(MODEL).unwrap().tokenizer().unwrap();
    let evaluated = |text| Windows::split_from_text(&tokenizer, text, SEQ_LEN, Some(2), Bos::Auto).unwrap().1;
    let (old, new) = (evaluated(&old), evaluated(&new));
    assert!(old.iter().eq(new.iter()) && old.text_sha256() != new.text_sha256());

    let after = compressor.run(&mut ()).unwrap();
    assert_eq!(after.ran, [Stage::Fold, Stage::Evaluate]);
    assert_eq!(before.dense.perplexity.text_sha256, old.text_sha256());
    for found in [&after.dense.perplexity, &after.compressed.perplexity] {
        assert_eq!(found.text_sha256, new.text_sha256());
    }
    let card = std::fs::read_to_string(path.join("out/README.md")).unwrap();
    assert!(card.contains(new.text_sha256()) && !card.contains(old.text_sha256()), "{card}");
}

/// Puts something in the way of a checkpoint that is about to be renamed.
struct Obstruct<'a> {
    saving: bool,
    out: &'a Path,
}

impl Observer for Obstruct<'_> {
    fn started(&mut self, stage: &'static str, _: u64) {
        self.saving |= stage == "compress: save";
    }

    fn advanced(&mut self, stage: &'static str, done: u64, total: u64) -> ControlFlow<()> {
        if self.saving && stage == "hash" && done == total {
            std::fs::create_dir(self.out).unwrap();
            std::fs::write(self.out.join("config.json"), "{}").unwrap();
        }
        ControlFlow::Continue(())
    }
}

#[test]
fn a_run_that_was_killed_after_its_checkpoint_was_in_place_knows_it_as_its_own() {
    let directory = directory();
    let path = directory.path();
    let out = path.join("out");
    let compressor = compressor(path, "out");
    // Nothing has run since the renaming, which failed here.
    let error = compressor.run(&mut Obstruct { saving: false, out: &out }).unwrap_err();
    assert!(matches!(error, Error::Io { action: "rename to", .. }), "{error}");
    let records = || {
        let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        files(&path.join("work")).iter().map(name).filter(|name| name.starts_with("saved-")).count()
    };
    assert_eq!(records(), 1);
    // What is in its place and another model's is not taken for it.
    std::fs::remove_dir_all(&out).unwrap();
    let other = compressions::compressor(path, "other").target(Goal::Blocks(3));
    other.run(&mut ()).unwrap();
    std::fs::rename(path.join("other"), &out).unwrap();
    let error = compressor.run(&mut ()).unwrap_err().to_string();
    assert!(error.contains("exists and is not empty"), "{error}");
    // Its own checkpoint is.
    std::fs::remove_dir_all(&out).unwrap();
    let twin = compressions::compressor(path, "twin").work(path.join("twin.work"));
    twin.run(&mut ()).unwrap();
    std::fs::rename(path.join("twin"), &out).unwrap();
    assert!(compressor.dry_run(&mut ()).unwrap().stages.iter().all(|stage| stage.known));
    assert!(compressor.run(&mut ()).unwrap().ran.is_empty());
    // Where nothing is in its place, it is written.
    std::fs::remove_dir_all(&out).unwrap();
    assert_eq!(compressor.run(&mut ()).unwrap().ran, [Stage::Fold, Stage::Save]);
}

#[test]
fn a_stricter_gate_says_what_an_earlier_run_has_saved() {
    let directory = directory();
    let path = directory.path();
    let gated = |limit| compressor(path, "out").max_nll_increase(limit);
    gated(100.0).run(&mut ()).unwrap();
    let error = gated(-100.0).run(&mut ()).unwrap_err();
    let Error::QualityGate { targeted: false, saved: Some(saved), .. } = &error else { panic!("{error}") };
    assert_eq!(*saved, path.join("out"));
    assert!(error.to_string().contains(&format!("{} still holds", saved.display())), "{error}");
    std::fs::remove_dir_all(saved).unwrap();
    let error = gated(-100.0).run(&mut ()).unwrap_err();
    assert!(matches!(error, Error::QualityGate { saved: None, .. }), "{error}");
    assert!(error.to_string().ends_with("nothing was saved"), "{error}");
}

#[test]
fn a_damaged_result_says_what_to_do_about_it() {
    let directory = directory();
    let path = directory.path();
    let compressor = compressor(path, "out");
    compressor.run(&mut ()).unwrap();
    let plan = files(&path.join("work")).into_iter().find(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("plan-")
    });
    let plan = plan.unwrap();
    std::fs::write(&plan, "{").unwrap();
    let error = compressor.run(&mut ()).unwrap_err().to_string();
    assert!(error.contains(&plan.display().to_string()) && error.contains("delete it"), "{error}");
    std::fs::remove_file(&plan).unwrap();
    assert_eq!(compressor.run(&mut ()).unwrap().ran, [Stage::Plan]);
}

#[test]
fn weights_whose_report_was_deleted_are_made_anew() {
    let directory = directory();
    let path = directory.path();
    let compressor = compressor(path, "out").heal(heal(2));
    compressor.run(&mut ()).unwrap();
    let healed = |report: bool| {
        let mut found = files(&path.join("work")).into_iter();
        let is_wanted = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("healed-") && name.ends_with(".json") == report
        };
        found.find(is_wanted).unwrap()
    };
    let (report, kept) = (healed(true), healed(false));
    let is_weights = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "safetensors");
    let kept = files(&kept).into_iter().find(is_weights).unwrap();
    let good = std::fs::read(&kept).unwrap();
    std::fs::write(&kept, b"of another run").unwrap();
    std::fs::remove_file(report).unwrap();
    assert!(compressor.run(&mut ()).unwrap().ran.contains(&Stage::Heal));
    assert!(std::fs::read(&kept).unwrap() == good);
}
