//! What folding costs without any healing: the loss against the parameters that are stored, for removal alone, blocks
//! tied in pairs with ever more of their own, groups for a budget, and mixes of all. Then how fast a tied model decodes.
//!
//! ```text
//! cargo run --release --example folding -- --model M --text F --work DIR
//! ```
//!
//! The first 80 % of the text calibrate, the last 20 % evaluate; --quantize is for the speed alone. What was measured is
//! kept in DIR: an interrupted run goes on where it was.
#![allow(clippy::print_stdout)]

mod cli;
mod table;

use std::path::PathBuf;

use clap::Parser;
use foldgpt::importance::{GreedyPerplexity, Importance};
use foldgpt::plan::{Budget, Donor, Groups, PlanBuilder, Ranks, ResidualStart, ScaleStart};
use foldgpt::{
    Candidate, Checkpoint, Decoder, LatencyOptions, Mix, Plan, Scores, Target, Windows, fold_on, latency,
    output_errors, pareto_front, perplexity,
};
use serde::{Deserialize, Serialize};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What folding costs without any healing, and how fast a tied model decodes
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    #[command(flatten)]
    quantize: cli::quantize::QuantizeArgs,
    /// Text: its first 80 % calibrate, its last 20 % evaluate
    #[arg(long)]
    text: PathBuf,
    /// Where results are kept
    #[arg(long)]
    work: PathBuf,
    /// Calibrate on at most this many windows
    #[arg(long, default_value_t = 16)]
    windows: usize,
    /// Measure ties and mixes on at most this many of them, and output errors on as many of those that evaluate
    #[arg(long, default_value_t = 4)]
    tie_windows: usize,
    /// Evaluate on at most this many windows
    #[arg(long, default_value_t = 32)]
    eval_windows: usize,
    /// Ranks of residuals
    #[arg(long, value_delimiter = ',', default_values_t = [8, 32, 64])]
    ranks: Vec<usize>,
    /// Shares of the parameters for budgets
    #[arg(long, value_delimiter = ',', default_values_t = [0.9, 0.8, 0.7, 0.6])]
    budgets: Vec<f64>,
    /// Tokens made in each run that measures the speed; 0 measures none
    #[arg(long, default_value_t = 128)]
    decode: usize,
    #[command(flatten)]
    window: cli::WindowArgs,
}

/// One line of the table.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    name: String,
    parameters: usize,
    nll: f64,
    /// The mean over projections that differ of `E‖Ŵx − Wx‖² / E‖Wx‖²` on text that none has seen.
    output_error: Option<f64>,
}

/// All that a line needs.
struct Bench<'a> {
    args: &'a Args,
    dense: &'a Decoder,
    calibration: Windows,
    few: Windows,
    held_out: Windows,
    /// Some of those, for the errors of outputs: these are means over many numbers a token.
    few_held_out: Windows,
    work: cli::work::Work,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let checkpoint = args.model.open()?;
    let dense = cli::load(&checkpoint, args.model.dtype.dtype())?;
    let bench = Bench::new(&args, &checkpoint, &dense)?;
    let scores = bench.scores()?;
    println!("| | parameters | share | nll | output error |\n|---|---:|---:|---:|---:|");
    bench.print(&bench.line("dense", Plan::builder(), false)?);
    bench.removals(&scores)?;
    bench.pairs()?;
    bench.budgets()?;
    for Candidate { mix, plan, .. } in bench.mixes(&scores)? {
        let removed = plan.removed().len();
        let name = format!(
            "mix: {} parameters, {removed} removed, {} for residuals",
            mix.parameters, mix.residual_share
        );
        bench.print(&bench.planned(&name, &plan, false)?);
    }
    let (dtype, held_out) = (args.model.dtype, cli::protocol(&bench.held_out));
    println!("\nnll in nats per token, in {dtype}, on {held_out}");
    println!("calibrated on {}", cli::protocol(&bench.calibration));
    println!("ties and mixes measured on {}", cli::protocol(&bench.few));
    println!("output errors on {}", cli::protocol(&bench.few_held_out));
    if args.decode > 0 {
        bench.speed()?;
    }
    Ok(())
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args, checkpoint: &Checkpoint, dense: &'a Decoder) -> anyhow::Result<Self> {
        let (tokenizer, text) = (checkpoint.tokenizer()?, cli::read_text(&args.text)?);
        let (windows, evaluated) = (Some(args.windows), Some(args.eval_windows));
        let (calibration, held_out) = args.window.split(&tokenizer, &text, windows, evaluated)?;
        let few = calibration.spread(args.tie_windows)?;
        let few_held_out = held_out.spread(args.tie_windows)?;
        let model = checkpoint.sha256(&mut cli::Bars::default())?;
        let [calibrated, tied, evaluated] = [&calibration, &few, &held_out].map(cli::protocol);
        let protocol = [model, args.model.dtype.to_string(), calibrated, tied, evaluated];
        let work = cli::work::Work::open(&args.work, &protocol)?;
        Ok(Self { args, dense, calibration, few, held_out, few_held_out, work })
    }

    /// The scores that removal goes by: a third of the blocks, one after the other.
    fn scores(&self) -> anyhow::Result<Scores> {
        self.work.kept("scores", || {
            let method = GreedyPerplexity { remove: self.dense.depth() / 3, ..GreedyPerplexity::default() };
            Ok(method.score(self.dense, &self.few, &mut cli::Bars::default())?)
        })
    }

    /// Plans, measuring ties on few windows, and measures what that makes of the model.
    fn line(&self, name: &str, builder: PlanBuilder, errors: bool) -> anyhow::Result<Line> {
        let plan: Plan = self.work.kept(&format!("plan {name}"), || {
            Ok(builder.measure(self.dense, &self.few, &mut cli::Bars::default())?)
        })?;
        self.planned(name, &plan, errors)
    }

    fn planned(&self, name: &str, plan: &Plan, errors: bool) -> anyhow::Result<Line> {
        self.work.kept(&format!("line {name}"), || {
            let mut bars = cli::Bars::default();
            let folded = fold_on(self.dense, plan, &self.calibration, &mut bars)?;
            let nll = perplexity(&folded, &self.held_out, &mut bars)?.mean_nll;
            let mut found = Vec::new();
            if errors {
                found = output_errors(self.dense, &folded, &self.few_held_out, &mut bars)?;
            }
            let total: f64 = found.iter().map(|error| error.relative).sum();
            let output_error = Some(total / found.len() as f64).filter(|_| !found.is_empty());
            Ok(Line { name: name.into(), parameters: folded.parameter_count(), nll, output_error })
        })
    }

    fn print(&self, Line { name, parameters, nll, output_error }: &Line) {
        let share = *parameters as f64 / self.dense.parameter_count() as f64;
        let error = output_error.map(|error| format!("{error:.4}")).unwrap_or_default();
        println!("| {name} | {parameters} | {share:.3} | {nll:.4} | {error} |");
    }

    fn removals(&self, scores: &Scores) -> anyhow::Result<()> {
        let most = scores.chosen.as_ref().map(Vec::len).unwrap_or_default();
        let counts = [1, 2, 3].into_iter().map(|third| (most * third).div_ceil(3));
        for count in counts {
            // In the order of removal: the first of them are what fewer removals would have chosen.
            let mut scores = scores.clone();
            if let Some(chosen) = &mut scores.chosen {
                chosen.truncate(count);
            }
            let builder = Plan::builder().remove(Target::Blocks(count), &scores);
            self.print(&self.line(&format!("{count} blocks removed"), builder, false)?);
        }
        Ok(())
    }

    fn pairs(&self) -> anyhow::Result<()> {
        let pairs = |donor| Plan::builder().share(Groups::of(2)).donor(donor);
        let print = |name: &str, builder| -> anyhow::Result<()> {
            self.print(&self.line(name, builder, true)?);
            Ok(())
        };
        for (name, donor) in [("first", Donor::First), ("mean", Donor::Mean), ("best", Donor::Best)] {
            print(&format!("pairs, {name} donor"), pairs(donor))?;
        }
        let scaled = || pairs(Donor::Mean).scales(ScaleStart::LeastSquares);
        print("pairs, mean, scales", scaled())?;
        for &rank in &self.args.ranks {
            for (name, start) in [("plain", ResidualStart::Svd), ("whitened", ResidualStart::Whitened)] {
                let builder = scaled().residual(Ranks::Uniform(rank), start);
                print(&format!("pairs, mean, scales, rank {rank} {name}"), builder)?;
            }
        }
        if let Some(&rank) = self.args.ranks.first() {
            // As many parameters, where they help most.
            let uniform = pairs(Donor::Mean).residual(Ranks::Uniform(rank), ResidualStart::Svd);
            let size = |builder: PlanBuilder| -> anyhow::Result<usize> {
                let arch = self.dense.architecture();
                Ok(builder.build(arch)?.architecture(arch)?.parameter_count())
            };
            let budget = size(uniform)? - size(pairs(Donor::Mean))?;
            let builder = scaled().residual(Ranks::Parameters(budget), ResidualStart::Whitened);
            print(&format!("pairs, mean, scales, rank {rank} spread, whitened"), builder)?;
        }
        Ok(())
    }

    fn parameters(&self, share: f64) -> usize {
        (share * self.dense.parameter_count() as f64) as usize
    }

    fn budgets(&self) -> anyhow::Result<()> {
        for &share in &self.args.budgets {
            let groups = Groups::until(Budget::Parameters(self.parameters(share)));
            let builder = Plan::builder().share(groups).donor(Donor::Mean).scales(ScaleStart::LeastSquares);
            match self.line(&format!("groups for a budget of {share}, mean, scales"), builder, true) {
                Ok(line) => self.print(&line),
                Err(error) => match error.downcast_ref() {
                    Some(foldgpt::Error::Budget { .. }) => {
                        println!("| no groups for a budget of {share}: {error} | | | | |");
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    fn mixes(&self, scores: &Scores) -> anyhow::Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        let third = scores.chosen.as_ref().map(Vec::len).unwrap_or_default().div_ceil(3);
        for &share in &self.args.budgets {
            for mix in Mix::new(self.parameters(share)).variants(&[0, third, 2 * third], &[0.0, 0.1]) {
                let name = format!("mix {share} {} {}", mix.removed, mix.residual_share);
                let measured = || match mix.measure(self.dense, scores, &self.few, &mut cli::Bars::default())
                {
                    Ok(candidate) => Ok(Some(candidate)),
                    // A budget that this mix cannot meet, or by nothing that computes.
                    Err(foldgpt::Error::Budget { .. } | foldgpt::Error::NotFinite { .. }) => Ok(None),
                    Err(error) => Err(error.into()),
                };
                candidates.extend(self.work.kept(&name, measured)?);
            }
        }
        Ok(pareto_front(candidates))
    }

    /// The speed of the model tied in pairs beside that of the same depth untied.
    fn speed(&self) -> anyhow::Result<()> {
        let plan = Plan::builder().share(Groups::of(2)).build(self.dense.architecture())?;
        let tied = fold_on(self.dense, &plan, &self.few, &mut ())?;
        let [untied, tied] = [self.args.quantize.apply(self.dense.clone())?, self.args.quantize.apply(tied)?];
        let mut options = LatencyOptions::default();
        options.new_tokens = self.args.decode;
        let measured = latency(&[&untied, &tied], &options, &mut cli::Bars::default())?;
        let rows: Vec<_> = ["untied", "in pairs"].into_iter().zip(&measured).collect();
        println!("\n{}", table::speeds(&rows));
        Ok(())
    }
}
