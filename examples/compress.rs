//! Makes a model smaller: drops the blocks that matter least together, ties others, heals what is left where that is
//! asked for, evaluates, saves. Every stage is kept, and a rerun does what changed.
//!
//! ```text
//! cargo run --release --example compress -- --model M --text F --remove 0.2 --out DIR
//! cargo run --release --example compress -- --model M --text F --group-size 2 --rank 8 --out DIR
//! cargo run --release --example compress -- --model M --text F --budget-params 0.6 --out DIR
//! cargo run --release --example compress -- --recipe FILE.toml --dry-run
//! cargo run --release --example compress -- --recipe FILE.toml --report FILE.html
//! ```
//!
//! The first 80 % of the text calibrates and heals, the last 20 % evaluates, in f32 whatever the blocks were scored in.
#![allow(clippy::print_stdout)]

mod chart;
mod cli;
mod outcome;
mod table;

use std::path::PathBuf;

use clap::Parser;
use foldgpt::importance::{Gates, GatesWithCoupling, Method};
use foldgpt::pipeline::Precision;
use foldgpt::report::ReportFiles;
use foldgpt::{Bytes, Checkpoint, Compressor, Format, LatencyOptions, Recipe};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Makes a model smaller: scores its blocks, drops the least important, ties others, heals, evaluates, saves
#[derive(Parser)]
struct Args {
    /// A recipe, TOML or JSON (*.json), in place of all flags but --work, --report and --dry-run
    #[arg(long, conflicts_with_all = ["model", "dtype", "text", "method", "TargetArgs", "ScoringArgs", "SharingArgs",
        "format", "protect", "out", "seed", "windows", "eval_windows", "WindowArgs", "HealArgs", "TuningArgs",
        "max_nll_increase", "max_memory", "latency", "field", "prompt", "base_model"])]
    recipe: Option<PathBuf>,
    /// Say what would be done, how long it takes and what comes out, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Keep every stage's result in this directory, and do what is not there (by default --out with .work after it)
    #[arg(long)]
    work: Option<PathBuf>,
    /// A directory in the Hugging Face layout, a GGUF file, or a hub id (`org/name`, feature `hub`)
    #[arg(long, required_unless_present = "recipe")]
    model: Option<String>,
    /// What blocks are scored in; bf16 takes, on CPUs with AVX-512 bf16, less time
    #[arg(long, value_enum, default_value = "f32")]
    dtype: cli::DtypeArg,
    /// Text, or JSON Lines (*.jsonl): its first 80 % calibrate, its last 20 % evaluate
    #[arg(long, required_unless_present = "recipe")]
    text: Option<PathBuf>,
    /// The field of JSON Lines that holds the text (`text` by default)
    #[arg(long)]
    field: Option<String>,
    /// How blocks are scored and chosen
    #[arg(long, value_parser = cli::scoring::methods(), default_value_t = Method::Coupling)]
    method: Method,
    #[command(flatten)]
    target: cli::target::TargetArgs,
    #[command(flatten)]
    scoring: cli::scoring::ScoringArgs,
    #[command(flatten)]
    sharing: cli::target::SharingArgs,
    /// How the model is written: compact by default where blocks share, in --out or in --model, and expanded otherwise
    #[arg(long, value_enum)]
    format: Option<cli::target::FormatArg>,
    /// Blocks that have to stay, by index from 0
    #[arg(long, value_delimiter = ',')]
    protect: Vec<usize>,
    /// The directory to write, new or empty
    #[arg(long, required_unless_present = "recipe")]
    out: Option<PathBuf>,
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
    #[command(flatten)]
    heal: cli::heal::HealArgs,
    /// Save nothing whose loss is higher by more than this, in nats per token
    #[arg(long)]
    max_nll_increase: Option<f64>,
    /// Take at most this much memory, such as 3GB, for weights, states and activations, beside the some tens of megabytes
    /// of the program itself: blocks are read from disk one at a time where the model is larger, and can only be
    /// dropped then (methods block-influence, angular, perplexity and gates)
    #[arg(long)]
    max_memory: Option<Bytes>,
    /// Measure how fast the model is before and after; leave the machine alone meanwhile
    #[arg(long)]
    latency: bool,
    /// Write what was found to this HTML file, and to Markdown and JSON beside it
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// A text that the models before and after continue in the report; may be given several times
    #[arg(long)]
    prompt: Vec<String>,
    /// The hub id of the model, for the model card, where it was not fetched by it
    #[arg(long, value_name = "org/name")]
    base_model: Option<String>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut compressor = match &args.recipe {
        Some(path) => Compressor::read(path)?,
        None => Compressor::from(recipe(&args)?),
    };
    anyhow::ensure!(
        args.work.is_none() || args.scoring.state.is_none(),
        "--work keeps what --state would: give one of them"
    );
    if let Some(work) = args.work.or(args.scoring.state) {
        compressor = compressor.work(work);
    }
    compressor.command = Some(cli::command());
    let files = args.report.map(ReportFiles::new).transpose()?;
    let mut bars = cli::Bars::default();
    if args.dry_run {
        println!("{}", compressor.dry_run(&mut bars)?);
        return Ok(());
    }
    let report = compressor.run(&mut bars)?;
    outcome::print(&report);
    if let Some(files) = files {
        files.write(&report)?;
        println!("the report is in {}", files.html().display());
    }
    Ok(())
}

/// The flags as a recipe.
fn recipe(args: &Args) -> anyhow::Result<Recipe> {
    anyhow::ensure!(
        args.target.goal().is_some() || args.sharing.any(),
        "one of --remove, --remove-blocks, --max-params, --group-size and --budget-params is needed"
    );
    args.scoring.check(args.method)?;
    let mut recipe = Recipe::default();
    recipe.model = args.model.clone().unwrap_or_default();
    recipe.text = args.text.clone().unwrap_or_default();
    recipe.text_field.clone_from(&args.field);
    recipe.out = args.out.clone().unwrap_or_default();
    recipe.seed = args.seed;
    recipe.dtype = match args.dtype {
        cli::DtypeArg::F32 => Precision::F32,
        cli::DtypeArg::Bf16 => Precision::Bf16,
    };
    let windows = &mut recipe.windows;
    (windows.seq_len, windows.bos) = (args.window.seq_len, args.window.bos.into());
    windows.split_special_tokens = args.window.split_special_tokens;
    (windows.calibrate, windows.evaluate) = (args.windows, args.eval_windows);
    recipe.method = args.method;
    if args.method == Method::Gates {
        let mut gates = Gates::default();
        gates.halves = args.scoring.halves;
        args.scoring.train(&mut gates);
        recipe.gates = Some(gates);
    }
    if args.method == Method::Coupling {
        let mut coupling = GatesWithCoupling::default();
        args.scoring.train(&mut coupling.gates);
        recipe.coupling = Some(coupling).filter(|coupling| *coupling != GatesWithCoupling::default());
    }
    recipe.target = args.target.goal();
    recipe.protect.clone_from(&args.protect);
    recipe.share =
        args.sharing.share(|| Ok(Checkpoint::open(&recipe.model)?.architecture().parameter_count()))?;
    recipe.mix = args.sharing.mix();
    recipe.heal = args.heal.heal(args.seed)?;
    recipe.max_nll_increase = args.max_nll_increase;
    recipe.max_memory = args.max_memory;
    recipe.latency = args.latency.then(LatencyOptions::default);
    recipe.format = args.format.map(Format::from);
    recipe.format.map_or(Ok(()), |format| args.heal.check_format(format))?;
    recipe.samples.prompts.clone_from(&args.prompt);
    recipe.base_model.clone_from(&args.base_model);
    Ok(recipe)
}
