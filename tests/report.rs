//! Reports as Markdown and JSON, model cards, and what the pipeline adds to a report.
#![allow(clippy::unwrap_used, clippy::panic)]

mod reports;
mod support;

use std::collections::BTreeMap;
use std::path::Path;

use foldgpt::candle::{DType, Device};
use foldgpt::checkpoint::ModelCard;
use foldgpt::heal::{Budget, Losses};
use foldgpt::importance::Method;
use foldgpt::model::Unit;
use foldgpt::pipeline::{Goal, Share, Stage};
use foldgpt::plan::{Donor, Groups, Ranks, ResidualStart, ScaleStart};
use foldgpt::{Account, Checkpoint, Compressor, Format, Heal, Plan, SaveOptions, Target, perplexity};
use pulldown_cmark::{Event, Options, Parser, Tag};
use reports::{HOSTILE, full, plain};
use sha2::{Digest, Sha256};
use yaml_rust2::{Yaml, YamlLoader};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-stories");

fn heal() -> Heal {
    let mut heal = Heal::default();
    (heal.budget, heal.batch, heal.losses) = (Budget::Steps(3), 2, Losses::tail());
    heal
}

fn compressor(directory: &Path, out: &str) -> Compressor {
    let text = directory.join("text.txt");
    std::fs::write(&text, "Anna lost the red kite near the old bridge, and Ben was sad.\n".repeat(60))
        .unwrap();
    let mut compressor = Compressor::new(MODEL, text, directory.join(out))
        .work(directory.join("work"))
        .method(Method::BlockInfluence)
        .target(Goal::Blocks(2))
        .prompts(["Anna lost", "Ben"]);
    let recipe = &mut compressor.recipe;
    (recipe.windows.seq_len, recipe.windows.calibrate, recipe.windows.evaluate) = (32, 3, 2);
    recipe.samples.tokens = 4;
    compressor
}

/// The front matter of a card, and the rest.
fn card(directory: &Path) -> (Yaml, String) {
    let text = std::fs::read_to_string(directory.join("README.md")).unwrap();
    let (front, rest) = text.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
    let mut documents = YamlLoader::load_from_str(front).unwrap();
    assert_eq!(documents.len(), 1);
    (documents.remove(0), rest.to_string())
}

/// The cells of a table of Markdown, by the first of each row.
fn table<'t>(text: &'t str, caption: &str) -> BTreeMap<&'t str, Vec<&'t str>> {
    let (_, after) = text.split_once(&format!("\n{caption}:\n\n")).unwrap();
    let rows = after.lines().take_while(|line| line.starts_with('|')).skip(2);
    rows.map(|row| {
        let mut cells = row.trim_matches('|').split('|').map(str::trim);
        (cells.next().unwrap(), cells.collect())
    })
    .collect()
}

fn number(shown: &str) -> f64 {
    let shown = shown.split_whitespace().next().unwrap();
    shown.replace(',', "").parse().unwrap()
}

#[test]
fn markdown_has_the_numbers_of_the_json() {
    let report = full();
    let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
    let text = report.to_markdown().unwrap();
    let shown = table(&text, "Before and after");
    let rows = json["comparison"].as_array().unwrap();
    assert_eq!(shown.len(), rows.len());
    for row in rows {
        let (quantity, unit) = (row["quantity"].as_str().unwrap(), row["unit"].as_str().unwrap());
        let name = if unit.is_empty() { quantity.to_string() } else { format!("{quantity} ({unit})") };
        let cells = &shown[name.as_str()];
        let digits = row["digits"].as_u64().unwrap() as i32;
        let found = [
            &row["dense"]["value"],
            &row["folded"]["value"],
            &row["compressed"]["value"],
            &row["difference"],
        ];
        for (cell, expected) in cells.iter().zip(found) {
            match expected.as_f64() {
                Some(expected) => {
                    assert!(
                        (number(cell) - expected).abs() <= 0.5001 * 0.1f64.powi(digits),
                        "{name}: {cell} {expected}"
                    );
                }
                None => assert!(cell.is_empty(), "{name}: {cell}"),
            }
        }
    }
    assert_eq!(json["comparison"][3]["compressed"]["value"], json["compressed"]["perplexity"]["mean_nll"]);
    let blocks = table(&text, "Block by block");
    for score in &report.plan.scores().unwrap().blocks {
        let cells = &blocks[score.unit().to_string().as_str()];
        assert!((number(cells[0]) / score.importance - 1.0).abs() < 1e-3);
        assert_eq!(cells[1] == "removed", report.plan.removed().contains(&score.index));
    }
    let held_out = table(&text, "Loss on windows held out of the training");
    for (step, loss) in &report.heal.as_ref().unwrap().held_out {
        assert!((number(held_out[step.to_string().as_str()][0]) - loss).abs() < 5.1e-5);
    }
    for hash in [&report.model_sha256, &report.saved_sha256, &report.calibration.text_sha256] {
        assert!(text.contains(hash.as_str()), "{hash}");
    }
}

#[test]
fn a_report_reads_back_from_its_json() {
    for report in [full(), plain()] {
        assert_eq!(foldgpt::pipeline::Report::from_json(&report.to_json().unwrap()).unwrap(), report);
    }
    assert!(foldgpt::pipeline::Report::from_json("{}").unwrap_err().to_string().starts_with("report: "));
}

#[test]
fn markdown_leaves_out_what_was_not_done() {
    let text = plain().to_markdown().unwrap();
    for heading in ["Asked", "Before and after", "Protocol", "Blocks", "Provenance"] {
        assert!(text.contains(&format!("\n## {heading}\n")), "{heading}");
    }
    for absent in ["## Healing", "## Samples", "strongest couplings", "Mixes", "| cut", "± is", "task file"]
    {
        assert!(!text.contains(absent), "{absent}");
    }
    // Its part is a figure.
    assert!(!text.contains("## Size and loss"));
    let filled =
        text.split("\n## ").all(|section| section.lines().filter(|line| !line.is_empty()).count() > 1);
    assert!(filled, "a heading stands over nothing: {text}");
    assert_eq!(text, plain().to_markdown().unwrap());
}

#[test]
fn hostile_text_means_nothing_in_markdown() {
    let text = full().to_markdown().unwrap();
    assert!(!text.contains('\u{1b}') && !text.contains('\u{202e}'));
    let (mut headings, mut tables, mut code) = (0, 0, Vec::new());
    for event in Parser::new_ext(&text, Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH) {
        match event {
            Event::Html(html) => assert_eq!(html.trim(), "<!-- foldgpt report -->"),
            Event::InlineHtml(html) => panic!("{html}"),
            Event::Start(Tag::Link { .. } | Tag::Image { .. } | Tag::Emphasis | Tag::Strong) => {
                panic!("{event:?}")
            }
            Event::Start(Tag::Heading { .. }) => headings += 1,
            Event::Start(Tag::Table(_)) => tables += 1,
            Event::Code(text) => code.push(text.to_string()),
            _ => {}
        }
    }
    assert_eq!((headings, tables), (9, 7));
    // On one line, and otherwise as it was.
    let clean = HOSTILE.replace(['\u{1b}', '\u{202e}'], "\u{fffd}").replace('\n', " ");
    assert!(code.contains(&format!("/models/{clean}")), "{code:?}");
    assert!(code.contains(&clean), "{code:?}");
}

#[test]
fn the_pipeline_reports_what_it_did_and_keeps_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let mut one = compressor(path, "one").heal(heal());
    one.command = Some("compress --model x".into());
    let report = one.run(&mut ()).unwrap();
    assert_eq!(report.command.as_deref(), Some("compress --model x"));
    assert_eq!(report.heal_curve.iter().map(|point| point.step).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(report.heal_curve.iter().all(|point| point.loss > 0.0 && point.terms.tail > 0.0));
    assert_eq!(report.samples.len(), 2);
    assert_eq!(report.samples[0].prompt, "Anna lost");
    assert!(!report.samples[0].dense.is_empty() && report.samples[0].folded.is_some());
    assert!(report.others.is_empty());

    // All of it is known, whoever asks.
    let again = one.run(&mut ()).unwrap();
    assert!(again.ran.is_empty());
    assert_eq!(again.to_json().unwrap(), report.to_json().unwrap());
    // Other beginnings are answered anew, and nothing else is done but what they need.
    let asked = compressor(path, "one").heal(heal()).prompts(["Tom"]);
    assert!(!asked.dry_run(&mut ()).unwrap().stages.iter().all(|stage| stage.known));
    let asked = asked.run(&mut ()).unwrap();
    assert_eq!(asked.ran, [Stage::Fold, Stage::Evaluate]);
    assert_eq!(asked.samples.len(), 1);
    let silent = {
        let mut silent = compressor(path, "one").heal(heal());
        silent.recipe.samples.tokens = 0;
        silent.run(&mut ()).unwrap()
    };
    assert!(silent.samples.is_empty() && silent.ran.is_empty());

    // Another recipe with the same working directory knows of this one.
    let other = compressor(path, "other").target(Goal::Blocks(4)).run(&mut ()).unwrap();
    assert_eq!(other.others.len(), 1);
    assert_eq!(other.others[0].out, path.join("one"));
    assert_eq!(other.others[0].mean_nll.to_bits(), report.compressed.perplexity.mean_nll.to_bits());
    assert!(other.others[0].healed && other.samples[0].folded.is_none());
    // Other evaluation windows are not compared.
    let mut elsewhere = compressor(path, "elsewhere").target(Goal::Blocks(3));
    elsewhere.recipe.windows.evaluate = 1;
    assert!(elsewhere.run(&mut ()).unwrap().others.is_empty());
    // What the same recipe finds on others takes the place of nothing.
    let mut fewer = one.clone();
    fewer.recipe.windows.evaluate = 1;
    assert_eq!(fewer.run(&mut ()).unwrap().ran, [Stage::Fold, Stage::Evaluate]);
    let third = compressor(path, "third").target(Goal::Blocks(5)).run(&mut ()).unwrap();
    let outs: Vec<_> = third.others.iter().map(|other| other.out.clone()).collect();
    assert_eq!(outs, [path.join("other"), path.join("one")]);
}

#[test]
fn the_files_of_tasks_are_named_by_their_hashes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let task = path.join("copa.jsonl");
    let item = r#"{"premise": "Ben fell.", "choice1": "He cried.", "choice2": "He ate.", "question": "effect", "label": 0}"#;
    let expected = |text: &str| {
        std::fs::write(&task, text).unwrap();
        let digest = format!("{:x}", Sha256::digest(text));
        let mut compressor = compressor(path, "out");
        compressor.recipe.tasks = vec![task.clone()];
        let report = compressor.run(&mut ()).unwrap();
        let text = report.to_markdown().unwrap();
        assert!(text.contains(&format!("- task file, sha256: `{digest}  copa`\n")), "{digest}: {text}");
        (report.ran, digest)
    };
    let (_, first) = expected(&format!("{item}\n"));
    // The same items need no work, and are of another file.
    let (ran, second) = expected(&format!("{item}\n\n"));
    assert!(ran.is_empty() && first != second, "{ran:?}");
}

#[test]
fn samples_begin_with_the_text_where_nothing_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let none: [&str; 0] = [];
    let report = compressor(directory.path(), "out").prompts(none).run(&mut ()).unwrap();
    assert_eq!(report.samples.len(), 2);
    let text = std::fs::read_to_string(directory.path().join("text.txt")).unwrap();
    assert!(report.samples.iter().all(|sample| text.contains(sample.prompt.trim())));
}

#[test]
fn a_card_stands_in_what_the_pipeline_saves() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let mut compressor =
        compressor(path, "out").heal(heal()).share(Share::new(Groups::of(2))).format(Format::Compact);
    compressor.recipe.base_model = Some("org/na-me".into());
    let report = compressor.run(&mut ()).unwrap();
    let (front, body) = card(&path.join("out"));
    assert_eq!(front["library_name"].as_str(), Some("foldgpt"));
    assert_eq!(front["base_model"].as_str(), Some("org/na-me"));
    assert_eq!(front["pipeline_tag"].as_str(), Some("text-generation"));
    let tags: Vec<&str> = front["tags"].as_vec().unwrap().iter().filter_map(Yaml::as_str).collect();
    assert_eq!(tags, ["foldgpt", "depth-pruning", "weight-sharing", "knowledge-distillation"]);
    let rows = table(&body, "Before and after");
    let nll = &rows["NLL (nats per token)"];
    assert!((number(nll[2]) - report.compressed.perplexity.mean_nll).abs() < 5.1e-5);
    assert!((number(rows["stored tensors (bytes)"][2]) - report.saved_bytes as f64).abs() < 0.5);
    assert!(body.contains(&report.model_sha256) && body.contains("predicted tokens in 2 windows of 32"));
    // It goes to the hub: no place on this machine does.
    assert!(!body.contains(path.to_str().unwrap()), "{body}");

    // What is evaluated anew is said anew, and the weights stay as they are.
    let mut longer = compressor.clone();
    longer.recipe.windows.evaluate = 3;
    assert_eq!(longer.run(&mut ()).unwrap().ran, [Stage::Fold, Stage::Evaluate]);
    let (_, renewed) = card(&path.join("out"));
    assert!(renewed.contains("in 3 windows of 32"), "{renewed}");
    // A card that somebody has changed is theirs.
    std::fs::write(path.join("out/README.md"), "mine").unwrap();
    compressor.run(&mut ()).unwrap();
    assert_eq!(std::fs::read_to_string(path.join("out/README.md")).unwrap(), "mine");
}

#[test]
fn every_saved_directory_has_a_card() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) =
        (directory.path().join("models--org--name/snapshots/1"), directory.path().join("second"));
    let checkpoint = support::open("llama");
    let dense = support::load("llama");
    checkpoint.save(&dense, None, &first, &SaveOptions::default(), &mut ()).unwrap();
    let (front, body) = card(&first);
    assert_eq!(front["library_name"].as_str(), Some("transformers"));
    assert!(front["base_model"].is_badvalue());
    assert!(body.contains("# llama, compressed") && body.contains("blocks: 4 of 4"), "{body}");
    assert!(!body.contains("removed") && body.contains("not measured"), "{body}");
    // What was copied without a plan says which blocks it lost.
    let dropped = directory.path().join("dropped");
    checkpoint.save_blocks(&[0, 2], None, &dropped, &SaveOptions::default(), &mut ()).unwrap();
    let (front, body) = card(&dropped);
    assert!(body.contains("blocks: 2 of 4\n") && body.contains("removed: 1, 3\n"), "{body}");
    assert_eq!(front["tags"][1].as_str(), Some("depth-pruning"));
    // Results are whoever's who measured them.
    let own = checkpoint.card(&dense.with_blocks(&[0, 2]).unwrap(), None);
    assert!(own.body.contains("removed: 1, 3\n") && !own.body.contains("not measured"), "{}", own.body);
    // A snapshot of the hub's cache says whose it is, and what is made of what was made of it says so too.
    let fetched = Checkpoint::open(&first).unwrap();
    let scores = foldgpt::Scores::new("test", &support::windows("llama"), vec![0.4, 0.1, 0.3, 0.2]).unwrap();
    let plan = foldgpt::Plan::new(dense.architecture(), &scores, Target::Blocks(1), &[]).unwrap();
    let cut = foldgpt::fold(&dense, &plan).unwrap();
    fetched.save(&cut, Some(&plan), &second, &SaveOptions::default(), &mut ()).unwrap();
    let (front, body) = card(&second);
    assert_eq!(front["base_model"].as_str(), Some("org/name"));
    assert!(body.contains("# org/name, compressed") && body.contains("removed: 1\n"), "{body}");
    let third = directory.path().join("third");
    let again = Checkpoint::open(&second).unwrap();
    let reloaded = again.decoder(DType::F32, &Device::Cpu).unwrap();
    again.save(&reloaded, None, &third, &SaveOptions::default(), &mut ()).unwrap();
    assert_eq!(card(&third).0["base_model"].as_str(), Some("org/name"));
    // What lost halves says so, and is tagged as what lost blocks.
    let halves = vec![8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0];
    let windows = support::windows("llama");
    let halves = foldgpt::Scores::of_units("test", &windows, &Unit::halves(4), halves).unwrap();
    let plan = foldgpt::Plan::new(dense.architecture(), &halves, Target::Blocks(1), &[]).unwrap();
    let thinner = foldgpt::fold(&dense, &plan).unwrap();
    let fourth = directory.path().join("fourth");
    checkpoint.save(&thinner, Some(&plan), &fourth, &SaveOptions::default(), &mut ()).unwrap();
    let (front, body) = card(&fourth);
    let gone: Vec<String> = plan.removed_halves().iter().map(ToString::to_string).collect();
    assert!(plan.removed().is_empty() && !gone.is_empty());
    assert!(body.contains(&format!("\n- halves that were removed: {}\n", gone.join(", "))), "{body}");
    let tags: Vec<&str> = front["tags"].as_vec().unwrap().iter().filter_map(Yaml::as_str).collect();
    assert_eq!(tags, ["foldgpt", "depth-pruning"]);
    let nll = |path: &Path| {
        let decoder = Checkpoint::open(path).unwrap().decoder(DType::F32, &Device::Cpu).unwrap();
        perplexity(&decoder, &support::windows("llama"), &mut ()).unwrap().mean_nll.to_bits()
    };
    assert_eq!(nll(&second), nll(&third));
}

#[test]
fn a_card_says_what_blocks_share_and_what_each_keeps() {
    let (checkpoint, dense) = (support::open("llama"), support::load("llama"));
    let pairs = |donor| Plan::builder().share(Groups::of(2)).donor(donor);
    let ranked = pairs(Donor::First).scales(ScaleStart::Ones).residual(Ranks::Uniform(2), ResidualStart::Svd);
    let cases = [
        (pairs(Donor::Mean), "their mean", "norms of their own\n"),
        (pairs(Donor::First).share_norms(), "those of block 2", "no norms of their own\n"),
        (ranked, "those of block 2", "norms of their own, scales, residuals of rank 2\n"),
    ];
    for (place, (builder, donor, own)) in cases.into_iter().enumerate() {
        let plan = builder.build(dense.architecture()).unwrap();
        let folded = foldgpt::fold(&dense, &plan).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let options = SaveOptions::from(Format::Compact);
        let out = scratch.path().join("out");
        checkpoint.save(&folded, Some(&plan), &out, &options, &mut ()).unwrap();
        let (_, body) = card(&out);
        assert!(body.contains(&format!("share matrices: 2, 3: {donor}\n")), "{place}: {body}");
        assert!(body.contains(&format!("what blocks that share keep: {own}")), "{place}: {body}");
    }
}

#[test]
fn work_and_memory_are_those_of_the_saved_model_in_every_report() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let report = compressor(path, "out").share(Share::new(Groups::of(2))).run(&mut ()).unwrap();
    assert!(report.dense.latency.is_none(), "nothing is measured for it");
    let counted = |place: &Path| {
        let decoder = Checkpoint::open(place).unwrap().decoder(DType::F32, &Device::Cpu).unwrap();
        Account::counted(&decoder, 32).unwrap()
    };
    let (dense, compressed) = (counted(Path::new(MODEL)), counted(&path.join("out")));
    assert_eq!((report.dense.account, report.compressed.account), (Some(dense), Some(compressed)));
    let (_, body) = card(&path.join("out"));
    for text in [body, report.to_markdown().unwrap()] {
        let rows = table(&text, "Before and after");
        for (name, before, after) in [
            ("FLOPs per token", dense.flops_per_token, compressed.flops_per_token),
            ("resident bytes", dense.resident_bytes, compressed.resident_bytes),
            ("KV bytes per token", dense.kv_bytes_per_token, compressed.kv_bytes_per_token),
        ] {
            assert!(after < before, "{name}");
            let shown = [number(rows[name][0]), number(rows[name][1])];
            assert!(
                (shown[0] - before as f64).abs() < 0.5 && (shown[1] - after as f64).abs() < 0.5,
                "{name}"
            );
        }
    }
}

#[test]
fn a_card_survives_whatever_it_is_told() {
    let mut card = ModelCard::new(HOSTILE);
    card.base_model = Some(HOSTILE.into());
    card.tags = vec![HOSTILE.into(), "yes".into(), "1.0".into()];
    let text = card.to_markdown(Format::Expanded);
    let (front, rest) = text.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
    let front = &YamlLoader::load_from_str(front).unwrap()[0];
    assert_eq!(front["base_model"].as_str(), Some(HOSTILE));
    let tags: Vec<&str> = front["tags"].as_vec().unwrap().iter().filter_map(Yaml::as_str).collect();
    assert_eq!(tags, ["foldgpt", HOSTILE, "yes", "1.0"]);
    assert!(rest.trim_start().lines().next().unwrap().starts_with("# "));
    let html = |event: &Event| matches!(event, Event::Html(_) | Event::InlineHtml(_));
    assert!(!Parser::new(rest).any(|event| html(&event)), "{rest}");
}
