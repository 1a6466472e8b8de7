//! What several test files need.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

use std::collections::HashMap;
use std::path::PathBuf;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::model::{Adapter, LowRank, Projection};
use foldgpt::{Checkpoint, Decoder};

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

/// The largest distance of two tensors, as a share of the largest magnitude of `expected`.
pub fn distance(found: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(found.dims(), expected.dims());
    let largest =
        |x: Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    largest((found - expected).unwrap()) / largest(expected.clone())
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
