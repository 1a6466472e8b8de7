//! Continues a prompt.
//!
//! ```text
//! cargo run --release --example generate -- --model M --prompt P [--tokens N] [--temperature T] [--quantize q8_0]
//! ```
#![allow(clippy::print_stdout)]

mod cli;

use std::io::Write;
use std::ops::ControlFlow;

use clap::Parser;
use foldgpt::Generate;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Continues a prompt
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    #[command(flatten)]
    quantize: cli::quantize::QuantizeArgs,
    /// The text to continue
    #[arg(long)]
    prompt: String,
    /// Make at most this many tokens
    #[arg(long, default_value_t = 100)]
    tokens: usize,
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Sample among the likeliest tokens only
    #[arg(long)]
    top_k: Option<usize>,
    /// Sample among the likeliest tokens that together have this probability
    #[arg(long)]
    top_p: Option<f64>,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (checkpoint, decoder) = args.model.load()?;
    let decoder = args.quantize.apply(decoder)?;
    let options = Generate {
        max_tokens: args.tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    };
    let mut prompt = args.prompt.as_str();
    options.run(&decoder, &checkpoint.tokenizer()?, &args.prompt, |piece| {
        // The prompt comes before the first piece, when all options have proved sound.
        print!("{}{piece}", std::mem::take(&mut prompt));
        match std::io::stdout().flush() {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    println!();
    Ok(())
}
