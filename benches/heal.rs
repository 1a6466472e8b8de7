//! What each term of healing's loss costs, in forward passes with the head on the same tokens, in one run.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

mod support;

use foldgpt::candle::DType;
use foldgpt::heal::Losses;
use support::{TOKENS, decoder, ratio, windows, work};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: usize = 4;
/// Steps of a run: enough that what is done once, before the first, does not count.
const STEPS: usize = 3;

fn main() {
    let (wide, windows) = (decoder(), windows(BATCH));
    println!(
        "a healing step on LoRA of rank 8 costs, medians of interleaved runs of {BATCH} x {TOKENS} tokens:"
    );
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        let dense = wide.to_dtype(dtype).unwrap();
        let kept: Vec<usize> = (0..dense.depth()).filter(|index| index % 5 != 2).collect();
        let cut = dense.with_blocks(&kept).unwrap();
        let forwards = || (0..STEPS).for_each(|_| work::forward(&cut, &windows));
        for (losses, terms, teacher) in [
            (Losses::default(), "text", None),
            (Losses::logits(), "text, logits", Some(&dense)),
            (Losses::tail(), "text, logits, tail", Some(&dense)),
        ] {
            let cost = ratio(&|| work::lora(&cut, &windows, STEPS, losses, teacher), &forwards);
            println!("  {name:<5} {terms:<19} {cost:.2} forward passes of the student");
        }
    }
}
