//! What a decoder computes without some of its units, for many sets of units at once.
//!
//! Sets are walked as a tree: what several have in common before their first difference runs once. Between calls the
//! path of one set, the base, may be kept, so that a search that removes unit after unit never runs again what it
//! has.

use candle_core::Tensor;

use crate::data::Windows;
use crate::error::Result;
use crate::model::{Decoder, Part, Pass, Unit};

/// Runs a decoder without sets of units over windows.
pub(super) struct Removals<'a> {
    decoder: &'a Decoder,
    units: &'a [Unit],
    inputs: Vec<(Tensor, Vec<u32>)>,
    pass: Pass<'a>,
    base: Vec<bool>,
    /// For each window, the input of every unit on the path of the base, as far as it is known.
    trunks: Vec<Vec<Option<Tensor>>>,
    half_runs: u64,
}

/// A set of units, by place: true where the unit is removed.
pub(super) type Removed = Vec<bool>;

impl<'a> Removals<'a> {
    pub(super) fn new(decoder: &'a Decoder, windows: &Windows, units: &'a [Unit]) -> Result<Self> {
        let inputs = (0..windows.len())
            .map(|index| Ok((windows.tensor(index, decoder.device())?, windows.window(index)?.to_vec())))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            decoder,
            units,
            pass: decoder.pass(0, windows.seq_len())?,
            base: vec![false; units.len()],
            trunks: Vec::new(),
            inputs,
            half_runs: 0,
        })
    }

    /// Adds block runs that were spent elsewhere for the same purpose.
    pub(super) fn charge(&mut self, block_runs: f64) {
        self.half_runs += (2.0 * block_runs) as u64;
    }

    /// Blocks computed on a window so far; half a block counts half.
    pub(super) fn block_runs(&self) -> f64 {
        self.half_runs as f64 / 2.0
    }

    /// The set of these places.
    pub(super) fn set(&self, places: &[usize]) -> Removed {
        (0..self.units.len()).map(|place| places.contains(&place)).collect()
    }

    /// Keeps the path of the base from now on, at one state a unit and window.
    pub(super) fn keep_base(mut self) -> Self {
        self.trunks = vec![vec![None; self.units.len() + 1]; self.inputs.len()];
        self
    }

    /// Makes `base` the set whose path is kept; what it has in common with the last one stays known.
    pub(super) fn rebase(&mut self, base: Removed) {
        let common = self.base.iter().zip(&base).take_while(|(old, new)| old == new).count();
        for trunk in &mut self.trunks {
            trunk.iter_mut().skip(common + 1).for_each(|state| *state = None);
        }
        self.base = base;
    }

    /// Calls `leaf` with each set's final state (before the final norm, `(1, seq, hidden)`) on window `window`;
    /// equal sets are computed once. The results come in the order of `sets`.
    pub(super) fn on_window(
        &mut self,
        window: usize,
        sets: &[Removed],
        leaf: &mut dyn FnMut(&Tensor) -> Result<f64>,
    ) -> Result<Vec<f64>> {
        let mut results = vec![0.0; sets.len()];
        let Some((ids, _)) = self.inputs.get(window) else { return Ok(results) };
        let start = self.decoder.embed(ids, &self.pass)?;
        let all: Vec<usize> = (0..sets.len()).collect();
        let mut branch = Branch { window, sets, leaf, results: &mut results };
        self.descend(&mut branch, 0, start, &all, true)?;
        Ok(results)
    }

    /// The mean loss of each set on window `window`, in nats per predicted token.
    pub(super) fn losses(&mut self, window: usize, sets: &[Removed]) -> Result<Vec<f64>> {
        let decoder = self.decoder;
        let targets: Vec<u32> =
            self.inputs.get(window).map(|(_, ids)| ids.iter().skip(1).copied().collect()).unwrap_or_default();
        self.on_window(window, sets, &mut |state| {
            let rows = state.squeeze(0)?.narrow(0, 0, targets.len())?;
            let losses = decoder.nll(&rows, &targets)?.to_vec1::<f32>()?;
            Ok(losses.into_iter().map(f64::from).sum::<f64>() / targets.len() as f64)
        })
    }

    /// Takes a group of sets that agree before `place` from there to the end.
    fn descend(
        &mut self,
        branch: &mut Branch<'_>,
        mut place: usize,
        mut state: Tensor,
        group: &[usize],
        mut on_trunk: bool,
    ) -> Result<()> {
        let mut group = group.to_vec();
        while let Some(&unit) = self.units.get(place) {
            let removes = |&index: &usize| {
                branch.sets.get(index).and_then(|set| set.get(place)).copied().unwrap_or_default()
            };
            let (without, with): (Vec<usize>, Vec<usize>) = group.iter().partition(|index| removes(index));
            let base_removes = self.base.get(place).copied().unwrap_or_default();
            if with.is_empty() {
                on_trunk &= base_removes;
            } else {
                if !without.is_empty() {
                    self.descend(branch, place + 1, state.clone(), &without, on_trunk && base_removes)?;
                }
                on_trunk &= !base_removes;
                state = self.run(branch.window, place, unit, &state, on_trunk)?;
                group = with;
            }
            place += 1;
        }
        let result = (branch.leaf)(&state)?;
        for index in group {
            if let Some(slot) = branch.results.get_mut(index) {
                *slot = result;
            }
        }
        Ok(())
    }

    /// A unit's output, kept and taken from memory where it lies on the path of the base.
    fn run(&mut self, window: usize, place: usize, unit: Unit, x: &Tensor, on_trunk: bool) -> Result<Tensor> {
        let known =
            self.trunks.get_mut(window).and_then(|trunk| trunk.get_mut(place + 1)).filter(|_| on_trunk);
        if let Some(Some(state)) = &known {
            return Ok(state.clone());
        }
        let state = self.decoder.run_unit(unit, x, &self.pass)?;
        self.half_runs += if unit.part == Part::Whole { 2 } else { 1 };
        if let Some(slot) = known {
            *slot = Some(state.clone());
        }
        Ok(state)
    }
}

/// What stays the same on the way down one window's tree.
struct Branch<'a> {
    window: usize,
    sets: &'a [Removed],
    leaf: &'a mut dyn FnMut(&Tensor) -> Result<f64>,
    results: &'a mut [f64],
}
