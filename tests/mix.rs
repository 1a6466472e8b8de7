//! Meeting a total: removal first, then sharing, then rank; and the front of a search.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use foldgpt::model::{BlockParam, NormSite, Param, Projection};
use foldgpt::plan::{Donor, Groups, ScaleStart};
use foldgpt::{Decoder, Error, Mix, Observer, Plan, Scores, fold_on, perplexity, search_mixes};
use support::{load, windows};

fn model() -> (Decoder, Scores) {
    let decoder = load("qwen3");
    let scores = Scores::new("test", &windows("qwen3"), vec![0.4, 0.1, 0.3, 0.2]).unwrap();
    (decoder, scores)
}

fn mix(parameters: usize, removed: usize, residual_share: f64) -> Mix {
    let mut mix = Mix::new(parameters);
    (mix.removed, mix.residual_share) = (removed, residual_share);
    mix
}

/// The parameters of one block, matrices and all.
fn block(decoder: &Decoder) -> usize {
    let params = decoder.architecture().block_params();
    params.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

#[test]
fn removal_comes_first_then_sharing_then_rank() {
    let (decoder, scores) = model();
    let windows = windows("qwen3");
    let (total, block) = (decoder.parameter_count(), block(&decoder));
    let plan = |mix: Mix| mix.plan(&decoder, &scores, &windows, &mut ()).unwrap();
    // Removal alone, and no more of it than it takes.
    let cut = plan(mix(total - block, 3, 0.05));
    assert_eq!((cut.removed(), cut.sharing()), (&[1][..], None));
    // Two blocks may go, and it takes a tie besides; what is left over is rank.
    let tied = plan(mix(total - 2 * block - block / 2, 2, 0.05));
    assert_eq!(tied.removed(), [1, 3]);
    assert_eq!(tied.sharing().unwrap().groups.len(), 1);
    assert!(!tied.sharing().unwrap().ranks.is_empty());
    // The total is met, and used up to the last unit of rank.
    let folded = fold_on(&decoder, &tied, &windows, &mut ()).unwrap().parameter_count();
    let unit = decoder.architecture().intermediate_size + decoder.architecture().hidden_size;
    assert!(folded <= total - 2 * block - block / 2);
    assert!(folded + unit > total - 2 * block - block / 2, "{folded}");
    // What is protected stays, and the next one goes.
    let mut protected = mix(total - block, 3, 0.05);
    protected.protected = vec![1];
    assert_eq!(plan(protected).removed(), [3]);
    // Asked again, the plan is the same.
    assert_eq!(tied.to_builder().measure(&decoder, &windows, &mut ()).unwrap(), tied);
    // Nothing kept for residuals, no residuals.
    assert!(plan(mix(total - block / 2, 0, 0.0)).sharing().unwrap().ranks.is_empty());
}

#[test]
fn a_search_returns_what_no_other_beats_and_measures_it() {
    let (decoder, scores) = model();
    let windows = windows("qwen3");
    let total = decoder.parameter_count();
    let mut mixes = mix(total * 4 / 5, 0, 0.0).variants(&[0, 1], &[0.0, 0.1]);
    mixes.extend(mix(total * 7 / 10, 0, 0.0).variants(&[0, 1], &[0.0, 0.1]));
    mixes.push(mix(10, 0, 0.0)); // passed over
    let front = search_mixes(&decoder, &scores, &mixes, &windows, &mut ()).unwrap();
    assert!(!front.is_empty());
    for pair in front.windows(2) {
        assert!(pair[0].parameters < pair[1].parameters && pair[0].loss > pair[1].loss);
    }
    for candidate in &front {
        let folded = fold_on(&decoder, &candidate.plan, &windows, &mut ()).unwrap();
        assert_eq!(folded.parameter_count(), candidate.parameters);
        assert!(candidate.parameters <= candidate.mix.parameters);
        assert_eq!(
            perplexity(&folded, &windows, &mut ()).unwrap().mean_nll.to_bits(),
            candidate.loss.to_bits()
        );
    }
    // No mix that was tried beats one of the front.
    for mix in &mixes[..mixes.len() - 1] {
        let tried = mix.measure(&decoder, &scores, &windows, &mut ()).unwrap();
        assert!(front.iter().any(|best| best.parameters <= tried.parameters && best.loss <= tried.loss));
    }
}

#[test]
fn a_budget_that_cannot_be_met_says_what_could() {
    let (decoder, scores) = model();
    let windows = windows("qwen3");
    let error = search_mixes(&decoder, &scores, &[mix(10, 1, 0.0)], &windows, &mut ()).unwrap_err();
    assert!(matches!(error, Error::Budget { budget: 10, .. }), "{error}");
    assert!(mix(100, 0, 1.0).plan(&decoder, &scores, &windows, &mut ()).is_err());
}

#[test]
fn a_total_between_full_tying_and_the_share_for_residuals_is_met() {
    let (decoder, scores) = model();
    let (windows, arch) = (windows("qwen3"), decoder.architecture());
    let all = Plan::builder().share(Groups::of(4)).donor(Donor::Mean).scales(ScaleStart::LeastSquares);
    let least = all.build(arch).unwrap().architecture(arch).unwrap().parameter_count();
    let unit = arch.intermediate_size + arch.hidden_size;
    for (more, ranks) in [(0, false), (unit, true)] {
        let mix = mix(least + more, 0, 0.05);
        assert!(mix.parameters as f64 * 0.95 < least as f64);
        let plan = mix.plan(&decoder, &scores, &windows, &mut ()).unwrap();
        let sharing = plan.sharing().unwrap();
        assert_eq!(sharing.groups[0].blocks, [0, 1, 2, 3]);
        assert_eq!(!sharing.ranks.is_empty(), ranks, "{more}");
        let folded = fold_on(&decoder, &plan, &windows, &mut ()).unwrap();
        assert!(folded.parameter_count() <= mix.parameters, "{more}");
        assert_eq!(plan.to_builder().measure(&decoder, &windows, &mut ()).unwrap(), plan, "{more}");
    }
    // What cannot be met is named as it was asked for, with what could be.
    let error = mix(least - 1, 0, 0.05).plan(&decoder, &scores, &windows, &mut ()).unwrap_err();
    let Error::Budget { budget, least: found, .. } = error else { panic!("{error}") };
    assert_eq!((budget, found), (least - 1, least));
}

#[test]
fn a_mix_whose_loss_is_not_finite_is_passed_over() {
    // Block 2 computes what it did, with matrices that overflow behind the norm of another block.
    let huge = 1e30;
    let decoder = load("qwen3").map(|param, value| match param {
        Param::Block(2, BlockParam::Norm(NormSite::MlpIn, _)) => Ok((value / huge)?),
        Param::Block(2, BlockParam::Weight(Projection::Gate | Projection::Up)) => Ok((value * huge)?),
        _ => Ok(value.clone()),
    });
    let decoder = decoder.unwrap();
    let (_, scores) = model();
    let windows = windows("qwen3");
    let (total, block) = (decoder.parameter_count(), block(&decoder));
    // One tie, and then all four blocks in one group.
    let [sound, broken] = [mix(total - block / 2, 0, 0.0), mix(total - 5 * block / 2, 0, 0.0)];
    let search = |mixes: &[Mix]| search_mixes(&decoder, &scores, mixes, &windows, &mut ());
    let front = search(&[broken.clone(), sound.clone()]).unwrap();
    assert_eq!((front.len(), &front[0].mix), (1, &sound));
    let error = search(&[broken]).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
}

#[test]
fn no_more_goes_than_may_and_all_mixes_are_tried() {
    let (decoder, scores) = model();
    let windows = windows("qwen3");
    let (total, block) = (decoder.parameter_count(), block(&decoder));
    let plan = |mix: &Mix| mix.plan(&decoder, &scores, &windows, &mut ()).unwrap();
    for most in [3, 4, 100] {
        assert_eq!(plan(&mix(total - 3 * block, most, 0.0)).removed(), [1, 2, 3], "{most}");
        let mut protected = mix(total - 2 * block - 1, most, 0.0);
        protected.protected = vec![0, 3];
        let plan = plan(&protected);
        assert_eq!((plan.removed(), plan.sharing().unwrap().groups.len()), (&[1, 2][..], 1), "{most}");
    }
    let mixes = mix(total - block / 2, 0, 0.0).variants(&[0, 100], &[0.0]);
    let front = search_mixes(&decoder, &scores, &mixes, &windows, &mut ()).unwrap();
    assert!(!front.is_empty() && front.iter().all(|candidate| candidate.parameters < total));
}

#[test]
fn mixes_that_come_to_the_same_plan_are_measured_once() {
    #[derive(Default)]
    struct Measured(usize);
    impl Observer for Measured {
        fn started(&mut self, stage: &'static str, _: u64) {
            self.0 += usize::from(stage == "perplexity");
        }
    }
    let (decoder, scores) = model();
    let mixes = mix(decoder.parameter_count() - block(&decoder), 0, 0.0).variants(&[1, 2, 3], &[0.0, 0.1]);
    let mut measured = Measured::default();
    let front = search_mixes(&decoder, &scores, &mixes, &windows("qwen3"), &mut measured).unwrap();
    assert_eq!((measured.0, front.len()), (1, 1));
    assert_eq!(front[0].mix, mixes[0]);
}
