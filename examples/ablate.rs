//! What of healing is worth its budget: every cut or folded model healed with every choice of what is trained and of
//! what it is held to, beside the original model fine-tuned alike, which is the fair ceiling.
//!
//! ```text
//! cargo run --release --example ablate -- --dense M --models CUT,FOLDED --text F --tasks T.jsonl,… \
//!     --heal-minutes 40 --work DIR
//! ```
//!
//! The first 80 % of the text train, but for a few windows that choose the weights that are kept; the last 20 % and
//! the tasks evaluate, in f32. Every row is kept in DIR with the model that it healed, and the state of the one that
//! runs: an interrupted ablation goes on where it was.
//!
//! Where the original model knows the text less well than a healed one, it is a poor teacher. `--correct-teacher` holds
//! models to the original one after its fine-tune instead, the ceiling (teacher correction, arXiv 2408.11796).
#![allow(clippy::print_stdout)]

mod cli;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Parser, ValueEnum};
use cli::heal::Distill;
use cli::work::Work;
use foldgpt::candle::DType;
use foldgpt::eval::{Task, accuracy};
use foldgpt::heal::{HealReport, Teacher, hold_out};
use foldgpt::{Checkpoint, Decoder, Heal, SaveOptions, Tokenizer, Windows, perplexity};
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
    /// Tasks as JSON Lines, in the formats of lm-evaluation-harness's datasets
    #[arg(long, num_args = 1.., value_delimiter = ',')]
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
    /// What is trained: norms, scales as well, adapters as well (each of them by default)
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["norms", "scales", "lora"])]
    train: Vec<Train>,
    /// What models are held to beside the text (each by default)
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["none", "logits", "tail"])]
    distill: Vec<Distill>,
    /// Hold models to the original one as it is after its own fine-tune
    #[arg(long)]
    correct_teacher: bool,
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

/// What a row trains: this, and all before it.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Train {
    /// The norms
    Norms,
    /// A scale of every output of every linear map, too
    Scales,
    /// Low-rank adapters of every linear map, too
    Lora,
}

impl Train {
    const ALL: [Self; 3] = [Self::Norms, Self::Scales, Self::Lora];

    fn and_before(self) -> &'static [Self] {
        match self {
            Self::Norms => &Self::ALL[..1],
            Self::Scales => &Self::ALL[..2],
            Self::Lora => &Self::ALL,
        }
    }
}

/// A checkpoint, and what was loaded of it.
struct Model {
    name: String,
    checkpoint: Checkpoint,
    decoder: Decoder,
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
    work: Work,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    anyhow::ensure!(
        args.heal(&Train::ALL, Distill::Tail).is_some(),
        "one of --heal-steps, --heal-tokens and --heal-minutes is needed"
    );
    let tasks = Task::read_all(&args.tasks, args.limit)?;
    let models = args.models.iter().map(|model| Ok((name_of(model)?, cli::open(model, None)?)));
    let models = models.collect::<anyhow::Result<Vec<_>>>()?;
    let checkpoint = cli::open(&args.dense, None)?;
    let tokenizer = checkpoint.tokenizer()?;
    let text = foldgpt::data::read_documents(&args.text, &args.field)?;
    let (first, held_out) = args.window.split(&tokenizer, &text, None, args.eval_windows)?;
    let (train, choosing) = hold_out(&first)?;
    let decoder = cli::load(&checkpoint, args.dtype.dtype())?;
    // Loaded for this alone, so that no two are in memory together.
    for (_, model) in &models {
        cli::heal::check_tokenizers(model, &checkpoint)?;
        let student = cli::load(model, args.dtype.dtype())?.sharing(&decoder)?;
        for heal in args.distill.iter().filter_map(|&distill| args.heal(&Train::ALL, distill)) {
            heal.check_run(&student, &train, Some(&choosing), Some(Teacher::Model(&decoder)))?;
        }
    }
    let work = open_work(&args, &checkpoint, &tasks, [&train, &choosing, &held_out])?;
    let dense = Model { name: "dense".into(), checkpoint, decoder };
    let setting = Setting { args: &args, tokenizer, train, choosing, held_out, tasks, work };

    let mut rows = vec![setting.row(&dense, &[], Distill::None, None)?];
    rows.push(setting.row(&dense, &Train::ALL, Distill::None, None)?);
    let corrected = args.correct_teacher.then(|| setting.corrected(&dense)).transpose()?;
    for (name, checkpoint) in models {
        let name = format!("{name} {:.8}", checkpoint.sha256(&mut cli::Bars::default())?);
        let decoder = cli::load(&checkpoint, args.dtype.dtype())?.sharing(&dense.decoder)?;
        let model = Model { name, checkpoint, decoder };
        rows.push(setting.row(&model, &[], Distill::None, None)?);
        for train in &args.train {
            for &distill in &args.distill {
                let teacher = corrected.as_ref().unwrap_or(&dense.decoder);
                rows.push(setting.row(&model, train.and_before(), distill, Some(teacher))?);
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
    fn row(
        &self,
        model: &Model,
        train: &[Train],
        distill: Distill,
        teacher: Option<&Decoder>,
    ) -> anyhow::Result<Row> {
        let corrected = self.args.correct_teacher && distill != Distill::None;
        let held_to = format!("{}{}", lower(&distill), if corrected { ", corrected" } else { "" });
        let name = format!("{} {} {held_to}", model.name, names(train, " "));
        let state = self.work.path(&name, "state");
        let row = self.work.kept(&name, || {
            let mut bars = cli::Bars::default();
            let (healed, report) = match self.args.heal(train, distill).filter(|_| !train.is_empty()) {
                Some(mut heal) => {
                    heal.state_file = Some(state.clone());
                    heal.log_file = Some(self.work.path(&name, "jsonl"));
                    let teacher = teacher.filter(|_| heal.losses.need_teacher()).map(Teacher::Model);
                    let healed =
                        heal.run(&model.decoder, &self.train, Some(&self.choosing), teacher, &mut bars)?;
                    (healed.decoder.to_dtype(DType::F32)?, Some(healed.report))
                }
                None => (model.decoder.to_dtype(DType::F32)?, None),
            };
            if report.is_some() {
                let directory = self.work.path(&name, "model");
                if directory.exists() {
                    std::fs::remove_dir_all(&directory)?;
                }
                let options = SaveOptions::default();
                model.checkpoint.save(&healed, None, &directory, &options, &mut bars)?;
            }
            self.measure(&healed, model, (train, held_to), report)
        })?;
        if state.exists() {
            std::fs::remove_file(&state)?;
        }
        Ok(row)
    }

    /// The original model as its row left it.
    fn corrected(&self, dense: &Model) -> anyhow::Result<Decoder> {
        let name = format!("{} {} none", dense.name, names(&Train::ALL, " "));
        let path = self.work.path(&name, "model");
        let checkpoint = Checkpoint::open(&path)
            .with_context(|| format!("the original's fine-tune is not in {}", path.display()))?;
        cli::load(&checkpoint, self.args.dtype.dtype())
    }

    fn measure(
        &self,
        healed: &Decoder,
        model: &Model,
        (train, distill): (&[Train], String),
        report: Option<HealReport>,
    ) -> anyhow::Result<Row> {
        let mut bars = cli::Bars::default();
        let mut accuracies = BTreeMap::new();
        for task in &self.tasks {
            accuracies.insert(task.name.clone(), accuracy(healed, &self.tokenizer, task, &mut bars)?.acc);
        }
        Ok(Row {
            model: model.name.clone(),
            train: names(train, " + "),
            distill,
            parameters: healed.parameter_count(),
            nll: perplexity(healed, &self.held_out, &mut bars)?.mean_nll,
            accuracy: accuracies,
            report,
        })
    }
}

/// The last part of a path.
fn name_of(model: &str) -> anyhow::Result<String> {
    let name = Path::new(model).file_name().with_context(|| format!("{model} has no name"))?;
    Ok(name.to_string_lossy().into())
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
