//! What of healing is worth its budget: every cut or folded model healed with every choice of what is trained and of
//! what it is held to, beside the original model fine-tuned alike, which is the fair ceiling.
//!
//! ```text
//! cargo run --release --example ablate -- --dense M --models CUT,FOLDED --text F --tasks T.jsonl,… \
//!     --heal-minutes 40 --work DIR
//! ```
//!
//! The first 80 % of the text train, but for a few windows that choose the weights that are kept; the last 20 % and
//! the tasks evaluate, in f32. Every row is kept in DIR, and the state of the one that runs: an interrupted ablation
//! goes on where it was.
#![allow(clippy::print_stdout)]

mod cli;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use cli::heal::{Distill, Train};
use foldgpt::candle::{DType, Device};
use foldgpt::eval::{Task, accuracy};
use foldgpt::heal::{HealReport, Teacher};
use foldgpt::{Checkpoint, Decoder, Tokenizer, Windows, perplexity};
use serde::{Deserialize, Serialize};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Heals models under one budget with every choice of what is trained and learnt from
#[derive(Parser)]
struct Args {
    /// The original model: teacher, and ceiling
    #[arg(long)]
    dense: String,
    /// Cut or folded models made from it
    #[arg(long, value_delimiter = ',', required = true)]
    models: Vec<String>,
    /// Text: its first 80 % train, its last 20 % evaluate
    #[arg(long)]
    text: PathBuf,
    /// Tasks as JSON Lines
    #[arg(long, value_delimiter = ',')]
    tasks: Vec<PathBuf>,
    /// Answer at most this many items of each task (all by default)
    #[arg(long)]
    limit: Option<usize>,
    /// Where rows and states are kept
    #[arg(long)]
    work: PathBuf,
    /// Evaluate on at most this many windows (all by default)
    #[arg(long)]
    eval_windows: Option<usize>,
    /// How matrices are held while healing
    #[arg(long, value_enum, default_value_t = cli::DtypeArg::F32)]
    dtype: cli::DtypeArg,
    #[command(flatten)]
    heal: cli::heal::HealArgs,
    #[command(flatten)]
    window: cli::WindowArgs,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// One line of the table.
#[derive(Debug, Serialize, Deserialize)]
struct Row {
    /// What it was measured on, and with.
    protocol: String,
    model: String,
    train: String,
    distill: String,
    parameters: usize,
    nll: f64,
    accuracy: BTreeMap<String, f64>,
    report: Option<HealReport>,
}

/// What all rows have in common.
struct Setting<'a> {
    args: &'a Args,
    tokenizer: Tokenizer,
    train: Windows,
    choosing: Windows,
    held_out: Windows,
    tasks: Vec<Task>,
    dense: Decoder,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    anyhow::ensure!(
        args.heal.heal(0)?.is_some(),
        "one of --heal-steps, --heal-tokens and --heal-minutes is needed"
    );
    let tasks = args.tasks.iter().map(|path| Task::read(path, args.limit)).collect::<foldgpt::Result<_>>()?;
    let checkpoint = Checkpoint::open(&args.dense)?;
    let tokenizer = checkpoint.tokenizer()?;
    let text = cli::read_text(&args.text)?;
    let (first, last) = cli::split_text(&text);
    let (train, choosing) =
        cli::heal::split(&args.window.cut(&tokenizer, first, None).context("the first 80 %")?)?;
    let held_out = args.window.cut(&tokenizer, last, args.eval_windows).context("the last 20 %")?;
    std::fs::create_dir_all(&args.work).with_context(|| format!("cannot create {}", args.work.display()))?;
    let dense = cli::load(&checkpoint, args.dtype.dtype())?;
    let setting = Setting { args: &args, tokenizer, train, choosing, held_out, tasks, dense };

    let mut rows = Vec::new();
    let all = [Train::Norms, Train::Scales, Train::Lora];
    rows.push(setting.row("dense", &setting.dense, &[], Distill::None)?);
    rows.push(setting.row("dense", &setting.dense, &all, Distill::None)?);
    for model in &args.models {
        let name = Path::new(model).file_name().map_or(model.clone(), |name| name.to_string_lossy().into());
        let student = cli::load(&Checkpoint::open(model)?, args.dtype.dtype())?.sharing(&setting.dense)?;
        rows.push(setting.row(&name, &student, &[], Distill::None)?);
        for train in [&all[..1], &all[..2], &all[..]] {
            for distill in [Distill::None, Distill::Logits, Distill::Tail] {
                rows.push(setting.row(&name, &student, train, distill)?);
            }
        }
    }
    print_table(&rows);
    println!("\nnll in nats per token, in f32, on {}", cli::protocol(&setting.held_out));
    println!("trained on {}", cli::protocol(&setting.train));
    Ok(())
}

impl Setting<'_> {
    /// A row, measured or as it was kept. Without anything to train it is the model as it is.
    fn row(&self, model: &str, decoder: &Decoder, train: &[Train], distill: Distill) -> anyhow::Result<Row> {
        let mut args = self.args.heal.clone();
        (args.train, args.distill) = (train.to_vec(), distill);
        let name = format!("{model}-{}-{}", names(train, "+"), lower(&distill));
        let path = self.args.work.join(format!("{name}.json"));
        let state = path.with_extension("state");
        (args.heal_state, args.heal_log) = (Some(state.clone()), Some(path.with_extension("jsonl")));
        let protocol = self.protocol(&args, decoder)?;
        if path.exists() {
            let row: Row = serde_json::from_str(&cli::read_text(&path)?)
                .with_context(|| format!("{} is no result", path.display()))?;
            anyhow::ensure!(row.protocol == protocol, "{} is of another setting", path.display());
            return Ok(row);
        }
        let mut bars = cli::Bars::default();
        let (healed, report) = match args.heal(self.args.seed)?.filter(|_| !train.is_empty()) {
            Some(heal) => {
                let teacher = heal.losses.need_teacher().then_some(Teacher::Model(&self.dense));
                let healed = heal.run(decoder, &self.train, Some(&self.choosing), teacher, &mut bars)?;
                (healed.decoder, Some(healed.report))
            }
            None => (decoder.clone(), None),
        };
        let row = self.measure(
            Row {
                protocol,
                model: model.into(),
                train: names(train, " + "),
                distill: lower(&distill),
                parameters: healed.parameter_count(),
                nll: 0.0,
                accuracy: BTreeMap::new(),
                report,
            },
            &healed.to_dtype(DType::F32)?,
        )?;
        cli::keep(&path, &row)?;
        if state.exists() {
            std::fs::remove_file(&state)?;
        }
        Ok(row)
    }

    fn measure(&self, mut row: Row, healed: &Decoder) -> anyhow::Result<Row> {
        let mut bars = cli::Bars::default();
        row.nll = perplexity(healed, &self.held_out, &mut bars)?.mean_nll;
        for task in &self.tasks {
            row.accuracy.insert(task.name.clone(), accuracy(healed, &self.tokenizer, task, &mut bars)?.acc);
        }
        Ok(row)
    }

    /// All that a row depends on.
    fn protocol(&self, args: &cli::heal::HealArgs, decoder: &Decoder) -> anyhow::Result<String> {
        let heal = args.heal(self.args.seed)?;
        let tasks: Vec<(&str, usize)> =
            self.tasks.iter().map(|task| (task.name.as_str(), task.items.len())).collect();
        // A few logits tell models apart.
        let ids = foldgpt::candle::Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?;
        let logits = decoder.forward(&ids)?.narrow(2, 0, 4)?.flatten_all()?.to_vec1::<f32>()?;
        let texts = [&self.train, &self.choosing, &self.held_out].map(cli::protocol);
        Ok(serde_json::to_string(&(heal, tasks, logits, texts, self.args.dtype.to_string()))?)
    }
}

fn names(train: &[Train], between: &str) -> String {
    train.iter().map(lower).collect::<Vec<_>>().join(between)
}

fn lower(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}").to_lowercase()
}

fn print_table(rows: &[Row]) {
    let tasks: Vec<&String> = rows.first().map(|row| row.accuracy.keys().collect()).unwrap_or_default();
    let heads = tasks.iter().map(|task| format!(" {task} |")).collect::<Vec<_>>().concat();
    println!("| model | parameters | trained | held to | steps | seconds | nll |{heads}");
    println!("|---|---:|---|---|---:|---:|---:|{}", "---:|".repeat(tasks.len()));
    for row in rows {
        let (train, distill) = match &row.report {
            Some(_) => (row.train.as_str(), row.distill.as_str()),
            None => ("", ""),
        };
        let (steps, seconds) = row.report.as_ref().map_or((0, 0.0), |report| (report.steps, report.seconds));
        let cells = row.accuracy.values().map(|acc| format!(" {acc:.4} |")).collect::<Vec<_>>().concat();
        println!(
            "| {} | {} | {train} | {distill} | {steps} | {seconds:.0} | {:.4} |{cells}",
            row.model, row.parameters, row.nll
        );
    }
}
