//! Writes a model without some of its blocks. Stored tensors are copied from file to file: the model is never in memory.
//!
//! ```text
//! cargo run --release --example drop -- --model M --blocks 21,22,23 --out DIR
//! cargo run --release --example drop -- --model M.gguf --out DIR
//! ```
//!
//! Which blocks those are, `score` says; `compress` does both, and evaluates.
#![allow(clippy::print_stdout)]

mod cli;

use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use foldgpt::{Bytes, SaveOptions};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Writes a model without some of its blocks, never having it in memory (of a GGUF file, one tensor at a time in f32)
#[derive(Parser)]
struct Args {
    /// A directory in the Hugging Face layout, a GGUF file, or a hub id (`org/name`, feature `hub`)
    #[arg(long)]
    model: String,
    /// The blocks that go, by index from 0; without any, a GGUF file becomes a directory that transformers loads
    #[arg(long, value_delimiter = ',')]
    blocks: Vec<usize>,
    /// The directory to write, new or empty
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    format: cli::target::FormatArgs,
    /// Tensors are split into files of at most this many bytes; a larger tensor has a file of its own
    #[arg(long, default_value = "5GB")]
    max_shard: Bytes,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let whole = args.blocks.is_empty();
    anyhow::ensure!(
        !whole || !std::path::Path::new(&args.model).is_dir(),
        "--blocks: none given, and the model is a directory"
    );
    let checkpoint = cli::open(&args.model, None)?;
    let depth = checkpoint.architecture().depth();
    if let Some(index) = args.blocks.iter().find(|&&index| index >= depth) {
        anyhow::bail!("--blocks: block {index} does not exist: the model has {depth} blocks");
    }
    let kept: Vec<usize> = (0..depth).filter(|index| !args.blocks.contains(index)).collect();
    anyhow::ensure!(!kept.is_empty(), "--blocks: no block would stay");

    let mut options = SaveOptions::from(args.format.of(&checkpoint, false));
    options.max_shard_bytes = args.max_shard.0;
    let start = Instant::now();
    let saved = checkpoint.save_blocks(&kept, None, &args.out, &options, &mut cli::Bars::default())?;
    let seconds = start.elapsed().as_secs_f64();
    let rate = Bytes((saved.tensor_bytes as f64 / seconds) as u64);
    println!("{} of {depth} blocks stay, {} of tensors", kept.len(), Bytes(saved.tensor_bytes));
    println!("written and compared in {seconds:.1} s, {rate} per second");
    if let Some(peak) = cli::peak_memory() {
        println!("peak resident memory {peak}");
    }
    println!("saved to {}", saved.directory.display());
    Ok(())
}
