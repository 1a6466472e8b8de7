//! Removing block after block, measuring anew each time.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Tensor;

use serde::Serialize;

use super::memo::Memo;
use super::removals::{Removals, Removed, Report};
use super::{Importance, Scores, check_blocks, check_removal, statistics, whole_blocks};
use crate::data::Windows;
use crate::error::Result;
use crate::model::Decoder;
use crate::progress::{self, Observer};

/// Removes the block whose absence costs the least loss, and measures all others anew, until enough are gone.
///
/// A block's score is the loss, in nats per token, when it was last measured. From SLEB (Song et al., 2024, arXiv
/// 2402.09025), which keeps the first and the last block. Holds a hidden state of every window and block in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GreedyPerplexity {
    /// How many blocks to choose.
    pub remove: usize,
    /// Blocks that stay, besides the first and the last.
    pub protected: Vec<usize>,
    /// Where measured losses are kept, and gone on from.
    #[serde(skip)]
    pub losses_file: Option<PathBuf>,
}

impl Importance for GreedyPerplexity {
    fn method(&self) -> &'static str {
        "greedy-perplexity"
    }

    fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores> {
        let ends = [0, decoder.depth().saturating_sub(1)];
        let kept: Vec<usize> = self.protected.iter().copied().chain(ends).collect();
        let greedy = Greedy {
            method: self.method(),
            remove: self.remove,
            kept: &kept,
            file: self.losses_file.as_deref(),
        };
        #[allow(clippy::redundant_closure_for_method_calls)] // the method itself is for one lifetime only
        greedy
            .run(decoder, windows, observer, |removals, sets, report| removals.losses(sets, report))?
            .with_options(self)
    }
}

/// The search that greedy methods have in common: `measure` gives each set's cost on a window.
pub(super) struct Greedy<'a> {
    pub method: &'static str,
    pub remove: usize,
    pub kept: &'a [usize],
    pub file: Option<&'a Path>,
}

impl Greedy<'_> {
    pub(super) fn run(
        &self,
        decoder: &Decoder,
        windows: &Windows,
        observer: &mut dyn Observer,
        measure: impl Fn(&mut Removals<'_>, &[Removed], Report<'_>) -> Result<Vec<Vec<f64>>>,
    ) -> Result<Scores> {
        let start = Instant::now();
        let units = whole_blocks(decoder);
        check_blocks(self.kept, decoder.depth())?;
        let free = (0..units.len()).filter(|place| !self.kept.contains(place)).count();
        check_removal(self.remove, free)?;
        let memo = Memo::open(self.file, self.method, decoder, &units)?;
        let mut removals = Removals::new(decoder, windows, &units)?.keep_base().remembering(memo.as_ref());
        let (mut chosen, mut importance) = (Vec::new(), vec![0.0; units.len()]);
        let mut stability = None;
        let rounds = self.remove.max(1);
        // All blocks are measured in the first round, so that those that stay have a score too.
        let sets_in = |round: usize| if round == 0 { units.len() } else { free - round };
        let total = (0..rounds).map(sets_in).sum::<usize>() * windows.len();
        let mut before = 0;
        progress::stage(self.method, total as u64, observer, |observer| {
            for round in 0..rounds {
                let candidates: Vec<usize> = (0..units.len())
                    .filter(|place| !chosen.contains(place) && (round == 0 || !self.kept.contains(place)))
                    .collect();
                let sets: Vec<Removed> = candidates
                    .iter()
                    .map(|&place| removals.set(&[chosen.as_slice(), &[place]].concat()))
                    .collect();
                let by_window = measure(&mut removals, &sets, &mut |done| {
                    progress::advance(self.method, before + done, total as u64, observer)
                })?;
                before += (sets.len() * windows.len()) as u64;
                if round == 0 {
                    stability = Scores::of_windows(self.method, windows, &by_window)?.stability;
                }
                let costs = statistics::means(&by_window);
                for (&place, &cost) in candidates.iter().zip(&costs) {
                    if let Some(slot) = importance.get_mut(place) {
                        *slot = cost;
                    }
                }
                let allowed = candidates.iter().zip(&costs).filter(|(place, _)| !self.kept.contains(place));
                let least = allowed.min_by(|a, b| a.1.total_cmp(b.1));
                if let Some((&place, &cost)) = least.filter(|_| chosen.len() < self.remove) {
                    tracing::debug!(block = place, cost, "goes next");
                    chosen.push(place);
                    removals.rebase(removals.set(&chosen));
                }
            }
            Ok(())
        })?;
        let mut scores = Scores::new(self.method, windows, importance)?.costing(start, removals.block_runs());
        scores = scores.costing_before(memo.as_ref());
        if let Some(stability) = stability {
            scores = scores.with_stability(stability);
        }
        scores.chosen = Some(chosen).filter(|chosen| !chosen.is_empty());
        Ok(scores)
    }
}

/// The final states of the whole model on every window.
pub(super) fn final_states(
    decoder: &Decoder,
    windows: &Windows,
    observer: &mut dyn Observer,
) -> Result<Vec<Tensor>> {
    let mut states = Vec::with_capacity(windows.len());
    progress::steps("final states", windows.len(), observer, |window| {
        states.push(decoder.hidden(&windows.tensor(window, decoder.device())?)?);
        Ok(())
    })?;
    Ok(states)
}
