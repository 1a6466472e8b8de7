//! Trains the small Llama that this crate's tests, examples and documentation use (`examples/tiny-stories`).
//!
//! ```sh
//! RAYON_NUM_THREADS=1 cargo run --release --example pretrain -- --out /tmp/tiny-stories
//! ```
//!
//! One thread is how the committed model was made: matrices this small gain little from more, and unless the
//! variable is set, candle reads `/proc/cpuinfo` before every product to choose a number.
//!
//! 1. Stories come from a seeded grammar (`examples/stories`), and a byte-level BPE tokenizer is trained on them.
//! 2. A random [`Decoder`] learns them with the trainer that heals ([`Heal`]), everything being trained; every step sees
//!    stories that no step before has seen.
//! 3. The weights are rounded to bf16 and measured on held-out stories: beside tables of n-grams, without each
//!    block in turn, and by a story of its own.
//! 4. It is saved as a Hugging Face directory that [`Checkpoint::open`] and transformers load.
//!
//! The same flags give the same bytes on the same machine; the defaults are those of the committed model, which a loop of
//! the same options made before there was this trainer.
#![allow(clippy::print_stdout)]

mod cli;
mod stories;

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use clap::Parser;
use foldgpt::heal::{Budget, ParamGroup, Trainable};
use foldgpt::{Bos, Checkpoint, Decoder, Generate, Heal, SaveOptions, Tokenizer, Windows, perplexity};
use rand::{SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

// Training allocates and frees the same large buffers again and again, which the system's allocator is slow at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const VOCAB: usize = 1536;
const WINDOW: usize = 256;

/// Trains a small Llama on generated stories and saves it.
#[derive(Parser)]
struct Args {
    /// Where the model is saved; must not exist yet, or be empty
    #[arg(long, default_value = "examples/tiny-stories")]
    out: PathBuf,
    /// Optimizer steps
    #[arg(long, default_value_t = 900)]
    steps: usize,
    /// Windows of 256 tokens in each step
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Keep the training's state in this file, and go on from it where it exists
    #[arg(long)]
    state: Option<PathBuf>,
    /// Log every step to this file, as JSON Lines
    #[arg(long)]
    log: Option<PathBuf>,
    /// Seed of the stories and of the first weights; the held-out stories have the next one
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let taken = args.out.read_dir().is_ok_and(|mut entries| entries.next().is_some());
    ensure!(!taken, "{} is not empty: remove it, or choose another --out", args.out.display());

    let tokenizer = stories::tokenizer(&stories::corpus(args.seed, 1 << 20), VOCAB)?;
    let checkpoint = Checkpoint::create(config(), Tokenizer::new(tokenizer, &config()))?;
    let tokenizer = checkpoint.tokenizer()?;
    let tokens = story_tokens(&tokenizer, args.seed, args.steps * args.batch * WINDOW + 1)?;

    let decoder = train(&checkpoint, &tokens, &args)?;
    report(&decoder, &tokenizer, &tokens, args.seed + 1)?;
    let mut bars = cli::Bars::default();
    let saved = checkpoint.save(&decoder, None, &args.out, &SaveOptions::default(), &mut bars)?;
    println!("\nsaved {} bytes of weights to {}", saved.tensor_bytes, saved.directory.display());
    Ok(())
}

/// What transformers' `LlamaForCausalLM` reads.
fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": null,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.02,
        "use_cache": true,
        "torch_dtype": "bfloat16",
    })
}

/// At least `count` tokens of stories, encoded one by one: the text of all of them is never in memory.
fn story_tokens(tokenizer: &Tokenizer, seed: u64, count: usize) -> Result<Vec<u32>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tokens = Vec::new();
    while tokens.len() < count {
        tokens.extend(tokenizer.encode(&(stories::story(&mut rng) + stories::END))?);
    }
    Ok(tokens)
}

/// A decoder trained on windows of `tokens`, its weights rounded to what will be saved.
fn train(checkpoint: &Checkpoint, tokens: &[u32], args: &Args) -> Result<Decoder> {
    let random = Decoder::random(checkpoint.architecture().clone(), args.seed, DType::F32, &Device::Cpu)?;
    // The last token of a window is only a target, and the first one of the next window.
    let window = |index: usize| tokens[index * WINDOW..=(index + 1) * WINDOW].to_vec();
    let windows = Windows::from_ids((0..args.steps * args.batch).map(window).collect())?;
    let mut training = Heal::default();
    (training.budget, training.seed) = (Budget::Steps(args.steps), args.seed);
    (training.batch, training.micro_batch) = (args.batch, args.batch);
    // Decay pulls at matrices only: embeddings and norms have no size that is too large.
    training.groups = vec![
        ParamGroup::new(Trainable::Matrices, args.lr).with_decay(0.1),
        ParamGroup::new(Trainable::Everything, args.lr),
    ];
    training.adamw.beta2 = 0.95;
    (training.state_file, training.save_every) = (args.state.clone(), 50);
    training.log_file.clone_from(&args.log);
    let trained = training.run(&random, &windows, None, None, &mut cli::Bars::default())?;
    let report = trained.report;
    println!(
        "{} parameters, {} steps, {:.1} minutes, {:.0} tokens/s",
        report.trained,
        report.steps,
        report.seconds / 60.0,
        report.tokens as f64 / report.seconds
    );
    let round = |value: &Tensor| value.to_dtype(DType::BF16)?.to_dtype(DType::F32);
    Ok(trained.decoder.map(|_, value| Ok(round(value)?))?)
}

/// Prints what the model is worth on stories that it has not seen.
fn report(decoder: &Decoder, tokenizer: &Tokenizer, train: &[u32], seed: u64) -> Result<()> {
    let text = stories::corpus(seed, 100_000);
    let held_out = tokenizer.encode(&text)?;
    println!("\nnats per held-out token, after {} of training", train.len());
    for (order, name) in [(1, "unigrams"), (2, "bigrams"), (3, "trigrams")] {
        println!("{name:>9} {:.4}", stories::ngram::ngram_nll(train, &held_out, VOCAB, order));
    }
    let windows = Windows::from_text(tokenizer, &text, WINDOW, None, Bos::Never)?;
    let whole = perplexity(decoder, &windows, &mut ())?.mean_nll;
    println!("{:>9} {whole:.4}", "model");

    println!("\nwithout one block");
    for removed in 0..decoder.depth() {
        let kept: Vec<usize> = (0..decoder.depth()).filter(|&index| index != removed).collect();
        let nll = perplexity(&decoder.with_blocks(&kept)?, &windows, &mut ())?.mean_nll;
        println!("{removed:>9} {:+.4}", nll - whole);
    }

    println!("\na story of its own");
    let generate = Generate { max_tokens: 250, temperature: 0.7, seed, ..Generate::default() };
    generate.run(decoder, tokenizer, stories::END, |piece| {
        print!("{piece}");
        ControlFlow::Continue(())
    })?;
    println!();
    Ok(())
}
