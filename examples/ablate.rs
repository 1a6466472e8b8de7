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

use clap::Parser;
use cli::heal::Distill;
use cli::work::Work;
use foldgpt::candle::DType;
use foldgpt::eval::{Task, accuracy};
use foldgpt::heal::{HealReport, Teacher, hold_out};
use foldgpt::{Checkpoint, Decoder, Heal, Tokenizer, Windows, perplexity};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

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
    /// Text, or JSON Lines (*.jsonl): its first 80 % train, its last 20 % evaluate
    #[arg(long)]
    text: PathBuf,
    /// The field of JSON Lines that holds the text
    #[arg(long, default_value = "text")]
    field: String,
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
    tuning: cli::heal::TuningArgs,
    #[command(flatten)]
    window: cli::WindowArgs,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// What the rows train: the first of them, the first two, all.
#[derive(Debug, Clone, Copy)]
enum Train {
    Norms,
    Scales,
    Lora,
}

impl Train {
    const ALL: [Self; 3] = [Self::Norms, Self::Scales, Self::Lora];
}

impl Args {
    fn heal(&self, train: &[Train], distill: Distill) -> Option<Heal> {
        let group = |train: &Train| match train {
            Train::Norms => self.tuning.norms(),
            Train::Scales => self.tuning.scales(),
            Train::Lora => self.tuning.lora(true),
        };
        self.tuning.heal(self.seed, distill, train.iter().map(group).collect())
    }
}

/// One line of the table.
#[derive(Debug, Serialize, Deserialize)]
struct Row {
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
    work: Work,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    anyhow::ensure!(
        args.heal(&Train::ALL, Distill::Tail).is_some(),
        "one of --heal-steps, --heal-tokens and --heal-minutes is needed"
    );
    let tasks =
        args.tasks.iter().map(|path| Task::read(path, args.limit)).collect::<foldgpt::Result<Vec<_>>>()?;
    let checkpoint = cli::open(&args.dense, None)?;
    let tokenizer = checkpoint.tokenizer()?;
    let text = foldgpt::data::read_documents(&args.text, &args.field)?;
    let (first, held_out) = args.window.split(&tokenizer, &text, None, args.eval_windows)?;
    let (train, choosing) = hold_out(&first)?;
    let dense = cli::load(&checkpoint, args.dtype.dtype())?;
    let work = open_work(&args, &checkpoint, &tasks, [&train, &choosing, &held_out])?;
    let setting = Setting { args: &args, tokenizer, train, choosing, held_out, tasks, dense, work };

    let mut rows = Vec::new();
    rows.push(setting.row("dense", &setting.dense, &[], Distill::None)?);
    rows.push(setting.row("dense", &setting.dense, &Train::ALL, Distill::None)?);
    for model in &args.models {
        let name = Path::new(model).file_name().map_or(model.clone(), |name| name.to_string_lossy().into());
        let checkpoint = cli::open(model, None)?;
        let name = format!("{name} {:.8}", checkpoint.sha256(&mut cli::Bars::default())?);
        let student = cli::load(&checkpoint, args.dtype.dtype())?.sharing(&setting.dense)?;
        rows.push(setting.row(&name, &student, &[], Distill::None)?);
        for train in [&Train::ALL[..1], &Train::ALL[..2], &Train::ALL[..]] {
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
        let name = format!("{model} {} {}", names(train, " "), lower(&distill));
        let state = self.work.path(&name, "state");
        let row = self.work.kept(&name, || {
            let mut bars = cli::Bars::default();
            let (healed, report) = match self.args.heal(train, distill).filter(|_| !train.is_empty()) {
                Some(mut heal) => {
                    heal.state_file = Some(state.clone());
                    heal.log_file = Some(self.work.path(&name, "jsonl"));
                    let teacher = heal.losses.need_teacher().then_some(Teacher::Model(&self.dense));
                    let healed = heal.run(decoder, &self.train, Some(&self.choosing), teacher, &mut bars)?;
                    (healed.decoder, Some(healed.report))
                }
                None => (decoder.clone(), None),
            };
            let row = Row {
                model: model.into(),
                train: names(train, " + "),
                distill: lower(&distill),
                parameters: healed.parameter_count(),
                nll: 0.0,
                accuracy: BTreeMap::new(),
                report,
            };
            self.measure(row, &healed.to_dtype(DType::F32)?)
        })?;
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
}

/// The directory of rows, for one setting: all that every row depends on.
fn open_work(args: &Args, dense: &Checkpoint, tasks: &[Task], texts: [&Windows; 3]) -> anyhow::Result<Work> {
    let items = |task: &Task| format!("{:x}", Sha256::digest(format!("{:?}", task.items)));
    let tasks: Vec<(&str, usize, String)> =
        tasks.iter().map(|task| (task.name.as_str(), task.items.len(), items(task))).collect();
    let [train, choosing, held_out] = texts.map(cli::protocol);
    let protocol = [
        dense.sha256(&mut cli::Bars::default())?,
        args.dtype.to_string(),
        serde_json::to_string(&args.heal(&Train::ALL, Distill::Tail))?,
        format!("{tasks:?}"),
        train,
        choosing,
        held_out,
    ];
    Work::open(&args.work, &protocol)
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
