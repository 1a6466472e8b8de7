//! Scores as bars for a terminal.
#![allow(unreachable_pub)]

use std::fmt::Write;

use foldgpt::Scores;

const WIDTH: f64 = 48.0;

/// One line a block: index, bar, score; blocks of `marked` are marked by `word`.
pub fn bars(scores: &Scores, marked: &[usize], word: &str) -> String {
    let values = || scores.blocks.iter().map(|block| block.importance);
    let (low, high) = (values().fold(0.0f64, f64::min), values().fold(0.0f64, f64::max));
    let mut chart = String::new();
    for block in &scores.blocks {
        let share = (block.importance - low) / (high - low).max(f64::MIN_POSITIVE);
        let is_marked = marked.contains(&block.index);
        let (mark, fill) = if is_marked { (format!("  {word}"), '░') } else { (String::new(), '█') };
        let bar: String = std::iter::repeat_n(fill, (share * WIDTH).round().max(1.0) as usize).collect();
        let _ = writeln!(chart, "{:>4} {bar} {:.4}{mark}", block.unit().to_string(), block.importance);
    }
    chart
}
