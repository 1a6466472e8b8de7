//! Searching for the set to remove, decided by true losses.

use super::select::{Set, swap_search, swaps};
use super::surrogate::Surrogate;
use crate::error::{Error, Result};

/// Sizes between pairs and the size asked for at which sets are measured on the way up.
const STEPS: usize = 12;
/// The share of the budget that the way up may take.
const WAY_UP: f64 = 0.6;
/// Sets of one size that are carried over to the next.
const BEAM: usize = 3;
/// How many standard deviations below its expectation a set is hoped to be, where sets are measured to learn.
const HOPE: f64 = 1.0;

/// A search for the set of least true loss, led by a surrogate that learns from every loss measured.
///
/// Singles and pairs say little of large sets, so sets grow: at every size on the way up the most promising
/// extensions of the best sets so far, and their neighbours, are measured, and what that shows of blocks that cover
/// for each other leads the next size.
pub(super) struct Search<'a> {
    /// Sets measured so far, with their losses.
    pub measured: Vec<(Set, f64)>,
    pub dense_loss: f64,
    /// Places that may be removed.
    pub free: &'a [usize],
    pub count: usize,
    /// Sets measured in each round.
    pub batch: usize,
    /// Rounds without improvement before the search ends.
    pub patience: usize,
}

/// Gives the losses of sets, or `None` where the budget is spent.
type Measure<'a> = dyn FnMut(&[Set]) -> Result<Option<Vec<f64>>> + 'a;

impl Search<'_> {
    /// Measures, round by round, the most promising sets, until `patience` rounds bring no better one or the budget
    /// is spent: `measure` gives the losses of sets, or `None` where more than the given share of it is. Returns
    /// the measured sets of the right size, best first.
    pub(super) fn run(
        &mut self,
        starts: &[Set],
        mut measure: impl FnMut(&[Set], f64) -> Result<Option<Vec<f64>>>,
    ) -> Result<Vec<(Set, f64)>> {
        // Whatever the budget, there is a set to return.
        let mut unknown: Vec<Set> = starts.iter().filter(|set| !self.knows(set)).cloned().collect();
        unknown.sort();
        unknown.dedup();
        if let Some(losses) = measure(&unknown, f64::INFINITY)? {
            self.add(unknown, losses)?;
        }
        let above = self.count.saturating_sub(3);
        for step in 0..above.min(STEPS) {
            let size = 3 + step * above / above.min(STEPS);
            self.improve(size, &[], 1, &mut |sets| measure(sets, WAY_UP))?;
        }
        self.improve(self.count, starts, self.patience, &mut |sets| measure(sets, 1.0))?;
        Ok(self.best(self.count, usize::MAX))
    }

    /// Rounds at one size, until `patience` of them bring nothing better.
    fn improve(
        &mut self,
        size: usize,
        starts: &[Set],
        patience: usize,
        measure: &mut Measure<'_>,
    ) -> Result<()> {
        let lowest = |search: &Self| search.best(size, 1).first().map_or(f64::INFINITY, |(_, loss)| *loss);
        let (mut stale, mut best) = (0, lowest(self));
        while stale < patience {
            let batch = self.propose(size, starts);
            if batch.is_empty() {
                break;
            }
            let Some(losses) = measure(&batch)? else { break };
            self.add(batch, losses)?;
            let now = lowest(self);
            stale = if now < best { 0 } else { stale + 1 };
            best = best.min(now);
        }
        Ok(())
    }

    fn add(&mut self, sets: Vec<Set>, losses: Vec<f64>) -> Result<()> {
        check_losses(&losses)?;
        self.measured.extend(sets.into_iter().zip(losses));
        Ok(())
    }

    fn knows(&self, set: &Set) -> bool {
        self.measured.iter().any(|(measured, _)| measured == set)
    }

    /// The measured sets of this size that may be removed, best first, at most `count`.
    fn best(&self, size: usize, count: usize) -> Vec<(Set, f64)> {
        let fits = |set: &Set| {
            size_of(set) == size
                && set.iter().enumerate().all(|(place, removed)| !removed || self.free.contains(&place))
        };
        let mut sets: Vec<_> = self.measured.iter().filter(|(set, _)| fits(set)).cloned().collect();
        sets.sort_by(|a, b| a.1.total_cmp(&b.1));
        sets.truncate(count);
        sets
    }

    /// The largest measured sets that are smaller than `size`, the best few.
    fn below(&self, size: usize) -> Vec<Set> {
        let sizes = (0..size).rev().map(|size| self.best(size, BEAM)).find(|sets| !sets.is_empty());
        sets(sizes.unwrap_or_default())
    }

    /// Sets of this size not yet measured: the ones that the surrogate expects to be best, and as many that may be
    /// best for all that is known. Candidates are the local optima of the surrogate and of the truth so far, their
    /// neighbours, and every extension of the best smaller sets.
    fn propose(&self, size: usize, starts: &[Set]) -> Vec<Set> {
        let surrogate = Surrogate::fit(&self.measured, self.dense_loss);
        let predict = |set: &Set| surrogate.predict(set);
        let known = sets(self.best(size, BEAM));
        let below = self.below(size);
        let grown = below.iter().map(|set| grow(set.clone(), size, self.free, &predict));
        let mut optima: Vec<Set> = (starts.iter().cloned().chain(known.clone()).chain(grown))
            .map(|set| swap_search(set, self.free, &predict))
            .collect();
        optima.extend(known);
        let extended = below.iter().flat_map(|set| extensions(set, self.free));
        let mut candidates: Vec<Set> = (optima.iter().flat_map(|set| swaps(set, self.free)))
            .chain(optima.clone())
            .chain(extended.filter(|set| size_of(set) == size))
            .collect();
        candidates.sort();
        candidates.dedup();
        candidates.retain(|set| !self.knows(set));
        let mut ranked: Vec<(f64, Set)> = candidates.into_iter().map(|set| (predict(&set), set)).collect();
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        let rest = ranked.split_off(ranked.len().min(self.batch.div_ceil(2)));
        let hoped = rest.into_iter().map(|(loss, set)| (loss - HOPE * surrogate.deviation(&set), set));
        let mut hoped: Vec<(f64, Set)> = hoped.collect();
        hoped.sort_by(|a, b| a.0.total_cmp(&b.0));
        ranked.into_iter().chain(hoped).take(self.batch).map(|(_, set)| set).collect()
    }
}

pub(super) fn check_losses(losses: &[f64]) -> Result<()> {
    match losses.iter().find(|loss| !loss.is_finite()) {
        Some(&value) => Err(Error::NotFinite { what: "the loss of a set of removals".into(), value }),
        None => Ok(()),
    }
}

fn sets(measured: Vec<(Set, f64)>) -> Vec<Set> {
    measured.into_iter().map(|(set, _)| set).collect()
}

fn size_of(set: &Set) -> usize {
    set.iter().filter(|removed| **removed).count()
}

/// `set` with every free place added, one at a time.
fn extensions(set: &Set, free: &[usize]) -> Vec<Set> {
    let has = |place: usize| set.get(place).copied().unwrap_or_default();
    let with = |added: usize| (0..set.len()).map(|place| has(place) || place == added).collect::<Set>();
    free.iter().copied().filter(|&place| !has(place)).map(with).collect()
}

/// `set` with the cheapest places added one after the other, up to `size`.
fn grow(mut set: Set, size: usize, free: &[usize], cost: &dyn Fn(&Set) -> f64) -> Set {
    while size_of(&set) < size {
        let best = extensions(&set, free).into_iter().min_by(|a, b| cost(a).total_cmp(&cost(b)));
        let Some(best) = best else { break };
        set = best;
    }
    set
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_lossless)]
mod tests {
    use super::*;
    use crate::importance::coupling::Coupling;
    use crate::importance::select::{membership, places};

    #[test]
    fn the_search_finds_a_minimum_that_pairs_cannot_see() {
        // Pairs say that 0, 1 and 2 are the best; together they are far worse.
        let coupling = Coupling {
            matrix: (0..8)
                .map(|i| (0..8).map(|j| if i == j { 0.1 + 0.02 * i as f64 } else { 0.0 }).collect())
                .collect(),
            dense_loss: 3.0,
            block_runs: 0.0,
        };
        let truth = |set: &Set| {
            3.0 + coupling.cost(&places(set)) + if set[0] && set[1] && set[2] { 1.0 } else { 0.0 }
        };
        let free: Vec<usize> = (0..8).collect();
        let mut measured: Vec<(Set, f64)> = vec![(membership(8, &[]), 3.0)];
        measured.extend((0..8).map(|i| membership(8, &[i])).map(|set| (set.clone(), truth(&set))));
        measured.extend(
            (0..8)
                .flat_map(|i| (0..i).map(move |j| membership(8, &[i, j])))
                .map(|set| (set.clone(), truth(&set))),
        );
        let mut search = Search { measured, dense_loss: 3.0, free: &free, count: 3, batch: 4, patience: 2 };
        let start = membership(8, &coupling.select(3, &[]).unwrap());
        assert_eq!(places(&start), [0, 1, 2]);
        let mut calls = 0;
        let found = search
            .run(&[start], |sets, _| {
                calls += sets.len();
                Ok(Some(sets.iter().map(truth).collect()))
            })
            .unwrap();
        assert_eq!(places(&found[0].0), [0, 1, 3]);
        assert!(calls < 30, "{calls} of 56 sets were measured");
    }
}
