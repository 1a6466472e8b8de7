//! Measures a model's perplexity.
//!
//! ```text
//! cargo run --release --example evaluate -- --model M --text F [--windows N] [--seq-len N] [--json]
//! cargo run --release --example evaluate -- --model M --ids F.json [--json]
//! ```
#![allow(clippy::print_stdout)]

mod cli;

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use foldgpt::Windows;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures a model's perplexity
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// Text to evaluate on
    #[arg(long, required_unless_present = "ids", conflicts_with = "ids")]
    text: Option<PathBuf>,
    /// JSON array of arrays of token ids, each a window
    #[arg(long, conflicts_with_all = ["seq_len", "bos"])]
    ids: Option<PathBuf>,
    /// Use at most this many windows (all by default)
    #[arg(long)]
    windows: Option<usize>,
    #[command(flatten)]
    window: cli::WindowArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (checkpoint, decoder) = args.model.load()?;
    let windows = match (&args.ids, &args.text) {
        (Some(path), _) => {
            let mut ids: Vec<Vec<u32>> = serde_json::from_str(&cli::read_text(path)?)
                .with_context(|| format!("{} is not an array of arrays of token ids", path.display()))?;
            ids.truncate(args.windows.unwrap_or(usize::MAX));
            Windows::from_ids(ids)?
        }
        (None, Some(path)) => {
            args.window.cut(&checkpoint.tokenizer()?, &cli::read_text(path)?, args.windows)?
        }
        (None, None) => anyhow::bail!("either --text or --ids is needed"),
    };
    let result = foldgpt::perplexity(&decoder, &windows, &mut cli::Bars::default())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&result)?);
    } else {
        println!("perplexity {:.4}, mean nll {:.4} nats", result.perplexity, result.mean_nll);
        println!("{}", cli::protocol(&windows));
    }
    Ok(())
}
