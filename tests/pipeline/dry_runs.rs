//! What is known before any work.

use foldgpt::pipeline::{Goal, Share};
use foldgpt::plan::Groups;
use foldgpt::{Bytes, Format, Recipe};

use crate::compressions::{compressor, directory, files, heal};

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
