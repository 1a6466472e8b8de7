//! One training step of the gates beside one forward pass with the head, on the same tokens, in one run.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use foldgpt::model::{Unit, Walk};
use support::{decoder, ratio, window};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn gates(c: &mut Criterion) {
    let decoder = decoder();
    let (tokens, ids) = window();
    let units = Unit::blocks(decoder.depth());
    let soft = vec![0.9; units.len()];
    let targets = &tokens[1..];

    let forward = || {
        let hidden = decoder.hidden(&ids).unwrap().squeeze(0).unwrap();
        let rows = hidden.narrow(0, 0, targets.len()).unwrap();
        black_box(decoder.nll(&rows, targets).unwrap());
    };
    let step = || {
        let walk = Walk::forward(&decoder, &units, &soft, &ids).unwrap();
        let (_, upstream) = decoder.loss_vjp(walk.output(), targets).unwrap();
        black_box(walk.gate_gradients(&upstream).unwrap());
    };

    let mut group = c.benchmark_group("gates, 512 tokens");
    group.sample_size(10).measurement_time(Duration::from_secs(15));
    group.bench_function("forward with head", |b| b.iter(forward));
    group.bench_function("gate step", |b| b.iter(step));
    group.finish();
    println!(
        "\na gate step costs {:.2} forward passes, the median of interleaved runs",
        ratio(&step, &forward)
    );
}

criterion_group!(benches, gates);
criterion_main!(benches);
