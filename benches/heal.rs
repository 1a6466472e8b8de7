//! One healing step on LoRA beside one forward pass with the head, on the same tokens, in one run.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::hint::black_box;

use foldgpt::candle::{DType, Tensor};
use foldgpt::heal::{Budget, Heal, Lora, Losses, ParamGroup, Teacher, Trainable};
use foldgpt::{Decoder, Windows};
use support::{TOKENS, architecture, decoder, ratio};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: usize = 4;
/// Steps of a run: enough that what is done once, before the first, does not count.
const STEPS: usize = 3;

fn windows() -> Windows {
    let vocab = architecture().vocab_size as u32;
    let window = |index: u32| (0..TOKENS as u32).map(|i| (i * 97 + index * 31) % vocab).collect();
    Windows::from_ids((0..BATCH as u32).map(window).collect()).unwrap()
}

fn forward(decoder: &Decoder, windows: &Windows) {
    for window in windows.iter() {
        let (inputs, targets) = (&window[..TOKENS - 1], &window[1..]);
        let ids = Tensor::from_slice(inputs, (1, inputs.len()), decoder.device()).unwrap();
        let hidden = decoder.hidden(&ids).unwrap().squeeze(0).unwrap();
        black_box(decoder.nll(&hidden, targets).unwrap());
    }
}

/// Steps of healing; adapters stay, so that nothing but steps is timed.
fn heal(decoder: &Decoder, windows: &Windows, losses: Losses, teacher: Option<&Decoder>) {
    let mut lora = Lora::default();
    lora.merge = false;
    let mut heal = Heal::default();
    (heal.budget, heal.batch, heal.micro_batch) = (Budget::Steps(STEPS), BATCH, 1);
    heal.groups = vec![ParamGroup::new(Trainable::Lora(lora), 1e-4)];
    heal.losses = losses;
    black_box(heal.run(decoder, windows, None, teacher.map(Teacher::Model), &mut ()).unwrap());
}

fn main() {
    let wide = decoder();
    let windows = windows();
    println!(
        "a healing step on LoRA of rank 8 costs, medians of interleaved runs of {BATCH} x {TOKENS} tokens:"
    );
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        let dense = wide.to_dtype(dtype).unwrap();
        let kept: Vec<usize> = (0..dense.depth()).filter(|index| index % 5 != 2).collect();
        let cut = dense.with_blocks(&kept).unwrap();
        let forwards = || (0..STEPS).for_each(|_| forward(&cut, &windows));
        for (losses, terms, teacher) in [
            (Losses::default(), "text", None),
            (Losses::logits(), "text, logits", Some(&dense)),
            (Losses::tail(), "text, logits, tail", Some(&dense)),
        ] {
            let cost = ratio(&|| heal(&cut, &windows, losses, teacher), &forwards);
            println!("  {name:<5} {terms:<19} {cost:.2} forward passes of the student");
        }
    }
}
