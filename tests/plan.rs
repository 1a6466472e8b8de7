//! Plans: targets, rounding, protection, and refusal of what contradicts itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use foldgpt::{Plan, Scores, Target, Windows};
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
    assert!(plan(4, Target::Parameters(10)).unwrap_err().to_string().contains("parameter budget"));
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
        assert!(foldgpt::fold(&decoder, &plan).unwrap().parameter_count() <= budget);
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
fn a_plan_survives_json_and_a_tampered_one_does_not_load() {
    let plan = plan(6, Target::Rate(0.5)).unwrap();
    let json = plan.to_json().unwrap();
    assert_eq!(Plan::from_json(&json).unwrap(), plan);
    let tampered = |from: &str, to: &str| {
        let changed = json.replace(from, to);
        assert_ne!(changed, json, "{from} is not in the plan");
        Plan::from_json(&changed).unwrap_err().to_string()
    };
    assert!(tampered("\"version\": 1", "\"version\": 2").contains("version 2"));
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
