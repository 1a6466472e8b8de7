//! Measures how blocks cover for each other, exactly and by gate gradients, and how far the two agree.
//!
//! ```text
//! cargo run --release --example coupling -- --model M --text F --windows 4
//! ```
#![allow(clippy::print_stdout)]

mod cli;

use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use foldgpt::data::split_text;
use foldgpt::importance::{Coupling, spearman};
use foldgpt::model::Unit;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures how blocks cover for each other, exactly and by gate gradients, and how far the two agree
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// Calibration text: its first 80 % are used
    #[arg(long)]
    text: PathBuf,
    /// Use this many windows, spread over the text
    #[arg(long, default_value_t = 4)]
    windows: usize,
    #[command(flatten)]
    window: cli::WindowArgs,
    /// Print both matrices, and what they depend on, as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (checkpoint, decoder) = args.model.load()?;
    let text = cli::read_text(&args.text)?;
    let all = args.window.cut(&checkpoint.tokenizer()?, split_text(&text).0, None)?;
    let windows = all.spread(args.windows)?;
    let units = Unit::blocks(decoder.depth());

    let start = Instant::now();
    let exact = Coupling::exact(&decoder, &windows, &units, &mut cli::Bars::default())?;
    let exact_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let estimate = Coupling::from_gate_gradients(&decoder, &windows, &units, &mut cli::Bars::default())?;
    let estimate_seconds = start.elapsed().as_secs_f64();

    let agreement = spearman(&exact.pairs(), &estimate.pairs());
    if args.json {
        let of = |coupling: &Coupling, seconds: f64| {
            json!({
                "coupling": coupling.matrix, "block_runs": coupling.block_runs, "seconds": seconds
            })
        };
        let found = json!({
            "exact": of(&exact, exact_seconds), "gate_gradients": of(&estimate, estimate_seconds),
            "spearman": agreement, "dtype": args.model.dtype.to_string(), "windows": cli::protocol(&windows),
        });
        println!("{}", serde_json::to_string_pretty(&found)?);
        return Ok(());
    }
    if cli::colours() {
        println!("exact:\n{}", Coupling::heat_map(&exact.matrix));
        println!("by gate gradients:\n{}", Coupling::heat_map(&estimate.matrix));
    } else {
        println!("heat maps in a terminal with colours, the numbers with --json\n");
    }
    println!("| coupling | block runs | seconds |\n|---|---:|---:|");
    println!("| exact | {:.0} | {exact_seconds:.0} |", exact.block_runs);
    println!("| by gate gradients | {:.0} | {estimate_seconds:.0} |", estimate.block_runs);
    println!("\nSpearman's rank correlation of their pairs: {agreement:.3}");
    println!("in {}, {}", args.model.dtype, cli::protocol(&windows));
    Ok(())
}
