//! What a step costs, in forward passes with the head on the same tokens, in one run: of gates, and of healing with each
//! term of its loss.
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
    let (wide, one, batch) = (decoder(), windows(1), windows(BATCH));
    println!("| step | tokens | forward passes |\n|---|---:|---:|");
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        let dense = wide.to_dtype(dtype).unwrap();
        let cost = ratio(&|| work::gate_step(&dense, &one), &|| work::forward(&dense, &one));
        println!("| gates, {name} | {TOKENS} | {cost:.2} |");

        let kept: Vec<usize> = (0..dense.depth()).filter(|index| index % 5 != 2).collect();
        let cut = dense.with_blocks(&kept).unwrap();
        let forwards = || (0..STEPS).for_each(|_| work::forward(&cut, &batch));
        for (losses, terms, teacher) in [
            (Losses::default(), "text", None),
            (Losses::logits(), "text and logits", Some(&dense)),
            (Losses::tail(), "text, logits and tail", Some(&dense)),
        ] {
            let cost = ratio(&|| work::lora(&cut, &batch, STEPS, losses, teacher), &forwards);
            println!("| healing lora of rank 8 by {terms}, {name} | {BATCH} x {TOKENS} | {cost:.2} |");
        }
    }
    println!(
        "\nmedians of interleaved runs; a healing step in forward passes of its student, without a fifth of the blocks"
    );
}
