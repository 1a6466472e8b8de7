//! What long computations hold in memory, counted by the allocator.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Mutex;

use foldgpt::Decoder;
use foldgpt::candle::{DType, Device, Tensor, Var};
use foldgpt::model::{Architecture, Unit, Walk};
use foldgpt::ops::Kernels;
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const SEQ: usize = 256;
const HIDDEN: usize = 96;
const INTERMEDIATE: usize = 256;
const VOCAB: usize = 6000;
/// Rows whose logits exist at once on the way back.
const CHUNK: usize = 128;
const F32: usize = size_of::<f32>();

/// What others hold meanwhile would be counted too.
static ONE: Mutex<()> = Mutex::new(());

fn decoder(depth: usize) -> Decoder {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": depth, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    Decoder::random(Architecture::from_config(&config).unwrap(), 0, DType::F32, &Device::Cpu).unwrap()
}

/// The most bytes that a training step of the gates holds beyond the weights.
fn gate_step(depth: usize) -> usize {
    let decoder = decoder(depth);
    let tokens: Vec<u32> = (0..SEQ as u32).map(|i| i * 37 % VOCAB as u32).collect();
    let ids = Tensor::from_slice(&tokens, (1, SEQ), &Device::Cpu).unwrap();
    let units = Unit::blocks(depth);
    let step = || {
        let walk = Walk::forward(&decoder, &units, &vec![0.9; depth], &ids).unwrap();
        let (_, upstream) = decoder.loss_vjp(walk.output(), &tokens[1..]).unwrap();
        walk.gate_gradients(&upstream, |_| true).unwrap()
    };
    step(); // pools of threads and their buffers are there from now on
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    step();
    ALLOCATOR.peak_usage() - before
}

/// The most bytes that a loss, differentiated with respect to its rows, holds beyond what it is given.
fn loss(kernels: Kernels, rows: usize) -> usize {
    let random = |shape| Tensor::randn(0f32, 1f32, shape, &Device::Cpu).unwrap();
    let (hidden, head) = (Var::from_tensor(&random((rows, HIDDEN))).unwrap(), random((VOCAB, HIDDEN)));
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 37 % VOCAB as u32).collect();
    let step = || {
        let losses = kernels.nll(hidden.as_tensor(), &head, &targets, None).unwrap();
        losses.sum_all().unwrap().backward().unwrap();
    };
    step();
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    step();
    ALLOCATOR.peak_usage() - before
}

#[test]
fn logits_of_one_chunk_exist_at_once() {
    let _one = ONE.lock().unwrap();
    let logits = CHUNK * VOCAB * F32;
    // The primitives make several tensors of logits on the way to a loss, and a gradient of each on the way back.
    for (kernels, tensors) in [(Kernels::Fused, 2), (Kernels::Primitive, 12)] {
        let (few, many) = (loss(kernels, CHUNK), loss(kernels, 8 * CHUNK));
        assert!(many < tensors * logits, "{kernels:?}: {many} bytes, and a chunk of logits takes {logits}");
        let growth = many.saturating_sub(few);
        assert!(growth < logits, "{kernels:?}: {growth} bytes more for eight chunks, each of {logits}");
    }
}

#[test]
fn a_gate_step_holds_block_inputs_one_blocks_activations_and_one_chunk_of_logits() {
    let _one = ONE.lock().unwrap();
    let state = SEQ * HIDDEN * F32;
    // Three matrices of the MLP's width and about ten of the model's, each with its gradient and one to add to it.
    let activations = 3 * (3 * SEQ * INTERMEDIATE * F32 + 10 * state);
    let logits = CHUNK * VOCAB * F32;
    for depth in [6, 24] {
        let (peak, limit) = (gate_step(depth), depth * state + activations.max(2 * logits));
        assert!(peak < limit, "{depth} blocks: {peak} bytes, expected fewer than {limit}");
    }
    // Only the inputs grow with the depth.
    let growth = gate_step(24) - gate_step(6);
    assert!(growth.abs_diff(18 * state) < 2 * state, "{growth} bytes for 18 blocks of {state}");
}
