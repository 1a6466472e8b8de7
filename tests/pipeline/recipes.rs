//! Recipes as files, and those that are refused.

use std::path::PathBuf;

use foldgpt::heal::Trainable;
use foldgpt::importance::Method;
use foldgpt::pipeline::{Goal, MixOptions, Share, Total};
use foldgpt::plan::{Groups, Ranks, Residual, ResidualStart};
use foldgpt::{Compressor, Error, Format, LatencyOptions, Recipe};

use crate::compressions::{compressor, directory, files, heal};

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
