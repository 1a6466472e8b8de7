//! What several test files need.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

use std::collections::HashMap;
use std::path::PathBuf;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::model::{Adapter, LowRank, Projection};
use foldgpt::plan::{Budget, Donor, Groups, Ranks, ResidualStart, ScaleStart};
use foldgpt::{Checkpoint, Decoder, Plan, Scores, Target, Windows, fold_on};

/// The checkpoints in `tests/fixtures`, one a family.
pub const FAMILIES: [&str; 11] = [
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "llama",
    "llama-tied-rope3",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
];

pub fn fixture(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family)
}

pub fn open(family: &str) -> Checkpoint {
    Checkpoint::open(fixture(family)).unwrap()
}

/// A Llama of these sizes that has no weights yet, with the tokenizer of the embedded model, and its vocabulary by default.
pub fn new_llama(sizes: serde_json::Value) -> Checkpoint {
    let tiny = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-stories");
    let tiny = Checkpoint::open(tiny).unwrap();
    let mut config = serde_json::json!({
        "model_type": "llama", "vocab_size": tiny.architecture().vocab_size, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false,
    });
    let serde_json::Value::Object(sizes) = sizes else { panic!("{sizes} are no fields") };
    config.as_object_mut().unwrap().extend(sizes);
    Checkpoint::create(config, tiny.tokenizer().unwrap()).unwrap()
}

pub fn load(family: &str) -> Decoder {
    open(family).decoder(DType::F32, &Device::Cpu).unwrap()
}

/// What transformers computes on a fixture.
pub fn expected(family: &str) -> HashMap<String, Tensor> {
    foldgpt::candle::safetensors::load(fixture(family).join("expected.safetensors"), &Device::Cpu).unwrap()
}

pub fn input_ids(family: &str) -> Tensor {
    expected(family).get("input_ids").unwrap().to_dtype(DType::U32).unwrap()
}

/// Deterministic values of about unit size.
pub fn values(shape: &[usize], seed: u64) -> Tensor {
    let count: usize = shape.iter().product();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let draws = (0..count).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    });
    Tensor::from_vec(draws.collect::<Vec<f32>>(), shape, &Device::Cpu).unwrap()
}

/// The decoder with a scale and a residual of rank 2 on every projection that it has.
pub fn adapted(decoder: &Decoder) -> Decoder {
    let mut adapted = decoder.clone();
    for depth in 0..decoder.depth() {
        for (place, projection) in Projection::ALL.into_iter().enumerate() {
            let Some((output, input)) = decoder.architecture().projection_shape(projection) else { continue };
            let seed = (100 * depth + 3 * place) as u64 + 1;
            let scale = ((values(&[output], seed) * 0.2).unwrap() + 1.0).unwrap();
            let a = (values(&[2, input], seed + 1) * 0.3).unwrap();
            let b = (values(&[output, 2], seed + 2) * 0.1).unwrap();
            let adapter = Adapter::new(Some(scale), Some(LowRank { a, b }));
            adapted = adapted.with_adapter(depth, projection, adapter).unwrap();
        }
    }
    adapted
}

/// Some windows of a fixture's tokens.
pub fn windows(family: &str) -> Windows {
    let vocab = load(family).architecture().vocab_size as u32;
    let ids = (0..6u32)
        .map(|window| (0..24).map(|place| (window * 31 + place * place * 7 + 3 * place) % vocab).collect());
    Windows::from_ids(ids.collect()).unwrap()
}

/// Plans of every kind of group, donor and start, for a fixture of four blocks.
pub fn kinds(family: &str) -> Vec<(&'static str, Plan)> {
    let decoder = load(family);
    let (arch, windows) = (decoder.architecture(), windows(family));
    let scores = Scores::new("test", &windows, vec![0.4, 0.1, 0.3, 0.2]).unwrap();
    let (ones, fit) = (ScaleStart::Ones, ScaleStart::LeastSquares);
    let budget = Groups::until(Budget::Parameters(decoder.parameter_count() - 1));
    let rank = Ranks::Uniform(3);
    let plans = [
        ("pairs", Plan::builder().share(Groups::of(2)).donor(Donor::First).build(arch)),
        ("all, mean", Plan::builder().share(Groups::of(4)).donor(Donor::Mean).build(arch)),
        (
            "range, scales of one",
            Plan::builder().share(Groups::of_within(2, 1..=2)).donor(Donor::First).scales(ones).build(arch),
        ),
        (
            "apart, shared norms",
            Plan::builder()
                .share(Groups::Explicit(vec![vec![0, 3]]))
                .donor(Donor::First)
                .share_norms()
                .build(arch),
        ),
        (
            "after removal, incomplete",
            Plan::builder().remove(Target::Blocks(1), &scores).share(Groups::of(2)).scales(fit).build(arch),
        ),
        (
            "best donors, scales, whitened",
            Plan::builder()
                .share(Groups::of(2))
                .donor(Donor::Best)
                .scales(fit)
                .residual(rank, ResidualStart::Whitened)
                .measure(&decoder, &windows, &mut ()),
        ),
        (
            "svd",
            Plan::builder()
                .share(Groups::of(3))
                .donor(Donor::First)
                .residual(rank, ResidualStart::Svd)
                .build(arch),
        ),
        ("budget", Plan::builder().share(budget).donor(Donor::Mean).measure(&decoder, &windows, &mut ())),
        (
            "spread",
            Plan::builder()
                .share(Groups::of(2))
                .donor(Donor::First)
                .residual(Ranks::Parameters(2000), ResidualStart::Whitened)
                .measure(&decoder, &windows, &mut ()),
        ),
    ];
    plans.into_iter().map(|(name, plan)| (name, plan.unwrap())).collect()
}

/// A fixture folded by a plan.
pub fn folded(family: &str, plan: &Plan) -> Decoder {
    fold_on(&load(family), plan, &windows(family), &mut ()).unwrap()
}

/// The largest distance of two tensors, as a share of the largest magnitude of `expected`; both have to be finite.
pub fn distance(found: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(found.dims(), expected.dims());
    let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (name, tensor) in [("found", found), ("expected", expected)] {
        let wrong = values(tensor).into_iter().find(|value| !value.is_finite());
        assert_eq!(wrong, None, "a value of what was {name} is not finite");
    }
    let largest =
        |x: &Tensor| values(x).into_iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
    largest(&(found - expected).unwrap()) / largest(expected)
}

/// A config.json changed by `change`, beside the other files of a fixture, in a temporary directory.
pub fn changed_fixture(family: &str, change: impl FnOnce(&mut serde_json::Value)) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture(family).join(name), directory.path().join(name)).unwrap();
    }
    let path = directory.path().join("config.json");
    let mut config = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
    directory
}
