//! What a step costs, in forward passes with the head on the same tokens, in one run: of gates, and of healing with each
//! term of its loss.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo bench --bench steps [-- gates]
//! ```
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
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let line = |name: String, tokens: String, step: &dyn Fn(), forwards: &dyn Fn()| {
        if wanted.as_ref().is_none_or(|wanted| name.contains(wanted.as_str())) {
            println!("| {name} | {tokens} | {:.2} |", ratio(step, forwards));
        }
    };
    let (wide, one, batch, halves) = (decoder(), windows(1), windows(BATCH), windows(2 * BATCH));
    let (of_one, of_batch) = (TOKENS.to_string(), format!("{BATCH} x {TOKENS}"));
    println!("| step | tokens | forward passes |\n|---|---:|---:|");
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        let dense = wide.to_dtype(dtype).unwrap();
        let step = format!("gradients of all gates, {name}");
        line(step, of_one.clone(), &|| work::gate_step(&dense, &one), &|| work::forward(&dense, &one));
        let training = || work::gate_training(&dense, &halves, STEPS);
        let forwards = || (0..STEPS).for_each(|_| work::forward(&dense, &batch));
        line(format!("training of gates, {name}"), of_batch.clone(), &training, &forwards);

        let kept: Vec<usize> = (0..dense.depth()).filter(|index| index % 5 != 2).collect();
        let cut = dense.with_blocks(&kept).unwrap();
        let forwards = || (0..STEPS).for_each(|_| work::forward(&cut, &batch));
        for (losses, terms, teacher) in [
            (Losses::default(), "text", None),
            (Losses::logits(), "text and logits", Some(&dense)),
            (Losses::tail(), "text, logits and tail", Some(&dense)),
        ] {
            let step = || work::lora(&cut, &batch, STEPS, losses, teacher);
            line(format!("healing lora of rank 8 by {terms}, {name}"), of_batch.clone(), &step, &forwards);
        }
    }
    println!(
        "\nmedians of interleaved runs; a healing step in forward passes of its student, without a fifth of the blocks"
    );
}
