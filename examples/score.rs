//! Scores how much each block of a model matters, and says which would go.
//!
//! ```text
//! cargo run --release --example score -- --model M --text F [--method coupling] [--remove 0.2] [--max-memory 3GB] [--json]
//! ```
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod chart;
mod cli;

use std::path::PathBuf;

use anyhow::ensure;
use clap::Parser;
use foldgpt::candle::Device;
use foldgpt::importance::{Coupling, Method, Residence};
use foldgpt::model::{Part, Unit};
use foldgpt::{Bytes, Checkpoint, Plan, Scores, Windows};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Scores how much each block of a model matters, and says which would go
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// Calibration text
    #[arg(long)]
    text: PathBuf,
    /// How blocks are scored; by default in one pass, where compress searches for the best set
    #[arg(long, value_parser = cli::scoring::methods(), default_value_t = Method::BlockInfluence)]
    method: Method,
    #[command(flatten)]
    scoring: cli::scoring::ScoringArgs,
    #[command(flatten)]
    target: cli::target::TargetArgs,
    /// Blocks that have to stay, by index from 0
    #[arg(long, value_delimiter = ',')]
    protect: Vec<usize>,
    /// Use at most this many windows, spread over the text
    #[arg(long, default_value_t = 16)]
    windows: usize,
    #[command(flatten)]
    window: cli::WindowArgs,
    /// Take at most this much memory, such as 3GB, for weights, states and activations, beside the some tens of megabytes
    /// of the program itself: blocks are read from disk one at a time where the model is larger (methods
    /// block-influence, angular, perplexity and gates)
    #[arg(long)]
    max_memory: Option<Bytes>,
    /// With --max-memory, the directory for states that memory has no room for: one that is on disk (by default the
    /// system's for temporary files, which may itself be in memory)
    #[arg(long, requires = "max_memory")]
    scratch: Option<PathBuf>,
    /// Seed of everything drawn at random
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let checkpoint = args.model.open()?;
    let arch = checkpoint.architecture();
    cli::check_protected(&args.protect, arch.depth())?;
    let text = cli::read_text(&args.text)?;
    let windows = args.window.cut(&checkpoint.tokenizer()?, &text, None)?.spread(args.windows)?;

    let target = args.target.target();
    let count = target.map_or(Ok(0), |target| target.blocks(arch))?;
    ensure!(
        count > 0 || args.method != Method::Gates,
        "--method gates finds a set of one size, and no block would go: give --remove, --remove-blocks or --max-params"
    );
    ensure!(
        args.scoring.state.is_none() || args.method.keeps_state(),
        "--state keeps nothing of --method {}, which is measured anew each time",
        args.method
    );
    let mut scores = score(&args, &checkpoint, &windows, count)?;
    let (mut would_go, mut as_chosen) = (Vec::new(), false);
    if let Some(target) = target {
        let plan = Plan::new(arch, &scores, target, &args.protect)?;
        // What the method chose stays in the order of removal.
        as_chosen = cli::scoring::chose(&scores, plan.removed());
        if !as_chosen {
            scores.chosen = Some(plan.removed().to_vec());
        }
        would_go = plan.units();
    }
    cli::scoring::warn_unstable(&scores);
    if args.json {
        println!("{}", json(&scores, &would_go, args.model.dtype)?);
    } else {
        print_scores(&scores, &would_go, as_chosen, &windows);
    }
    Ok(())
}

/// Scores with the model in memory, or with its blocks on disk where it may not take as much.
fn score(args: &Args, checkpoint: &Checkpoint, windows: &Windows, count: usize) -> anyhow::Result<Scores> {
    let (name, dtype) = (args.method, args.model.dtype.dtype());
    let options = cli::scoring::options(name, count, &args.protect, args.seed, &args.scoring)?;
    let (method, mut bars) = (name.build(&options), cli::Bars::default());
    let Some(most) = args.max_memory else {
        return Ok(method.score(&cli::load(checkpoint, dtype)?, windows, &mut bars)?);
    };
    let residence = name.residence(checkpoint, dtype, windows, &options, most)?;
    eprintln!("{residence}");
    let scores = if let Residence::Streamed { mut options, .. } = residence {
        options.scratch.clone_from(&args.scratch);
        let model = checkpoint.streamed(dtype, &Device::Cpu, options)?;
        method.score_streamed(&model, windows, &mut bars)?
    } else {
        method.score(&cli::load(checkpoint, dtype)?, windows, &mut bars)?
    };
    if let Some(peak) = cli::peak_memory() {
        eprintln!("peak resident memory {peak}");
    }
    Ok(scores)
}

/// The scores, with what they were computed in, and the halves that would go where halves were scored.
fn json(scores: &Scores, would_go: &[Unit], dtype: cli::DtypeArg) -> serde_json::Result<String> {
    let mut value = serde_json::to_value(scores)?;
    value["dtype"] = dtype.to_string().into();
    if scores.blocks.iter().any(|block| block.part != Part::Whole) {
        let halves = would_go.iter().filter(|unit| unit.part != Part::Whole);
        value["chosen_halves"] = halves.map(ToString::to_string).collect();
    }
    serde_json::to_string_pretty(&value)
}

fn print_scores(scores: &Scores, would_go: &[Unit], as_chosen: bool, windows: &Windows) {
    println!("{} on {}", scores.method, cli::protocol(windows));
    print!("{}", chart::bars(scores, would_go, "would go"));
    match &scores.coupling {
        Some(matrix) if cli::colours() => println!("\ncoupling:\n{}", Coupling::heat_map(matrix)),
        Some(_) => println!("\ncoupling: a heat map in a terminal with colours, the numbers with --json"),
        None => {}
    }
    if scores.chosen.is_some() {
        let how =
            if scores.coupling.is_some() && as_chosen { " (chosen as a set, by true losses)" } else { "" };
        let units: Vec<String> = would_go.iter().map(ToString::to_string).collect();
        println!("would go: {}{how}", units.join(", "));
    }
    println!("{:.1} s, {:.0} block runs", scores.seconds, scores.block_runs);
    match scores.stability {
        Some(stability) => {
            println!("stability {stability:.2} (Spearman's correlation of two halves of the text)");
        }
        None if scores.windows < 2 => println!("stability unknown: it takes at least two windows"),
        None => println!("stability is not measured for this method"),
    }
}
