//! Ties, measured: what groups cost, which donors are best, and how far neighbours are tied for a budget.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use foldgpt::model::{BlockParam, NormSite, Param, Projection};
use foldgpt::plan::{Budget, Donor, Groups, Matrices, Ranks, Residual, ResidualStart, ScaleStart};
use foldgpt::{Decoder, Error, Observer, Plan, Windows, fold};
use support::{load, windows};

#[test]
fn budgeted_groups_meet_their_budget_with_the_cheapest_ties() {
    for donor in [Donor::First, Donor::Mean, Donor::Best] {
        let decoder = load("qwen3");
        let windows = windows("qwen3");
        let (arch, total) = (decoder.architecture(), decoder.parameter_count());
        let matrices =
            arch.block_params().iter().filter(|(_, shape)| shape.len() == 2).cloned().collect::<Vec<_>>();
        let block: usize = matrices.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let budgets = [
            (total, 0),
            (total - 1, 1),
            (total - block, 1),
            (total - block - 1, 2),
            (total - 2 * block - 1, 3),
        ];
        for (budget, ties) in budgets {
            let builder = Plan::builder().share(Groups::until(Budget::Parameters(budget))).donor(donor);
            let plan = builder.measure(&decoder, &windows, &mut ()).unwrap();
            let sharing = plan.sharing().unwrap();
            let found: usize = sharing.groups.iter().map(|group| group.blocks.len() - 1).sum();
            assert_eq!(found, ties, "{donor:?} {budget}");
            assert!(fold(&decoder, &plan).unwrap().parameter_count() <= budget);
            assert_eq!(Plan::from_json(&plan.to_json().unwrap()).unwrap(), plan);
            // Each tie was measured with those before it, so that costs add up.
            let loss = |plan: &Plan| loss(&fold(&decoder, plan).unwrap(), &windows);
            let dense = self::loss(&decoder, &windows);
            let cost: f64 = sharing.groups.iter().map(|group| group.cost.unwrap()).sum();
            assert!((loss(&plan) - dense - cost).abs() < 1e-6, "{donor:?} {budget}");
            if donor != Donor::Best {
                let blocks: Vec<Vec<usize>> =
                    sharing.groups.iter().map(|group| group.blocks.clone()).collect();
                assert_eq!(blocks, tied_by_hand(&decoder, &windows, donor, ties), "{donor:?} {budget}");
            }
            if ties == 1 {
                // The pair that was chosen is the one whose tying costs the least, measured by hand.
                for pair in [[0, 1], [1, 2], [2, 3]] {
                    let other = Plan::builder().share(Groups::Explicit(vec![pair.to_vec()]));
                    let other = other.donor(donor).measure(&decoder, &windows, &mut ()).unwrap();
                    assert!(loss(&other) - dense > cost - 1e-6, "{pair:?} would have been cheaper");
                }
            }
        }
        let builder = Plan::builder().share(Groups::until(Budget::Parameters(10))).donor(donor);
        let error = builder.measure(&decoder, &windows, &mut ()).unwrap_err().to_string();
        assert!(error.contains("budget for sharing is 10 parameters"), "{error}");
        let bytes = Budget::Bytes((4 * total - 4) as u64);
        let plan = Plan::builder().share(Groups::until(bytes)).measure(&decoder, &windows, &mut ()).unwrap();
        assert_eq!(plan.sharing().unwrap().groups.len(), 1);
        let builder = Plan::builder().share(Groups::until(Budget::Bytes(10))).donor(donor);
        let error = builder.measure(&decoder, &windows, &mut ()).unwrap_err().to_string();
        assert!(error.contains("budget for sharing is 10 bytes"), "{error}");
    }
}

#[test]
fn ties_that_make_a_model_no_smaller_are_not_made() {
    #[derive(Default)]
    struct Stages(Vec<&'static str>);
    impl Observer for Stages {
        fn started(&mut self, stage: &'static str, _: u64) {
            self.0.push(stage);
        }
    }
    let (decoder, windows) = (load("llama"), windows("llama"));
    let (arch, total) = (decoder.architecture(), decoder.parameter_count());
    let until = |limit, rank, donor| {
        let groups = Groups::until(Budget::Parameters(limit));
        Plan::builder().share(groups).donor(donor).residual(Ranks::Uniform(rank), ResidualStart::Svd)
    };
    let size = |plan: &Plan| plan.architecture(arch).unwrap().parameter_count();
    let pair = |rank, donor| {
        let pair = Plan::builder().share(Groups::Explicit(vec![vec![0, 1]])).donor(donor);
        size(&pair.residual(Ranks::Uniform(rank), ResidualStart::Svd).build(arch).unwrap())
    };
    // The least rank at which two residuals take more than one block's matrices: one residual takes less.
    let rank = (1..1000).find(|&rank| pair(rank, Donor::Mean) >= total).unwrap();
    assert!(pair(rank, Donor::First) < total);
    for limit in [total - 1, 10] {
        let mut stages = Stages::default();
        let error = until(limit, rank, Donor::Mean).measure(&decoder, &windows, &mut stages).unwrap_err();
        let Error::Budget { budget, least, .. } = error else { panic!("{error}") };
        assert_eq!((budget, least), (limit, total));
        assert_eq!(stages.0, [] as [&str; 0], "nothing is measured for it");
    }
    // Of all donors those are left that help.
    let plan = until(total - 1, rank, Donor::Best).measure(&decoder, &windows, &mut ()).unwrap();
    let groups = &plan.sharing().unwrap().groups;
    assert!(size(&plan) < total);
    assert!(groups.iter().all(|group| group.donor != Matrices::Mean), "{groups:?}");
    assert!(groups.iter().flat_map(|group| &group.tried).all(|(donor, _)| *donor != Matrices::Mean));
}

#[test]
fn a_budget_says_what_all_ties_would_leave() {
    let (decoder, windows) = (load("qwen3"), windows("qwen3"));
    let arch = decoder.architecture();
    for (largest, groups) in [(None, Groups::of(4)), (Some(3), Groups::of(3)), (Some(2), Groups::of(2))] {
        for donor in [Donor::First, Donor::Mean, Donor::Best] {
            let all = Plan::builder().share(groups.clone());
            let all = all.donor(if donor == Donor::Best { Donor::First } else { donor });
            let all = all.scales(ScaleStart::Ones).build(arch).unwrap();
            let least = all.architecture(arch).unwrap().parameter_count();
            let until = |limit| {
                let groups = Groups::Budget { budget: Budget::Parameters(limit), largest };
                let builder = Plan::builder().share(groups).donor(donor).scales(ScaleStart::Ones);
                builder.measure(&decoder, &windows, &mut ())
            };
            let error = until(least - 1).unwrap_err();
            assert!(
                matches!(error, Error::Budget { least: found, .. } if found == least),
                "{largest:?} {donor:?} {least}: {error}"
            );
            if largest.is_none() && donor != Donor::Best {
                assert!(until(least).is_ok(), "{donor:?}");
            }
        }
    }
}

#[test]
fn a_folded_model_is_tied_further_until_a_budget_is_met() {
    let (decoder, windows) = (load("llama"), windows("llama"));
    for groups in [vec![vec![0, 1], vec![2, 3]], vec![vec![0, 2], vec![1, 3]]] {
        let first = Plan::builder().share(Groups::Explicit(groups.clone())).donor(Donor::First);
        let folded = fold(&decoder, &first.build(decoder.architecture()).unwrap()).unwrap();
        for donor in [Donor::First, Donor::Mean] {
            let limit = folded.parameter_count() - 1;
            let until = Plan::builder().share(Groups::until(Budget::Parameters(limit))).donor(donor);
            let plan = until.measure(&folded, &windows, &mut ()).unwrap();
            assert!(fold(&folded, &plan).unwrap().parameter_count() <= limit, "{groups:?} {donor:?}");
        }
    }
}

fn loss(decoder: &Decoder, windows: &Windows) -> f64 {
    foldgpt::perplexity(decoder, windows, &mut ()).unwrap().mean_nll
}

/// The groups after so many ties, each of the neighbours whose tying costs the least; what was measured before the last
/// tie is measured again where it is the least.
fn tied_by_hand(decoder: &Decoder, windows: &Windows, donor: Donor, ties: usize) -> Vec<Vec<usize>> {
    let tied = |groups: &[Vec<usize>]| {
        let groups = groups.iter().filter(|group| group.len() > 1).cloned().collect();
        let plan = Plan::builder().share(Groups::Explicit(groups)).donor(donor);
        loss(&fold(decoder, &plan.build(decoder.architecture()).unwrap()).unwrap(), windows)
    };
    let mut groups: Vec<Vec<usize>> = (0..decoder.depth()).map(|block| vec![block]).collect();
    let mut known: Vec<(Vec<usize>, f64, usize)> = Vec::new();
    for age in 0..ties {
        let without = |pair: &[usize]| {
            let mut with: Vec<Vec<usize>> =
                groups.iter().filter(|group| !pair.contains(&group[0])).cloned().collect();
            with.push(pair.to_vec());
            with.sort();
            with
        };
        let cost = |pair: &[usize]| tied(&without(pair)) - tied(&groups);
        let pairs: Vec<Vec<usize>> = groups.windows(2).map(<[Vec<usize>]>::concat).collect();
        known.retain(|(pair, ..)| pairs.contains(pair));
        for pair in &pairs {
            if !known.iter().any(|(other, ..)| other == pair) {
                known.push((pair.clone(), cost(pair), age));
            }
        }
        let least = loop {
            known.sort_by(|a, b| a.1.total_cmp(&b.1));
            let (pair, _, measured) = known[0].clone();
            if measured == age {
                break pair;
            }
            known[0] = (pair.clone(), cost(&pair), age);
        };
        groups = without(&least);
    }
    groups.into_iter().filter(|group| group.len() > 1).collect()
}

#[test]
fn groups_that_are_named_have_costs_too() {
    let (decoder, windows) = (load("qwen3"), windows("qwen3"));
    for donor in [Donor::First, Donor::Mean, Donor::Best] {
        let plan = Plan::builder().share(Groups::of(2)).donor(donor).scales(ScaleStart::Ones);
        let plan = plan.measure(&decoder, &windows, &mut ()).unwrap();
        let groups = &plan.sharing().unwrap().groups;
        let costs: Vec<f64> = groups.iter().map(|group| group.cost.unwrap()).collect();
        assert_eq!(costs.len(), 2, "{donor:?}");
        let dense = loss(&decoder, &windows);
        assert!((loss(&fold(&decoder, &plan).unwrap(), &windows) - dense - costs[0] - costs[1]).abs() < 1e-6);
        // The only donor costs what it does among others.
        let asked = match donor {
            Donor::First => Some(Matrices::Block(0)),
            Donor::Mean => Some(Matrices::Mean),
            _ => None,
        };
        let best = Plan::builder().share(Groups::of(2)).donor(Donor::Best);
        let best = best.measure(&decoder, &windows, &mut ()).unwrap();
        let tried = &best.sharing().unwrap().groups[0].tried;
        for (_, cost) in tried.iter().filter(|(donor, _)| Some(*donor) == asked) {
            assert_eq!(cost.to_bits(), costs[0].to_bits(), "{donor:?}");
        }
        assert_eq!(tried.len(), 3);
        let first = Plan::builder().share(Groups::of_within(2, 0..=1)).donor(donor);
        let first = fold(&decoder, &first.measure(&decoder, &windows, &mut ()).unwrap()).unwrap();
        assert!((loss(&first, &windows) - dense - costs[0]).abs() < 1e-6, "{donor:?}");
        // A group that cannot be is refused before anything is measured.
        let wrong = Plan::builder().share(Groups::Explicit(vec![vec![0, 1], vec![1, 2]])).donor(donor);
        let error = wrong.measure(&decoder, &windows, &mut ()).unwrap_err().to_string();
        assert!(error.contains("two groups"), "{error}");
    }
}

#[test]
fn a_donor_that_overflows_is_none() {
    // Block 2 computes what it did, with matrices that overflow behind the norm of another block.
    let huge = 1e30;
    let decoder = load("llama").map(|param, value| match param {
        Param::Block(2, BlockParam::Norm(NormSite::MlpIn, _)) => Ok((value / huge)?),
        Param::Block(2, BlockParam::Weight(Projection::Gate | Projection::Up)) => Ok((value * huge)?),
        _ => Ok(value.clone()),
    });
    let (decoder, windows) = (decoder.unwrap(), windows("llama"));
    assert!((loss(&decoder, &windows) - loss(&load("llama"), &windows)).abs() < 1e-3);
    let measure = |builder: foldgpt::PlanBuilder| builder.measure(&decoder, &windows, &mut ());
    let pair = || Plan::builder().share(Groups::Explicit(vec![vec![1, 2]]));
    let plan = measure(pair().donor(Donor::Best)).unwrap();
    let group = &plan.sharing().unwrap().groups[0];
    assert_eq!((group.donor, group.tried.len()), (Matrices::Block(1), 0));
    assert_eq!(Plan::from_json(&plan.to_json().unwrap()).unwrap(), plan);
    let error = measure(pair().donor(Donor::Mean)).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }) && error.to_string().contains("[1, 2]"), "{error}");
    // A search passes over such neighbours for as long as there are others.
    let total = decoder.parameter_count();
    let until = |budget| Plan::builder().share(Groups::until(Budget::Parameters(budget))).donor(Donor::Mean);
    let plan = measure(until(total - 1)).unwrap();
    assert_eq!(plan.sharing().unwrap().groups[0].blocks, [0, 1]);
    let error = measure(until(plan.architecture(decoder.architecture()).unwrap().parameter_count() - 1));
    assert!(matches!(error, Err(Error::NotFinite { .. })), "{error:?}");
}

#[test]
fn a_residual_raises_the_budget_that_its_groups_were_for() {
    let (decoder, windows) = (load("qwen3"), windows("qwen3"));
    let arch = decoder.architecture();
    let pair = Plan::builder().share(Groups::Explicit(vec![vec![0, 1]])).build(arch).unwrap();
    // What one tie leaves, and no room for anything besides.
    let exact = pair.architecture(arch).unwrap().parameter_count();
    for budget in [Budget::Parameters(exact), Budget::Bytes(4 * exact as u64)] {
        let tied = Plan::builder().share(Groups::until(budget)).donor(Donor::Mean);
        let tied = tied.measure(&decoder, &windows, &mut ()).unwrap();
        assert_eq!(tied.sharing().unwrap().groups.len(), 1);
        for ranks in [Ranks::Uniform(2), Ranks::Parameters(700)] {
            let residual = Residual { ranks, start: ResidualStart::Svd };
            let plan = tied.with_residual(&decoder, residual, &windows, &mut ()).unwrap();
            let sharing = plan.sharing().unwrap();
            assert_eq!(sharing.groups, tied.sharing().unwrap().groups, "{budget:?} {ranks:?}");
            let size = plan.architecture(arch).unwrap().parameter_count();
            let limit = match sharing.asked {
                Groups::Budget { budget: Budget::Parameters(count), .. } => count,
                Groups::Budget { budget: Budget::Bytes(bytes), .. } => bytes as usize / 4,
                _ => panic!("{:?}", sharing.asked),
            };
            assert!(exact < size && size <= limit, "{budget:?} {ranks:?}: {size} of {limit}");
            // Asked again, the plan is the same.
            let again = plan.to_builder().measure(&decoder, &windows, &mut ()).unwrap();
            assert_eq!(again, plan, "{budget:?} {ranks:?}");
        }
    }
}
