//! What a decoder computes without some of its units, for many sets of units at once.
//!
//! Sets are walked as a tree: what several have in common before their first difference runs once. Between calls the
//! path of one set, the base, may be kept, so that a search that removes unit after unit never runs again what it
//! has. Windows have nothing in common and run side by side.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use candle_core::Tensor;
use rayon::prelude::*;

use super::memo::Memo;
use super::statistics;
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::{Decoder, Part, Pass, Unit};

/// Runs a decoder without sets of units over windows.
pub(super) struct Removals<'a> {
    shared: Shared<'a>,
    windows: Vec<Window>,
}

/// What is the same for all windows.
struct Shared<'a> {
    decoder: &'a Decoder,
    units: &'a [Unit],
    pass: Pass<'a>,
    base: Removed,
    memo: Option<&'a Memo>,
}

/// One window, and what is known of it.
struct Window {
    ids: Tensor,
    targets: Vec<u32>,
    sha256: String,
    /// The input of every unit on the path of the base, as far as it is known; empty where it is not kept.
    trunk: Vec<Option<Tensor>>,
    half_runs: u64,
}

/// A set of units, by place: true where the unit is removed.
pub(super) type Removed = Vec<bool>;

/// Gives a set's value on a window, from the window's index, its targets, and the final state before the final norm,
/// `(1, seq, hidden)`.
pub(super) type Leaf<'a> = &'a (dyn Fn(usize, &[u32], &Tensor) -> Result<f64> + Sync);

/// Hears from time to time how many values are there; an error ends the work.
pub(super) type Report<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

/// The longest time between two reports.
const TICK: Duration = Duration::from_millis(20);

impl<'a> Removals<'a> {
    pub(super) fn new(decoder: &'a Decoder, windows: &Windows, units: &'a [Unit]) -> Result<Self> {
        let window = |index: usize| {
            let targets = windows.window(index)?.get(1..).unwrap_or_default().to_vec();
            let ids = windows.tensor(index, decoder.device())?;
            let sha256 = windows.window_sha256(index)?;
            Ok(Window { ids, targets, sha256, trunk: Vec::new(), half_runs: 0 })
        };
        let pass = decoder.pass(0, windows.seq_len())?;
        let shared = Shared { decoder, units, pass, base: vec![false; units.len()], memo: None };
        let windows = (0..windows.len()).map(window).collect::<Result<_>>()?;
        Ok(Self { shared, windows })
    }

    /// Keeps every value in a memo, and takes from there what was measured before.
    pub(super) fn remembering(mut self, memo: Option<&'a Memo>) -> Self {
        self.shared.memo = memo;
        self
    }

    /// Blocks computed on a window so far; half a block counts half.
    pub(super) fn block_runs(&self) -> f64 {
        self.windows.iter().map(|window| window.half_runs).sum::<u64>() as f64 / 2.0
    }

    /// The block runs that the values of these sets take where nothing is kept and there is no base.
    pub(super) fn runs_of(&self, sets: &[Removed]) -> f64 {
        let all: Vec<usize> = (0..sets.len()).collect();
        (self.windows.len() * half_runs(self.shared.units, sets, 0, &all)) as f64 / 2.0
    }

    /// How many windows there are.
    pub(super) fn windows(&self) -> usize {
        self.windows.len()
    }

    /// The set of these places.
    pub(super) fn set(&self, places: &[usize]) -> Removed {
        (0..self.shared.units.len()).map(|place| places.contains(&place)).collect()
    }

    /// Keeps the path of the base from now on: `(windows, units, seq, hidden)` numbers in f32.
    pub(super) fn keep_base(mut self) -> Self {
        for window in &mut self.windows {
            window.trunk = vec![None; self.shared.units.len() + 1];
        }
        self
    }

    /// Makes `base` the set whose path is kept; what it has in common with the last one stays known.
    pub(super) fn rebase(&mut self, base: Removed) {
        let common = self.shared.base.iter().zip(&base).take_while(|(old, new)| old == new).count();
        for window in &mut self.windows {
            window.trunk.iter_mut().skip(common + 1).for_each(|state| *state = None);
        }
        self.shared.base = base;
    }

    /// The mean loss of each set over all windows, in nats per predicted token.
    pub(super) fn mean_losses(&mut self, sets: &[Removed], report: Report<'_>) -> Result<Vec<f64>> {
        Ok(statistics::means(&self.losses(sets, report)?))
    }

    /// The loss of each set on each window: a row a window.
    pub(super) fn losses(&mut self, sets: &[Removed], report: Report<'_>) -> Result<Vec<Vec<f64>>> {
        let decoder = self.shared.decoder;
        self.values(
            sets,
            &|_, targets, state| Ok(decoder.window_nll(state, targets)? / targets.len() as f64),
            report,
        )
    }

    /// What `leaf` says of each set on each window, a row a window; equal sets are computed once.
    pub(super) fn values(
        &mut self,
        sets: &[Removed],
        leaf: Leaf<'_>,
        report: Report<'_>,
    ) -> Result<Vec<Vec<f64>>> {
        let (done, stop, finished) = (AtomicU64::new(0), AtomicBool::new(false), AtomicBool::new(false));
        let (shared, windows) = (&self.shared, &mut self.windows);
        if let Some(memo) = shared.memo {
            memo.start_clock();
        }
        let mut rows: Result<Vec<Vec<f64>>> = Ok(Vec::new());
        let mut told = Ok(());
        rayon::in_place_scope(|scope| {
            scope.spawn(|_| {
                let _finished = SetOnDrop(&finished);
                let row = |(index, window): (usize, &mut Window)| {
                    let mut descent = Descent {
                        shared,
                        window,
                        index,
                        sets,
                        leaf,
                        values: vec![0.0; sets.len()],
                        done: &done,
                        stop: &stop,
                    };
                    descent.run()?;
                    Ok(descent.values)
                };
                rows = windows.par_iter_mut().enumerate().map(row).collect();
            });
            let mut tick = Duration::from_micros(50);
            while !finished.load(Ordering::Acquire) {
                // Inside of a pool this thread may be the only one that there is.
                if rayon::yield_now() == Some(rayon::Yield::Executed) {
                    continue;
                }
                std::thread::sleep(tick);
                tick = (tick * 2).min(TICK);
                if told.is_ok() {
                    told = report(done.load(Ordering::Relaxed));
                    stop.store(told.is_err(), Ordering::Relaxed);
                }
            }
        });
        told?;
        let rows = rows?;
        report(done.load(Ordering::Relaxed))?;
        Ok(rows)
    }
}

/// Half blocks computed from `place` on for a group of sets that agree before it.
fn half_runs(units: &[Unit], sets: &[Removed], mut place: usize, group: &[usize]) -> usize {
    let (mut group, mut runs) = (group.to_vec(), 0);
    while let Some(unit) = units.get(place).filter(|_| !group.is_empty()) {
        let (without, with) = part(sets, &group, place);
        place += 1;
        if with.is_empty() {
            continue;
        }
        runs += half_units(*unit) as usize + half_runs(units, sets, place, &without);
        group = with;
    }
    runs
}

/// Of a group of sets, by their index: those that remove the unit at `place`, and those that run it.
pub(super) fn part(sets: &[Removed], group: &[usize], place: usize) -> (Vec<usize>, Vec<usize>) {
    let removes =
        |index: &&usize| sets.get(**index).and_then(|set| set.get(place)).copied().unwrap_or_default();
    group.iter().partition(removes)
}

/// Half blocks in a unit.
fn half_units(unit: Unit) -> u64 {
    if unit.part == Part::Whole { 2 } else { 1 }
}

/// Tells that the work is over, whatever became of it.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// One window's way through the tree of sets.
struct Descent<'w, 'a> {
    shared: &'w Shared<'a>,
    window: &'w mut Window,
    index: usize,
    sets: &'w [Removed],
    leaf: Leaf<'w>,
    values: Vec<f64>,
    done: &'w AtomicU64,
    stop: &'w AtomicBool,
}

impl Descent<'_, '_> {
    fn run(&mut self) -> Result<()> {
        let Some(memo) = self.shared.memo else {
            let all: Vec<usize> = (0..self.sets.len()).collect();
            return self.descend_from_the_top(&all);
        };
        let mut unknown = Vec::new();
        for (index, (set, slot)) in self.sets.iter().zip(&mut self.values).enumerate() {
            match memo.value(&self.window.sha256, set) {
                Some(value) => *slot = value,
                None => unknown.push(index),
            }
        }
        self.done.fetch_add((self.sets.len() - unknown.len()) as u64, Ordering::Relaxed);
        if unknown.is_empty() {
            return Ok(());
        }
        let before = self.window.half_runs;
        self.descend_from_the_top(&unknown)?;
        let measured: Vec<(&[bool], f64)> = (unknown.iter())
            .filter_map(|&index| Some((self.sets.get(index)?.as_slice(), *self.values.get(index)?)))
            .collect();
        memo.add(&self.window.sha256, &measured, (self.window.half_runs - before) as f64 / 2.0)
    }

    /// Takes a group of sets from the embedding to the end.
    fn descend_from_the_top(&mut self, group: &[usize]) -> Result<()> {
        let state = self.shared.decoder.embed(&self.window.ids, &self.shared.pass)?;
        self.descend(0, state, group, true)
    }

    /// Takes a group of sets that agree before `place` from there to the end.
    fn descend(
        &mut self,
        mut place: usize,
        mut state: Tensor,
        group: &[usize],
        mut on_trunk: bool,
    ) -> Result<()> {
        let mut group = group.to_vec();
        while let Some(&unit) = self.shared.units.get(place) {
            let (without, with) = part(self.sets, &group, place);
            let base_removes = self.shared.base.get(place).copied().unwrap_or_default();
            if with.is_empty() {
                on_trunk &= base_removes;
            } else {
                if !without.is_empty() {
                    self.descend(place + 1, state.clone(), &without, on_trunk && base_removes)?;
                }
                on_trunk &= !base_removes;
                state = self.unit(place, unit, &state, on_trunk)?;
                group = with;
            }
            place += 1;
        }
        if self.stop.load(Ordering::Relaxed) {
            // Only ends the windows: the caller hears what the report failed with.
            return Err(Error::Cancelled { stage: "removals" });
        }
        let value = (self.leaf)(self.index, &self.window.targets, &state)?;
        self.done.fetch_add(group.len() as u64, Ordering::Relaxed);
        for index in group {
            if let Some(slot) = self.values.get_mut(index) {
                *slot = value;
            }
        }
        Ok(())
    }

    /// A unit's output, kept and taken from memory where it lies on the path of the base.
    fn unit(&mut self, place: usize, unit: Unit, x: &Tensor, on_trunk: bool) -> Result<Tensor> {
        let known = self.window.trunk.get_mut(place + 1).filter(|_| on_trunk);
        if let Some(Some(state)) = &known {
            return Ok(state.clone());
        }
        let state = self.shared.decoder.run_unit(unit, x, &self.shared.pass)?;
        self.window.half_runs += half_units(unit);
        if let Some(slot) = known {
            *slot = Some(state.clone());
        }
        Ok(state)
    }
}
