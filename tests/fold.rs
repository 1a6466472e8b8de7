//! Folding in memory: what is shared exists once, and every kind of group computes what it should.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::Arc;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::model::{NormSite, Part, Projection, Unit};
use foldgpt::plan::{Donor, Groups, Ranks, ResidualStart, ScaleStart};
use foldgpt::{Account, Decoder, Held, Plan, Scores, Target, Windows, fold, fold_on, output_errors};
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
            // One text by itself too: what is one row is multiplied in another way.
            for ids in [&ids, &ids.narrow(0, 0, 1).unwrap()] {
                let whole = decoder.forward(ids).unwrap();
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
