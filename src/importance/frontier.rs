//! The losses without many sets of units, block by block.
//!
//! The tree of sets is that of [`removals`](super::removals), and what sets have in common before their first difference
//! runs once here too. There one branch after the other is followed to its end, which keeps few states alive; here all
//! branches of all windows pass a block before any passes the next, so that each block is read once.

use super::removals::{Removed, Report, part};
use crate::data::Windows;
use crate::error::Result;
use crate::model::{BlockSource, States};

/// Sets that agree so far, by their index; the first names the branch.
type Branch = Vec<usize>;

/// The loss of each set of whole blocks on each window, a row a window, and the blocks computed on a window.
pub(super) fn losses(
    source: &dyn BlockSource,
    windows: &Windows,
    sets: &[Removed],
    report: Report<'_>,
) -> Result<(Vec<Vec<f64>>, f64)> {
    let mut frontier = Frontier {
        source,
        windows,
        sets,
        states: source.states(windows.len() * sets.len()),
        branches: vec![(0..sets.len()).collect()],
        runs: 0,
        steps: 0,
    };
    frontier.begin()?;
    frontier.pass_blocks(report)?;
    let rows = frontier.end(report)?;
    Ok((rows, frontier.runs as f64))
}

struct Frontier<'a> {
    source: &'a dyn BlockSource,
    windows: &'a Windows,
    sets: &'a [Removed],
    /// The state of every branch on every window.
    states: States,
    branches: Vec<Branch>,
    runs: u64,
    /// Windows that have passed a block, or the head.
    steps: u64,
}

impl Frontier<'_> {
    /// Where a branch has its state on a window.
    fn slot(&self, window: usize, branch: &[usize]) -> usize {
        window * self.sets.len() + branch.first().copied().unwrap_or_default()
    }

    fn begin(&mut self) -> Result<()> {
        let front = self.source.front()?;
        let pass = self.source.pass_over(self.windows.seq_len())?;
        for window in 0..self.windows.len() {
            let ids = self.windows.tensor(window, self.source.device())?;
            self.states.put(self.slot(window, &[]), front.embed(&ids, &pass)?)?;
        }
        Ok(())
    }

    fn pass_blocks(&mut self, report: Report<'_>) -> Result<()> {
        let source = self.source;
        let pass = source.pass_over(self.windows.seq_len())?;
        let mut place = 0;
        source.visit(&source.all(), &mut |block| {
            let parted: Vec<(Branch, Branch)> =
                self.branches.drain(..).map(|branch| part(self.sets, &branch, place)).collect();
            for window in 0..self.windows.len() {
                for (without, with) in &parted {
                    let of_both = without.iter().chain(with).min().copied().unwrap_or_default();
                    let x = self.states.take(self.slot(window, &[of_both]))?;
                    if !with.is_empty() {
                        self.states.put(self.slot(window, with), block.run(&x, &pass)?)?;
                        self.runs += 1;
                    }
                    if !without.is_empty() {
                        self.states.put(self.slot(window, without), x)?;
                    }
                }
                self.tell(report)?;
            }
            let both = parted.into_iter().flat_map(|(without, with)| [without, with]);
            self.branches.extend(both.filter(|branch| !branch.is_empty()));
            place += 1;
            Ok(())
        })
    }

    /// The loss at the end of every branch.
    fn end(&mut self, report: Report<'_>) -> Result<Vec<Vec<f64>>> {
        let back = self.source.back()?;
        let mut rows = Vec::with_capacity(self.windows.len());
        for window in 0..self.windows.len() {
            let targets = self.windows.window(window)?.get(1..).unwrap_or_default();
            let mut row = vec![0.0; self.sets.len()];
            for branch in &self.branches {
                let state = self.states.take(self.slot(window, branch))?;
                let loss = back.window_nll(&state, targets)? / targets.len() as f64;
                for &index in branch {
                    if let Some(slot) = row.get_mut(index) {
                        *slot = loss;
                    }
                }
            }
            rows.push(row);
            self.tell(report)?;
        }
        Ok(rows)
    }

    /// Tells how far the work is, in values.
    fn tell(&mut self, report: Report<'_>) -> Result<()> {
        self.steps += 1;
        let (windows, sets) = (self.windows.len() as u64, self.sets.len() as u64);
        let all = windows * (self.source.architecture().depth() as u64 + 1);
        report(windows * sets * self.steps / all.max(1))
    }
}
