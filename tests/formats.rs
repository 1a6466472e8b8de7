//! In which format a compression writes what it made, where none is asked for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use foldgpt::heal::{Budget, Lora, ParamGroup, Trainable};
use foldgpt::importance::Method;
use foldgpt::pipeline::{Goal, MixOptions, Share, Total};
use foldgpt::plan::{Groups, Ranks, Residual, ResidualStart};
use foldgpt::{Compressor, Format, Heal};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-stories");

fn compressor(model: &str, directory: &Path, out: &str) -> Compressor {
    let text = directory.join("text.txt");
    std::fs::write(&text, "Anna lost the red kite near the old bridge, and Ben was sad.\n".repeat(60))
        .unwrap();
    let mut compressor = Compressor::new(model, text, directory.join(out)).method(Method::BlockInfluence);
    let recipe = &mut compressor.recipe;
    (recipe.windows.seq_len, recipe.windows.calibrate, recipe.windows.evaluate) = (32, 2, 2);
    recipe.samples.tokens = 0;
    compressor
}

fn pairs() -> Share {
    let mut share = Share::new(Groups::of(2));
    share.own.residual = Some(Residual { ranks: Ranks::Uniform(2), start: ResidualStart::Svd });
    share
}

/// A healing whose adapters stay beside their matrices.
fn kept() -> Heal {
    let mut lora = Lora::default();
    (lora.rank, lora.merge) = (2, false);
    let mut heal = Heal::default();
    (heal.budget, heal.batch) = (Budget::Steps(1), 1);
    heal.groups = vec![ParamGroup::new(Trainable::Lora(lora), 1e-3)];
    heal
}

#[test]
fn what_shares_is_written_once_unless_another_format_is_asked_for() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path();
    let of = |model: &str, out: &str| compressor(model, path, out);
    let shared = path.join("shared");
    let shared = shared.to_str().unwrap();
    let one = Goal::Blocks(1);
    let cases = [
        ("cut", of(MODEL, "cut").target(one), Format::Expanded),
        ("shared", of(MODEL, "shared").share(pairs()), Format::Compact),
        ("for others", of(MODEL, "for others").share(pairs()).format(Format::Expanded), Format::Expanded),
        ("asked for", of(MODEL, "asked for").target(one).format(Format::Compact), Format::Compact),
        // What was made of a compact model is one.
        ("of a compact one", of(shared, "of a compact one").target(one), Format::Compact),
        ("adapters", of(MODEL, "adapters").target(one).heal(kept()), Format::Compact),
        // A total that removal alone meets.
        (
            "no ties",
            of(MODEL, "no ties").mix(MixOptions::new(Total::Share(0.97))).target(one),
            Format::Expanded,
        ),
    ];
    for (out, compressor, expected) in cases {
        let forecast = compressor.dry_run(&mut ()).unwrap().compressed.unwrap();
        let report = compressor.run(&mut ()).unwrap();
        assert_eq!(report.format, expected, "{out}");
        let [expanded, compact] =
            ["model.safetensors", "foldgpt.safetensors"].map(|name| path.join(out).join(name).is_file());
        assert_eq!((expanded, compact), (expected == Format::Expanded, expected == Format::Compact), "{out}");
        if report.heal.is_none() {
            assert_eq!(forecast.stored_bytes, report.saved_bytes, "{out}");
        }
        assert!(expected == Format::Expanded || out == "adapters" || report.saved_bytes < report.dense_bytes);
        let text = report.to_markdown().unwrap();
        assert!(text.contains(&format!("{expected}")), "{out}: {text}");
        // A rerun finds what the first run wrote.
        assert!(compressor.run(&mut ()).unwrap().ran.is_empty(), "{out}");
    }
}
