//! One tile of a result: the innermost loops of a product.

use super::number::Step;
use crate::ops::simd::vectorised;

/// Rows of a tile.
pub(super) const ROWS: usize = 8;
/// Columns of a tile: with 8 rows its sums, one stretch of columns and one value fill 28 of 32 wide registers.
pub(super) const COLUMNS: usize = 48;

/// Part of a result.
pub(super) type Tile = [[f32; COLUMNS]; ROWS];
pub(super) const EMPTY: Tile = [[0.0; COLUMNS]; ROWS];

/// Adds `Σ_p a[r][p] · b[p][c]` over steps to `out[r][c]`; rows of `a` are at least as long as `b`.
pub(in crate::ops) type TileFn<S> = fn(a: [&[S]; ROWS], b: &[[S; COLUMNS]], out: &mut Tile);

/// The fastest implementation that this machine has.
pub(super) fn best<S: Step>() -> TileFn<S> {
    S::fast().unwrap_or(portable)
}

/// The same on any machine, up to how sums are rounded.
pub(super) fn portable<S: Step>(a: [&[S]; ROWS], b: &[[S; COLUMNS]], out: &mut Tile) {
    vectorised(
        #[inline(always)]
        || {
            for (a, out) in a.iter().zip(out) {
                let mut sums = *out;
                for (&a, b) in a.iter().zip(b) {
                    for (sum, &b) in sums.iter_mut().zip(b) {
                        *sum = S::add(*sum, a, b);
                    }
                }
                *out = sums;
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every implementation adds exact sums of steps that `step` makes, whose products `S::add` knows.
    fn exact<S: Step>(step: fn(usize) -> S) {
        for depth in [0usize, 1, 7, 100] {
            let rows: Vec<Vec<S>> =
                (0..ROWS).map(|r| (0..depth).map(|p| step(r * 5 + p * 3)).collect()).collect();
            let b: Vec<[S; COLUMNS]> =
                (0..depth).map(|p| std::array::from_fn(|column| step(p * 7 + column))).collect();
            let a: [&[S]; ROWS] = std::array::from_fn(|row| rows[row].as_slice());
            for tile in [Some(portable as TileFn<S>), S::fast()].into_iter().flatten() {
                let mut out = [[3.0; COLUMNS]; ROWS];
                tile(a, &b, &mut out);
                for (row, out) in out.iter().enumerate() {
                    for (column, &sum) in out.iter().enumerate() {
                        let expected = (0..depth).fold(3.0, |sum, p| S::add(sum, rows[row][p], b[p][column]));
                        assert!((sum - expected).abs() < 1e-6, "{row}, {column}");
                    }
                }
            }
        }
    }

    /// Small integers, whose sums are exact in f32.
    fn number(seed: usize) -> f32 {
        (seed * 37 % 15) as f32 - 7.0
    }

    #[test]
    fn every_implementation_adds_exact_sums() {
        fn bits(seed: usize) -> u32 {
            u32::from(half::bf16::from_f32(number(seed)).to_bits())
        }
        exact::<f32>(number);
        exact::<u32>(|seed| bits(seed) | bits(seed + 11) << 16);
    }
}
