//! The innermost loops of a product in bf16: one tile of the result.
//!
//! Its safety rests on two facts, and on no property of the data: the function
//! compiled for AVX-512 runs only after the instructions were found on this machine, and every transmutation is
//! between arrays of plain numbers and vector registers of the same size, for which all bit patterns are valid.
#![allow(unsafe_code)]

use std::sync::OnceLock;

/// Rows of a tile.
pub(super) const ROWS: usize = 8;
/// Columns of a tile: with 8 rows its sums, one stretch of columns and one value fill 28 of 32 wide registers.
pub(super) const COLUMNS: usize = 48;

/// Two neighbours along the inner dimension, for every column of a tile: the first in the low half.
pub(super) type Pairs = [u32; COLUMNS];
/// Part of a result.
pub(super) type Tile = [[f32; COLUMNS]; ROWS];

/// Computes `out[r][c] = Σ_p a[r][p] · b[p][c]` over pairs; rows of `a` are at least as long as `b`.
pub(super) type TileFn = fn(a: [&[u32]; ROWS], b: &[Pairs], out: &mut Tile);

/// The fastest implementation that this machine has.
pub(super) fn best() -> TileFn {
    static BEST: OnceLock<TileFn> = OnceLock::new();
    *BEST.get_or_init(|| {
        let found = dot_product_instructions();
        tracing::debug!(avx512 = found.is_some(), "how matrices of bf16 are multiplied");
        found.unwrap_or(portable)
    })
}

/// The implementation on the dot-product instructions of AVX-512, where the machine has them.
#[cfg(target_arch = "x86_64")]
pub(super) fn dot_product_instructions() -> Option<TileFn> {
    fn run(a: [&[u32]; ROWS], b: &[Pairs], out: &mut Tile) {
        // SAFETY: handed out below only where the features were detected.
        unsafe { avx512(a, b, out) }
    }
    (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")).then_some(run as TileFn)
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn dot_product_instructions() -> Option<TileFn> {
    None
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
#[allow(clippy::needless_range_loop)] // loops over registers, which have to be unrolled
fn avx512(a: [&[u32]; ROWS], b: &[Pairs], out: &mut Tile) {
    use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps, _mm512_set1_epi32, _mm512_setzero_ps};
    use std::mem::transmute;

    const REGISTERS: usize = COLUMNS / 16;
    let a = a.map(|row| &row[..b.len()]);
    let mut sums = [[_mm512_setzero_ps(); REGISTERS]; ROWS];
    for (place, b) in b.iter().enumerate() {
        // SAFETY: 48 numbers of 32 bits are three registers of 512.
        let b = unsafe { transmute::<Pairs, [__m512bh; REGISTERS]>(*b) };
        for row in 0..ROWS {
            let pair = _mm512_set1_epi32(a[row][place].cast_signed());
            // SAFETY: one register read as another type of the same width.
            let pair: __m512bh = unsafe { transmute(pair) };
            for register in 0..REGISTERS {
                sums[row][register] = _mm512_dpbf16_ps(sums[row][register], pair, b[register]);
            }
        }
    }
    // SAFETY: 8 × 3 registers of 16 numbers are 8 × 48 numbers.
    *out = unsafe { transmute::<[[__m512; REGISTERS]; ROWS], Tile>(sums) };
}

/// The same sums on any machine.
pub(super) fn portable(a: [&[u32]; ROWS], b: &[Pairs], out: &mut Tile) {
    crate::ops::simd::vectorised(
        #[inline(always)]
        || {
            for (a, out) in a.iter().zip(out.iter_mut()) {
                let mut sums = [0.0f32; COLUMNS];
                for (&a, b) in a.iter().zip(b) {
                    let (low, high) = (low(a), high(a));
                    for (sum, &b) in sums.iter_mut().zip(b) {
                        *sum += low * self::low(b) + high * self::high(b);
                    }
                }
                *out = sums;
            }
        },
    );
}

#[inline(always)]
fn low(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

#[inline(always)]
fn high(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic pairs of small integers, whose sums are exact in f32.
    fn pair(seed: usize) -> u32 {
        let value = |seed: usize| u32::from(half::bf16::from_f32((seed * 37 % 15) as f32 - 7.0).to_bits());
        value(seed) | value(seed + 11) << 16
    }

    #[test]
    fn every_implementation_computes_exact_sums() {
        for depth in [0usize, 1, 7, 100] {
            let rows: Vec<Vec<u32>> =
                (0..ROWS).map(|r| (0..depth).map(|p| pair(r * 5 + p * 3)).collect()).collect();
            let b: Vec<Pairs> =
                (0..depth).map(|p| std::array::from_fn(|column| pair(p * 7 + column))).collect();
            let a: [&[u32]; ROWS] = std::array::from_fn(|row| rows[row].as_slice());
            for tile in [Some(portable as TileFn), dot_product_instructions()].into_iter().flatten() {
                let mut out = [[f32::NAN; COLUMNS]; ROWS];
                tile(a, &b, &mut out);
                for (row, out) in out.iter().enumerate() {
                    for (column, &sum) in out.iter().enumerate() {
                        let terms = (0..depth).map(|p| {
                            let (a, b) = (rows[row][p], b[p][column]);
                            low(a) * low(b) + high(a) * high(b)
                        });
                        assert!((sum - terms.sum::<f32>()).abs() < 1e-6, "{row}, {column}");
                    }
                }
            }
        }
    }
}
