//! What streamed scoring and copying hold in memory, counted by the allocator.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::Path;

use foldgpt::candle::{DType, Device};
use foldgpt::importance::{BlockInfluence, Gates, Method, MethodOptions, PerplexityIncrease, Residence};
use foldgpt::plan::{Groups, Ranks, ResidualStart};
use foldgpt::{Bytes, Checkpoint, Decoder, Format, Importance, Plan, SaveOptions, StreamOptions, Windows};
use peak_alloc::PeakAlloc;
use support::new_llama;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const SEQ: usize = 128;
const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 1024;
const VOCAB: usize = 2000;
const DEPTH: usize = 12;
/// Residuals that are larger than the matrices they add to.
const RANK: usize = 200;
const F32: usize = size_of::<f32>();
/// One block's matrices, in numbers.
const BLOCK: usize = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE;
/// One hidden state of a window.
const STATE: usize = SEQ * HIDDEN * F32;

/// A random model on disk, in bf16 and several shards; `sharing` ties pairs of its blocks, with residuals of a high rank.
fn write(directory: &Path, depth: usize, vocab: usize, sharing: bool) {
    let checkpoint = new_llama(serde_json::json!({
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": depth,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": vocab,
    }));
    let mut arch = checkpoint.architecture().clone();
    if sharing {
        let plan = Plan::builder().share(Groups::of(2)).residual(Ranks::Uniform(RANK), ResidualStart::Svd);
        arch = plan.build(&arch).unwrap().architecture(&arch).unwrap();
    }
    let decoder = Decoder::random(arch, 0, DType::F32, &Device::Cpu).unwrap();
    let mut options = SaveOptions::default();
    options.max_shard_bytes = 8_000_000;
    options.format = if sharing { Format::Compact } else { Format::Expanded };
    checkpoint.save(&decoder, None, directory, &options, &mut ()).unwrap();
}

fn windows(count: u32) -> Windows {
    let window = |index: u32| (0..SEQ as u32).map(|i| (i * 37 + index * 101) % VOCAB as u32).collect();
    Windows::from_ids((0..count).map(window).collect()).unwrap()
}

/// The most bytes that are held while `work` runs, beyond those before it.
fn peak<T>(work: impl Fn() -> T) -> usize {
    work(); // pools of threads and their buffers are there from now on
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    work();
    ALLOCATOR.peak_usage() - before
}

// One test: others would be counted too.
#[test]
fn streaming_holds_two_blocks_and_copying_a_piece_a_thread() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("model");
    write(&directory, DEPTH, VOCAB, false);
    let checkpoint = Checkpoint::open(&directory).unwrap();
    let model = (DEPTH * BLOCK + 2 * VOCAB * HIDDEN) * F32;
    // Three matrices of the MLP's width and about ten of the model's; backwards each has a gradient, and one to add.
    let activations = (3 * INTERMEDIATE + 10 * HIDDEN) * SEQ * F32;
    // A matrix as it lies in the file and as a tensor, and its rows of logits.
    let reading = 3 * VOCAB.max(INTERMEDIATE) * HIDDEN * 2;
    let score = |method: &dyn Importance, dtype: DType, count: u32, room: Option<u64>| {
        let mut options = StreamOptions::default();
        options.state_bytes = room;
        let (windows, streamed) =
            (windows(count), checkpoint.streamed(dtype, &Device::Cpu, options).unwrap());
        peak(|| method.score_streamed(&streamed, &windows, &mut ()).unwrap())
    };
    // What is said before.
    let say = |checkpoint: &Checkpoint, method: Method, dtype: DType, options: &MethodOptions| match method
        .residence(
            checkpoint,
            dtype,
            &windows(4),
            options,
            Bytes((model / F32 * dtype.size_in_bytes()) as u64 / 10 * 9),
        )
        .unwrap()
    {
        Residence::Streamed { bytes, .. } => bytes as usize,
        other => panic!("{other}"),
    };
    for (dtype, bytes) in [(DType::F32, F32), (DType::BF16, 2)] {
        let limit = 2 * BLOCK * bytes + reading + activations + 12 * STATE;
        let taken = score(&BlockInfluence::default(), dtype, 4, None);
        assert!(taken < limit, "{dtype:?}: {taken} bytes, expected fewer than {limit}");
        assert!(3 * taken < model, "{dtype:?}: {taken} bytes of a model of {model}");
        let told = say(&checkpoint, Method::BlockInfluence, dtype, &MethodOptions::default());
        assert!(taken < told, "{dtype:?}: {taken} bytes, and {told} were told");
    }
    let mut gates = Gates::default();
    (gates.remove, gates.steps, gates.batch) = (2, 2, 1);
    let limit = 2 * BLOCK * F32 + reading + 3 * activations + (DEPTH + 8) * STATE;
    let taken = score(&gates, DType::F32, 4, None);
    assert!(taken < limit, "gates: {taken} bytes, expected fewer than {limit}");
    let mut options = MethodOptions::default();
    options.gates = gates;
    let told = say(&checkpoint, Method::Gates, DType::F32, &options);
    assert!(taken < told, "gates: {taken} bytes, and {told} were told");

    // In memory too, and where gates keep all activations, which is told and not guessed far too high.
    for keeping in [false, true] {
        let mut options = options.clone();
        options.gates.gradient_checkpointing = !keeping;
        let residence =
            Method::Gates.residence(&checkpoint, DType::F32, &windows(4), &options, Bytes(u64::MAX)).unwrap();
        let Residence::Memory { bytes: told } = residence else { panic!("{residence}") };
        let taken = peak(|| {
            let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
            options.gates.score(&decoder, &windows(4), &mut ()).unwrap()
        });
        let told = told as usize;
        assert!(taken < told, "keeping {keeping}: {taken} bytes, and {told} were told");
        assert!(told - model < 3 * (taken - model), "keeping {keeping}: {taken} bytes, and {told} were told");
    }

    // What a block adds to shared matrices is read with it.
    let shared = scratch.path().join("shared");
    write(&shared, DEPTH, VOCAB, true);
    let shared = Checkpoint::open(&shared).unwrap();
    let streamed = shared.streamed(DType::F32, &Device::Cpu, StreamOptions::default()).unwrap();
    let taken = peak(|| BlockInfluence::default().score_streamed(&streamed, &windows(4), &mut ()).unwrap());
    let told = say(&shared, Method::BlockInfluence, DType::F32, &MethodOptions::default());
    assert!(taken < told, "with residuals: {taken} bytes, and {told} were told");

    // States that lie on disk take no memory, however many windows there are.
    let few = score(&PerplexityIncrease::default(), DType::F32, 1, Some(0));
    let many = score(&PerplexityIncrease::default(), DType::F32, 6, Some(0));
    let all = 5 * (DEPTH + 1) * STATE;
    assert!(many.saturating_sub(few) < all / 3, "{few} and {many} bytes, with {all} of states");

    // Of a tensor that is far larger than the pieces.
    let (large, vocab) = (scratch.path().join("large"), 60_000);
    write(&large, 2, vocab, false);
    let (large, out) = (Checkpoint::open(&large).unwrap(), scratch.path().join("out"));
    let threads = 4;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let copying = peak(|| {
        let copy = || large.save_blocks(&[1], None, &out, &SaveOptions::default(), &mut ());
        std::fs::remove_dir_all(pool.install(copy).unwrap().directory).unwrap();
    });
    // A mebibyte each, and headers and checksums.
    let limit = (threads + 2) << 20;
    assert!(copying < limit, "{copying} bytes, expected fewer than {limit}");
    assert!(limit < vocab * HIDDEN * 2, "{limit} bytes are no less than a tensor");
    let stored = large.tensor_bytes() as usize;
    assert!(4 * copying < stored, "{copying} bytes to copy from {stored}");
}
