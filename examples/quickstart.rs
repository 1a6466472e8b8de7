//! The whole job in a minute, on a tiny story-telling model that comes with the crate: score its blocks, drop those
//! that matter least, heal the rest, save, reload, and compare.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```
#![allow(clippy::print_stdout)]

mod chart;
mod cli;
mod stories;
mod table;

use std::ops::ControlFlow;

use clap::Parser;
use foldgpt::candle::DType;
use foldgpt::heal::{Budget, Losses, Teacher, hold_out};
use foldgpt::importance::BlockInfluence;
use foldgpt::{Checkpoint, Decoder, Generate, Heal, Importance, Plan, SaveOptions, Target, Tokenizer, fold};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-stories");
/// Steps of healing: a few seconds' worth.
const HEALING: usize = 60;
const PROMPT: &str = "A boy named Ben lived in";

/// The whole job on a tiny model that comes with the crate: score, drop, heal, save, reload, compare
#[derive(Parser)]
struct Args {}

fn main() -> anyhow::Result<()> {
    Args::parse();
    let mut bars = cli::Bars::default();
    let checkpoint = Checkpoint::open(MODEL)?;
    let dense = cli::load(&checkpoint, DType::F32)?;
    let tokenizer = checkpoint.tokenizer()?;

    // Stories that the model was not trained on: some to calibrate with, others to evaluate on.
    let window = cli::WindowArgs { seq_len: 256, bos: cli::BosArg::Auto };
    let calibration = window.cut(&tokenizer, &stories::corpus(11, 60_000), Some(24))?;
    let held_out = window.cut(&tokenizer, &stories::corpus(12, 120_000), Some(64))?;

    let scores = BlockInfluence::default().score(&dense, &calibration, &mut bars)?;
    let plan = Plan::new(dense.architecture(), &scores, Target::Rate(0.25), &[])?
        .for_model(checkpoint.sha256(&mut bars)?);
    println!(
        "How much each block matters ({}):\n{}",
        scores.method,
        chart::bars(&scores, &plan.units(), "removed")
    );

    let cut = fold(&dense, &plan)?;
    let train = window.cut(&tokenizer, &stories::corpus(13, 400_000), None)?;
    let (train, choosing) = hold_out(&train)?;
    let mut heal = Heal::default();
    (heal.budget, heal.micro_batch, heal.losses) = (Budget::Steps(HEALING), 4, Losses::tail());
    let healed = heal.run(&cut, &train, Some(&choosing), Some(Teacher::Model(&dense)), &mut bars)?;
    let directory = std::env::temp_dir().join(format!("foldgpt-quickstart-{}", std::process::id()));
    checkpoint.save(&healed.decoder, Some(&plan), &directory, &SaveOptions::default(), &mut bars)?;

    let written = Checkpoint::open(&directory)?;
    let reloaded = cli::load(&written, DType::F32)?;
    let rows = [
        table::Row::measure("dense", &checkpoint, &dense, &held_out, &mut bars)?,
        table::Row::measure("cut", &written, &cut, &held_out, &mut bars)?,
        table::Row::measure("healed", &written, &reloaded, &held_out, &mut bars)?,
    ];
    println!("{}\nnll in nats per token, {}\n", table::table(&rows), cli::protocol(&held_out));
    println!("{}\n", cli::heal::summary(&healed.report));
    println!("before: {}\n", sample(&dense, &tokenizer)?);
    println!("after:  {}\n", sample(&reloaded, &tokenizer)?);
    println!("The compressed model is in {}; transformers loads it too.", directory.display());
    Ok(())
}

fn sample(decoder: &Decoder, tokenizer: &Tokenizer) -> anyhow::Result<String> {
    let mut text = PROMPT.to_string();
    let options = Generate { max_tokens: 90, ..Generate::default() };
    options.run(decoder, tokenizer, PROMPT, |piece| {
        text.push_str(piece);
        ControlFlow::Continue(())
    })?;
    Ok(text)
}
