//! The whole job by a recipe: what it makes, what it forecasts, and what it refuses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod compressions;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use compressions::{MODEL, SEQ_LEN, Watch, compressor, directory, files, heal, weights};
use foldgpt::candle::{DType, Device};
use foldgpt::data::json_lines;
use foldgpt::heal::{Teacher, Trainable, hold_out};
use foldgpt::importance::{BlockInfluence, Gates, Method};
use foldgpt::pipeline::{Goal, MixOptions, Report, Share, Stage, Total};
use foldgpt::plan::{Groups, Ranks, Residual, ResidualStart};
use foldgpt::{
    Bos, Bytes, Checkpoint, Compressor, Error, Format, Importance, LatencyOptions, Plan, Recipe, SaveOptions,
    Target, Windows, fold_on, perplexity,
};

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
fn a_loss_can_be_the_target() {
    let directory = directory();
    let path = directory.path();
    let within = |limit, out| {
        let mut compressor = compressor(path, out).target(Goal::NllIncrease(limit));
        compressor.recipe.max_nll_increase = Some(100.0);
        compressor.run(&mut ()).unwrap().plan.removed().to_vec()
    };
    let (few, many) = (within(1.0, "few"), within(4.0, "many"));
    assert!(!few.is_empty() && few.len() < many.len(), "{few:?} {many:?}");
    assert!(few.iter().all(|block| many.contains(block)));
    // How many stay is not known before, and so neither whether four do.
    let mut heal = heal(1);
    heal.losses.tail_blocks = 4;
    compressor(path, "healed").target(Goal::NllIncrease(1.0)).heal(heal).dry_run(&mut ()).unwrap();
    // Nothing that could go with so little.
    let error = compressor(path, "none").target(Goal::NllIncrease(0.0)).run(&mut ()).unwrap_err();
    assert!(error.to_string().contains("target.nll-increase"), "{error}");
    assert!(!path.join("none").exists());
    // The methods with which it works are named.
    let coupling = compressor(path, "none").target(Goal::NllIncrease(1.0)).method(Method::Coupling);
    let error = coupling.run(&mut ()).unwrap_err().to_string();
    assert!(error.contains("block-influence, perplexity") && !error.contains("angular"), "{error}");
    // A target that is met where it calibrates and not where it evaluates says so.
    let story = std::fs::read_to_string(path.join("text.txt")).unwrap();
    // Of what means nothing to the model, no block knows much.
    std::fs::write(path.join("text.txt"), "Xyzzy qux 123 !! foo? ".repeat(story.len() / 5) + &story).unwrap();
    let error = compressor(path, "elsewhere").target(Goal::NllIncrease(1.2)).run(&mut ()).unwrap_err();
    assert!(matches!(error, Error::QualityGate { targeted: true, saved: None, .. }), "{error}");
    for part in ["`target.nll-increase`", "calibration windows", "`max_nll_increase`"] {
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn recipes_that_cannot_be_are_refused_by_field() {
    let directory = directory();
    let path = directory.path();
    let base = || compressor(path, "out");
    let refused = |compressor: Compressor, field: &str| {
        for error in [compressor.run(&mut ()).unwrap_err(), compressor.dry_run(&mut ()).unwrap_err()] {
            let Error::Recipe { field: Some(found), .. } = &error else { panic!("{field}: {error}") };
            assert_eq!(found, field, "{error}");
        }
        assert!(!path.join("work").exists() && !path.join("out").exists(), "{field}");
    };
    let with = |change: &dyn Fn(&mut Recipe)| {
        let mut compressor = base();
        change(&mut compressor.recipe);
        compressor
    };
    refused(base().target(Goal::Rate(1.0)), "target.rate");
    refused(base().target(Goal::Blocks(12)), "target.blocks");
    refused(base().target(Goal::Bytes(10)), "target.bytes");
    refused(base().target(Goal::NllIncrease(-1.0)), "target.nll-increase");
    refused(base().target(Goal::NllIncrease(0.1)).method(Method::Coupling), "target.nll-increase");
    refused(with(&|recipe| recipe.target = None), "target");
    refused(with(&|recipe| recipe.model.clear()), "model");
    refused(with(&|recipe| recipe.out.clear()), "out");
    refused(with(&|recipe| recipe.work = Some(recipe.out.join("work"))), "work");
    refused(with(&|recipe| recipe.windows.seq_len = 1), "windows.seq_len");
    refused(with(&|recipe| recipe.windows.evaluate = 0), "windows.evaluate");
    refused(
        with(&|recipe| recipe.coupling = Some(foldgpt::importance::GatesWithCoupling::default())),
        "coupling",
    );
    let told = |text: &str| {
        with(&|recipe| {
            let told = Recipe::from_toml(text).unwrap();
            recipe.method = told.method;
            (recipe.gates, recipe.coupling) = (told.gates, told.coupling);
        })
    };
    for (options, named) in [
        ("steps = 1", "steps is 1"),
        ("batch = 0", "batch is 0"),
        ("learning_rate = -0.1", "learning_rate is -0.1"),
        ("warm_start = [0.5]", "warm start is 1 scores"),
        ("warm_start = [0.5]\nhalves = true", "24 units"),
    ] {
        let gates = told(&format!("method = \"gates\"\n[gates]\n{options}"));
        assert!(gates.dry_run(&mut ()).unwrap_err().to_string().contains(named), "{options}");
        refused(gates, "gates");
    }
    for (options, field) in [
        ("search_windows = 0", "coupling"),
        ("batch = 0", "coupling"),
        ("budget_block_runs = -1.0", "coupling"),
        ("gates = { halves = true }", "coupling"),
        ("gates = { warm_start = [0.5] }", "coupling"),
        ("gates = { learning_rate = 0.0 }", "coupling.gates"),
        ("gates = { remove = 2 }", "coupling.gates.remove"),
    ] {
        refused(told(&format!("[coupling]\n{options}")), field);
    }
    let mix = MixOptions::new(Total::Share(0.7));
    refused(base().method(Method::Gates).mix(mix).target(Goal::Blocks(0)), "target");
    refused(with(&|recipe| recipe.max_nll_increase = Some(f64::NAN)), "max_nll_increase");
    refused(
        with(&|recipe| recipe.latency = Recipe::from_toml("latency.runs = 0").unwrap().latency),
        "latency",
    );
    refused(base().protect(&[12]), "protect");
    refused(base().target(Goal::Blocks(3)).protect(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), "target");
    refused(base().share(Share::new(Groups::of(2))).mix(mix), "share");
    refused(base().mix(MixOptions::new(Total::Share(1.5))), "mix.total.share");
    refused(base().heal(heal(0)), "heal");
    refused(
        base().heal({
            let mut heal = heal(1);
            // Two of the twelve go.
            heal.groups = vec![Trainable::LastBlocks(11).into()];
            heal
        }),
        "heal.groups",
    );
    refused(
        base().heal({
            let mut heal = heal(1);
            heal.seed = 3;
            heal
        }),
        "heal.seed",
    );

    std::fs::create_dir(path.join("out")).unwrap();
    std::fs::write(path.join("out/mine"), b"mine").unwrap();
    for error in [base().run(&mut ()).unwrap_err(), base().dry_run(&mut ()).unwrap_err()] {
        assert!(error.to_string().contains("exists and is not empty"), "{error}");
    }
    assert_eq!(files(&path.join("out")), [path.join("out/mine")]);
    assert!(!path.join("work").exists());
}

#[test]
fn sharing_without_effect_is_refused_by_field() {
    let directory = directory();
    let path = directory.path();
    let refused = |share: Share, field: &str| {
        let compressor = compressor(path, "out").share(share);
        for error in [compressor.run(&mut ()).unwrap_err(), compressor.dry_run(&mut ()).unwrap_err()] {
            assert!(matches!(&error, Error::Recipe { field: Some(found), .. } if found == field), "{error}");
        }
        assert!(!path.join("work").exists() && !path.join("out").exists(), "{field}");
    };
    for groups in [Groups::of(0), Groups::of(1), Groups::of_within(2, 30..=40), Groups::of_within(2, 3..=12)]
    {
        refused(Share::new(groups), "share.groups");
    }
    for ranks in [Ranks::Uniform(0), Ranks::Parameters(9)] {
        let mut share = Share::new(Groups::of(2));
        share.own.residual = Some(Residual { ranks, start: ResidualStart::Svd });
        refused(share, "share.own.residual.ranks");
    }
}

#[test]
fn recipes_that_come_along_are_read() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/recipes");
    let recipe = Recipe::read(directory.join("smollm2.toml")).unwrap();
    assert_eq!((recipe.target, recipe.method), (Some(Goal::Blocks(6)), Method::BlockInfluence));
}

#[test]
fn toml_and_json_are_the_same_recipe() {
    let toml = r#"
        model = "org/name"
        text = "text.txt"
        out = "out"
        seed = 7
        dtype = "bf16"
        method = "coupling"
        protect = [0, 11]
        target = { rate = 0.2 }
        max_nll_increase = 0.3
        tasks = ["arc.jsonl"]
        latency = true
        format = "compact"

        [windows]
        seq_len = 128
        bos = "never"

        [coupling]
        search_windows = 2
        gates = { batch = 1 }

        [share]
        groups = { consecutive = { size = 2 } }
        own = { scales = "least-squares", residual = { ranks = { uniform = 4 }, start = "svd" } }

        [heal]
        budget = { tokens = 5000 }
        losses = { divergence = 1.0 }
        groups = [{ params = "norms", learning_rate = 1e-3 }, { params = { lora = { rank = 4 } }, learning_rate = 1e-4 }]
    "#;
    let json = r#"{
        "model": "org/name", "text": "text.txt", "out": "out", "seed": 7, "dtype": "bf16", "method": "coupling",
        "protect": [0, 11], "target": { "rate": 0.2 }, "max_nll_increase": 0.3, "tasks": ["arc.jsonl"],
        "latency": {}, "format": "compact", "windows": { "seq_len": 128, "bos": "never" },
        "coupling": { "search_windows": 2, "gates": { "batch": 1 } },
        "share": { "groups": { "consecutive": { "size": 2 } }, "own": { "scales": "least-squares",
            "residual": { "ranks": { "uniform": 4 }, "start": "svd" } } },
        "heal": { "budget": { "tokens": 5000 }, "losses": { "divergence": 1.0 }, "groups": [
            { "params": "norms", "learning_rate": 1e-3 },
            { "params": { "lora": { "rank": 4 } }, "learning_rate": 1e-4 } ] }
    }"#;
    let recipe = Recipe::from_toml(toml).unwrap();
    assert_eq!(recipe, Recipe::from_json(json).unwrap());
    assert_eq!(recipe, Recipe::from_json(&serde_json::to_string(&recipe).unwrap()).unwrap());
    assert_eq!((recipe.target, recipe.format), (Some(Goal::Rate(0.2)), Some(Format::Compact)));
    assert_eq!((recipe.windows.seq_len, recipe.windows.calibrate), (128, 16));
    let work = recipe.work_directory();
    let latency = |text: &str| Recipe::from_toml(text).unwrap().latency;
    assert_eq!(latency("latency = true"), Some(LatencyOptions::default()));
    assert_eq!(latency("latency = false"), None);
    assert_eq!(latency("[latency]\nruns = 7").map(|options| (options.runs, options.prompt)), Some((7, 128)));
    assert_eq!(Recipe::from_json("{\"latency\": null}").unwrap().latency, None);
    // The own default of the method, and not that of gates alone.
    assert_eq!(recipe.coupling.unwrap().gates.steps, 120);
    assert_eq!(work, PathBuf::from("out.work"));

    for (target, found) in [("{ \"rate\": 0.2, \"bytes\": 9 }", "`rate` and `bytes`"), ("{}", "nothing")] {
        let error = Recipe::from_json(&format!("{{\"target\": {target}}}")).unwrap_err().to_string();
        assert!(error.contains(&format!("`target` is {found}, expected exactly one")), "{error}");
    }
    assert_eq!(Recipe::from_json("{\"target\": null}").unwrap().target, None);

    let directory = tempfile::tempdir().unwrap();
    let unknown = [
        "target = { share = 0.2 }",
        "target = { rate = 0.2, blocks = 2 }",
        "remove = 3",
        "[heal]\nstep = 3",
        "[heal.losses]\nkl = 1.0",
        "[windows]\nlength = 3",
        "method = \"magic\"",
        "[coupling.gates]\nsteep = 3",
        "heal = { adamw = { b = 1 } }",
        "latency = { repeats = 3 }",
    ];
    for text in unknown {
        let path = directory.path().join("recipe.toml");
        std::fs::write(&path, text).unwrap();
        let error = Recipe::read(&path).unwrap_err().to_string();
        let names = [
            "share",
            "`blocks` and `rate`",
            "remove",
            "step",
            "kl",
            "length",
            "magic",
            "steep",
            "`b`",
            "repeats",
        ];
        assert!(error.contains("recipe.toml") && names.iter().any(|name| error.contains(name)), "{error}");
    }
}

#[test]
fn a_dry_run_writes_nothing_and_knows_what_comes() {
    let directory = directory();
    let path = directory.path();
    let before = files(path);
    let shared = |out: &str, format| {
        compressor(path, out).share(Share::new(Groups::of(2))).target(Goal::Rate(0.25)).format(format)
    };
    for (out, compressor) in [
        ("healed", compressor(path, "healed").heal(heal(2))),
        ("compact", shared("compact", Format::Compact)),
        ("expanded", shared("expanded", Format::Expanded)),
    ] {
        let forecast = compressor.dry_run(&mut ()).unwrap();
        if out == "healed" {
            assert_eq!(files(path), before);
        }
        assert!(!path.join(out).exists());
        assert!(forecast.stages.iter().any(|stage| !stage.known && stage.peak_bytes > 0));
        assert!(forecast.measured_tokens > 0 && forecast.seconds() > 0.0);
        let report = compressor.run(&mut ()).unwrap();
        let sizes = forecast.compressed.unwrap();
        assert_eq!(sizes.parameters, report.compressed.parameters, "{out}");
        assert_eq!(sizes.blocks, report.compressed.blocks);
        assert_eq!(sizes.stored_bytes, report.saved_bytes, "{out}");
        if out != "expanded" {
            // What is shared counts once in an account.
            assert_eq!(report.compressed.account.unwrap().stored_bytes, report.saved_bytes, "{out}");
        }
        let again = compressor.dry_run(&mut ()).unwrap();
        assert!(again.stages.iter().all(|stage| stage.known));
        assert_eq!(again.measured_tokens, 0);
    }
}

#[test]
fn a_dry_run_says_what_its_sizes_take_for_granted() {
    let directory = directory();
    let path = directory.path();
    let within = |blocks| {
        let share = Share::new(Groups::of_within(2, 2..=9));
        compressor(path, "out").share(share).target(Goal::Blocks(blocks)).format(Format::Compact)
    };
    assert!(within(0).dry_run(&mut ()).unwrap().compressed.unwrap().assumed.is_empty());
    let forecast = within(2).dry_run(&mut ()).unwrap().compressed.unwrap();
    let report = within(2).protect(&[10, 11]).run(&mut ()).unwrap();
    assert_ne!(forecast.parameters, report.compressed.parameters);
    assert_eq!(forecast.assumed.len(), 1, "{:?}", forecast.assumed);
    assert!(forecast.assumed[0].contains("blocks 2 to 9"), "{:?}", forecast.assumed);
}

#[test]
fn a_dry_run_counts_absurd_numbers_too() {
    let directory = directory();
    let huge = Recipe::from_toml(
        r#"
        method = "gates"
        gates = { steps = 9223372036854775807, batch = 9223372036854775807 }
        samples = { tokens = 9223372036854775807 }

        [share]
        groups = { consecutive = { size = 2 } }
        own = { residual = { ranks = { parameters = 9223372036854775807 }, start = "svd" } }

        [heal]
        budget = { tokens = 5000 }
        batch = 9223372036854775807
        micro_batch = 9223372036854775807
        groups = [{ params = { lora = { rank = 9223372036854775807 } }, learning_rate = 1e-4 }]
    "#,
    )
    .unwrap();
    let mut compressor = compressor(directory.path(), "out");
    let recipe = &mut compressor.recipe;
    (recipe.method, recipe.gates, recipe.samples) = (huge.method, huge.gates, huge.samples);
    (recipe.share, recipe.heal) = (huge.share, huge.heal);
    let forecast = compressor.dry_run(&mut ()).unwrap();
    assert!(forecast.seconds().is_finite() && forecast.seconds() > 1e18);
    assert!(forecast.peak_bytes() > 1 << 62);
    compressor = compressor.max_memory(Bytes(6_000_000));
    (compressor.recipe.share, compressor.recipe.heal) = (None, None);
    let error = compressor.dry_run(&mut ()).unwrap_err().to_string();
    assert!(error.contains("max_memory"), "{error}");
}

#[test]
fn bytes_are_met_by_as_few_blocks_as_it_takes() {
    let directory = directory();
    let path = directory.path();
    let dense = Checkpoint::open(MODEL).unwrap().tensor_bytes();
    let one = compressor(path, "one").target(Goal::Bytes(dense - 1)).run(&mut ()).unwrap();
    assert_eq!(one.compressed.blocks, one.dense.blocks - 1);
    let block = dense - one.saved_bytes;
    let two = compressor(path, "two").target(Goal::Bytes(dense - block - 1)).run(&mut ()).unwrap();
    assert_eq!(two.saved_bytes, dense - 2 * block);
    let none = compressor(path, "none").target(Goal::Bytes(dense)).run(&mut ()).unwrap();
    assert_eq!(none.saved_bytes, dense);
    // The norms that healing moves take f32: one block less would not be enough.
    let healed = compressor(path, "healed").target(Goal::Bytes(dense - block)).heal(heal(1));
    let healed = healed.run(&mut ()).unwrap();
    assert_eq!(healed.compressed.blocks, healed.dense.blocks - 2);
    assert!(healed.saved_bytes > dense - 2 * block && healed.saved_bytes < dense - block);
}

#[test]
fn bytes_are_met_where_blocks_share_too() {
    let directory = directory();
    let path = directory.path();
    let checkpoint = Checkpoint::open(MODEL).unwrap();
    let dense = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    for (name, groups) in [("even", Groups::of(2)), ("odd", Groups::of_within(2, 1..=10))] {
        let plan = Plan::builder().share(groups).residual(Ranks::Uniform(8), ResidualStart::Svd);
        let plan = plan.build(dense.architecture()).unwrap();
        let source = path.join(name);
        checkpoint
            .save(
                &fold_on(&dense, &plan, &Windows::from_ids(vec![vec![1, 2]]).unwrap(), &mut ()).unwrap(),
                None,
                &source,
                &Format::Compact.into(),
                &mut (),
            )
            .unwrap();
        let source = Checkpoint::open(&source).unwrap();
        let arch = source.architecture();
        for format in [Format::Compact, Format::Expanded] {
            let whole = source.stored_bytes(&Plan::builder().build(arch).unwrap(), format).unwrap();
            // The bytes of a stranger's own, and more.
            for most in [whole - 40_000, whole / 4 * 3] {
                let mut compressor = compressor(path, &format!("{name}-{format:?}-{most}")).format(format);
                compressor.recipe.model = source.location().to_str().unwrap().into();
                let compressor = compressor.target(Goal::Bytes(most));
                let forecast = compressor.dry_run(&mut ()).unwrap().compressed.unwrap();
                let report = compressor.run(&mut ()).unwrap();
                let found = format!("{name} {format:?}: {} of {most}", report.saved_bytes);
                assert!(forecast.stored_bytes <= most, "{found}");
                assert!(report.saved_bytes <= most, "{found}");
                assert_eq!(source.stored_bytes(&report.plan, format).unwrap(), report.saved_bytes);
                let fewer = Target::Blocks(report.plan.removed().len() - 1);
                let fewer = Plan::new(arch, report.plan.scores().unwrap(), fewer, &[]).unwrap();
                assert!(source.stored_bytes(&fewer, format).unwrap() > most, "{found}: fewer would do");
            }
        }
    }
}

#[test]
fn a_mix_meets_its_total() {
    let directory = directory();
    let all_but_5 = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11];
    let mut compressor = compressor(directory.path(), "out").mix(MixOptions::new(Total::Share(0.8)));
    compressor = compressor.target(Goal::Blocks(1)).protect(&all_but_5);
    compressor.recipe.windows.calibrate = 1;
    let report = compressor.run(&mut ()).unwrap();
    assert!(report.compressed.parameters as f64 <= 0.8 * report.dense.parameters as f64);
    assert!(report.plan.removed().iter().all(|block| !all_but_5.contains(block)));
    assert!(report.plan.sharing().is_some(), "one block alone is not enough");
}

#[test]
fn a_search_over_mixes_removes_no_more_than_the_target() {
    let directory = directory();
    let path = directory.path();
    let of = |out: &str, share: f64, most: usize, residual_share: f64| {
        let mut mix = MixOptions::new(Total::Share(share));
        (mix.search, mix.residual_share) = (true, residual_share);
        let mut compressor = compressor(path, out).mix(mix).target(Goal::Blocks(most));
        compressor.recipe.windows.calibrate = 1;
        compressor
    };
    let report = of("none", 0.8, 1, 0.0).run(&mut ()).unwrap();
    let mut tried: Vec<(usize, f64)> =
        report.mixes.iter().map(|mix| (mix.removed, mix.residual_share)).collect();
    tried.sort_by(|a, b| a.partial_cmp(b).unwrap());
    assert_eq!(tried, [(0, 0.0), (1, 0.0)]);
    let best = report.mixes.iter().min_by(|a, b| a.loss.total_cmp(&b.loss)).unwrap();
    assert_eq!(best.removed, report.plan.removed().len());
    // The share for residuals is one of those that are tried.
    let some = of("some", 0.8, 1, 0.3).run(&mut ()).unwrap();
    let shares: Vec<f64> = some.mixes.iter().map(|mix| mix.residual_share).collect();
    assert!(shares.contains(&0.3) && shares.iter().all(|share| [0.0, 0.3, 3.0 * 0.3].contains(share)));
}

#[test]
fn a_mix_whose_removal_is_enough_removes_no_more() {
    let directory = directory();
    let path = directory.path();
    let mut compressor =
        compressor(path, "out").mix(MixOptions::new(Total::Share(0.8))).target(Goal::Blocks(8));
    compressor.recipe.windows.calibrate = 1;
    let forecast = compressor.dry_run(&mut ()).unwrap().compressed.unwrap();
    let report = compressor.run(&mut ()).unwrap();
    assert!(report.compressed.blocks > 4, "{}", report.compressed.blocks);
    assert_eq!(forecast.blocks, report.compressed.blocks);
    assert_eq!(forecast.parameters, report.compressed.parameters);
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
    assert!(refused(compressor(path, "out").max_memory(Bytes(1000))).contains("at least"));
    assert!(!path.join("work").exists() && !path.join("out").exists());
    // With enough of it, a limit changes nothing.
    let enough = compressor(path, "out").heal(heal(2)).max_memory(Bytes(u64::MAX)).run(&mut ()).unwrap();
    assert!(enough.heal.is_some());
    let recipe = Recipe::from_toml("max_memory = \"3GB\"").unwrap();
    assert_eq!(recipe.max_memory, Some(Bytes(3_000_000_000)));
}
