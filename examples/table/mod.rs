//! Models side by side: what they hold, what they are worth, how fast they read.
#![allow(dead_code, unreachable_pub)]

use std::fmt::Write;
use std::time::Instant;

use foldgpt::eval::Throughput;
use foldgpt::pipeline::Measured;
use foldgpt::{Checkpoint, Decoder, Latency, Observer, Perplexity, Windows, perplexity};

/// A model's line of the table.
pub struct Row {
    name: &'static str,
    blocks: usize,
    parameters: usize,
    bytes: u64,
    result: Perplexity,
    tokens_per_second: f64,
}

impl Row {
    /// A model that was measured, and its bytes.
    pub fn of(name: &'static str, bytes: u64, measured: &Measured) -> Self {
        let result = measured.perplexity.clone();
        let tokens = (result.windows * result.seq_len) as f64;
        Self {
            name,
            blocks: measured.blocks,
            parameters: measured.parameters,
            bytes,
            result,
            tokens_per_second: tokens / measured.seconds,
        }
    }

    /// Evaluates `decoder`, loaded from `checkpoint`, on `windows`; speed is that of the evaluation, in tokens read per second.
    pub fn measure(
        name: &'static str,
        checkpoint: &Checkpoint,
        decoder: &Decoder,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> foldgpt::Result<Self> {
        // The first pass touches memory for the first time: it is no measure of speed.
        perplexity(decoder, &windows.spread(1)?, &mut ())?;
        let start = Instant::now();
        let result = perplexity(decoder, windows, observer)?;
        let tokens = (windows.len() * windows.seq_len()) as f64;
        Ok(Self {
            name,
            blocks: decoder.depth(),
            parameters: decoder.parameter_count(),
            bytes: checkpoint.tensor_bytes(),
            result,
            tokens_per_second: tokens / start.elapsed().as_secs_f64(),
        })
    }
}

/// The rows under their heads.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<12} {:>6} {:>12} {:>14} {:>8} {:>11} {:>9}\n",
        "", "blocks", "parameters", "stored bytes", "nll", "perplexity", "tokens/s"
    );
    for row in rows {
        let _ = writeln!(
            text,
            "{:<12} {:>6} {:>12} {:>14} {:>8.4} {:>11.4} {:>9.0}",
            row.name,
            row.blocks,
            grouped(row.parameters as u64),
            grouped(row.bytes),
            row.result.mean_nll,
            row.result.perplexity,
            row.tokens_per_second
        );
    }
    text
}

/// How fast models are and what they take, measured in turns, each beside the first.
pub fn speeds(rows: &[(&str, &Latency)]) -> String {
    let mut text = format!(
        "{:<12} {:>27} {:>6} {:>27} {:>6} {:>15} {:>13}\n",
        "", "prefill tokens/s", "", "decode tokens/s", "", "resident bytes", "KV bytes/token"
    );
    let spread = |found: &Throughput| format!("{:.1} ({:.1}-{:.1})", found.median, found.min, found.max);
    for (name, latency) in rows {
        let first = rows.first().map_or(latency, |(_, first)| first);
        let ratio = |of: fn(&Latency) -> f64| format!("x{:.2}", of(latency) / of(first));
        let _ = writeln!(
            text,
            "{name:<12} {:>27} {:>6} {:>27} {:>6} {:>15} {:>13}",
            spread(&latency.prefill),
            ratio(|latency| latency.prefill.median),
            spread(&latency.decode),
            ratio(|latency| latency.decode.median),
            grouped(latency.resident_bytes),
            grouped(latency.kv_bytes_per_token)
        );
    }
    if let Some((_, Latency { prompt, new_tokens, dtype, threads, prefill, .. })) = rows.first() {
        let _ = writeln!(
            text,
            "medians (slowest-fastest) of {} runs in turns, {prompt} tokens read and {new_tokens} made, {dtype}, \
             {threads} threads",
            prefill.runs
        );
    }
    text
}

/// Digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}
