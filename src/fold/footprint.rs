//! What folding takes in memory beside the dense model, counted before it begins.

use crate::model::{Architecture, Projection};
use crate::plan::{Own, Ranks};

/// Bytes of a number in f64, in which means are taken and starts are computed.
const WIDE: u64 = 8;

/// Counts states, matrices and workspace.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FoldFootprint<'a> {
    pub arch: &'a Architecture,
    /// Calibration windows.
    pub windows: u64,
    /// Bytes of one hidden state of a window.
    pub state: u64,
}

impl FoldFootprint<'_> {
    /// The matrices that groups are given, at most one block's for two, and one of them in the making. `block` are the
    /// bytes of a block's matrices.
    pub(crate) fn made(&self, block: u64) -> u64 {
        (self.arch.depth() as u64 / 2 + 1) * block + 3 * WIDE * self.largest()
    }

    /// The input of every block on every window, and what the final norm sees: ties are measured from there on.
    pub(crate) fn ties(&self) -> u64 {
        (self.arch.depth() as u64 + 1).saturating_mul(self.windows).saturating_mul(self.state)
    }

    /// Starting what blocks keep for themselves: a state of every window, the moments of a block's inputs, and one
    /// projection taken apart.
    pub(crate) fn starts(&self, own: Own) -> u64 {
        if !own.adapts() {
            return 0;
        }
        let (mut numbers, mut states) = (4 * self.largest(), 0);
        let inputs = [Projection::Q, Projection::O, Projection::Up, Projection::Down];
        let squares = inputs.into_iter().filter_map(|at| self.arch.projection_shape(at)).map(|(_, input)| {
            let input = input as u64;
            input * input
        });
        let widest = squares.clone().max().unwrap_or_default();
        let spread = own.residual.is_some_and(|residual| matches!(residual.ranks, Ranks::Parameters(_)));
        if own.needs_windows() || spread {
            states = self.windows.saturating_mul(self.state);
            // A sum is replaced by a new one.
            numbers += squares.sum::<u64>() + 2 * widest;
        }
        if own.residual.is_some() {
            // The matrix as rows, as columns, whitened and in pieces, its singular vectors twice; of the moment likewise.
            numbers += 8 * self.largest() + 4 * widest;
        }
        states.saturating_add(WIDE * numbers)
    }

    /// Numbers of the largest matrix of a block.
    fn largest(&self) -> u64 {
        let shapes = Projection::ALL.into_iter().filter_map(|at| self.arch.projection_shape(at));
        shapes.map(|(output, input)| (output * input) as u64).max().unwrap_or_default()
    }
}
