//! Heals a model that lost blocks, or whose blocks share matrices: a small fine-tune, held to the original model.
//!
//! ```text
//! cargo run --release --example heal -- --model CUT --teacher M --text F --heal-steps 200 --out DIR
//! ```
//!
//! The first 80 % of the text train, but for a few windows that choose the weights that are kept; the last 20 %
//! evaluate. Killed and started again with the same flags and a --heal-state, it goes on where it was. What lies side by
//! side in memory is the student and its teacher, and with a --teacher-cache only ever one model.
#![allow(clippy::print_stdout)]

mod cli;
mod table;

use std::path::PathBuf;

use anyhow::ensure;
use clap::Parser;
use foldgpt::candle::DType;
use foldgpt::checkpoint::check_destination;
use foldgpt::heal::{CacheOptions, Losses, Teacher, TeacherCache, hold_out};
use foldgpt::{Checkpoint, SaveOptions, Windows};
use table::Row;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Heals a cut or folded model with a small fine-tune, held to the original one
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// The original model, as --model; not with --distill none
    #[arg(long)]
    teacher: Option<String>,
    /// Keep the teacher's last states and likeliest tokens in this file, made where it does not exist: the teacher is
    /// then in memory while that is done, and not while the model is healed
    #[arg(long)]
    teacher_cache: Option<PathBuf>,
    /// Text, or JSON Lines (*.jsonl): its first 80 % train, its last 20 % evaluate
    #[arg(long)]
    text: PathBuf,
    /// The field of JSON Lines that holds the text
    #[arg(long, default_value = "text")]
    field: String,
    #[command(flatten)]
    heal: cli::heal::HealArgs,
    /// The directory to write, new or empty
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    format: cli::target::FormatArgs,
    /// Seed of the order of windows and of the adapters
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Train on at most this many windows (all by default)
    #[arg(long)]
    windows: Option<usize>,
    /// Evaluate on at most this many windows
    #[arg(long, default_value_t = 32)]
    eval_windows: usize,
    #[command(flatten)]
    window: cli::WindowArgs,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let Some(heal) = args.heal.heal(args.seed)? else {
        anyhow::bail!("one of --heal-steps, --heal-tokens and --heal-minutes is needed");
    };
    let caches = args.teacher_cache.is_some();
    ensure!(!caches || heal.losses.need_teacher(), "--teacher-cache is for --distill tail and logits");
    cli::heal::HealArgs::check_teacher(&heal.losses, args.teacher.is_some())?;
    check_destination(&args.out)?;
    let mut bars = cli::Bars::default();
    let checkpoint = args.model.open()?;
    let format = args.format.of(&checkpoint, args.heal.keep_adapters);
    args.heal.check_format(format)?;
    let text = foldgpt::data::read_documents(&args.text, &args.field)?;
    let (train, held_out) =
        args.window.split(&checkpoint.tokenizer()?, &text, args.windows, Some(args.eval_windows))?;
    let (train, choosing) = hold_out(&train)?;

    let original = args.teacher.as_ref().map(|name| cli::open(name, None)).transpose()?;
    if let Some(original) = &original {
        cli::heal::check_tokenizers(&checkpoint, original)?;
    }
    // No two models are in memory together but a student and the teacher that it shares tensors with.
    let bytes = checkpoint.tensor_bytes();
    let before = Row::measure("before", bytes, &cli::load(&checkpoint, DType::F32)?, &held_out, &mut bars)?;
    let cache = match (&original, &args.teacher_cache) {
        (Some(original), Some(path)) => Some(cached(&args, original, path, &train, &heal.losses)?),
        _ => None,
    };
    let dense = match (&original, &cache) {
        (Some(original), None) => Some(cli::load(original, args.model.dtype.dtype())?),
        _ => None,
    };
    let mut student = cli::load(&checkpoint, args.model.dtype.dtype())?;
    if let Some(dense) = &dense {
        student = student.sharing(dense)?;
    }
    let teacher = cache.as_ref().map(Teacher::Cache).or(dense.as_ref().map(Teacher::Model));
    let healed = heal.run(&student, &train, Some(&choosing), teacher, &mut bars)?;

    let (decoder, report) = (healed.decoder, healed.report);
    drop((student, dense));
    let mut after = Row::measure("healed", 0, &decoder.to_dtype(DType::F32)?, &held_out, &mut bars)?;
    let mut options = SaveOptions::from(format);
    let (card, found) = (checkpoint.card(&decoder, None), [&before.result, &after.result]);
    options.card = Some(cli::heal::card(card, &report, original.is_some(), found));
    let saved = checkpoint.save(&decoder, None, &args.out, &options, &mut bars)?;
    after.bytes = saved.tensor_bytes;
    println!("{}", table::table(&[before, after]));
    println!("nll in nats per token, {}", cli::protocol(&held_out));
    println!("{}", cli::heal::summary(&report));
    println!("saved to {} ({} bytes of tensors)", saved.directory.display(), saved.tensor_bytes);
    Ok(())
}

/// What the teacher has to say, from the file or into it.
fn cached(
    args: &Args,
    original: &Checkpoint,
    path: &PathBuf,
    train: &Windows,
    losses: &Losses,
) -> anyhow::Result<TeacherCache> {
    let mut bars = cli::Bars::default();
    let sha256 = original.sha256(&mut bars)?;
    if path.exists() {
        return Ok(TeacherCache::open(path, &sha256, train)?);
    }
    let mut options = CacheOptions::default();
    (options.tail_blocks, options.temperature) = (losses.tail_blocks, losses.temperature);
    let dense = cli::load(original, args.model.dtype.dtype())?;
    Ok(TeacherCache::write(path, &dense, &sha256, train, &options, &mut bars)?)
}
