//! The loss without each block, one shot.

use std::time::Instant;

use super::removals::Removals;
use super::{Importance, Scores, whole_blocks};
use crate::data::Windows;
use crate::error::Result;
use crate::model::Decoder;
use crate::progress::{self, Observer};

/// The loss of the model without the block, in nats per token, measured once for every block.
///
/// From Shortened LLaMA (Kim et al., 2024, arXiv 2402.02834).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PerplexityIncrease;

impl Importance for PerplexityIncrease {
    fn method(&self) -> &'static str {
        "perplexity"
    }

    fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores> {
        let start = Instant::now();
        let units = whole_blocks(decoder);
        let mut removals = Removals::new(decoder, windows, &units)?;
        let sets: Vec<_> = (0..units.len()).map(|place| removals.set(&[place])).collect();
        let total = (windows.len() * sets.len()) as u64;
        let by_window =
            progress::counted(self.method(), total, observer, |report| removals.losses(&sets, report))?;
        let scores = Scores::of_windows(self.method(), windows, &by_window)?;
        Ok(scores.costing(start, removals.block_runs()))
    }
}
