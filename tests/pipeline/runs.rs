//! What a run makes, and from what.

use std::fmt::Write;
use std::path::Path;

use foldgpt::candle::{DType, Device};
use foldgpt::data::json_lines;
use foldgpt::heal::{Teacher, hold_out};
use foldgpt::importance::{BlockInfluence, Gates, Method};
use foldgpt::pipeline::{Report, Share, Stage};
use foldgpt::plan::Groups;
use foldgpt::{
    Bos, Bytes, Checkpoint, Compressor, Error, Importance, LatencyOptions, Plan, Recipe, SaveOptions, Target,
    Windows, fold_on, perplexity,
};

use crate::compressions::{MODEL, SEQ_LEN, Watch, compressor, directory, heal, weights};

#[test]
fn the_result_is_that_of_the_calls_by_hand() {
    let directory = directory();
    let path = directory.path();
    let compressor = compressor(path, "out").heal(heal(3)).seed(5).protect(&[3]);
    let report = compressor.run(&mut ()).unwrap();

    let checkpoint = Checkpoint::open(MODEL).unwrap();
    let dense = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    let text = std::fs::read_to_string(path.join("text.txt")).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let (first, evaluation) =
        Windows::split_from_text(&tokenizer, &text, SEQ_LEN, Some(2), Bos::Auto).unwrap();
    let calibration = first.spread(3).unwrap();
    let scores = BlockInfluence::default().score(&dense, &calibration, &mut ()).unwrap();
    let plan = Plan::new(dense.architecture(), &scores, Target::Blocks(2), &[3]).unwrap();
    let plan = plan.for_model(checkpoint.sha256(&mut ()).unwrap());
    let folded = fold_on(&dense, &plan, &calibration, &mut ()).unwrap();
    let (train, choosing) = hold_out(&first).unwrap();
    let mut heal = heal(3);
    heal.seed = 5;
    let healed = heal.run(&folded, &train, Some(&choosing), Some(Teacher::Model(&dense)), &mut ()).unwrap();
    let by_hand = path.join("by-hand");
    let saved =
        checkpoint.save(&healed.decoder, Some(&plan), &by_hand, &SaveOptions::default(), &mut ()).unwrap();

    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        let read = |directory: &Path| std::fs::read(directory.join(name)).unwrap();
        assert!(read(&by_hand) == read(&path.join("out")), "{name} differs");
    }
    let written = |directory: &Path| {
        let json = std::fs::read_to_string(directory.join("plan.json")).unwrap();
        Plan::from_json(&json).unwrap()
    };
    let (one, other) = (written(&by_hand), written(&path.join("out")));
    assert_eq!((one.removed(), one.model_sha256()), (other.removed(), other.model_sha256()));
    let nll = |decoder| perplexity(decoder, &evaluation, &mut ()).unwrap().mean_nll.to_bits();
    assert_eq!(report.dense.perplexity.mean_nll.to_bits(), nll(&dense));
    assert_eq!(report.folded.as_ref().unwrap().perplexity.mean_nll.to_bits(), nll(&folded));
    assert_eq!(report.compressed.perplexity.mean_nll.to_bits(), nll(&healed.decoder));
    assert_eq!(report.saved_bytes, saved.tensor_bytes);
    assert_eq!(report.compressed.parameters, healed.decoder.parameter_count());
    assert_eq!(report.ran, Stage::ALL);
    let json = report.to_json().unwrap();
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(value["recipe"]["target"]["blocks"], 2);
    assert_eq!(value["saved_sha256"].as_str().unwrap().len(), 64);
}

#[test]
fn json_lines_are_read_by_their_field() {
    let directory = directory();
    let path = directory.path();
    let mut lines = String::new();
    for line in std::fs::read_to_string(path.join("text.txt")).unwrap().lines() {
        writeln!(lines, "{}", serde_json::json!({ "body": line })).unwrap();
    }
    std::fs::write(path.join("text.jsonl"), &lines).unwrap();
    std::fs::write(path.join("joined.txt"), json_lines(&lines, "body").unwrap()).unwrap();
    let of = |text: &str, field: Option<&str>| {
        let mut compressor = compressor(path, "out");
        compressor.recipe.text = path.join(text);
        compressor.recipe.text_field = field.map(str::to_owned);
        compressor.run(&mut ())
    };
    of("joined.txt", None).unwrap();
    // The same windows: nothing is left to do.
    assert!(of("text.jsonl", Some("body")).unwrap().ran.is_empty());
    let refused = |text, field, expected: &str| {
        let error = of(text, field).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}, expected {expected}");
    };
    refused("text.jsonl", None, "line 1 has no string in its field `text`");
    refused("text.txt", Some("body"), "text_field");
}

#[test]
fn a_run_in_little_memory_reads_blocks_from_disk_and_gives_the_same_model() {
    let directory = directory();
    let path = directory.path();
    for method in [Method::BlockInfluence, Method::Angular, Method::Perplexity, Method::Gates] {
        let named = |what: &str| {
            let mut compressor = compressor(path, &format!("{method}-{what}"));
            compressor = compressor.method(method).work(path.join(format!("{method}-{what}.work")));
            if method == Method::Gates {
                let mut gates = Gates::default();
                gates.steps = 4;
                compressor.recipe.gates = Some(gates);
            }
            compressor
        };
        let in_memory = named("memory").run(&mut ()).unwrap();
        let little = named("disk").max_memory(Bytes(6_000_000));
        let forecast = little.dry_run(&mut ()).unwrap();
        assert!(forecast.stages[0].what.contains("disk"), "{method}: {}", forecast.stages[0].what);
        let counted = forecast.peak_bytes() - forecast.process_bytes.unwrap_or_default();
        assert!(counted < 6_000_000, "{method}: {counted}");
        let mut watch = Watch::default();
        let from_disk = little.run(&mut watch).unwrap();
        assert!(!watch.stages.contains(&"load"), "{method}: the model was loaded");
        assert!(from_disk.streamed && !in_memory.streamed && from_disk.samples.is_empty(), "{method}");
        assert_eq!(from_disk.saved_bytes, in_memory.saved_bytes, "{method}");
        assert_eq!(from_disk.ran, [Stage::Score, Stage::Plan, Stage::Evaluate, Stage::Save]);
        assert_eq!(in_memory.dense.perplexity, from_disk.dense.perplexity, "{method}");
        assert_eq!(in_memory.compressed.perplexity, from_disk.compressed.perplexity, "{method}");
        assert_eq!(in_memory.compressed.parameters, from_disk.compressed.parameters, "{method}");
        let importance = |report: &Report| report.plan.scores().unwrap().importance();
        assert_eq!(importance(&in_memory), importance(&from_disk), "{method}");
        let (memory, disk) = (format!("{method}-memory"), format!("{method}-disk"));
        assert!(weights(&path.join(memory)) == weights(&path.join(disk)), "{method}");
        assert!(little.run(&mut ()).unwrap().ran.is_empty(), "{method}");
    }
}

#[test]
fn what_little_memory_cannot_do_is_refused_before_any_work() {
    let directory = directory();
    let path = directory.path();
    let little = || compressor(path, "out").max_memory(Bytes(6_000_000));
    let refused = |compressor: Compressor| match compressor.run(&mut ()) {
        Err(Error::Recipe { field: Some(field), reason }) if field == "max_memory" => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(little().heal(heal(2))).contains("`heal`"));
    assert!(refused(little().method(Method::Taylor)).contains("taylor"));
    assert!(refused(little().share(Share::new(Groups::of(2)))).contains("`share`"));
    assert!(refused(little().latency(LatencyOptions::default())).contains("`latency`"));
    assert!(refused(little().prompts(["Anna"])).contains("`samples.prompts`"));
    let (mut recipe, mut gates) = (little().method(Method::Gates).recipe.clone(), Gates::default());
    gates.gradient_checkpointing = false;
    recipe.gates = Some(gates);
    assert!(refused(Compressor::from(recipe)).contains("`gates.gradient_checkpointing = false`"));
    assert!(refused(compressor(path, "out").max_memory(Bytes(1000))).contains("at least"));
    assert!(!path.join("work").exists() && !path.join("out").exists());
    // With enough of it, a limit changes nothing.
    let enough = compressor(path, "out").heal(heal(2)).max_memory(Bytes(u64::MAX)).run(&mut ()).unwrap();
    assert!(enough.heal.is_some());
    let recipe = Recipe::from_toml("max_memory = \"3GB\"").unwrap();
    assert_eq!(recipe.max_memory, Some(Bytes(3_000_000_000)));
}
