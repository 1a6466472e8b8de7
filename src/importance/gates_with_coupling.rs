//! Gates, coupling and true losses together: the crate's own method.

use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Deserializer, Serialize};

use super::basis::Basis;
use super::coupling::Coupling;
use super::memo::Memo;
use super::removals::Removals;
use super::search::Search;
use super::select::{Set, membership, places};
use super::{Gates, Importance, Scores, check_blocks, check_removal, finalists, whole_blocks};
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::progress::{self, Observer};

/// Gates warm-started from the loss without each block, exact pairwise coupling, and a search over sets that is led
/// by both and decided by true losses.
///
/// Singles are measured on all windows, pairs and larger sets on a few of them: what each block costs alone says how
/// those differ from all. What pairs cannot know of larger sets is learned from the sets that the search measures, near
/// the size asked for. The best sets are then compared on all windows, by successive halving (Jamieson and Talwalkar,
/// 2016, arXiv 1502.07943).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct GatesWithCoupling {
    /// The gates; their number to remove and protected blocks are those of the whole method.
    #[serde(deserialize_with = "gates_of_the_method")]
    pub gates: Gates,
    /// Windows, spread over all, on which pairs are measured and sets are searched.
    pub search_windows: usize,
    /// At most this many block runs for the search after gates and coupling.
    pub budget_block_runs: f64,
    /// Sets measured in each round of the search.
    pub batch: usize,
    /// Rounds without improvement before the search ends.
    pub patience: usize,
    /// The best sets of the search, which are then compared on ever more windows: half of them go whenever the
    /// windows have doubled, until the last few are compared on all.
    pub finalists: usize,
    /// Where measured losses are kept, and gone on from; the gates have a file of their own.
    #[serde(skip)]
    pub losses_file: Option<PathBuf>,
}

impl Default for GatesWithCoupling {
    fn default() -> Self {
        Self {
            gates: Gates { steps: GATE_STEPS, ..Gates::default() },
            search_windows: 4,
            budget_block_runs: 20_000.0,
            batch: 8,
            patience: 8,
            finalists: 40,
            losses_file: None,
        }
    }
}

const METHOD: &str = "coupling";

/// Half as many steps as for gates alone: here they only say where the search begins.
const GATE_STEPS: usize = 120;

/// Gates whose default is that of the method, whichever of their options are there.
fn gates_of_the_method<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Gates, D::Error> {
    let mut options = serde_json::Map::deserialize(deserializer)?;
    options.entry("steps").or_insert_with(|| GATE_STEPS.into());
    serde_json::from_value(options.into()).map_err(serde::de::Error::custom)
}

impl Importance for GatesWithCoupling {
    fn method(&self) -> &'static str {
        METHOD
    }

    fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores> {
        let start = Instant::now();
        let units = whole_blocks(decoder);
        check_blocks(&self.gates.protected, decoder)?;
        let kept = &self.gates.protected;
        let free: Vec<usize> = (0..units.len()).filter(|place| !kept.contains(place)).collect();
        check_removal(self.gates.remove, free.len())?;
        let memo = Memo::open(self.losses_file.as_deref(), METHOD, decoder, &units)?;
        let parts = windows.doubling(self.search_windows)?;
        let parts = parts.iter().map(|part| Removals::new(decoder, part, &units));
        let parts = parts.map(|part| Ok(part?.remembering(memo.as_ref()))).collect::<Result<Vec<_>>>()?;
        let mut known = Known::measure(parts, units.len(), observer)?;

        let gates = Gates { warm_start: Some(known.all.increases().collect()), ..self.gates.clone() };
        let training = Instant::now();
        let trained = gates.train(decoder, windows, &units, observer)?;
        // What an interrupted run spent on the gates counts too.
        let spent_before = trained.seconds - training.elapsed().as_secs_f64();

        let chosen = match self.gates.remove {
            0 => None,
            _ => self.choose(&mut known, &trained.gates, &free, observer)?,
        };
        let block_runs = known.parts.iter().map(Removals::block_runs).sum::<f64>() + trained.block_runs;
        let mut scores = Scores::new(METHOD, windows, trained.gates)?;
        scores = scores.with_stability(trained.stability).with_options(self)?;
        scores.trajectory = trained.trajectory;
        scores.chosen = chosen;
        scores.coupling = Some(known.coupling.matrix);
        let mut scores = scores.costing(start, block_runs);
        scores.seconds += spent_before;
        scores = scores.costing_before(memo.as_ref());
        Ok(scores)
    }
}

impl GatesWithCoupling {
    /// The set of the lowest loss that the search finds.
    fn choose(
        &self,
        known: &mut Known<'_>,
        gates: &[f64],
        free: &[usize],
        observer: &mut dyn Observer,
    ) -> Result<Option<Vec<usize>>> {
        let starts = self.starts(&known.coupling, gates, free)?;
        let finalists = self.search(known, free, &starts, observer)?;
        let count = finalists.len();
        let best = finalists::best_of(finalists, &mut known.parts, &known.bases, observer)?;
        let best = best.map(|set| places(&set));
        tracing::debug!(blocks = ?best, finalists = count, "the best set that was found");
        Ok(best)
    }

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

    /// The best sets that the search finds within its budget, with their losses on its windows.
    fn search(
        &self,
        known: &mut Known<'_>,
        free: &[usize],
        starts: &[Set],
        observer: &mut dyn Observer,
    ) -> Result<Vec<(Set, f64)>> {
        const STAGE: &str = "search";
        let (basis, all) = (known.bases.first().cloned().unwrap_or_default(), &known.all);
        let Some(removals) = known.parts.first_mut() else { return Ok(Vec::new()) };
        let shifted = |(set, loss): (&Set, f64)| loss + basis.shift(all, set);
        let measured = known.measured.iter().map(|(set, loss)| (set.clone(), shifted((set, *loss))));
        let mut search = Search {
            measured: measured.collect(),
            dense_loss: all.dense,
            free,
            count: self.gates.remove,
            batch: self.batch,
            patience: self.patience,
        };
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
                Ok(Some(sets.iter().zip(losses).map(shifted).collect()))
            })
        })?;
        let spent = removals.block_runs() - before;
        tracing::debug!(sets = search.measured.len(), block_runs = spent, budget, "the search is over");
        best.truncate(self.finalists.max(1));
        Ok(best
            .into_iter()
            .map(|(set, loss)| {
                let shift = basis.shift(all, &set);
                (set, loss - shift)
            })
            .collect())
    }
}

/// What is known before anything is chosen: singles on all windows, pairs on those of the search.
struct Known<'a> {
    /// The windows in parts, the search's first.
    parts: Vec<Removals<'a>>,
    /// What singles cost on each part, and on all.
    bases: Vec<Basis>,
    all: Basis,
    /// Pairs, with what singles cost on all windows in the diagonal.
    coupling: Coupling,
    /// All sets measured on the first part.
    measured: Vec<(Set, f64)>,
}

impl<'a> Known<'a> {
    fn measure(mut parts: Vec<Removals<'a>>, units: usize, observer: &mut dyn Observer) -> Result<Self> {
        const STAGE: &str = "singles";
        let no_windows = || Error::argument("windows", 0, "at least 1");
        let first = parts.first_mut().ok_or_else(no_windows)?;
        let (measured, coupling) = Coupling::measure(first, units, observer)?;
        let sets: Vec<Set> = measured.iter().take(1 + units).map(|(set, _)| set.clone()).collect();
        let losses: Vec<f64> = measured.iter().take(1 + units).map(|(_, loss)| *loss).collect();
        let mut bases = vec![Basis::new(first.windows(), &losses)];
        let total = parts.iter().skip(1).map(|part| part.windows() * sets.len()).sum::<usize>() as u64;
        let mut before = 0;
        progress::stage(STAGE, total, observer, |observer| {
            for part in parts.iter_mut().skip(1) {
                let losses = part.mean_losses(&sets, &mut |done| {
                    progress::advance(STAGE, before + done, total, observer)
                })?;
                before += (part.windows() * sets.len()) as u64;
                bases.push(Basis::new(part.windows(), &losses));
            }
            Ok(())
        })?;
        let all = Basis::of_all(&bases);
        let coupling = coupling.with_singles(&all)?;
        Ok(Self { parts, bases, all, coupling, measured })
    }
}
