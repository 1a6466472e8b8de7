//! Gates, coupling and true losses together: the crate's own method.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Deserializer, Serialize};

use super::basis::Basis;
use super::coupling::{Coupling, Sets};
use super::memo::Memo;
use super::removals::Removals;
use super::search::Search;
use super::select::{Set, membership, places};
use super::{
    Gates, Importance, Scores, TrainedGates, check_blocks, check_removal, finalists, spearman, statistics,
    whole_blocks,
};
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::{Decoder, Unit};
use crate::progress::{self, Observer};

/// Gates warm-started from the loss without each block, exact pairwise coupling, and a search over sets that is led
/// by both and decided by true losses.
///
/// Singles are measured on all windows, pairs and larger sets on a few of them: what each block costs alone says how
/// those differ from all. What pairs cannot know of larger sets is learned from the sets that the search measures, near
/// the size asked for. The best sets are then compared on all windows, by successive halving (Jamieson and Talwalkar,
/// 2016, arXiv 1502.07943).
///
/// The scores are the gates. Where nothing is to be removed there is nothing to train gates towards: the scores are
/// then what each block costs alone, in nats per token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct GatesWithCoupling {
    /// The gates; their number to remove and protected blocks are those of the whole method. They are of whole blocks,
    /// and start from what blocks cost alone. By default those of [`Gates`], with half the steps, 120.
    #[serde(deserialize_with = "gates_of_the_method")]
    pub gates: Gates,
    /// Windows, spread over all, on which pairs are measured and sets are searched; 4 by default.
    pub search_windows: usize,
    /// At most this many block runs after gates and coupling, for the search and the comparison of its best sets; those
    /// that kept losses save count too, so that they change nothing but time. The sets that pairs and gates suggest
    /// are measured in any case. 30 000 by default.
    pub budget_block_runs: f64,
    /// Sets measured in each round of the search; 8 by default.
    pub batch: usize,
    /// Rounds without improvement before the search ends; 8 by default.
    pub patience: usize,
    /// The best sets of the search, at most, which are then compared on ever more windows: half of them go whenever the
    /// windows have doubled, until the last few are compared on all. 40 by default.
    pub finalists: usize,
    /// Where measured losses are kept, and gone on from, nowhere by default; the gates have a file of their own.
    #[serde(skip)]
    pub losses_file: Option<PathBuf>,
}

impl Default for GatesWithCoupling {
    fn default() -> Self {
        Self {
            gates: Gates { steps: GATE_STEPS, ..Gates::default() },
            search_windows: 4,
            budget_block_runs: 30_000.0,
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
        let kept = &self.gates.protected;
        check_blocks(kept, decoder.depth())?;
        let free: Vec<usize> = (0..units.len()).filter(|place| !kept.contains(place)).collect();
        check_removal(self.gates.remove, free.len())?;
        self.check()?;
        if self.gates.remove > 0 && self.gates.state_file.as_deref().is_some_and(Path::exists) {
            // What does not go on is told before pairs are measured.
            self.gates.state(decoder, windows, &units, &mut || Ok(()))?;
        }
        let memo = Memo::open(self.losses_file.as_deref(), METHOD, decoder, &units)?;
        let places = windows.doubling(self.search_windows)?;
        let parts = places.iter().map(|places| Removals::new(decoder, &windows.at(places), &units));
        let parts = parts.map(|part| Ok(part?.remembering(memo.as_ref()))).collect::<Result<Vec<_>>>()?;
        let mut known = Known::measure(parts, &places, units.len(), observer)?;
        let (trained, before) = self.train(&known, decoder, windows, &units, observer)?;
        let chosen = match self.gates.remove {
            0 => None,
            _ => self.choose(&mut known, &trained.gates, &free, observer)?,
        };
        let block_runs = known.parts.iter().map(Removals::block_runs).sum::<f64>() + trained.block_runs;
        let mut scores = Scores::new(METHOD, windows, trained.gates)?.with_options(self)?;
        if let Some(stability) = trained.stability {
            scores = scores.with_stability(stability);
        }
        scores.trajectory = trained.trajectory;
        scores.chosen = chosen;
        scores.coupling = Some(known.coupling.matrix);
        let mut scores = scores.costing(start, block_runs);
        scores.seconds += before;
        Ok(scores.costing_before(memo.as_ref()))
    }
}

impl GatesWithCoupling {
    /// Fails for options that no model can be scored by.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { gates, batch, budget_block_runs: budget, .. } = self;
        gates.check_options()?;
        if gates.halves {
            return Err(Error::argument("halves", true, "false: coupling is of whole blocks"));
        }
        if gates.warm_start.is_some() {
            return Err(Error::argument(
                "warm_start",
                "given",
                "none: gates start from what blocks cost alone",
            ));
        }
        if self.search_windows == 0 {
            return Err(Error::argument("search_windows", 0, "at least 1"));
        }
        if *batch == 0 {
            return Err(Error::argument("batch", 0, "at least 1 set in a round"));
        }
        if budget.is_nan() || *budget < 0.0 {
            return Err(Error::argument("budget_block_runs", budget, "a number from 0 on"));
        }
        Ok(())
    }

    /// Trains gates, each set from what its own half of the windows says of single blocks; and the seconds that
    /// interrupted runs spent on them.
    fn train(
        &self,
        known: &Known<'_>,
        decoder: &Decoder,
        windows: &Windows,
        units: &[Unit],
        observer: &mut dyn Observer,
    ) -> Result<(TrainedGates, f64)> {
        let [first, second] = &known.halves;
        if self.gates.remove == 0 {
            let singles = TrainedGates {
                units: units.to_vec(),
                gates: known.all.increases().collect(),
                stability: (windows.len() > 1).then(|| spearman(first, second)),
                trajectory: Vec::new(),
                seconds: 0.0,
                block_runs: 0.0,
            };
            return Ok((singles, 0.0));
        }
        let start = Instant::now();
        let starts = [Some(first.as_slice()), Some(second.as_slice())];
        let trained = self.gates.train_from(starts, decoder, windows, units, observer)?;
        let before = trained.seconds - start.elapsed().as_secs_f64();
        Ok((trained, before))
    }

    /// The set of the lowest loss that the search finds.
    fn choose(
        &self,
        known: &mut Known<'_>,
        gates: &[f64],
        free: &[usize],
        observer: &mut dyn Observer,
    ) -> Result<Option<Vec<usize>>> {
        let starts = self.starts(&known.coupling, gates, free)?;
        let left = gates.len() - self.gates.remove;
        let most = finalists::affordable(self.finalists, &known.parts, left, self.budget_block_runs / 2.0);
        let budget = (self.budget_block_runs - finalists::cost(most, &known.parts, left)).max(0.0);
        let mut best = self.search(known, budget, free, &starts, observer)?;
        best.truncate(most);
        let best = finalists::best_of(best, &mut known.parts, &known.bases, observer)?;
        let best = best.map(|set| places(&set));
        tracing::debug!(blocks = ?best, finalists = most, "the best set that was found");
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

    /// The sets that the search measures within a budget of block runs, best first, with their losses on its windows.
    fn search(
        &self,
        known: &mut Known<'_>,
        budget: f64,
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
        let (mut spent, total) = (0.0, budget as u64);
        let best = progress::stage(STAGE, total, observer, |observer| {
            search.run(starts, |sets, share| {
                let cost = removals.runs_of(sets);
                if share.is_finite() && spent + cost > share * budget {
                    return Ok(None);
                }
                spent += cost;
                let done = (spent as u64).min(total);
                let losses =
                    removals.mean_losses(sets, &mut |_| progress::advance(STAGE, done, total, observer))?;
                Ok(Some(sets.iter().zip(losses).map(shifted).collect()))
            })
        })?;
        tracing::debug!(sets = search.measured.len(), block_runs = spent, budget, "the search is over");
        let unshifted = |(set, loss): (Set, f64)| {
            let shift = basis.shift(all, &set);
            (set, loss - shift)
        };
        Ok(best.into_iter().map(unshifted).collect())
    }
}

/// What is known before anything is chosen: singles on all windows, pairs on those of the search.
struct Known<'a> {
    /// The windows in parts, the search's first.
    parts: Vec<Removals<'a>>,
    /// What singles cost on each part, and on all.
    bases: Vec<Basis>,
    all: Basis,
    /// What each single costs on the two halves of the windows; on all of them where there is only one.
    halves: [Vec<f64>; 2],
    /// Pairs, with what singles cost on all windows in the diagonal.
    coupling: Coupling,
    /// All sets measured on the first part.
    measured: Vec<(Set, f64)>,
}

impl<'a> Known<'a> {
    /// `places` are those of the parts' windows among all.
    fn measure(
        mut parts: Vec<Removals<'a>>,
        places: &[Vec<usize>],
        units: usize,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        const STAGE: &str = "singles";
        let no_windows = || Error::argument("windows", 0, "at least 1");
        let first = parts.first_mut().ok_or_else(no_windows)?;
        let (Sets { sets, losses: mut rows }, coupling) = Coupling::measure(first, units, observer)?;
        let measured = sets.iter().cloned().zip(statistics::means(&rows)).collect();
        let singles: Vec<Set> = sets.into_iter().take(1 + units).collect();
        for row in &mut rows {
            row.truncate(1 + units);
        }
        let mut by_part = vec![rows];
        let total = parts.iter().skip(1).map(|part| part.windows() * singles.len()).sum::<usize>() as u64;
        let mut before = 0;
        progress::stage(STAGE, total, observer, |observer| {
            for part in parts.iter_mut().skip(1) {
                by_part.push(part.losses(&singles, &mut |done| {
                    progress::advance(STAGE, before + done, total, observer)
                })?);
                before += (part.windows() * singles.len()) as u64;
            }
            Ok(())
        })?;
        let basis = |rows: &Vec<Vec<f64>>| Basis::new(rows.len(), &statistics::means(rows));
        let bases: Vec<Basis> = by_part.iter().map(basis).collect();
        let all = Basis::of_all(&bases);
        let coupling = coupling.with_singles(&all)?;
        let halves = halves(places, by_part);
        Ok(Self { parts, bases, all, halves, coupling, measured })
    }
}

/// What singles cost on the first and on the second half of the windows, from rows of losses by part.
fn halves(places: &[Vec<usize>], by_part: Vec<Vec<Vec<f64>>>) -> [Vec<f64>; 2] {
    let mut rows: Vec<(usize, Vec<f64>)> =
        places.iter().flatten().copied().zip(by_part.into_iter().flatten()).collect();
    rows.sort_by_key(|(place, _)| *place);
    let rows: Vec<Vec<f64>> = rows.into_iter().map(|(_, row)| row).collect();
    let (first, second) = rows.split_at(rows.len() / 2);
    let first = if first.is_empty() { second } else { first };
    [first, second].map(|rows| Basis::new(rows.len(), &statistics::means(rows)).increases().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_those_of_the_windows_in_their_order() {
        // Each window's single costs ten times its place.
        let row = |place: usize| vec![1.0, 1.0 + 10.0 * place as f64];
        let places = [vec![1, 3], vec![0, 2]];
        let by_part = places.iter().map(|places| places.iter().copied().map(row).collect()).collect();
        assert_eq!(halves(&places, by_part), [vec![5.0], vec![25.0]]);
        assert_eq!(halves(&[vec![0]], vec![vec![row(2)]]), [vec![20.0], vec![20.0]]);
    }
}
