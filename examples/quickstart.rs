//! The whole job in a minute, on a tiny story-telling model that comes with the crate: score its blocks, drop those
//! that matter least, heal the rest, save, compare, and report.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```
#![allow(clippy::print_stdout)]

mod chart;
mod cli;
mod outcome;
mod stories;
mod table;

use clap::Parser;
use foldgpt::heal::{Budget, Losses};
use foldgpt::importance::Method;
use foldgpt::pipeline::Goal;
use foldgpt::report::ReportFiles;
use foldgpt::{Compressor, Heal};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-stories");
/// Steps of healing: a few seconds' worth.
const HEALING: usize = 60;
const PROMPT: &str = "A boy named Ben lived in";

/// The whole job on a tiny model that comes with the crate: score, drop, heal, save, compare, report
#[derive(Parser)]
struct Args {}

fn main() -> anyhow::Result<()> {
    Args::parse();
    let directory = std::env::temp_dir().join(format!("foldgpt-quickstart-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    // Stories that the model was not trained on: the first 80 % calibrate and heal, the others evaluate.
    let text = directory.join("stories.txt");
    std::fs::write(&text, stories::corpus(11, 540_000))?;

    let mut heal = Heal::default();
    (heal.budget, heal.micro_batch, heal.losses) = (Budget::Steps(HEALING), 4, Losses::tail());
    heal.evaluate_every = HEALING / 4;
    let mut compressor = Compressor::new(MODEL, &text, directory.join("model"))
        .method(Method::BlockInfluence)
        .target(Goal::Rate(0.25))
        .heal(heal)
        .prompts([PROMPT]);
    let recipe = &mut compressor.recipe;
    (recipe.windows.seq_len, recipe.windows.calibrate, recipe.windows.evaluate) = (256, 24, 64);
    recipe.samples.tokens = 90;
    compressor.command = Some(cli::command());

    let files = ReportFiles::new(directory.join("report.html"))?;
    let report = compressor.run(&mut cli::Bars::default())?;
    files.write(&report)?;

    outcome::print(&report);
    for sample in &report.samples {
        println!("\nbefore: {}{}\n", sample.prompt, sample.dense);
        println!("after:  {}{}\n", sample.prompt, sample.compressed);
    }
    println!("The compressed model is in {}; transformers loads it too.", report.recipe.out.display());
    println!("The report is {}, with Markdown and JSON beside it.", files.html().display());
    Ok(())
}
