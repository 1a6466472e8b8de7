//! One training step of the gates beside one forward pass with the head, on the same tokens, in one run.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use foldgpt::Decoder;
use foldgpt::candle::DType;
use foldgpt::model::{Unit, Walk};
use support::{decoder, ratio, window};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn gates(c: &mut Criterion) {
    let wide = decoder();
    let narrow = wide.to_dtype(DType::BF16).unwrap();
    let (tokens, ids) = window();
    let units = Unit::blocks(wide.depth());
    let soft = vec![0.9; units.len()];
    let targets = &tokens[1..];

    let forward = |decoder: &Decoder| {
        let hidden = decoder.hidden(&ids).unwrap().squeeze(0).unwrap();
        let rows = hidden.narrow(0, 0, targets.len()).unwrap();
        black_box(decoder.nll(&rows, targets).unwrap());
    };
    let step = |decoder: &Decoder| {
        let walk = Walk::forward(decoder, &units, &soft, &ids).unwrap();
        let (_, upstream) = decoder.loss_vjp(walk.output(), targets).unwrap();
        black_box(walk.gate_gradients(&upstream, |_| true).unwrap());
    };

    let mut group = c.benchmark_group("gates, 512 tokens");
    group.sample_size(10).measurement_time(Duration::from_secs(12));
    for (dtype, decoder) in [("f32", &wide), ("bf16", &narrow)] {
        group.bench_function(format!("forward with head, {dtype}"), |b| b.iter(|| forward(decoder)));
        group.bench_function(format!("gate step, {dtype}"), |b| b.iter(|| step(decoder)));
    }
    group.finish();
    println!("\na gate step costs, medians of interleaved runs:");
    println!("  f32   {:.2} forward passes", ratio(&|| step(&wide), &|| forward(&wide)));
    println!("  bf16  {:.2} forward passes", ratio(&|| step(&narrow), &|| forward(&narrow)));
    println!("  f32   {:.2} times as long as in bf16", ratio(&|| step(&wide), &|| step(&narrow)));
}

criterion_group!(benches, gates);
criterion_main!(benches);
