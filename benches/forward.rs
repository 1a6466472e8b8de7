//! The forward pass on a SmolLM2-shaped random model beside the matrix products it is made of, in one run.
//!
//! Prints, after the timings, which share of the bound set by the products alone the forward pass reaches.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use foldgpt::Decoder;
use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::model::{Architecture, Projection};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TOKENS: usize = 512;

/// SmolLM2-135M: 30 blocks of 576, 9 query heads and 3 key heads of 64, vocabulary 49152.
fn architecture() -> Architecture {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
        "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "tie_word_embeddings": true,
    });
    Architecture::from_config(&config).unwrap()
}

/// Every matrix product of one block, and of the head, on operands of the same shapes.
struct Products {
    inputs: Vec<(Tensor, Tensor)>,
    head: (Tensor, Tensor),
}

impl Products {
    fn new(arch: &Architecture) -> Self {
        let random = |rows, columns| Tensor::randn(0f32, 1f32, (rows, columns), &Device::Cpu).unwrap();
        let shapes = Projection::ALL.into_iter().filter_map(|projection| arch.projection_shape(projection));
        Self {
            inputs: shapes.map(|(output, input)| (random(TOKENS, input), random(output, input))).collect(),
            head: (random(TOKENS, arch.hidden_size), random(arch.vocab_size, arch.hidden_size)),
        }
    }

    fn blocks(&self, depth: usize) {
        for _ in 0..depth {
            for (x, weight) in &self.inputs {
                black_box(x.matmul(&weight.t().unwrap()).unwrap());
            }
        }
    }

    fn head(&self) {
        black_box(self.head.0.matmul(&self.head.1.t().unwrap()).unwrap());
    }
}

fn forward(c: &mut Criterion) {
    let arch = architecture();
    let decoder = Decoder::random(arch.clone(), 0, DType::F32, &Device::Cpu).unwrap();
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i * 97 % arch.vocab_size as u32).collect();
    let ids = Tensor::from_slice(&tokens, (1, TOKENS), &Device::Cpu).unwrap();
    let hidden = decoder.hidden(&ids).unwrap().squeeze(0).unwrap();
    let products = Products::new(&arch);
    let depth = arch.depth();

    let blocks = || drop(black_box(decoder.hidden(&ids).unwrap()));
    let with_head = || {
        blocks();
        black_box(decoder.nll(&hidden, &tokens).unwrap());
    };
    let product_blocks = || products.blocks(depth);
    let product_all = || {
        products.blocks(depth);
        products.head();
    };

    let mut group = c.benchmark_group("forward, 512 tokens");
    group.sample_size(10).measurement_time(Duration::from_secs(12));
    group.bench_function("blocks", |b| b.iter(blocks));
    group.bench_function("blocks: products alone", |b| b.iter(product_blocks));
    group.bench_function("with head", |b| b.iter(with_head));
    group.bench_function("with head: products alone", |b| b.iter(product_all));
    group.finish();

    println!("\nshare of the bound set by the matrix products, medians of interleaved runs:");
    println!("  blocks     {:.0} %", 100.0 * share(&product_blocks, &blocks));
    println!("  with head  {:.0} %", 100.0 * share(&product_all, &with_head));
}

/// The median over interleaved pairs of the time of `bound` by that of `path`.
fn share(bound: &dyn Fn(), path: &dyn Fn()) -> f64 {
    let time = |f: &dyn Fn()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    let mut ratios: Vec<f64> = (0..7).map(|_| time(bound) / time(path)).collect();
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}

criterion_group!(benches, forward);
criterion_main!(benches);
