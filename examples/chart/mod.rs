//! Scores as bars for a terminal.
#![allow(unreachable_pub)]

use std::fmt::Write;

use foldgpt::Scores;
use foldgpt::model::{Part, Unit};

const WIDTH: f64 = 48.0;

/// One line a block, or a half of one: index, bar, score; what `marked` holds is marked by `word`.
pub fn bars(scores: &Scores, marked: &[Unit], word: &str) -> String {
    let values = || scores.blocks.iter().map(|block| block.importance);
    let (low, high) = (values().fold(0.0f64, f64::min), values().fold(0.0f64, f64::max));
    let width =
        scores.blocks.iter().map(|block| block.unit().to_string().len()).max().unwrap_or_default() + 2;
    let mut chart = String::new();
    for block in &scores.blocks {
        let share = (block.importance - low) / (high - low).max(f64::MIN_POSITIVE);
        let is_marked = marked
            .iter()
            .any(|unit| unit.block == block.index && (unit.part == Part::Whole || unit.part == block.part));
        let (mark, fill) = if is_marked { (format!("  {word}"), '░') } else { (String::new(), '█') };
        let bar: String = std::iter::repeat_n(fill, (share * WIDTH).round().max(1.0) as usize).collect();
        let _ = writeln!(chart, "{:>width$} {bar} {:.4}{mark}", block.unit().to_string(), block.importance);
    }
    chart
}
