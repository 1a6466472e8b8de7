//! Models side by side: what they hold, what they are worth, how fast they read.
#![allow(dead_code, unreachable_pub)]

use std::fmt::Write;
use std::time::Instant;

use foldgpt::eval::Throughput;
use foldgpt::report::{self, Value};
use foldgpt::{Decoder, Latency, Observer, Perplexity, Windows, perplexity};

/// A model's line of the table.
pub struct Row {
    name: &'static str,
    blocks: usize,
    parameters: usize,
    /// Bytes of its tensors as they are stored.
    pub bytes: u64,
    pub result: Perplexity,
    tokens_per_second: f64,
}

impl Row {
    /// Evaluates `decoder` on `windows`; speed is that of the evaluation, in tokens read per second.
    pub fn measure(
        name: &'static str,
        bytes: u64,
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
            bytes,
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

/// Before and after, a quantity a line; `name` is that of the result.
pub fn compared(rows: &[report::Row], name: &str) -> String {
    let cut = if rows.iter().any(|row| row.folded.is_some()) { "cut" } else { "" };
    let mut lines = vec![["", "dense", cut, name, "difference", "relative"].map(String::from)];
    lines.extend(rows.iter().map(|row| {
        let unit = if row.unit.is_empty() { String::new() } else { format!(" ({})", row.unit) };
        let cell = |value: Option<Value>| value.map(|value| spread(value, row.digits)).unwrap_or_default();
        let relative = row.relative.map(|share| format!("{} %", signed(100.0 * share, 1)));
        [
            format!("{}{unit}", row.quantity),
            cell(row.dense),
            cell(row.folded),
            cell(row.compressed),
            row.difference.map(|value| signed(value, row.digits)).unwrap_or_default(),
            relative.unwrap_or_default(),
        ]
    }));
    let width =
        |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; 6] = std::array::from_fn(width);
    let mut text = String::new();
    for line in &lines {
        for (column, (cell, width)) in line.iter().zip(widths).enumerate() {
            let _ =
                if column == 0 { write!(text, "{cell:<width$}") } else { write!(text, "  {cell:>width$}") };
        }
        text.push('\n');
    }
    text
}

/// A value with its error, or with the slowest and the fastest run.
fn spread(value: Value, digits: usize) -> String {
    let error = value.error.map(|error| format!(" ± {}", rounded(error, digits)));
    let range =
        value.range.map(|range| format!(" ({})", range.map(|number| rounded(number, digits)).join("-")));
    rounded(value.value, digits) + &error.or(range).unwrap_or_default()
}

/// A number from 0 on with so many digits after the point, and groups of three before it.
fn rounded(number: f64, digits: usize) -> String {
    let text = format!("{number:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    whole.parse().map_or_else(|_| whole.to_string(), grouped) + rest
}

/// A number with its sign; what rounds to nothing has none.
fn signed(number: f64, digits: usize) -> String {
    let text = rounded(number.abs(), digits);
    let nothing = !text.contains(|digit| ('1'..='9').contains(&digit));
    let sign = if nothing {
        ""
    } else if number < 0.0 {
        "-"
    } else {
        "+"
    };
    format!("{sign}{text}")
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
    if let Some((_, first)) = rows.first() {
        text += &speed_protocol(first);
        text.push('\n');
    }
    text
}

/// How speed was measured, in one line.
pub fn speed_protocol(latency: &Latency) -> String {
    let Latency { prompt, new_tokens, dtype, threads, prefill, .. } = latency;
    format!(
        "medians (slowest-fastest) of {} runs in turns, {prompt} tokens read and {new_tokens} made, {dtype}, {threads} \
         thread{}",
        prefill.runs,
        if *threads == 1 { "" } else { "s" }
    )
}

/// Digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}
