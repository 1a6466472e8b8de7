//! Targets of bytes, loss and parameters, and what meets them.

use foldgpt::candle::{DType, Device};
use foldgpt::importance::Method;
use foldgpt::pipeline::{Goal, MixOptions, Total};
use foldgpt::plan::{Groups, Ranks, ResidualStart};
use foldgpt::{Checkpoint, Error, Format, Plan, Target, Windows, fold_on};

use crate::compressions::{MODEL, compressor, directory, heal};

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
