//! What a healing holds in memory beyond the model and its teacher, counted by the allocator.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use foldgpt::candle::{DType, Device};
use foldgpt::heal::{Budget, Heal, Lora, Losses, ParamGroup, Teacher, Trainable};
use foldgpt::model::{Architecture, Projection};
use foldgpt::{Decoder, Windows};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const SEQ: usize = 257;
const HIDDEN: usize = 96;
const INTERMEDIATE: usize = 256;
const VOCAB: usize = 6000;
/// Rows whose logits exist at once.
const CHUNK: usize = 128;
const RANK: usize = 2;
const F32: usize = size_of::<f32>();
/// One hidden state of a micro-batch.
const STATE: usize = (SEQ - 1) * HIDDEN * F32;

fn decoder(depth: usize) -> Decoder {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": depth, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    Decoder::random(Architecture::from_config(&config).unwrap(), 0, DType::F32, &Device::Cpu).unwrap()
}

/// The most bytes that healing without the last block holds beyond the weights.
fn healing(depth: usize) -> usize {
    let dense = decoder(depth + 1);
    let kept: Vec<usize> = (0..depth).collect();
    let cut = dense.with_blocks(&kept).unwrap();
    let window = |index: u32| (0..SEQ as u32).map(|i| (i * 37 + index) % VOCAB as u32).collect();
    let windows = Windows::from_ids((0..4).map(window).collect()).unwrap();
    let mut lora = Lora::default();
    (lora.rank, lora.projections, lora.merge) = (RANK, vec![Projection::Q], false);
    let mut heal = Heal::default();
    (heal.budget, heal.batch, heal.losses) = (Budget::Steps(2), 2, Losses::tail());
    heal.groups = vec![ParamGroup::new(Trainable::Lora(lora), 1e-3)];
    let run = || heal.run(&cut, &windows, None, Some(Teacher::Model(&dense)), &mut ()).unwrap();
    run(); // pools of threads and their buffers are there from now on
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    run();
    ALLOCATOR.peak_usage() - before
}

#[test]
fn a_healing_holds_block_inputs_one_blocks_activations_and_a_chunk_of_logits_of_each_model() {
    // Three matrices of the MLP's width and about ten of the model's, each with its gradient and one to add to it.
    let activations = 3 * (3 * (SEQ - 1) * INTERMEDIATE * F32 + 10 * STATE);
    let logits = CHUNK * VOCAB * F32;
    // Value, two moments, gradient, and what is copied on the way between them.
    let trained = 8 * RANK * (HIDDEN + HIDDEN) * F32;
    for depth in [6, 24] {
        let (peak, limit) = (healing(depth), depth * (STATE + trained) + activations.max(4 * logits));
        assert!(peak < limit, "{depth} blocks: {peak} bytes, expected fewer than {limit}");
    }
    // Only the inputs and what is trained grow with the depth.
    let growth = healing(24) - healing(6);
    assert!(growth < 18 * (STATE + trained) + 2 * STATE, "{growth} bytes for 18 blocks of {STATE}");
}
