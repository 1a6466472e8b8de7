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
//! 2. A random [`Decoder`] learns them with [`AdamW`]; every step sees stories that no step before has seen.
//! 3. The weights are rounded to bf16 and measured on held-out stories: beside tables of n-grams, without each
//!    block in turn, and by a story of its own.
//! 4. It is saved as a Hugging Face directory that [`Checkpoint::open`] and transformers load.
//!
//! The same flags give the same bytes on the same machine; the defaults are those of the committed model.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod stories;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use clap::Parser;
use foldgpt::model::{BlockParam, Param};
use foldgpt::{Bos, Checkpoint, Decoder, Generate, SaveOptions, Tokenizer, Windows, perplexity};
use indicatif::{ProgressBar, ProgressStyle};
use rand::{SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

// Training allocates and frees the same large buffers again and again, which the system's allocator is slow at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const VOCAB: usize = 1536;
const WINDOW: usize = 256;
const MAX_GRADIENT_NORM: f64 = 1.0;

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
    let saved = checkpoint.save(&decoder, None, &args.out, &SaveOptions::default(), &mut ())?;
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

/// A decoder trained on `tokens` from first to last, its weights rounded to what will be saved.
fn train(checkpoint: &Checkpoint, tokens: &[u32], args: &Args) -> Result<Decoder> {
    let mut trainer = Trainer::new(checkpoint, args.seed)?;
    let batch = args.batch * WINDOW;
    let style = "{bar:30} {pos}/{len} steps, {msg}, {eta} left";
    let bar = ProgressBar::new(args.steps as u64).with_style(ProgressStyle::with_template(style)?);
    let (start, mut smooth, mut speed) = (Instant::now(), None, 0.0);
    for step in 0..args.steps {
        // The last token of a batch is only a target, and the first one of the next batch.
        let loss = trainer.step(&tokens[step * batch..=(step + 1) * batch], learning_rate(step, args))?;
        ensure!(loss.is_finite(), "the loss of step {step} is {loss}: try a lower --lr");
        let loss = smooth.map_or(loss, |before| 0.95 * before + 0.05 * loss);
        smooth = Some(loss);
        speed = ((step + 1) * batch) as f64 / start.elapsed().as_secs_f64();
        bar.set_message(format!("loss {loss:.3}, {speed:.0} tokens/s"));
        bar.inc(1);
    }
    bar.finish();
    let (count, minutes) = (trainer.decoder.parameter_count(), start.elapsed().as_secs_f64() / 60.0);
    println!("{count} parameters, {} steps, {minutes:.1} minutes, {speed:.0} tokens/s", args.steps);
    trainer.rounded()
}

/// A short linear warm-up, then half a cosine down to nothing.
fn learning_rate(step: usize, args: &Args) -> f64 {
    let warm_up = (args.steps / 20).max(1);
    if step < warm_up {
        return args.lr * (step + 1) as f64 / warm_up as f64;
    }
    let done = (step - warm_up) as f64 / (args.steps - warm_up).max(1) as f64;
    args.lr * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

/// A decoder whose tensors are variables, and what moves them.
struct Trainer {
    decoder: Decoder,
    vars: Vec<(Param, Var)>,
    optimizers: [AdamW; 2],
}

impl Trainer {
    fn new(checkpoint: &Checkpoint, seed: u64) -> Result<Self> {
        let frozen = Decoder::random(checkpoint.architecture().clone(), seed, DType::F32, &Device::Cpu)?;
        let mut vars = Vec::new();
        let decoder = frozen.map(|param, value| {
            let var = Var::from_tensor(value)?;
            let tensor = var.as_tensor().clone();
            vars.push((param, var));
            Ok(tensor)
        })?;
        let optimizer = |matrices: bool, weight_decay| {
            let of_group = |(param, _): &&(Param, Var)| is_matrix(*param) == matrices;
            let group = vars.iter().filter(of_group).map(|(_, var)| var.clone()).collect();
            AdamW::new(group, ParamsAdamW { beta2: 0.95, weight_decay, ..ParamsAdamW::default() })
        };
        let optimizers = [optimizer(true, 0.1)?, optimizer(false, 0.0)?];
        Ok(Self { decoder, vars, optimizers })
    }

    /// Learns from windows that follow each other; their mean loss before that.
    fn step(&mut self, tokens: &[u32], learning_rate: f64) -> Result<f32> {
        let (inputs, targets) = (&tokens[..tokens.len() - 1], &tokens[1..]);
        let ids = Tensor::from_slice(inputs, (inputs.len() / WINDOW, WINDOW), self.decoder.device())?;
        let hidden = self.decoder.hidden(&ids)?; // (windows, 256, 128)
        let loss = self.decoder.nll(&hidden.flatten_to(1)?, targets)?.mean_all()?;
        let mut gradients = loss.backward()?;
        clip(&self.vars, &mut gradients)?;
        for optimizer in &mut self.optimizers {
            optimizer.set_learning_rate(learning_rate);
            optimizer.step(&gradients)?;
        }
        Ok(loss.to_scalar()?)
    }

    /// The decoder as it will be read back from bf16.
    fn rounded(&self) -> Result<Decoder> {
        let round = |value: &Tensor| value.detach().to_dtype(DType::BF16)?.to_dtype(DType::F32);
        Ok(self.decoder.map(|_, value| Ok(round(value)?))?)
    }
}

/// Weight decay pulls at these only: embeddings and norms have no size that is too large.
fn is_matrix(param: Param) -> bool {
    matches!(param, Param::Block(_, BlockParam::Weight(_)))
}

/// Scales all gradients together, so that their norm is at most [`MAX_GRADIENT_NORM`].
fn clip(vars: &[(Param, Var)], gradients: &mut GradStore) -> Result<()> {
    let mut squares = 0.0;
    for (param, var) in vars {
        let gradient = gradients.get(var).with_context(|| format!("{param} gets no gradient"))?;
        squares += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let scale = (MAX_GRADIENT_NORM / squares.sqrt()).min(1.0);
    for (_, var) in vars {
        if let Some(gradient) = gradients.remove(var) {
            gradients.insert(var, (gradient * scale)?);
        }
    }
    Ok(())
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
