//! How much two units cover for each other.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::basis::Basis;
use super::gate_walk::{Draw, Drawn, walk};
use super::removals::{Removals, Removed};
use super::{check_units, statistics};
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::{Decoder, Unit};
use crate::progress::{self, Observer};

/// Pairwise coupling of units, in nats per token.
///
/// Off the diagonal `C_ij = L(i, j off) − L(i off) − L(j off) + L(all on)`: positive where two units cover for each
/// other, so that both must not go; negative where one is useless without the other. On the diagonal
/// `a_i = L(i off) − L(all on)`. Symmetric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Coupling {
    /// The matrix, row by row.
    pub matrix: Vec<Vec<f64>>,
    /// The loss with all units on.
    pub dense_loss: f64,
    /// Blocks computed on a window; a backward counts as two.
    pub block_runs: f64,
}

/// Sets that were measured: none, singles, pairs; and their losses, a row a window.
pub(super) struct Sets {
    pub sets: Vec<Removed>,
    pub losses: Vec<Vec<f64>>,
}

const EXACT: &str = "coupling";
const GRADIENTS: &str = "coupling by gradients";

impl Coupling {
    /// Measures every pair: `n(n − 1) / 2` partial forwards that share what they have in common, about a third of
    /// the block runs of as many whole ones. `units` are all blocks, or all halves.
    ///
    /// # Errors
    /// Other units, a failed computation, a loss that is not finite, or a cancelling observer.
    pub fn exact(
        decoder: &Decoder,
        windows: &Windows,
        units: &[Unit],
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        check_units(units, decoder.depth())?;
        let mut removals = Removals::new(decoder, windows, units)?;
        Ok(Self::measure(&mut removals, units.len(), observer)?.1)
    }

    /// As [`exact`](Self::exact), with all sets that were measured.
    pub(super) fn measure(
        removals: &mut Removals<'_>,
        n: usize,
        observer: &mut dyn Observer,
    ) -> Result<(Sets, Self)> {
        let mut sets = vec![removals.set(&[])];
        sets.extend((0..n).map(|place| removals.set(&[place])));
        sets.extend(pairs(n).into_iter().map(|(i, j)| removals.set(&[i, j])));
        let total = (removals.windows() * sets.len()) as u64;
        let losses = progress::counted(EXACT, total, observer, |report| removals.losses(&sets, report))?;
        let coupling = Self::from_losses(n, &statistics::means(&losses), removals.block_runs())?;
        Ok((Sets { sets, losses }, coupling))
    }

    /// The same pairs with what singles cost on other windows.
    pub(super) fn with_singles(mut self, basis: &Basis) -> Result<Self> {
        for (place, increase) in basis.increases().enumerate() {
            if !increase.is_finite() {
                let what = format!("the loss without block {place}");
                return Err(Error::NotFinite { what, value: increase });
            }
            self.set(place, place, increase);
        }
        self.dense_loss = basis.dense;
        Ok(self)
    }

    /// The matrix from the losses of no removal, of every single one, and of every pair, in the order of
    /// [`pairs`].
    fn from_losses(units: usize, losses: &[f64], block_runs: f64) -> Result<Self> {
        let (dense, rest) = losses.split_first().map_or((f64::NAN, &[][..]), |(dense, rest)| (*dense, rest));
        if let Some(loss) =
            losses.iter().find(|loss| !loss.is_finite()).or(Some(&dense).filter(|d| d.is_nan()))
        {
            return Err(Error::NotFinite { what: "a loss of the coupling matrix".into(), value: *loss });
        }
        let (singles, doubles) = rest.split_at(units.min(rest.len()));
        let mut coupling = Self { matrix: vec![vec![0.0; units]; units], dense_loss: dense, block_runs };
        for (place, single) in singles.iter().enumerate() {
            coupling.set(place, place, single - dense);
        }
        for ((i, j), double) in pairs(units).into_iter().zip(doubles) {
            coupling.set(i, j, double - dense - coupling.get(i, i) - coupling.get(j, j));
        }
        Ok(coupling)
    }

    /// Estimates every pair from gate gradients: one backward pass with each unit off,
    /// `C_ij ≈ −(∂L/∂g_j with i off − ∂L/∂g_j)`, symmetrised by the mean. The diagonal is measured.
    ///
    /// # Errors
    /// As [`exact`](Self::exact).
    pub fn from_gate_gradients(
        decoder: &Decoder,
        windows: &Windows,
        units: &[Unit],
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        check_units(units, decoder.depth())?;
        let n = units.len();
        let mut losses = vec![0.0; n + 1];
        let mut gradients = vec![vec![0.0; n]; n + 1];
        let mut block_runs = 0.0;
        let share = 1.0 / (windows.len() * (windows.seq_len() - 1)) as f64;
        progress::steps(GRADIENTS, windows.len() * (n + 1), observer, |step| {
            let (window, off) = (step / (n + 1), step % (n + 1));
            // The last of each window's passes is the one with all units on.
            let gates = (0..n).map(|place| if place == off { 0.0 } else { 1.0 }).collect();
            let draw = Draw { window, drawn: Drawn { gates, slopes: vec![1.0; n] } };
            for walked in walk(decoder, windows, units, &[draw], false, &mut || Ok(()))? {
                let mut values = std::iter::once(&walked.loss).chain(&walked.gradients);
                if let Some(&value) = values.find(|value| !value.is_finite()) {
                    let what = format!("the loss without unit {off} of {n}, or one of its gradients,");
                    return Err(Error::NotFinite { what, value });
                }
                block_runs += walked.block_runs;
                if let (Some(sum), Some(row)) = (losses.get_mut(off), gradients.get_mut(off)) {
                    *sum += walked.loss * share;
                    row.iter_mut().zip(walked.gradients).for_each(|(sum, found)| *sum += found * share);
                }
            }
            Ok(())
        })?;
        let dense = losses.pop().unwrap_or_default();
        let base = gradients.pop().unwrap_or_default();
        let half = |i: usize, j: usize| {
            let at = |row: &[f64]| row.get(j).copied().unwrap_or_default();
            at(&base) - gradients.get(i).map_or(0.0, |row| at(row))
        };
        let mut coupling = Self { matrix: vec![vec![0.0; n]; n], dense_loss: dense, block_runs };
        for (place, loss) in losses.iter().enumerate() {
            coupling.set(place, place, loss - dense);
        }
        for (i, j) in pairs(n) {
            coupling.set(i, j, f64::midpoint(half(i, j), half(j, i)));
        }
        Ok(coupling)
    }

    /// `C_ij`, or `a_i` where both are the same; 0 outside of the matrix.
    #[must_use]
    pub fn get(&self, i: usize, j: usize) -> f64 {
        self.matrix.get(i).and_then(|row| row.get(j)).copied().unwrap_or_default()
    }

    fn set(&mut self, i: usize, j: usize, value: f64) {
        for (i, j) in [(i, j), (j, i)] {
            if let Some(slot) = self.matrix.get_mut(i).and_then(|row| row.get_mut(j)) {
                *slot = value;
            }
        }
    }

    /// What removing `set` costs by singles and pairs: `Σ a_i + Σ_{i<j} C_ij`.
    #[must_use]
    pub fn cost(&self, set: &[usize]) -> f64 {
        let row = |(place, &i): (usize, &usize)| {
            self.get(i, i) + set.iter().skip(place + 1).map(|&j| self.get(i, j)).sum::<f64>()
        };
        set.iter().enumerate().map(row).sum()
    }

    /// The values above the diagonal, row by row.
    #[must_use]
    pub fn pairs(&self) -> Vec<f64> {
        pairs(self.matrix.len()).into_iter().map(|(i, j)| self.get(i, j)).collect()
    }

    /// A coupling matrix for a terminal with 256 colours: red where two units cover for each other, blue where one is
    /// useless without the other; the scale is that of the largest pair.
    #[must_use]
    pub fn heat_map(matrix: &[Vec<f64>]) -> String {
        let above = matrix.iter().enumerate().flat_map(|(i, row)| row.iter().skip(i + 1));
        let largest = above.fold(0.0f64, |largest, value| largest.max(value.abs()));
        let mut map = String::new();
        for (i, row) in matrix.iter().enumerate() {
            let _ = write!(map, "{i:>4} ");
            for (j, &value) in row.iter().enumerate() {
                // The root spreads small values over the scale; most pairs are far below the largest.
                let shade =
                    ((value.abs() / largest.max(f64::MIN_POSITIVE)).sqrt() * 5.0).round().min(5.0) as u8;
                let colour = match (i == j, value > 0.0) {
                    (true, _) => 244,
                    (_, true) => 16 + 36 * shade,
                    (_, false) => 16 + shade,
                };
                let _ = write!(map, "\x1b[48;5;{colour}m  \x1b[0m");
            }
            map.push('\n');
        }
        let _ =
            writeln!(map, "     red: cover for each other, blue: need each other, largest {largest:.3} nats");
        map
    }
}

/// All pairs `i < j` of places below `n`, row by row.
fn pairs(n: usize) -> Vec<(usize, usize)> {
    (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j))).collect()
}
