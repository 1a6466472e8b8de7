//! Numbers of matrices, and the steps that sums take along them.

use std::borrow::Cow;

use half::bf16;
use rayon::prelude::*;

use super::tile::TileFn;
use crate::ops::simd::vectorised;
use crate::ops::task_rows;

/// Steps of a row that are turned into steps of columns at once.
pub(super) const LANES: usize = 16;

/// A number of a matrix, as it is held.
pub(in crate::ops) trait Number: Copy + Sync {
    /// What a sum takes of it at once.
    type Step: Step;
    /// Numbers in a step.
    const A_STEP: usize;

    /// The step of as many numbers, or of fewer, with zeros for the others.
    fn step(numbers: &[Self]) -> Self::Step;
}

/// What a sum takes of a row, and of a column, at once: 32 bits.
pub(in crate::ops) trait Step: Copy + Default + Send + Sync {
    /// `sum + a · b`.
    fn add(sum: f32, a: Self, b: Self) -> f32;

    /// Rows of `inner` numbers as rows of steps.
    fn rows(x: &[f32], inner: usize) -> Cow<'_, [Self]>;

    fn to_bits(self) -> u32;

    fn from_bits(bits: u32) -> Self;

    /// The innermost loops by this machine's own instructions, where it has them.
    fn fast() -> Option<TileFn<Self>>;
}

impl Number for f32 {
    type Step = f32;
    const A_STEP: usize = 1;

    #[inline(always)]
    fn step(numbers: &[f32]) -> f32 {
        numbers[0]
    }
}

/// One number.
impl Step for f32 {
    #[inline(always)]
    fn add(sum: f32, a: f32, b: f32) -> f32 {
        sum + a * b
    }

    fn rows(x: &[f32], _: usize) -> Cow<'_, [f32]> {
        Cow::Borrowed(x)
    }

    #[inline(always)]
    fn to_bits(self) -> u32 {
        f32::to_bits(self)
    }

    #[inline(always)]
    fn from_bits(bits: u32) -> f32 {
        f32::from_bits(bits)
    }

    fn fast() -> Option<TileFn<f32>> {
        #[cfg(target_arch = "x86_64")]
        return super::avx512::numbers();
        #[cfg(not(target_arch = "x86_64"))]
        None
    }
}

/// The dot-product instructions of AVX-512 take two neighbours along the inner dimension at once.
impl Number for bf16 {
    type Step = u32;
    const A_STEP: usize = 2;

    #[inline(always)]
    fn step(numbers: &[bf16]) -> u32 {
        let bits = |number: &bf16| u32::from(number.to_bits());
        bits(&numbers[0]) | numbers.get(1).map_or(0, bits) << 16
    }
}

/// Steps that were made before.
impl Number for u32 {
    type Step = u32;
    const A_STEP: usize = 1;

    #[inline(always)]
    fn step(numbers: &[u32]) -> u32 {
        numbers[0]
    }
}

/// Two numbers in bf16, the first in the low half.
impl Step for u32 {
    #[inline(always)]
    fn add(sum: f32, a: u32, b: u32) -> f32 {
        let (low, high) =
            (|pair: u32| f32::from_bits(pair << 16), |pair: u32| f32::from_bits(pair & 0xffff_0000));
        sum + (low(a) * low(b) + high(a) * high(b))
    }

    fn rows(x: &[f32], inner: usize) -> Cow<'_, [u32]> {
        let pairs = inner.div_ceil(2);
        let mut steps = vec![0u32; x.len().checked_div(inner).unwrap_or(0) * pairs];
        let task = task_rows(inner);
        steps.par_chunks_mut((task * pairs).max(1)).zip(x.par_chunks((task * inner).max(1))).for_each(
            |(steps, x)| {
                vectorised(
                    #[inline(always)]
                    || {
                        for (steps, x) in steps.chunks_exact_mut(pairs).zip(x.chunks_exact(inner)) {
                            let (whole, rest) = x.as_chunks::<2>();
                            for (step, &[low, high]) in steps.iter_mut().zip(whole) {
                                *step = round(low) | round(high) << 16;
                            }
                            if let (Some(step), &[last]) = (steps.last_mut(), rest) {
                                *step = round(last);
                            }
                        }
                    },
                );
            },
        );
        Cow::Owned(steps)
    }

    #[inline(always)]
    fn to_bits(self) -> u32 {
        self
    }

    #[inline(always)]
    fn from_bits(bits: u32) -> u32 {
        bits
    }

    fn fast() -> Option<TileFn<u32>> {
        #[cfg(target_arch = "x86_64")]
        return super::avx512::pairs();
        #[cfg(not(target_arch = "x86_64"))]
        None
    }
}

/// The bits of the nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { bits >> 16 | 0x40 } else { nearest }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_nan() {
        let spread = (0..1000).map(|i| (i as f32 * 0.37).sin() * 3.0);
        for x in spread.chain([0.0, -0.0, f32::INFINITY, 1.0 + 1.0 / 256.0, 1e-40]) {
            assert_eq!(round(x) as u16, bf16::from_f32(x).to_bits(), "{x}");
        }
        assert!(bf16::from_bits(round(f32::NAN) as u16).is_nan());
    }

    #[test]
    fn rows_of_any_length_become_steps() {
        let pair = |low: f32, high: f32| low.to_bits() >> 16 | high.to_bits();
        assert_eq!(
            *u32::rows(&[1.0, 2.0, 0.5, -4.0, 3.0, 8.0], 3),
            [pair(1.0, 2.0), pair(0.5, 0.0), pair(-4.0, 3.0), pair(8.0, 0.0)]
        );
        assert!(u32::rows(&[], 4).is_empty() && u32::rows(&[], 0).is_empty());
    }

    #[test]
    fn steps_are_products() {
        assert_eq!(f32::add(1.0, 2.0, 3.0).to_bits(), 7.0f32.to_bits());
        let pair = |low: f32, high: f32| low.to_bits() >> 16 | high.to_bits();
        assert_eq!(u32::add(1.0, pair(2.0, -4.0), pair(3.0, 0.5)).to_bits(), 5.0f32.to_bits());
    }
}
