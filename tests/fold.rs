//! Folding in memory: what is shared exists once, and every kind of group computes what it should.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::Arc;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::model::{BlockParam, NormSite, Param, Part, Projection, Unit};
use foldgpt::plan::{Budget, Donor, Groups, Matrices, Ranks, Residual, ResidualStart, ScaleStart};
use foldgpt::{
    Account, Decoder, Error, Held, Observer, Plan, Scores, Target, Windows, fold, fold_on, output_errors,
};
use support::{FAMILIES, distance, folded, input_ids, kinds, load, windows};

fn resident_bytes(decoder: &Decoder) -> usize {
    Account::counted(decoder, 1).unwrap().resident_bytes as usize
}

#[test]
fn matrices_of_a_group_exist_once_through_every_conversion() {
    for family in FAMILIES {
        for (name, plan) in kinds(family) {
            let folded = folded(family, &plan);
            for decoder in [
                folded.clone(),
                folded.to_dtype(DType::BF16).unwrap(),
                folded.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap(),
                // Where there is no other device this is the identity, and shows only that it shares.
                folded.to_device(&Device::Cpu).unwrap(),
            ] {
                let group = &plan.sharing().unwrap().groups[0].blocks;
                let depths: Vec<usize> = group
                    .iter()
                    .map(|block| plan.kept().iter().position(|kept| kept == block).unwrap())
                    .collect();
                let first = &decoder.blocks()[depths[0]];
                for &depth in &depths {
                    let block = &decoder.blocks()[depth];
                    assert!(Arc::ptr_eq(&first.weights, &block.weights), "{family} {name}");
                    for at in Projection::ALL {
                        let ids =
                            [first, block].map(|block| block.weights.tensor(at).unwrap().map(Tensor::id));
                        assert_eq!(ids[0], ids[1], "{family} {name}");
                    }
                }
                assert_eq!(decoder.architecture(), folded.architecture(), "{family} {name}");
                let size = |(param, shape): (foldgpt::model::Param, Vec<usize>)| {
                    let narrow = decoder.dtype() == DType::BF16 && param.is_matrix();
                    shape.iter().product::<usize>() * if narrow { 2 } else { 4 }
                };
                let expected: usize = decoder.architecture().params().into_iter().map(size).sum();
                assert_eq!(resident_bytes(&decoder), expected, "{family} {name}");
            }
            let whole = resident_bytes(&load(family));
            assert!(resident_bytes(&folded) < whole, "{family} {name}");
        }
    }
}

#[test]
fn a_plan_alone_says_what_folding_makes() {
    for family in FAMILIES {
        for (name, plan) in kinds(family) {
            let folded = folded(family, &plan);
            let planned = plan.architecture(load(family).architecture()).unwrap();
            assert_eq!(&planned, folded.architecture(), "{family} {name}");
            let count: usize =
                planned.params().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            assert_eq!(count, folded.parameter_count(), "{family} {name}");
        }
    }
}

#[test]
fn accounts_from_a_plan_are_those_counted_from_the_model() {
    for family in FAMILIES {
        let dense = load(family);
        let mut models = vec![("dense", dense.architecture().clone(), dense.clone())];
        for (name, plan) in kinds(family) {
            models.push((name, plan.architecture(dense.architecture()).unwrap(), folded(family, &plan)));
        }
        let halves = [Unit { block: 0, part: Part::Mlp }, Unit { block: 3, part: Part::Attention }];
        let cut = dense.without(&halves).unwrap();
        models.push(("halves", cut.architecture().clone(), cut));
        for (name, arch, decoder) in models {
            for resident in [DType::F32, DType::BF16] {
                for context in [1, 7, 1000] {
                    let held = Held { stored: DType::F32.into(), resident, context };
                    let counted = Account::counted(&decoder.to_dtype(resident).unwrap(), context).unwrap();
                    assert_eq!(Account::planned(&arch, &held), counted, "{family} {name} {resident:?}");
                }
            }
        }
    }
}

#[test]
fn sharing_saves_memory_and_no_work() {
    // llama's fixture: the account of the dense model from its shapes alone.
    let decoder = load("llama");
    let arch = decoder.architecture();
    let held = Held { stored: DType::BF16.into(), resident: DType::F32, context: 10 };
    let dense = Account::planned(arch, &held);
    let matrices: usize =
        Projection::ALL.iter().map(|&at| arch.projection_shape(at).unwrap()).map(|(o, i)| o * i).sum();
    let block = matrices + 2 * arch.hidden_size;
    let outside = 2 * arch.vocab_size * arch.hidden_size + arch.hidden_size;
    assert!(!arch.tied);
    assert_eq!(dense.parameters, 4 * block + outside);
    assert_eq!(dense.stored_bytes, 2 * dense.parameters as u64);
    let attention = 4 * 10 * arch.query_width();
    assert_eq!(
        dense.flops_per_token as usize,
        4 * (2 * matrices + attention) + 2 * arch.vocab_size * arch.hidden_size
    );
    assert_eq!(dense.kv_bytes_per_token as usize, 4 * 2 * 4 * arch.key_width());
    let pairs = Plan::builder().share(Groups::of(2)).build(arch).unwrap().architecture(arch).unwrap();
    let pairs = Account::planned(&pairs, &held);
    assert_eq!(pairs.parameters, dense.parameters - 2 * matrices);
    assert_eq!(pairs.flops_per_token, dense.flops_per_token);
    assert_eq!(pairs.kv_bytes_per_token, dense.kv_bytes_per_token);
}

#[test]
fn decoding_with_a_cache_is_the_whole_pass_for_every_kind_of_group() {
    for family in FAMILIES {
        for (name, plan) in kinds(family) {
            let decoder = folded(family, &plan);
            let ids = input_ids(family);
            let seq = ids.dim(1).unwrap();
            let whole = decoder.forward(&ids).unwrap();
            let mut cache = decoder.cache();
            let mut pieces = Vec::new();
            for (start, len) in [(0, 3), (3, 1), (4, seq - 4)] {
                let hidden = decoder.extend(&ids.narrow(1, start, len).unwrap(), &mut cache).unwrap();
                pieces.push(decoder.logits(&hidden).unwrap());
            }
            let pieces = Tensor::cat(&pieces, 1).unwrap();
            assert!(distance(&pieces, &whole) < 1e-5, "{family} {name}");
        }
    }
}

#[test]
fn donors_give_what_their_names_say() {
    let decoder = load("llama");
    let matrix = |decoder: &Decoder, depth: usize| {
        decoder.blocks()[depth].weights.tensor(Projection::Up).unwrap().unwrap().clone()
    };
    let make = |donor| {
        let plan = Plan::builder().share(Groups::of(2)).donor(donor).build(decoder.architecture()).unwrap();
        fold(&decoder, &plan).unwrap()
    };
    assert_eq!(matrix(&make(Donor::First), 3).id(), matrix(&decoder, 2).id(), "nothing is copied");
    let mean = ((matrix(&decoder, 2) + matrix(&decoder, 3)).unwrap() / 2.0).unwrap();
    assert!(distance(&matrix(&make(Donor::Mean), 3), &mean) < 1e-6);
    let norm = |decoder: &Decoder, depth: usize| {
        decoder.blocks()[depth].own.norms[foldgpt::model::NormSite::MlpIn].as_ref().unwrap().gain.id()
    };
    assert_eq!(norm(&make(Donor::First), 3), norm(&decoder, 3), "norms stay its own");
    let plan = Plan::builder().share(Groups::of(2)).donor(Donor::First).share_norms();
    let plan = plan.build(decoder.architecture()).unwrap();
    assert_eq!(norm(&fold(&decoder, &plan).unwrap(), 3), norm(&decoder, 2), "unless they are shared too");
}

#[test]
fn a_full_rank_residual_gives_the_original_back() {
    for start in [ResidualStart::Svd, ResidualStart::Whitened] {
        for family in FAMILIES {
            let decoder = load(family);
            let plan = Plan::builder().share(Groups::of(2)).donor(Donor::Mean);
            let plan = plan.residual(Ranks::Uniform(10_000), start).build(decoder.architecture()).unwrap();
            let folded = fold_on(&decoder, &plan, &windows(family), &mut ()).unwrap();
            let ids = input_ids(family);
            let off = distance(&folded.forward(&ids).unwrap(), &decoder.forward(&ids).unwrap());
            assert!(off < 2e-4, "{family} {start:?}: off by {off}");
        }
    }
}

/// The mean relative output error of all projections that differ.
fn mean_error(original: &Decoder, folded: &Decoder, windows: &Windows) -> f64 {
    let errors = output_errors(original, folded, windows, &mut ()).unwrap();
    errors.iter().map(|error| error.relative).sum::<f64>() / errors.len() as f64
}

#[test]
fn scales_and_whitened_residuals_lower_the_output_error() {
    for family in FAMILIES {
        let decoder = load(family);
        let windows = windows(family);
        let error = |builder: foldgpt::PlanBuilder| {
            let plan = builder.build(decoder.architecture()).unwrap();
            mean_error(&decoder, &fold_on(&decoder, &plan, &windows, &mut ()).unwrap(), &windows)
        };
        let pairs = || Plan::builder().share(Groups::of(2)).donor(Donor::Mean);
        let tied = error(pairs());
        let scaled = error(pairs().scales(ScaleStart::LeastSquares));
        assert!(scaled < tied, "{family}: {scaled} with scales, {tied} without");
        for rank in [1, 4] {
            let plain = error(pairs().residual(Ranks::Uniform(rank), ResidualStart::Svd));
            let whitened = error(pairs().residual(Ranks::Uniform(rank), ResidualStart::Whitened));
            assert!(
                plain < tied && whitened < plain,
                "{family} rank {rank}: {whitened}, plain {plain}, tied {tied}"
            );
        }
    }
}

#[test]
fn least_squares_scales_are_those_of_the_normal_equations() {
    // One factor a row: the best approximation of W x by s V x over the tokens has s = Σ (w·x)(v·x) / Σ (v·x)².
    let decoder = load("llama");
    let windows = windows("llama");
    let plan = Plan::builder().share(Groups::Explicit(vec![vec![0, 1]])).donor(Donor::First);
    let plan = plan.scales(ScaleStart::LeastSquares).build(decoder.architecture()).unwrap();
    let folded = fold_on(&decoder, &plan, &windows, &mut ()).unwrap();
    let vector = |tensor: &Tensor| tensor.to_vec1::<f32>().unwrap();
    let scale = vector(folded.blocks()[1].own.adapters[Projection::Q].scale.as_ref().unwrap());
    let matrix = |depth: usize| {
        decoder.blocks()[depth].weights.tensor(Projection::Q).unwrap().unwrap().to_vec2::<f32>().unwrap()
    };
    let (shared, target) = (matrix(0), matrix(1));
    // What block 1's attention sees of every token behind block 0, which is its own: `x / rms(x) ⊙ gain`.
    let gain = vector(&decoder.blocks()[1].own.norms[NormSite::AttentionIn].as_ref().unwrap().gain);
    let epsilon = decoder.architecture().norm_eps;
    let mut tokens: Vec<Vec<f64>> = Vec::new();
    for window in 0..windows.len() {
        let pass = decoder.pass(0, windows.seq_len()).unwrap();
        let x = decoder.embed(&windows.tensor(window, &Device::Cpu).unwrap(), &pass).unwrap();
        let x = decoder.run_block(0, &x, &pass).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        tokens.extend(x.into_iter().map(|x| {
            let square: f64 = x.iter().map(|value| f64::from(*value).powi(2)).sum();
            let rms = (square / x.len() as f64 + epsilon).sqrt();
            x.iter().zip(&gain).map(|(value, gain)| f64::from(*value) / rms * f64::from(*gain)).collect()
        }));
    }
    let product = |row: &[f32], x: &[f64]| -> f64 { row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum() };
    assert_eq!(scale.len(), target.len());
    for (row, found) in scale.iter().enumerate() {
        let (mut with_target, mut with_itself) = (0.0, 0.0);
        for x in &tokens {
            let (w, v) = (product(&target[row], x), product(&shared[row], x));
            with_target += w * v;
            with_itself += v * v;
        }
        let expected = with_target / with_itself;
        assert!(
            (f64::from(*found) - expected).abs() < 1e-4 * expected.abs().max(1.0),
            "row {row}: {found}, expected {expected}"
        );
    }
    let mean = scale.iter().sum::<f32>() / scale.len() as f32;
    assert!(scale.iter().any(|factor| (factor - mean).abs() > 0.1), "rows have factors of their own");
}

#[test]
fn ranks_go_where_they_help_and_keep_their_budget() {
    let decoder = load("llama");
    let windows = windows("llama");
    let arch = decoder.architecture();
    let pairs = || Plan::builder().share(Groups::of(2)).donor(Donor::Mean);
    let uniform = pairs().residual(Ranks::Uniform(3), ResidualStart::Whitened).build(arch).unwrap();
    let size = |plan: &Plan| {
        let params = plan.architecture(arch).unwrap().params();
        params.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>()
    };
    let budget = size(&uniform) - size(&pairs().build(arch).unwrap());
    let spread = pairs().residual(Ranks::Parameters(budget), ResidualStart::Whitened);
    let spread = spread.measure(&decoder, &windows, &mut ()).unwrap();
    assert!(size(&spread) <= size(&uniform) && size(&spread) + 300 > size(&uniform));
    let error =
        |plan: &Plan| mean_error(&decoder, &fold_on(&decoder, plan, &windows, &mut ()).unwrap(), &windows);
    assert!(error(&spread) < error(&uniform));
    let spread = |count| pairs().residual(Ranks::Parameters(count), ResidualStart::Svd);
    assert!(spread(budget).build(arch).is_err(), "has to be measured");
    // Keys and values have the smallest matrices; one parameter less is no rank at all.
    let unit = arch.key_width() + arch.hidden_size;
    let error = spread(unit - 1).measure(&decoder, &windows, &mut ()).unwrap_err().to_string();
    assert!(error.contains(&format!("is {}, expected at least {unit}", unit - 1)), "{error}");
    let least = spread(unit).measure(&decoder, &windows, &mut ()).unwrap();
    assert_eq!(least.sharing().unwrap().ranks.len(), 1);
}

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
    let rank = (1..).find(|&rank| pair(rank, Donor::Mean) >= total).unwrap();
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

#[test]
fn folding_is_the_same_bit_for_bit_every_time() {
    let decoder = load("gemma2");
    let windows = windows("gemma2");
    let run = || {
        let plan = Plan::builder()
            .share(Groups::of(2))
            .donor(Donor::Best)
            .scales(ScaleStart::LeastSquares)
            .residual(Ranks::Parameters(3000), ResidualStart::Whitened)
            .measure(&decoder, &windows, &mut ())
            .unwrap();
        let logits =
            fold_on(&decoder, &plan, &windows, &mut ()).unwrap().forward(&input_ids("gemma2")).unwrap();
        (plan, logits.flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    assert_eq!(run(), run());
}

#[test]
fn what_needs_windows_says_so() {
    let decoder = load("llama");
    let plan = Plan::builder().share(Groups::of(2)).scales(ScaleStart::LeastSquares);
    let plan = plan.build(decoder.architecture()).unwrap();
    assert!(fold(&decoder, &plan).unwrap_err().to_string().contains("calibration windows"));
    assert!(fold(&load("gpt2"), &plan).is_err());
}

#[test]
fn a_folded_model_can_be_cut_and_folded_again() {
    let pairs = || Plan::builder().share(Groups::of(2));
    let all = || Plan::builder().share(Groups::of(4));
    for family in ["llama", "gemma2", "gpt2"] {
        let (decoder, windows) = (load(family), windows(family));
        let scores = Scores::new("test", &windows, vec![0.1, 0.4, 0.3, 0.2]).unwrap();
        // The mlp of block 1 goes first, then the attention of block 3.
        let halves = vec![9.0, 9.0, 9.0, 0.1, 9.0, 9.0, 0.2, 9.0];
        let halves = Scores::of_units("test", &windows, &Unit::halves(4), halves).unwrap();
        let firsts = [
            ("own norms", pairs().donor(Donor::Mean).residual(Ranks::Uniform(2), ResidualStart::Svd)),
            ("shared norms", pairs().share_norms()),
            ("mean norms", pairs().share_norms().donor(Donor::Mean).scales(ScaleStart::Ones)),
            ("all, shared norms", all().share_norms()),
            ("lost halves", Plan::builder().remove(Target::Blocks(1), &halves)),
        ];
        for (name, first) in firsts {
            let folded = fold(&decoder, &first.build(decoder.architecture()).unwrap()).unwrap();
            let again = [
                Plan::builder().remove(Target::Blocks(1), &scores),
                Plan::builder().remove(Target::Blocks(1), &halves),
                Plan::builder().remove(Target::Blocks(1), &scores).share(Groups::of(3)).donor(Donor::Mean),
                Plan::builder().remove(Target::Blocks(1), &halves).share(Groups::of(2)).share_norms(),
                Plan::builder().share(Groups::of_within(2, 1..=2)),
                pairs(),
                pairs().share_norms(),
                pairs().donor(Donor::Mean).residual(Ranks::Uniform(1), ResidualStart::Svd),
                all().donor(Donor::Mean),
                all(),
            ];
            for (place, builder) in again.into_iter().enumerate() {
                let plan = builder.build(folded.architecture()).unwrap();
                let made = fold(&folded, &plan).unwrap();
                let planned = plan.architecture(folded.architecture()).unwrap();
                assert_eq!(made.architecture(), &planned, "{family}, {name}, {place}");
                assert_eq!(made.parameter_count(), planned.parameter_count(), "{family}, {name}, {place}");
            }
        }
    }
}

#[test]
fn a_half_that_went_before_cannot_go_again() {
    let (dense, windows) = (load("llama"), windows("llama"));
    let lost = Unit { block: 1, part: Part::Mlp };
    let cut = dense.without(&[lost]).unwrap();
    // The least of all is not there any more; with its attention the block goes.
    let halves = vec![9.0, 9.0, 0.2, 0.1, 9.0, 9.0, 9.0, 9.0];
    let halves = Scores::of_units("test", &windows, &Unit::halves(4), halves).unwrap();
    let plan = Plan::new(cut.architecture(), &halves, Target::Blocks(1), &[]).unwrap();
    assert_eq!(plan.removed(), [1]);
    assert!(!plan.removed_halves().contains(&lost));
    let made = fold(&cut, &plan).unwrap();
    assert_eq!(made.architecture(), &plan.architecture(cut.architecture()).unwrap());
    // A plan for the whole model is none for this one.
    let attention = vec![9.0, 9.0, 0.1, 9.0, 9.0, 9.0, 9.0, 9.0];
    let attention = Scores::of_units("test", &windows, &Unit::halves(4), attention).unwrap();
    let whole = Plan::new(dense.architecture(), &attention, Target::Blocks(1), &[0, 2, 3]).unwrap();
    assert_eq!(whole.removed(), [1]);
    let mut value: serde_json::Value = serde_json::from_str(&whole.to_json().unwrap()).unwrap();
    (value["removed"], value["removed_halves"]) =
        (serde_json::json!([]), serde_json::json!([{ "block": 1, "part": "attention" }]));
    let whole = Plan::from_json(&value.to_string()).unwrap();
    assert!(fold(&dense, &whole).is_ok());
    let error = fold(&cut, &whole).unwrap_err().to_string();
    assert!(error.contains("half 1a should go") && error.contains("only 1a"), "{error}");
    // Blocks share only with those that have the same halves.
    let tie = |groups| Plan::builder().share(groups).build(cut.architecture());
    assert_eq!(tie(Groups::of(2)).unwrap().sharing().unwrap().groups[0].blocks, [2, 3]);
    let error = tie(Groups::Explicit(vec![vec![0, 1]])).unwrap_err().to_string();
    assert!(error.contains("same halves"), "{error}");
}

#[test]
fn what_two_depths_hold_and_do_not_share_counts_twice() {
    let decoder = load("llama");
    let pairs = Plan::builder().share(Groups::of(2)).build(decoder.architecture()).unwrap();
    let pairs = fold(&decoder, &pairs).unwrap();
    // Both still use the same attention, and no longer the same block.
    let parted = pairs.without(&[Unit { block: 1, part: Part::Mlp }]).unwrap();
    assert_eq!(parted.parameter_count(), parted.architecture().parameter_count());
    let attention: usize = [Projection::Q, Projection::K, Projection::V, Projection::O]
        .iter()
        .map(|&at| parted.blocks()[0].weights.get(at).unwrap().elem_count())
        .sum();
    let norm = decoder.architecture().hidden_size;
    assert_eq!(parted.parameter_count(), pairs.parameter_count() + attention - norm);
    // In memory it is there once.
    assert_eq!(resident_bytes(&parted), 4 * (parted.parameter_count() - attention));
}
