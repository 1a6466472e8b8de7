//! Measures a model: perplexity on text, accuracy on tasks.
//!
//! ```text
//! cargo run --release --example evaluate -- --model M --text F [--windows N] [--seq-len N] [--json]
//! cargo run --release --example evaluate -- --model M --ids F.json [--json]
//! cargo run --release --example evaluate -- --model M --tasks F.jsonl [F.jsonl …] [--limit N] [--json]
//! ```
#![allow(clippy::print_stdout)]

mod cli;

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use foldgpt::eval::{Task, accuracy};
use foldgpt::{Checkpoint, Decoder, Windows};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures a model: perplexity on text, accuracy on tasks
#[derive(Parser)]
#[command(group = clap::ArgGroup::new("what").required(true))]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    #[command(flatten)]
    quantize: cli::quantize::QuantizeArgs,
    /// Text to evaluate on
    #[arg(long, group = "what")]
    text: Option<PathBuf>,
    /// JSON array of arrays of token ids, each a window
    #[arg(long, group = "what", conflicts_with_all = ["seq_len", "bos"])]
    ids: Option<PathBuf>,
    /// Tasks as JSON Lines, in the formats of lm-evaluation-harness's datasets
    #[arg(long, group = "what", num_args = 1.., conflicts_with_all = ["windows", "seq_len", "bos"])]
    tasks: Vec<PathBuf>,
    /// Answer at most this many items of each task (all by default)
    #[arg(long, requires = "tasks")]
    limit: Option<usize>,
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
    // Files that cannot be used are told before the model is read.
    let tasks = args.tasks.iter().map(|path| Task::read(path, args.limit));
    let tasks = tasks.collect::<foldgpt::Result<Vec<Task>>>()?;
    let (checkpoint, decoder) = args.model.load()?;
    let decoder = args.quantize.apply(decoder)?;
    if tasks.is_empty() {
        perplexity(&args, &checkpoint, &decoder)
    } else {
        answer(&args, &tasks, &checkpoint, &decoder)
    }
}

fn perplexity(args: &Args, checkpoint: &Checkpoint, decoder: &Decoder) -> anyhow::Result<()> {
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
        (None, None) => anyhow::bail!("one of --text, --ids and --tasks is needed"),
    };
    let result = foldgpt::perplexity(decoder, &windows, &mut cli::Bars::default())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&result)?);
    } else {
        println!("perplexity {:.4}, mean nll {:.4} nats", result.perplexity, result.mean_nll);
        println!("{}", cli::protocol(&windows));
    }
    Ok(())
}

fn answer(args: &Args, tasks: &[Task], checkpoint: &Checkpoint, decoder: &Decoder) -> anyhow::Result<()> {
    let tokenizer = checkpoint.tokenizer()?;
    let mut results = serde_json::Map::new();
    if !args.json {
        println!("| task | items | acc | stderr | acc_norm | perplexity |\n|---|---:|---:|---:|---:|---:|");
    }
    for task in tasks {
        let result = accuracy(decoder, &tokenizer, task, &mut cli::Bars::default())?;
        if !args.json {
            let optional = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.4}"));
            let (norm, perplexity) = (optional(result.acc_norm), optional(result.perplexity));
            println!(
                "| {} | {} | {:.4} | {:.4} | {norm} | {perplexity} |",
                task.name, result.items, result.acc, result.stderr
            );
        }
        results.insert(task.name.clone(), serde_json::to_value(result)?);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "tasks": results }))?);
    }
    Ok(())
}
