//! Makes a model shallower: chooses the blocks that matter least together, drops them, saves, reloads, evaluates.
//!
//! ```text
//! cargo run --release --example compress -- --model M --text F --remove 0.2 --out DIR
//! ```
//!
//! The first 80 % of the text calibrates, the last 20 % evaluates, in f32 whatever the blocks were scored in.
#![allow(clippy::print_stdout)]

mod chart;
mod cli;
mod table;

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use foldgpt::candle::DType;
use foldgpt::checkpoint::check_destination;
use foldgpt::{Checkpoint, Plan, SaveOptions, fold};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Makes a model shallower: scores its blocks, drops the least important, saves, reloads, evaluates
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// Text: its first 80 % calibrate, its last 20 % evaluate
    #[arg(long)]
    text: PathBuf,
    /// How blocks are scored and chosen
    #[arg(long, value_enum, default_value_t = cli::Method::Coupling)]
    method: cli::Method,
    #[command(flatten)]
    target: cli::TargetArgs,
    #[command(flatten)]
    scoring: cli::ScoringArgs,
    /// Blocks that have to stay, by index from 0
    #[arg(long, value_delimiter = ',')]
    protect: Vec<usize>,
    /// The directory to write, new or empty
    #[arg(long)]
    out: PathBuf,
    /// Seed of everything drawn at random
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Calibrate on at most this many windows
    #[arg(long, default_value_t = 16)]
    windows: usize,
    /// Evaluate on at most this many windows
    #[arg(long, default_value_t = 32)]
    eval_windows: usize,
    #[command(flatten)]
    window: cli::WindowArgs,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let Some(target) = args.target.target() else {
        anyhow::bail!("one of --remove, --remove-blocks and --max-params is needed");
    };
    check_destination(&args.out)?;
    let mut bars = cli::Bars::default();
    let checkpoint = args.model.open()?;
    let dense = cli::load(&checkpoint, DType::F32)?;
    cli::check_protected(&args.protect, &dense)?;
    let count = target.blocks(dense.architecture())?;
    if count == 0 {
        println!("note: the target removes no block of {}", dense.depth());
    }
    let tokenizer = checkpoint.tokenizer()?;
    let text = cli::read_text(&args.text)?;
    let (calibration, held_out) = cli::split_text(&text);
    let calibration =
        args.window.cut(&tokenizer, calibration, Some(args.windows)).context("the first 80 %")?;
    let held_out = args.window.cut(&tokenizer, held_out, Some(args.eval_windows)).context("the last 20 %")?;

    let method = args.method.build(count, &args.protect, args.seed, &args.scoring)?;
    let scores = method.score(&dense.to_dtype(args.model.dtype.dtype())?, &calibration, &mut bars)?;
    let plan = Plan::new(dense.architecture(), &scores, target, &args.protect)?;
    let plan = plan.for_model(checkpoint.sha256(&mut bars)?);
    let folded = fold(&dense, &plan)?;
    let saved = checkpoint.save(&folded, Some(&plan), &args.out, &SaveOptions::default(), &mut bars)?;

    let written = Checkpoint::open(&args.out)?;
    let reloaded = cli::load(&written, DType::F32)?;
    let rows = [
        table::Row::measure("dense", &checkpoint, &dense, &held_out, &mut bars)?,
        table::Row::measure("compressed", &written, &reloaded, &held_out, &mut bars)?,
    ];
    println!("importance by {} on {} windows of {}", scores.method, scores.windows, scores.seq_len);
    print!("{}", chart::bars(&scores, &plan.units(), "removed"));
    println!("\n{}", table::table(&rows));
    println!("nll in nats per token, {}", cli::protocol(&held_out));
    println!("saved to {} ({} bytes of tensors)", saved.directory.display(), saved.tensor_bytes);
    Ok(())
}
