//! Makes a model smaller: drops the blocks that matter least together, ties others, saves, reloads, evaluates.
//!
//! ```text
//! cargo run --release --example compress -- --model M --text F --remove 0.2 --out DIR
//! cargo run --release --example compress -- --model M --text F --group-size 2 --rank 8 --format compact --out DIR
//! cargo run --release --example compress -- --model M --text F --budget-params 0.6 --format compact --out DIR
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
use foldgpt::{
    Checkpoint, Decoder, Format, Mix, Plan, SaveOptions, Scores, Target, Windows, fold_on, search_mixes,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Makes a model smaller: scores its blocks, drops the least important, ties others, saves, reloads, evaluates
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
    #[command(flatten)]
    sharing: cli::SharingArgs,
    /// How a model whose blocks share is written
    #[arg(long, value_enum, default_value_t = cli::FormatArg::Expanded)]
    format: cli::FormatArg,
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
    let target = args.target.target().unwrap_or(Target::Blocks(0));
    if args.target.target().is_none() && !args.sharing.any() {
        anyhow::bail!(
            "one of --remove, --remove-blocks, --max-params, --group-size and --budget-params is needed"
        );
    }
    check_destination(&args.out)?;
    let mut bars = cli::Bars::default();
    let checkpoint = args.model.open()?;
    let dense = cli::load(&checkpoint, DType::F32)?;
    cli::check_protected(&args.protect, &dense)?;
    let count = target.blocks(dense.architecture())?;
    if count == 0 && !args.sharing.any() {
        println!("note: the target removes no block of {}", dense.depth());
    }
    let tokenizer = checkpoint.tokenizer()?;
    let text = cli::read_text(&args.text)?;
    let (windows, evaluated) = (Some(args.windows), Some(args.eval_windows));
    let (calibration, held_out) = args.window.split(&tokenizer, &text, windows, evaluated)?;

    let plan = plan(&args, &dense, (target, count), &calibration, &mut bars)?;
    let plan = plan.for_model(checkpoint.sha256(&mut bars)?);
    let folded = fold_on(&dense, &plan, &calibration, &mut bars)?;
    let options = SaveOptions::from(Format::from(args.format));
    let saved = checkpoint.save(&folded, Some(&plan), &args.out, &options, &mut bars)?;

    let written = Checkpoint::open(&args.out)?;
    let reloaded = cli::load(&written, DType::F32)?;
    let rows = [
        table::Row::measure("dense", &checkpoint, &dense, &held_out, &mut bars)?,
        table::Row::measure("compressed", &written, &reloaded, &held_out, &mut bars)?,
    ];
    if let Some(scores) = plan.scores() {
        println!("importance by {} on {} windows of {}", scores.method, scores.windows, scores.seq_len);
        print!("{}", chart::bars(scores, &plan.units(), "removed"));
    }
    for group in plan.sharing().map(|sharing| sharing.groups.as_slice()).unwrap_or_default() {
        let cost = group.cost.map(|cost| format!(", {cost:+.4} nats")).unwrap_or_default();
        println!("tied {:?}, matrices of {:?}{cost}", group.blocks, group.donor);
    }
    println!("\n{}", table::table(&rows));
    println!("nll in nats per token, {}", cli::protocol(&held_out));
    println!("saved to {} ({} bytes of tensors)", saved.directory.display(), saved.tensor_bytes);
    Ok(())
}

/// What is removed and shared by the flags; nothing is scored where nothing may be removed.
fn plan(
    args: &Args,
    dense: &Decoder,
    (target, count): (Target, usize),
    calibration: &Windows,
    bars: &mut cli::Bars,
) -> anyhow::Result<Plan> {
    let scored = dense.to_dtype(args.model.dtype.dtype())?;
    let tenth = (dense.depth() + 5) / 10;
    let mixed = args.sharing.groups.is_none().then_some(args.sharing.budget(dense)?).flatten();
    let most = if mixed.is_some() && count == 0 { tenth } else { count };
    let mut builder = Plan::builder().protect(&args.protect);
    if most > 0 {
        let method = args.method.build(most, &args.protect, args.seed, &args.scoring)?;
        let scores = method.score(&scored, calibration, bars)?;
        if let Some(budget) = mixed {
            return mix(args, dense, (budget, most), &scores, calibration, bars);
        }
        builder = builder.remove(target, &scores);
    }
    Ok(args.sharing.apply(builder, dense)?.measure(dense, calibration, bars)?)
}

/// Removal first, then sharing, then rank: once, or with --search in several proportions.
fn mix(
    args: &Args,
    dense: &Decoder,
    (budget, most): (usize, usize),
    scores: &Scores,
    calibration: &Windows,
    bars: &mut cli::Bars,
) -> anyhow::Result<Plan> {
    let mut mix = Mix::new(budget);
    (mix.removed, mix.donor) = (most, args.sharing.donor.donor());
    if !args.sharing.search {
        return Ok(mix.plan(dense, scores, calibration, bars)?);
    }
    let mixes = mix.variants(&[0, most.div_ceil(2), most, 2 * most], &[0.0, 0.05, 0.15]);
    let front = search_mixes(dense, scores, &mixes, calibration, bars)?;
    println!("mixes that no other beats, by loss on the calibration windows:");
    for candidate in &front {
        let (removed, share) = (candidate.plan.removed().len(), candidate.mix.residual_share);
        let (parameters, loss) = (candidate.parameters, candidate.loss);
        println!("{parameters:>12} parameters  {loss:.4}  {removed} blocks removed, {share} for residuals");
    }
    let best = front.into_iter().last().context("no mix meets the budget")?;
    Ok(best.plan)
}
