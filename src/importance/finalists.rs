//! The best of several sets on all windows, without running all of them on all.

use super::basis::Basis;
use super::removals::Removals;
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
    let all = Basis::of_all(bases);
    let mut seen = bases.first().cloned().unwrap_or_default();
    let most = sets.len();
    let sets_in = |round: usize| (most >> round).max(FEWEST.min(most));
    let rest = parts.get_mut(1..).unwrap_or_default();
    let total = rest.iter().enumerate().map(|(round, part)| part.windows() * sets_in(round)).sum::<usize>();
    let mut before = 0;
    progress::stage(STAGE, total as u64, observer, |observer| {
        for (round, (part, basis)) in rest.iter_mut().zip(bases.iter().skip(1)).enumerate() {
            sort(&mut sets, |set| seen.shift(&all, set));
            sets.truncate(sets_in(round));
            let asked: Vec<Set> = sets.iter().map(|(set, _)| set.clone()).collect();
            let losses = part.mean_losses(&asked, &mut |done| {
                progress::advance(STAGE, before + done, total as u64, observer)
            })?;
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

/// By what the losses so far suggest for all windows.
fn sort(sets: &mut [(Set, f64)], shift: impl Fn(&Set) -> f64) {
    sets.sort_by(|a, b| (a.1 + shift(&a.0)).total_cmp(&(b.1 + shift(&b.0))));
}
