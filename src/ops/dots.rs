//! Dot products of one row with many, in f32, at the rate at which they are read.
//!
//! The sums are those of [`dot`], bit for bit, on every machine.

use super::simd::{dot, vectorised};

/// The dot product of `x` with the beginning of each of `out.len()` rows, which start `stride` numbers apart; `x` has at least
/// one number and no more than `stride`. Switches to this machine's instructions by itself.
pub(super) fn dots(x: &[f32], (rows, stride): (&[f32], usize), out: &mut [f32]) {
    debug_assert!((1..=stride).contains(&x.len()) && rows.len().div_ceil(stride) >= out.len());
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return simd.vectorize(avx2::Dots { simd, x, rows, stride, out });
    }
    portable_dots(x, (rows, stride), out);
}

fn portable_dots(x: &[f32], (rows, stride): (&[f32], usize), out: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (out, row) in out.iter_mut().zip(rows.chunks(stride)) {
                *out = dot(x, &row[..x.len()]);
            }
        },
    );
}

/// 256 bits at a time, also where there are registers of 512: measured, memory is then read a fifth faster, and what is in the
/// caches several times as fast as by what the compiler makes of [`dot`].
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use pulp::x86::V3;
    use pulp::{cast, f32x8};

    use crate::ops::simd::{LANES, fold};

    pub(super) struct Dots<'a> {
        pub simd: V3,
        pub x: &'a [f32],
        pub rows: &'a [f32],
        pub stride: usize,
        pub out: &'a mut [f32],
    }

    impl pulp::NullaryFnOnce for Dots<'_> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            for (out, row) in self.out.iter_mut().zip(self.rows.chunks(self.stride)) {
                *out = dot(self.simd, self.x, &row[..self.x.len()]);
            }
        }
    }

    #[inline(always)]
    fn dot(simd: V3, a: &[f32], b: &[f32]) -> f32 {
        let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        let rest: f32 = rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum();
        let mut sums: [f32x8; LANES / 8] = cast([0.0f32; LANES]);
        for (a, b) in a.iter().zip(b) {
            let (a, b): ([f32x8; LANES / 8], [f32x8; LANES / 8]) = (cast(*a), cast(*b));
            for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                *sum = simd.add_f32x8(*sum, simd.mul_f32x8(a, b));
            }
        }
        fold::<LANES>(cast(sums)) + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_products_do_not_depend_on_the_width_of_registers() {
        let spread = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
        for (width, stride) in [(1, 1), (31, 40), (32, 32), (33, 33), (64, 192), (100, 101), (576, 576)] {
            // The last row ends where the numbers do.
            let (x, rows) = (spread(width, 0.7), spread(4 * stride + width, 0.37));
            let (mut found, mut portable) = ([0.0; 5], [0.0; 5]);
            dots(&x, (&rows, stride), &mut found);
            portable_dots(&x, (&rows, stride), &mut portable);
            let expected: Vec<u32> =
                rows.chunks(stride).map(|row| dot(&x, &row[..width]).to_bits()).collect();
            assert_eq!(found.map(f32::to_bits).to_vec(), expected, "{width} of {stride}");
            assert_eq!(portable.map(f32::to_bits).to_vec(), expected, "{width} of {stride}");
        }
    }
}
