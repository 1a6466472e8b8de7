//! The best of several sets on all windows, without running all of them on all.

use super::basis::Basis;
use super::removals::Removals;
use super::search::check_losses;
use super::select::Set;
use crate::error::Result;
use crate::progress::{self, Observer};

const STAGE: &str = "finalists";
/// At least so many sets are compared on all windows.
const FEWEST: usize = 8;

/// The set of the lowest mean loss over the windows of all `parts`, by successive halving (Jamieson and Talwalkar,
/// 2016, arXiv 1502.07943): part by part, each as large as all before it, the better half goes on.
///
/// `sets` come with their mean losses on the first part, and `bases` are those of the parts.
pub(super) fn best_of(
    mut sets: Vec<(Set, f64)>,
    parts: &mut [Removals<'_>],
    bases: &[Basis],
    observer: &mut dyn Observer,
) -> Result<Option<Set>> {
    if sets.len() < 2 {
        return Ok(sets.pop().map(|(set, _)| set));
    }
    let all = Basis::of_all(bases);
    let mut seen = bases.first().cloned().unwrap_or_default();
    let most = sets.len();
    let total = sets_on_windows(most, parts);
    let rest = parts.get_mut(1..).unwrap_or_default();
    let mut before = 0;
    progress::stage(STAGE, total as u64, observer, |observer| {
        for (round, (part, basis)) in rest.iter_mut().zip(bases.iter().skip(1)).enumerate() {
            sort(&mut sets, |set| seen.shift(&all, set));
            sets.truncate(sets_in(most, round));
            let asked: Vec<Set> = sets.iter().map(|(set, _)| set.clone()).collect();
            let losses = part.mean_losses(&asked, &mut |done| {
                progress::advance(STAGE, before + done, total as u64, observer)
            })?;
            check_losses(&losses)?;
            before += (asked.len() * part.windows()) as u64;
            seen = Basis::of_all([&seen, basis]);
            let share = basis.windows as f64 / seen.windows as f64;
            for ((_, mean), loss) in sets.iter_mut().zip(losses) {
                *mean += share * (loss - *mean);
            }
        }
        Ok(())
    })?;
    sort(&mut sets, |_| 0.0);
    Ok(sets.into_iter().next().map(|(set, _)| set))
}

/// The sets that are still compared in a round, of `most` in the beginning.
fn sets_in(most: usize, round: usize) -> usize {
    (most >> round).max(FEWEST.min(most))
}

/// How many values comparing `most` sets takes, one a set and window.
fn sets_on_windows(most: usize, parts: &[Removals<'_>]) -> usize {
    parts.iter().skip(1).enumerate().map(|(round, part)| part.windows() * sets_in(most, round)).sum()
}

/// The block runs that comparing `most` sets takes at most, each of `blocks` on a window.
pub(super) fn cost(most: usize, parts: &[Removals<'_>], blocks: usize) -> f64 {
    (sets_on_windows(most, parts) * blocks) as f64
}

/// As many sets, at most `most` and at least one, as can be compared in `budget` block runs.
pub(super) fn affordable(most: usize, parts: &[Removals<'_>], blocks: usize, budget: f64) -> usize {
    (1..=most).rev().find(|&sets| cost(sets, parts, blocks) <= budget).unwrap_or(1)
}

/// By what the losses so far suggest for all windows.
fn sort(sets: &mut [(Set, f64)], shift: impl Fn(&Set) -> f64) {
    sets.sort_by(|a, b| (a.1 + shift(&a.0)).total_cmp(&(b.1 + shift(&b.0))));
}
