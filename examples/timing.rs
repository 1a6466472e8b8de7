//! Times pieces of work on request, for scripts that time the same work in other programs and take turns with this one.
//!
//! ```text
//! echo "forward gate-step" | cargo run --release --example timing -- --model M --ids F.json
//! ```
//!
//! Reads names of works from standard input, and answers each by a line of JSON with its seconds, after a first line that
//! says what they depend on. Nothing runs while it waits.
#![allow(clippy::print_stdout)]

mod cli;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, anyhow, ensure};
use clap::{Parser, ValueEnum};
use foldgpt::candle::Tensor;
use foldgpt::importance::{BlockInfluence, GreedyPerplexity, Importance};
use foldgpt::model::{KvCache, Unit, Walk};
use foldgpt::{Decoder, Windows};
use serde_json::json;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Times pieces of work on request
///
/// Names on standard input say what: blocks, forward, gate-step (or gate-step-checkpointing), gate-step-keeping,
/// block-influence, greedy, prefill, decode
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    #[command(flatten)]
    quantize: cli::quantize::QuantizeArgs,
    /// JSON array of arrays of token ids, each a window; what is timed on one window is timed on the first
    #[arg(long)]
    ids: PathBuf,
    /// Blocks that `greedy` removes
    #[arg(long, default_value_t = 3)]
    remove: usize,
    /// Windows that `greedy` measures on: the first ones
    #[arg(long, default_value_t = 2)]
    greedy_windows: usize,
    /// Tokens that `decode` reads one by one, after the window
    #[arg(long, default_value_t = 64)]
    tokens: usize,
}

/// What can be timed.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Work {
    /// The blocks on one window
    Blocks,
    /// Blocks and head on one window, to the loss
    Forward,
    /// Forward and back to a gate on every block, on one window
    #[value(alias = "gate-step-checkpointing")]
    GateStep,
    /// The same, keeping all activations: without gradient checkpointing
    GateStepKeeping,
    /// Block Influence on all windows
    BlockInfluence,
    /// Greedy perplexity
    Greedy,
    /// One window into an empty cache, to the logits after it
    Prefill,
    /// Tokens one by one after the window, each to its logits
    Decode,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let timing = Timing::new(&args)?;
    println!("{}", timing.conditions());
    for line in std::io::stdin().lines() {
        for name in line?.split_whitespace() {
            let work = Work::from_str(name, false)
                .map_err(|_| anyhow!("work {name} is not known, expected one of: {}", names()))?;
            let seconds = timing.seconds(work).with_context(|| format!("work {name}"))?;
            println!("{}", json!({ "work": name, "seconds": seconds }));
        }
    }
    Ok(())
}

/// What can be named.
fn names() -> String {
    let named = Work::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    named.map(|value| value.get_name().to_string()).collect::<Vec<_>>().join(", ")
}

struct Timing {
    decoder: Decoder,
    windows: Windows,
    few: Windows,
    remove: usize,
    tokens: usize,
}

impl Timing {
    fn new(args: &Args) -> anyhow::Result<Self> {
        let text = cli::read_text(&args.ids)?;
        let ids: Vec<Vec<u32>> = serde_json::from_str(&text)
            .with_context(|| format!("{} is not an array of arrays of token ids", args.ids.display()))?;
        let first = ids.iter().take(args.greedy_windows).cloned().collect();
        let (_, decoder) = args.model.load()?;
        ensure!(args.tokens > 0, "--tokens is 0, expected at least 1");
        Ok(Self {
            decoder: args.quantize.apply(decoder)?,
            windows: Windows::from_ids(ids)?,
            few: Windows::from_ids(first).context("--greedy-windows")?,
            remove: args.remove,
            tokens: args.tokens,
        })
    }

    /// What the seconds depend on, beside the machine.
    fn conditions(&self) -> serde_json::Value {
        json!({
            "matrices": self.decoder.matrix_types(),
            "threads": rayon::current_num_threads(),
            "windows": self.windows.len(),
            "seq_len": self.windows.seq_len(),
            "greedy_windows": self.few.len(),
            "remove": self.remove,
            "tokens": self.tokens,
        })
    }

    fn seconds(&self, work: Work) -> anyhow::Result<f64> {
        let decoder = &self.decoder;
        let window = self.windows.iter().next().context("no windows")?;
        let ids = Tensor::from_slice(window, (1, window.len()), decoder.device())?;
        let targets = window.get(1..).unwrap_or_default();
        let mut cache = decoder.cache();
        if let Work::Decode = work {
            decoder.extend(&ids, &mut cache)?;
        }
        let start = Instant::now();
        match work {
            Work::Blocks => drop(decoder.hidden(&ids)?),
            Work::Forward => {
                let hidden = decoder.hidden(&ids)?.squeeze(0)?;
                decoder.nll(&hidden.narrow(0, 0, targets.len())?, targets)?.to_vec1::<f32>()?;
            }
            Work::GateStep | Work::GateStepKeeping => {
                let (units, gates) = (Unit::blocks(decoder.depth()), vec![0.9; decoder.depth()]);
                let walk = match work {
                    Work::GateStep => Walk::forward(decoder, &units, &gates, &ids)?,
                    _ => Walk::forward_keeping_activations(decoder, &units, &gates, &ids)?,
                };
                let (_, upstream) = decoder.loss_vjp(walk.output(), targets)?;
                walk.gate_gradients(&upstream, |_| true)?;
            }
            Work::BlockInfluence => drop(BlockInfluence::default().score(decoder, &self.windows, &mut ())?),
            Work::Greedy => {
                let greedy = GreedyPerplexity { remove: self.remove, ..GreedyPerplexity::default() };
                greedy.score(decoder, &self.few, &mut ())?;
            }
            Work::Prefill => read(decoder, &ids, &mut cache)?,
            Work::Decode => {
                for place in 0..self.tokens {
                    read(decoder, &ids.narrow(1, place % window.len(), 1)?, &mut cache)?;
                }
            }
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Reads ids, to the logits after them.
fn read(decoder: &Decoder, ids: &Tensor, cache: &mut KvCache) -> anyhow::Result<()> {
    let hidden = decoder.extend(ids, cache)?;
    let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?;
    decoder.logits(&last)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(())
}
