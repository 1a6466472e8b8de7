//! Gates, coupling and true losses together: the crate's own method.

use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::coupling::Coupling;
use super::memo::Memo;
use super::removals::Removals;
use super::search::Search;
use super::select::{Set, membership, places};
use super::{Gates, Importance, Scores, check_blocks, check_removal, whole_blocks};
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::progress::{self, Observer};

/// Gates warm-started from the loss without each block, exact pairwise coupling, and a search over sets that is led
/// by both and decided by true losses.
///
/// Singles and pairs are measured around the whole model; what they cannot know of larger sets is learned from the
/// sets that the search measures, near the size asked for. The best few sets are then compared on all windows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct GatesWithCoupling {
    /// The gates; their number to remove and protected blocks are those of the whole method.
    pub gates: Gates,
    /// Windows, spread over all, on which pairs are measured and sets are searched.
    pub search_windows: usize,
    /// At most this many block runs for the search after gates and coupling.
    pub budget_block_runs: f64,
    /// Sets measured in each round of the search.
    pub batch: usize,
    /// Rounds without improvement before the search ends.
    pub patience: usize,
    /// The best sets that are compared on all windows at the end.
    pub finalists: usize,
    /// Where measured losses are kept, and gone on from; the gates have a file of their own.
    #[serde(skip)]
    pub losses_file: Option<PathBuf>,
}

impl Default for GatesWithCoupling {
    fn default() -> Self {
        Self {
            // Half as many steps as for gates alone: here they only say where the search begins.
            gates: Gates { steps: 120, ..Gates::default() },
            search_windows: 4,
            budget_block_runs: 20_000.0,
            batch: 8,
            patience: 8,
            finalists: 10,
            losses_file: None,
        }
    }
}

const METHOD: &str = "coupling";

impl Importance for GatesWithCoupling {
    fn method(&self) -> &'static str {
        METHOD
    }

    fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores> {
        let start = Instant::now();
        let units = whole_blocks(decoder);
        check_blocks(&self.gates.protected, decoder)?;
        let free: Vec<usize> =
            (0..units.len()).filter(|place| !self.gates.protected.contains(place)).collect();
        check_removal(self.gates.remove, free.len())?;
        let search = windows.spread(self.search_windows)?;
        let memo = Memo::open(self.losses_file.as_deref(), METHOD, decoder, &units)?;
        let mut removals = Removals::new(decoder, &search, &units)?.remembering(memo.as_ref());

        let (measured, coupling) = Coupling::measure(&mut removals, &search, units.len(), observer)?;
        let singles: Vec<f64> = (0..units.len()).map(|place| coupling.get(place, place)).collect();
        let gates = Gates { warm_start: Some(singles), ..self.gates.clone() };
        let training = Instant::now();
        let trained = gates.train(decoder, windows, &units, observer)?;
        // What an interrupted run spent on the gates counts too.
        let spent_before = trained.seconds - training.elapsed().as_secs_f64();

        let chosen = if self.gates.remove == 0 {
            None
        } else {
            let starts = self.starts(&coupling, &trained.gates, &free)?;
            let search = Search {
                measured,
                dense_loss: coupling.dense_loss,
                free: &free,
                count: self.gates.remove,
                batch: self.batch,
                patience: self.patience,
            };
            let finalists = self.search(search, &starts, &mut removals, observer)?;
            let on_all = Removals::new(decoder, windows, &units)?.remembering(memo.as_ref());
            Some(decide(on_all, finalists, &mut removals, observer)?)
        };
        let mut scores = Scores::new(METHOD, windows, trained.gates)?;
        scores = scores.with_stability(trained.stability).with_options(self)?;
        scores.trajectory = trained.trajectory;
        scores.chosen = chosen;
        scores.coupling = Some(coupling.matrix);
        let mut scores = scores.costing(start, removals.block_runs() + trained.block_runs);
        scores.seconds += spent_before;
        scores = scores.costing_before(memo.as_ref());
        Ok(scores)
    }
}

impl GatesWithCoupling {
    /// Where the search begins: the cheapest set by pairs, and the one that the gates closed.
    fn starts(&self, coupling: &Coupling, gates: &[f64], free: &[usize]) -> Result<Vec<Set>> {
        let (n, count) = (gates.len(), self.gates.remove);
        let by_pairs = coupling.select(count, &self.gates.protected)?;
        let mut order: Vec<(f64, usize)> =
            gates.iter().copied().zip(0..n).filter(|(_, place)| free.contains(place)).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0));
        let by_gates: Vec<usize> = order.iter().take(count).map(|(_, place)| *place).collect();
        Ok(vec![membership(n, &by_pairs), membership(n, &by_gates)])
    }

    /// The best sets that the search finds within its budget, on its windows.
    fn search(
        &self,
        mut search: Search<'_>,
        starts: &[Set],
        removals: &mut Removals<'_>,
        observer: &mut dyn Observer,
    ) -> Result<Vec<(Set, f64)>> {
        const STAGE: &str = "search";
        let (before, budget) = (removals.block_runs(), self.budget_block_runs);
        let mut best = progress::stage(STAGE, budget as u64, observer, |observer| {
            search.run(starts, |sets, share| {
                if removals.block_runs() - before >= share * budget {
                    return Ok(None);
                }
                let spent = (removals.block_runs() - before).min(budget);
                let losses = removals.mean_losses(sets, &mut |_| {
                    progress::advance(STAGE, spent as u64, budget as u64, observer)
                })?;
                let spent = (removals.block_runs() - before).min(budget);
                progress::advance(STAGE, spent as u64, budget as u64, observer)?;
                Ok(Some(losses))
            })
        })?;
        best.truncate(self.finalists.max(1));
        Ok(best)
    }
}

/// The best of the finalists on all windows.
fn decide(
    mut removals: Removals<'_>,
    finalists: Vec<(Set, f64)>,
    spent: &mut Removals<'_>,
    observer: &mut dyn Observer,
) -> Result<Vec<usize>> {
    let sets: Vec<Set> = finalists.into_iter().map(|(set, _)| set).collect();
    let total = (removals.windows() * sets.len()) as u64;
    let losses =
        progress::counted("finalists", total, observer, |report| removals.mean_losses(&sets, report))?;
    spent.charge(removals.block_runs());
    let best = sets.iter().zip(losses).min_by(|a, b| a.1.total_cmp(&b.1));
    best.map(|(set, _)| places(set)).ok_or_else(|| Error::Plan("the search measured no set".into()))
}
