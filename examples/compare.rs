//! Compares methods under one protocol: the same calibration windows, the same numbers of blocks removed, the loss
//! of each method's choice on text that none has seen.
//!
//! ```text
//! cargo run --release --example compare -- --model M --text F --blocks 3,6,9,12 --work DIR
//! ```
//!
//! The first 80 % of the text calibrate, the last 20 % evaluate. What each method found, and what that is worth, is kept
//! in DIR: an interrupted comparison goes on where it was.
#![allow(clippy::print_stdout)]

mod cli;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Parser;
use foldgpt::importance::{Method, MethodOptions, losses_without};
use foldgpt::{Decoder, Plan, Target, Windows};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Compares methods under one protocol, on text that none has seen
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// Text: its first 80 % calibrate, its last 20 % evaluate
    #[arg(long)]
    text: PathBuf,
    /// Numbers of blocks to remove
    #[arg(long, value_delimiter = ',', required = true)]
    blocks: Vec<usize>,
    /// Methods to compare (all by default)
    #[arg(long, value_parser = cli::scoring::methods(), value_delimiter = ',')]
    methods: Vec<Method>,
    /// Where the methods' results are kept
    #[arg(long)]
    work: PathBuf,
    /// Calibrate on at most this many windows
    #[arg(long, default_value_t = 32)]
    windows: usize,
    /// Evaluate on at most this many windows (all by default)
    #[arg(long)]
    eval_windows: Option<usize>,
    #[command(flatten)]
    window: cli::WindowArgs,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Sets of removed blocks, and their losses.
type Evaluated = Vec<(Vec<usize>, f64)>;

/// What a method chose for each number of blocks, and what that took.
struct Line {
    method: Method,
    chosen: BTreeMap<usize, Vec<usize>>,
    /// The lowest of all numbers of blocks.
    stability: Option<f64>,
    seconds: f64,
    block_runs: f64,
}

fn main() -> anyhow::Result<()> {
    let mut args = Args::parse();
    args.blocks.sort_unstable();
    args.blocks.dedup();
    let checkpoint = args.model.open()?;
    for &blocks in &args.blocks {
        ensure!(blocks > 0, "--blocks is {blocks}, expected at least 1");
        Target::Blocks(blocks).blocks(checkpoint.architecture()).context("--blocks")?;
    }
    let decoder = cli::load(&checkpoint, args.model.dtype.dtype())?;
    let (tokenizer, text) = (checkpoint.tokenizer()?, cli::read_text(&args.text)?);
    let (calibration, held_out) =
        args.window.split(&tokenizer, &text, Some(args.windows), args.eval_windows)?;
    let (model, dtype) = (checkpoint.sha256(&mut cli::Bars::default())?, args.model.dtype.to_string());
    let options = serde_json::to_string(&MethodOptions::default())?;
    let version = concat!("foldgpt ", env!("CARGO_PKG_VERSION")).to_string();
    let protocol =
        [model, dtype, cli::protocol(&calibration), format!("seed {}", args.seed), version, options];
    let work = cli::work::Work::open(&args.work, &protocol)?;

    let methods = if args.methods.is_empty() { Method::ALL.to_vec() } else { args.methods.clone() };
    let held_out_protocol = cli::protocol(&held_out);
    let evaluate = |name: &str, sets: &[Vec<usize>]| -> anyhow::Result<Vec<f64>> {
        let name = format!("{name} on {held_out_protocol}");
        let found: Evaluated = work.kept(&name, || {
            let losses = losses_without(&decoder, &held_out, sets, &mut cli::Bars::default())?;
            Ok(sets.iter().cloned().zip(losses).collect())
        })?;
        ensure!(found.iter().map(|(set, _)| set).eq(sets), "{} holds losses of others", args.work.display());
        Ok(found.into_iter().map(|(_, loss)| loss).collect())
    };
    let dense = evaluate("dense", &[Vec::new()])?;
    let mut lines = Vec::new();
    for method in methods {
        let line = run(method, &args, &decoder, &calibration, &work)?;
        let (counts, sets): (Vec<usize>, Vec<Vec<usize>>) = line.chosen.clone().into_iter().unzip();
        let losses = evaluate(&format!("{} without {counts:?}", method.name()), &sets)?;
        lines.push((line, counts.into_iter().zip(losses).collect()));
    }
    print_table(&args.blocks, &lines, dense.first().copied().unwrap_or_default());
    println!(
        "\nstability: Spearman's correlation of the scores of two halves of the text, the lowest of all numbers of \
         blocks; seconds and block runs: of all of them together, each about as if it had been alone"
    );
    println!("\nin {}; nll in nats per token on {held_out_protocol}", args.model.dtype);
    println!("scored on {}", cli::protocol(&calibration));
    Ok(())
}

/// What a method chooses for every number of blocks.
fn run(
    method: Method,
    args: &Args,
    decoder: &Decoder,
    windows: &Windows,
    work: &cli::work::Work,
) -> anyhow::Result<Line> {
    let mut line = Line { method, chosen: BTreeMap::new(), stability: None, seconds: 0.0, block_runs: 0.0 };
    let most = args.blocks.iter().copied().max().unwrap_or_default();
    let counts = if method.depends_on_count() { args.blocks.clone() } else { vec![most] };
    for count in counts {
        let name = format!("{}-{count}", method.name());
        let scores = work.kept(&name, || {
            let scoring = cli::scoring::ScoringArgs {
                state: Some(args.work.clone()),
                ..cli::scoring::ScoringArgs::default()
            };
            let method = cli::scoring::build(method, count, &[], args.seed, &scoring)?;
            Ok(method.score(decoder, windows, &mut cli::Bars::default())?)
        })?;
        cli::scoring::warn_unstable(&scores);
        line.seconds += scores.seconds;
        line.block_runs += scores.block_runs;
        line.stability = line.stability.into_iter().chain(scores.stability).reduce(f64::min);
        for &blocks in args.blocks.iter().filter(|blocks| !method.depends_on_count() || **blocks == count) {
            let plan = Plan::new(decoder.architecture(), &scores, Target::Blocks(blocks), &[])?;
            line.chosen.insert(blocks, plan.removed().to_vec());
        }
    }
    Ok(line)
}

fn print_table(blocks: &[usize], lines: &[(Line, BTreeMap<usize, f64>)], dense: f64) {
    let heads: Vec<String> = blocks.iter().map(|blocks| format!(" -{blocks} blocks |")).collect();
    let heads = heads.concat();
    println!(
        "| method |{heads} stability | seconds | block runs |\n|---|{}",
        "---:|".repeat(3 + blocks.len())
    );
    println!("| dense |{} | | |", format!(" {dense:.4} |").repeat(blocks.len()));
    for (line, losses) in lines {
        let cells: String = blocks
            .iter()
            .map(|blocks| losses.get(blocks).map_or(" |".into(), |loss| format!(" {loss:.4} |")))
            .collect();
        let stability = line.stability.map(|stability| format!("{stability:.2}")).unwrap_or_default();
        let Line { method, seconds, block_runs, .. } = line;
        println!("| {method} |{cells} {stability} | {seconds:.0} | {block_runs:.0} |");
    }
    for (line, _) in lines {
        println!("\n{}: {:?}", line.method.name(), line.chosen);
    }
}
