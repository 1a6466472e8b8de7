//! Measures a model, or two side by side: perplexity on text, accuracy on tasks, speed and memory.
//!
//! ```text
//! cargo run --release --example evaluate -- --model M --text F [--windows N] [--seq-len N] [--json]
//! cargo run --release --example evaluate -- --model M --ids F.json [--json]
//! cargo run --release --example evaluate -- --model M --tasks F.jsonl [F.jsonl …] [--limit N] [--json [--answers]]
//! cargo run --release --example evaluate -- --model M --latency [--against M2] [--json]
//! ```
#![allow(clippy::print_stdout)]

mod cli;
mod table;

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use foldgpt::eval::{Accuracy, Task, answers};
use foldgpt::{Checkpoint, Decoder, LatencyOptions, Windows, latency};
use serde_json::{Map, Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures a model, or two side by side: perplexity on text, accuracy on tasks, speed and memory
#[derive(Parser)]
#[command(group = clap::ArgGroup::new("what"))]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    #[command(flatten)]
    quantize: cli::quantize::QuantizeArgs,
    /// Another model, measured in the same run: a directory, a GGUF file, or a hub id
    #[arg(long)]
    against: Option<String>,
    /// Text to evaluate on
    #[arg(long, group = "what")]
    text: Option<PathBuf>,
    /// JSON array of arrays of token ids, each a window
    #[arg(long, group = "what", conflicts_with_all = ["seq_len", "bos", "split_special_tokens"])]
    ids: Option<PathBuf>,
    /// Tasks as JSON Lines, in the formats of lm-evaluation-harness's datasets
    #[arg(long, group = "what", num_args = 1.., value_delimiter = ',', conflicts_with_all = ["windows", "seq_len", "bos", "split_special_tokens"])]
    tasks: Vec<PathBuf>,
    /// Answer at most this many items of each task (all by default)
    #[arg(long, requires = "tasks")]
    limit: Option<usize>,
    /// With --json, say of every item how likely each choice is and whether it was answered right
    #[arg(long, requires = "tasks", requires = "json")]
    answers: bool,
    /// Use at most this many windows (all by default)
    #[arg(long)]
    windows: Option<usize>,
    #[command(flatten)]
    window: cli::WindowArgs,
    /// Measure the speed and what the model takes in memory, models in turns; leave the machine alone meanwhile
    #[arg(long)]
    latency: bool,
    /// Tokens of the prompt that is read for the speed
    #[arg(long, requires = "latency", default_value_t = LatencyOptions::default().prompt)]
    prompt_tokens: usize,
    /// Tokens made after it
    #[arg(long, requires = "latency", default_value_t = LatencyOptions::default().new_tokens)]
    new_tokens: usize,
    /// Timed runs of each model
    #[arg(long, requires = "latency", default_value_t = LatencyOptions::default().runs)]
    runs: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A model, and what was found of it.
struct Model {
    name: &'static str,
    checkpoint: Checkpoint,
    decoder: Decoder,
    found: Map<String, Value>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let reads = args.text.is_some() || args.ids.is_some();
    anyhow::ensure!(
        reads || args.latency || !args.tasks.is_empty(),
        "one of --text, --ids, --tasks and --latency is needed"
    );
    // Files that cannot be used are told before the model is read.
    let tasks = Task::read_all(&args.tasks, args.limit)?;
    let mut models = load(&args)?;
    let several = models.len() > 1;
    for model in &mut models {
        if several && !args.json {
            println!("{}: {}", model.name, model.checkpoint.location().display());
        }
        if reads {
            model.read(&args)?;
        } else if !tasks.is_empty() {
            model.answer(&args, &tasks)?;
        }
    }
    if args.latency {
        time(&args, &mut models)?;
    }
    if args.json {
        let mut found: Map<String, Value> =
            models.into_iter().map(|model| (model.name.into(), Value::Object(model.found))).collect();
        // Of one model, what was found of it and no more.
        let one = if several { None } else { found.remove("model") };
        println!("{}", serde_json::to_string_pretty(&one.unwrap_or(Value::Object(found)))?);
    }
    Ok(())
}

fn load(args: &Args) -> anyhow::Result<Vec<Model>> {
    let of = |name, checkpoint: Checkpoint| -> anyhow::Result<Model> {
        let decoder = args.quantize.apply(cli::load(&checkpoint, args.model.dtype.dtype())?)?;
        let found = Map::from_iter([("matrices".to_string(), decoder.matrix_types().into())]);
        Ok(Model { name, checkpoint, decoder, found })
    };
    let mut models = vec![of("model", args.model.open()?)?];
    if let Some(against) = &args.against {
        models.push(of("against", cli::open(against, None)?)?);
    }
    Ok(models)
}

impl Model {
    /// Perplexity on a text, or on windows of ids.
    fn read(&mut self, args: &Args) -> anyhow::Result<()> {
        let windows = match (&args.ids, &args.text) {
            (Some(path), _) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                let mut ids: Vec<Vec<u32>> = serde_json::from_str(&text)
                    .with_context(|| format!("{} is not an array of arrays of token ids", path.display()))?;
                ids.truncate(args.windows.unwrap_or(usize::MAX));
                Windows::from_ids(ids)?
            }
            (None, Some(path)) => {
                args.window.cut(&self.checkpoint.tokenizer()?, &cli::read_text(path)?, args.windows)?
            }
            (None, None) => return Ok(()),
        };
        let result = foldgpt::perplexity(&self.decoder, &windows, &mut cli::Bars::default())?;
        if !args.json {
            println!("perplexity {:.4}, mean nll {:.4} nats", result.perplexity, result.mean_nll);
            println!("{}", cli::protocol(&windows));
        }
        if let Value::Object(fields) = serde_json::to_value(result)? {
            self.found.extend(fields);
        }
        Ok(())
    }

    fn answer(&mut self, args: &Args, tasks: &[Task]) -> anyhow::Result<()> {
        let tokenizer = self.checkpoint.tokenizer()?;
        let mut results = Map::new();
        if !args.json {
            println!(
                "| task | items | acc | stderr | acc_norm | perplexity |\n|---|---:|---:|---:|---:|---:|"
            );
        }
        for task in tasks {
            let answers = answers(&self.decoder, &tokenizer, task, &mut cli::Bars::default())?;
            let result = Accuracy::of(&answers);
            if !args.json {
                let optional =
                    |value: Option<f64>| value.map_or("-".to_string(), |value| format!("{value:.4}"));
                let [stderr, norm, perplexity] =
                    [result.stderr, result.acc_norm, result.perplexity].map(optional);
                println!(
                    "| {} | {} | {:.4} | {stderr} | {norm} | {perplexity} |",
                    task.name, result.items, result.acc
                );
            }
            let mut result = json!(result);
            if args.answers {
                result["answers"] = json!(answers);
            }
            results.insert(task.name.clone(), result);
        }
        self.found.insert("tasks".into(), results.into());
        Ok(())
    }
}

/// Speed and memory of all models, in turns.
fn time(args: &Args, models: &mut [Model]) -> anyhow::Result<()> {
    let mut options = LatencyOptions::default();
    (options.prompt, options.new_tokens, options.runs) = (args.prompt_tokens, args.new_tokens, args.runs);
    let decoders: Vec<&Decoder> = models.iter().map(|model| &model.decoder).collect();
    let measured = latency(&decoders, &options, &mut cli::Bars::default())?;
    if !args.json {
        let rows: Vec<_> = models.iter().map(|model| model.name).zip(&measured).collect();
        println!("{}", table::speeds(&rows));
    }
    for (model, latency) in models.iter_mut().zip(&measured) {
        model.found.insert("latency".into(), json!(latency));
    }
    Ok(())
}
