//! The loss without each block, one shot.

use std::time::Instant;

use super::removals::{Removals, Removed, Report};
use super::{Importance, Scores, frontier, whole_blocks};
use crate::checkpoint::StreamedDecoder;
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
        let units = whole_blocks(decoder);
        let mut removals = Removals::new(decoder, windows, &units)?;
        self.measure(windows, units.len(), observer, |sets, report| {
            Ok((removals.losses(sets, report)?, removals.block_runs()))
        })
    }

    fn score_streamed(
        &self,
        model: &StreamedDecoder<'_>,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Scores> {
        self.measure(windows, model.depth(), observer, |sets, report| {
            frontier::losses(model, windows, sets, report)
        })
    }
}

impl PerplexityIncrease {
    /// The scores, by what `losses` says of the sets of one block on each window; with the blocks that it ran.
    fn measure(
        self,
        windows: &Windows,
        depth: usize,
        observer: &mut dyn Observer,
        losses: impl FnOnce(&[Removed], Report<'_>) -> Result<(Vec<Vec<f64>>, f64)>,
    ) -> Result<Scores> {
        let start = Instant::now();
        let single = |place: usize| -> Removed { (0..depth).map(|other| other == place).collect() };
        let sets: Vec<Removed> = (0..depth).map(single).collect();
        let total = (windows.len() * sets.len()) as u64;
        let (by_window, runs) =
            progress::counted(self.method(), total, observer, |report| losses(&sets, report))?;
        Ok(Scores::of_windows(self.method(), windows, &by_window)?.costing(start, runs))
    }
}
