//! The forward pass on a SmolLM2-shaped random model beside the matrix products it is made of, in one run.
//!
//! Prints, after the timings, which share of the bound set by the products alone the forward pass reaches.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::model::{Architecture, Projection};
use support::{TOKENS, architecture, decoder, ratio, window};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    let (arch, decoder) = (architecture(), decoder());
    let (tokens, ids) = window();
    let hidden = decoder.hidden(&ids).unwrap().squeeze(0).unwrap();
    let products = Products::new(&arch);
    let depth = arch.depth();
    let narrow = decoder.to_dtype(DType::BF16).unwrap();

    let blocks = || drop(black_box(decoder.hidden(&ids).unwrap()));
    let with_head = || {
        blocks();
        black_box(decoder.nll(&hidden, &tokens).unwrap());
    };
    let narrow_with_head = || {
        black_box(narrow.hidden(&ids).unwrap());
        black_box(narrow.nll(&hidden, &tokens).unwrap());
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
    group.bench_function("with head, bf16", |b| b.iter(narrow_with_head));
    group.bench_function("with head: products alone", |b| b.iter(product_all));
    group.finish();

    println!("\nshare of the bound set by the matrix products, medians of interleaved runs:");
    println!("  blocks     {:.0} %", 100.0 * ratio(&product_blocks, &blocks));
    println!("  with head  {:.0} %", 100.0 * ratio(&product_all, &with_head));
    println!("with matrices in bf16 the pass takes {:.2} of its time", ratio(&narrow_with_head, &with_head));
}

criterion_group!(benches, forward);
criterion_main!(benches);
