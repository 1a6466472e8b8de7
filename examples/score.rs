//! Scores how much each block of a model matters.
//!
//! ```text
//! cargo run --release --example score -- --model M --text F [--method block-influence] [--json]
//! ```
#![allow(clippy::print_stdout)]

mod chart;
mod cli;

use std::path::PathBuf;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// Calibration text
    #[arg(long)]
    text: PathBuf,
    #[arg(long, value_enum, default_value_t = cli::Method::BlockInfluence)]
    method: cli::Method,
    /// Use at most this many windows
    #[arg(long, default_value_t = 16)]
    windows: usize,
    #[command(flatten)]
    window: cli::WindowArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (checkpoint, decoder) = args.model.load()?;
    let text = cli::read_text(&args.text)?;
    let windows = args.window.cut(&checkpoint.tokenizer()?, &text, Some(args.windows))?;
    let scores = args.method.build().score(&decoder, &windows, &mut cli::Bars::default())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&scores)?);
    } else {
        println!("{} on {} windows of {} tokens", scores.method, scores.windows, scores.seq_len);
        print!("{}", chart::bars(&scores, &[]));
    }
    Ok(())
}
