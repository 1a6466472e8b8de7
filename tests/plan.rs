//! Plans: targets, rounding, protection, and refusal of what contradicts itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use foldgpt::model::Unit;
use foldgpt::plan::{Donor, Groups, Matrices, Ranks, ResidualStart, ScaleStart};
use foldgpt::{Error, Plan, Scores, Target, Windows, fold};
use support::load;

fn scores(importance: &[f64]) -> Scores {
    Scores::new("test", &Windows::from_ids(vec![vec![1, 2]]).unwrap(), importance.to_vec()).unwrap()
}

fn plan(depth: usize, target: Target) -> foldgpt::Result<Plan> {
    let mut arch = load("llama").architecture().clone();
    arch.blocks = vec![arch.blocks[0]; depth];
    let importance: Vec<f64> = (0..depth).map(|index| ((index * 7) % depth) as f64).collect();
    Plan::new(&arch, &scores(&importance), target, &[])
}

#[test]
fn rates_round_to_the_nearest_number_of_blocks_and_halves_up() {
    let cases = [
        (30, 0.2, 6),
        (30, 0.15, 5),
        (10, 0.25, 3),
        (30, 0.01, 0),
        (12, 0.2, 2),
        (18, 0.2, 4),
        (4, 0.85, 3),
        (5, 0.0, 0),
    ];
    for (depth, rate, removed) in cases {
        assert_eq!(plan(depth, Target::Rate(rate)).unwrap().removed().len(), removed, "{rate} of {depth}");
    }
}

#[test]
fn impossible_targets_are_refused_with_the_value() {
    for rate in [1.0, 1.5, -0.1, f64::NAN, f64::INFINITY] {
        let error = plan(4, Target::Rate(rate)).unwrap_err().to_string();
        assert!(error.contains("removal rate") && error.contains(&rate.to_string()), "{error}");
    }
    assert!(plan(4, Target::Rate(0.99)).unwrap_err().to_string().contains("0.99"), "3.96 rounds to all four");
    assert!(plan(4, Target::Blocks(4)).unwrap_err().to_string().contains('4'));
    let error = plan(4, Target::Parameters(10)).unwrap_err();
    let arch = load("llama").architecture().with_blocks(&[0]).unwrap();
    let one_block = arch.parameter_count();
    assert!(
        matches!(error, Error::Budget { what: "removal", unit: "parameters", budget: 10, least, .. }
            if least == one_block),
        "{error}"
    );
}

#[test]
fn a_parameter_budget_removes_as_few_blocks_as_it_takes() {
    let decoder = load("llama");
    let arch = decoder.architecture();
    let total = decoder.parameter_count();
    let block: usize = arch.block_params().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    for (budget, removed) in
        [(total, 0), (total - 1, 1), (total - block, 1), (total - block - 1, 2), (total - 3 * block, 3)]
    {
        let plan = Plan::new(arch, &scores(&[1.0, 2.0, 3.0, 4.0]), Target::Parameters(budget), &[]).unwrap();
        assert_eq!(plan.removed().len(), removed, "budget {budget}");
        assert!(fold(&decoder, &plan).unwrap().parameter_count() <= budget);
    }
}

#[test]
fn a_parameter_budget_is_met_by_halves_and_by_blocks_that_share() {
    let dense = load("llama");
    let pairs = Plan::builder().share(Groups::of(2)).scales(ScaleStart::Ones);
    let pairs = fold(&dense, &pairs.build(dense.architecture()).unwrap()).unwrap();
    let windows = Windows::from_ids(vec![vec![1, 2]]).unwrap();
    // The mlps matter least, then one attention after the other.
    let halves = vec![8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0];
    let halves = Scores::of_units("test", &windows, &Unit::halves(4), halves).unwrap();
    let blocks = scores(&[1.0, 3.0, 2.0, 4.0]);
    for (name, decoder) in [("dense", &dense), ("pairs", &pairs)] {
        let arch = decoder.architecture();
        let total = decoder.parameter_count();
        let size = |plan: &Plan| plan.architecture(arch).unwrap().parameter_count();
        for (kind, scores) in [("halves", &halves), ("blocks", &blocks)] {
            let (mut kept, mut counts) = (total, 0);
            for budget in (0..total).rev().step_by(total / 97) {
                let target = Target::Parameters(budget);
                let Ok(plan) = Plan::new(arch, scores, target, &[]) else { break };
                let found = size(&plan);
                assert!(found <= budget, "{name} {kind}: {found} of {budget}");
                assert_eq!(fold(decoder, &plan).unwrap().parameter_count(), found, "{name} {kind}");
                counts += usize::from(found < kept);
                kept = found;
            }
            // Halves may part what blocks share: more of them then leave no less.
            assert!(counts >= 2, "{name} {kind}: {counts} sizes");
        }
    }
    // A number that is enough whichever they are is never less than a plan takes.
    let arch = pairs.architecture();
    for budget in (0..pairs.parameter_count()).rev().step_by(1000) {
        let Ok(most) = Target::Parameters(budget).blocks(arch) else { break };
        for first in [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 2.0, 4.0], [3.0, 1.0, 4.0, 2.0]]
        {
            let plan = Plan::new(arch, &scores(&first), Target::Parameters(budget), &[]).unwrap();
            assert!(plan.removed().len() <= most, "{budget}: {:?}, at most {most}", plan.removed());
        }
    }
}

#[test]
fn protected_blocks_stay() {
    let arch = load("llama").architecture().clone();
    let scores = scores(&[0.1, 0.2, 0.3, 0.4]);
    let plan = Plan::new(&arch, &scores, Target::Blocks(2), &[0, 2]).unwrap();
    assert_eq!(plan.removed(), [1, 3]);
    let error = Plan::new(&arch, &scores, Target::Blocks(3), &[0, 2]).unwrap_err().to_string();
    assert!(error.contains("only 2 may"), "{error}");
    assert!(Plan::new(&arch, &scores, Target::Blocks(1), &[9]).is_err());
}

#[test]
fn fewer_blocks_than_were_chosen_are_the_first_of_an_order_and_the_least_of_a_set() {
    let arch = load("llama").architecture().clone();
    let removed = |method: &str, count: usize, protected: &[usize]| {
        let windows = Windows::from_ids(vec![vec![1, 2]]).unwrap();
        // By the loss of later rounds, what was chosen costs more than a block that has to stay.
        let mut scores = Scores::new(method, &windows, vec![0.1, 0.4, 0.3, 0.9]).unwrap();
        scores.chosen = Some(vec![2, 1]);
        Plan::new(&arch, &scores, Target::Blocks(count), protected).unwrap().removed().to_vec()
    };
    for method in ["greedy-perplexity", "macro-influence"] {
        assert_eq!(removed(method, 1, &[]), [2]);
        assert_eq!(removed(method, 2, &[]), [1, 2]);
        assert_eq!(removed(method, 1, &[1]), [2]);
        assert_eq!(removed(method, 1, &[2]), [0]);
    }
    assert_eq!(removed("coupling", 1, &[]), [0]);
    assert_eq!(removed("coupling", 2, &[]), [1, 2]);
}

#[test]
fn a_plan_survives_json_and_a_tampered_one_does_not_load() {
    let plan = plan(6, Target::Rate(0.5)).unwrap();
    let json = plan.to_json().unwrap();
    assert_eq!(Plan::from_json(&json).unwrap(), plan);
    let tampered = |from: &str, to: &str| {
        let changed = json.replace(from, to);
        assert_ne!(changed, json, "{from} is not in the plan");
        Plan::from_json(&changed).unwrap_err().to_string()
    };
    assert!(tampered("\"version\": 2", "\"version\": 3").contains("version 3"));
    assert!(tampered("\"depth\": 6", "\"depth\": 7").contains("6 scores for a model of 7"));
    assert!(
        tampered("\"protected\": []", "\"protected\": [0, 1, 2, 3, 4, 5]").contains("protected and removed")
    );
    let removed = format!("{:?}", plan.removed());
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    for wrong in ["[3, 1]", "[1, 1]", "[99]", "[0, 1, 2, 3, 4, 5]"] {
        let mut value = value.clone();
        value["removed"] = serde_json::from_str(wrong).unwrap();
        assert!(Plan::from_json(&value.to_string()).is_err(), "{removed} as {wrong}");
    }
    let mut value: serde_json::Value = serde_json::from_str(&json).unwrap();
    value["removed"] = serde_json::json!([77]);
    assert!(<Plan as serde::Deserialize>::deserialize(value).is_err(), "no way in around the checks");
    assert!(Plan::from_json("{}").is_err() && Plan::from_json("").is_err());
}

/// A plan for a model of `depth` blocks that ties what is left of it.
fn tied(depth: usize, remove: usize, groups: Groups) -> foldgpt::Result<Plan> {
    let mut arch = load("llama").architecture().clone();
    arch.blocks = vec![arch.blocks[0]; depth];
    let importance: Vec<f64> = (0..depth).map(|index| index as f64).collect();
    Plan::builder().remove(Target::Blocks(remove), &scores(&importance)).share(groups).build(&arch)
}

fn blocks(plan: &Plan) -> Vec<Vec<usize>> {
    plan.sharing().unwrap().groups.iter().map(|group| group.blocks.clone()).collect()
}

#[test]
fn groups_are_of_consecutive_blocks_that_stay() {
    let plan = tied(9, 2, Groups::of(3)).unwrap();
    assert_eq!(blocks(&plan), [vec![2, 3, 4], vec![5, 6, 7]], "block 8 is left alone");
    assert_eq!(blocks(&tied(9, 1, Groups::of(3)).unwrap()), [vec![1, 2, 3], vec![4, 5, 6], vec![7, 8]]);
    assert_eq!(blocks(&tied(9, 0, Groups::of_within(2, 3..=7)).unwrap()), [[3, 4], [5, 6]]);
    assert_eq!(blocks(&tied(6, 0, Groups::Explicit(vec![vec![0, 5]])).unwrap()), [[0, 5]]);
}

#[test]
fn groups_that_cannot_be_are_refused() {
    let cases = [
        (Groups::of(0), "group size is 0"),
        (Groups::of(1), "group size is 1, expected at least 2"),
        (Groups::Consecutive { size: 2, within: Some((5, 3)) }, "5 to 3"),
        (Groups::of_within(2, 3..=3), "3 to 3"),
        (Groups::of_within(2, 3..=6), "block 6 does not exist"),
        (Groups::of_within(2, 30..=40), "block 40 does not exist"),
        (Groups::Explicit(vec![vec![3]]), "two or more"),
        (Groups::Explicit(vec![vec![4, 3]]), "ascending"),
        (Groups::Explicit(vec![vec![0, 3]]), "removed"),
        (Groups::Explicit(vec![vec![3, 9]]), "block 9 does not exist"),
        (Groups::Explicit(vec![vec![2, 3], vec![3, 4]]), "two groups"),
        (Groups::until(foldgpt::plan::Budget::Parameters(1)), "measured"),
    ];
    for (groups, expected) in cases {
        let error = tied(6, 1, groups).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_plan_is_made_again_at_another_rate_without_scoring() {
    let arch = load("llama").architecture().clone();
    let plan = Plan::builder()
        .remove(Target::Blocks(1), &scores(&[0.4, 0.1, 0.3, 0.2]))
        .share(Groups::of(2))
        .donor(Donor::Mean)
        .scales(ScaleStart::LeastSquares)
        .residual(Ranks::Uniform(2), ResidualStart::Whitened)
        .for_model("abc")
        .build(&arch)
        .unwrap();
    assert_eq!((plan.removed(), blocks(&plan)), (&[1][..], vec![vec![0, 2]]));
    assert_eq!(plan.sharing().unwrap().groups[0].donor, Matrices::Mean);
    let read = Plan::from_json(&plan.to_json().unwrap()).unwrap();
    assert_eq!(read, plan);
    let again = read.to_builder().at(Target::Blocks(2)).build(&arch).unwrap();
    assert_eq!((again.removed(), blocks(&again)), (&[1, 3][..], vec![vec![0, 2]]));
    assert_eq!(again.to_builder().at(Target::Blocks(1)).build(&arch).unwrap(), plan);
    let ranks: usize = plan.sharing().unwrap().ranks.values().map(std::collections::BTreeMap::len).sum();
    assert_eq!(ranks, 14, "seven projections of both blocks");
}

#[test]
fn words_without_effect_are_refused() {
    let decoder = load("llama");
    let arch = decoder.architecture();
    let windows = support::windows("llama");
    let plain = || Plan::builder().remove(Target::Blocks(1), &scores(&[0.4, 0.1, 0.3, 0.2]));
    let idle = [
        ("remove", Plan::builder().at(Target::Blocks(1))),
        ("remove", Plan::builder().at(Target::Blocks(1)).share(Groups::of(2))),
        ("share", plain().donor(Donor::First)),
        ("share", plain().share_norms()),
        ("share", plain().scales(ScaleStart::Ones)),
        ("share", plain().residual(Ranks::Uniform(2), ResidualStart::Svd)),
    ];
    for (missing, builder) in idle {
        let found = [builder.clone().build(arch), builder.measure(&decoder, &windows, &mut ())];
        for error in found.map(|plan| plan.unwrap_err().to_string()) {
            assert!(error.contains(&format!("`{missing}`")), "{error}");
        }
    }
    let at_first =
        Plan::builder().at(Target::Blocks(2)).remove(Target::Blocks(1), &scores(&[0.4, 0.1, 0.3, 0.2]));
    assert_eq!(at_first.build(arch).unwrap().removed(), [1], "the last word counts");
}

#[test]
fn a_tampered_sharing_does_not_load() {
    let plan = tied(6, 1, Groups::of(2)).unwrap();
    let value: serde_json::Value = serde_json::from_str(&plan.to_json().unwrap()).unwrap();
    for (place, wrong) in [
        ("blocks", serde_json::json!([1])),
        ("blocks", serde_json::json!([1, 0])),
        ("donor", serde_json::json!({ "block": 5 })),
        ("extra", serde_json::json!(1)),
    ] {
        let mut value = value.clone();
        value["sharing"]["groups"][0][place] = wrong;
        assert!(Plan::from_json(&value.to_string()).is_err(), "{place}");
    }
}

#[test]
fn ranks_are_those_that_were_asked_for_or_the_plan_does_not_load() {
    let decoder = load("llama");
    let arch = decoder.architecture();
    let pairs = || Plan::builder().share(Groups::of(2)).donor(Donor::First);
    let residual = pairs().residual(Ranks::Uniform(2), ResidualStart::Svd).build(arch).unwrap();
    let value: serde_json::Value = serde_json::from_str(&residual.to_json().unwrap()).unwrap();
    let changed = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = value.clone();
        change(&mut value["sharing"]);
        Plan::from_json(&value.to_string())
    };
    assert!(fold(&decoder, &changed(&|_| {}).unwrap()).is_ok());
    let error = changed(&|sharing| sharing["own"]["residual"] = serde_json::Value::Null).unwrap_err();
    assert!(error.to_string().contains("own.residual"), "{error}");
    // Whether ranks are uniform depends on how large the model's matrices are.
    for change in [
        |sharing: &mut serde_json::Value| sharing["ranks"]["1"]["q_proj"] = 3.into(),
        |sharing: &mut serde_json::Value| {
            drop(sharing["ranks"]["1"].as_object_mut().unwrap().remove("q_proj"));
        },
        |sharing: &mut serde_json::Value| drop(sharing["ranks"].as_object_mut().unwrap().remove("3")),
        |sharing: &mut serde_json::Value| drop(sharing.as_object_mut().unwrap().remove("ranks")),
    ] {
        let plan = changed(&change).unwrap();
        for error in [plan.architecture(arch).map(drop), fold(&decoder, &plan).map(drop)] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains("uniform rank 2"), "{error}");
        }
    }
    // As high as the smaller side of a matrix allows.
    let high = pairs().residual(Ranks::Uniform(10_000), ResidualStart::Svd).build(arch).unwrap();
    assert!(fold(&decoder, &Plan::from_json(&high.to_json().unwrap()).unwrap()).is_ok());
}

#[test]
fn fields_that_no_version_has_are_refused() {
    let json = plan(6, Target::Rate(0.5)).unwrap().to_json().unwrap();
    for version in [1, 2] {
        let mut value: serde_json::Value = serde_json::from_str(&json).unwrap();
        value["version"] = version.into();
        assert!(Plan::from_json(&value.to_string()).is_ok(), "{version}");
        value["removed_heads"] = serde_json::json!([1]);
        let error = Plan::from_json(&value.to_string()).unwrap_err().to_string();
        assert!(error.contains("removed_heads"), "{version}: {error}");
    }
}

#[test]
fn a_plan_of_the_first_version_is_read() {
    let plan = plan(6, Target::Rate(0.5)).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&plan.to_json().unwrap()).unwrap();
    assert!(value.get("sharing").is_none(), "the first version had none");
    value["version"] = serde_json::json!(1);
    assert_eq!(Plan::from_json(&value.to_string()).unwrap(), plan);
}
