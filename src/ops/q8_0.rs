//! Products of one row with a matrix in blocks of ggml's Q8_0: 32 numbers of 8 bits, and what each is multiplied by.
//!
//! The row is rounded to such blocks too, with a factor in f32, and the products within a block are summed as integers. Sums do
//! not depend on the width of the machine's registers.

use std::borrow::Cow;

use candle_core::Result;
use candle_core::quantized::{GgmlDType, QTensor};
use half::f16;

use super::few_rows::{Lines, Row};
use super::simd::{fold, vectorised};

/// Numbers in a block.
const BLOCK: usize = 32;

/// Bytes of a block: the factor in half precision, then the numbers.
const BYTES: usize = 2 + BLOCK;

/// Lanes of a sum over blocks: each has four neighbouring products of every block.
const LANES: usize = 8;

/// A row that goes in.
pub(super) struct Rounded {
    numbers: Vec<[i8; BLOCK]>,
    factors: Vec<f32>,
}

impl Rounded {
    fn of<'r>(row: &'r Row<'_>) -> &'r Self {
        row.rounded.get_or_init(|| Self::new(row.numbers))
    }

    fn new(x: &[f32]) -> Self {
        let (blocks, _) = x.as_chunks::<BLOCK>();
        let mut row = Self { numbers: vec![[0; BLOCK]; blocks.len()], factors: vec![0.0; blocks.len()] };
        let places = row.numbers.iter_mut().zip(&mut row.factors);
        vectorised(
            #[inline(always)]
            || {
                for ((numbers, factor), block) in places.zip(blocks) {
                    *factor = round(block, numbers);
                }
            },
        );
        row
    }
}

/// The nearest multiples of a factor, up to 127 of it. The factor is NaN where a number is not finite, so that every product
/// is.
#[inline(always)]
fn round(x: &[f32; BLOCK], numbers: &mut [i8; BLOCK]) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer held in the low bits
    let (mut largest, mut is_finite) = (0.0f32, true);
    for x in x {
        is_finite &= x.is_finite();
        largest = if x.abs() > largest { x.abs() } else { largest };
    }
    let (mut factor, mut inverse) = (largest / 127.0, 127.0 / largest);
    if inverse > f32::MAX {
        // Of zeros, or of numbers next to them.
        (factor, inverse) = (0.0, 0.0);
    }
    for (number, x) in numbers.iter_mut().zip(x) {
        *number = (x * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i8;
    }
    if is_finite { factor } else { f32::NAN }
}

/// A matrix `(outputs, inputs)`, row by row.
struct Blocks<'a> {
    blocks: &'a [[u8; BYTES]],
    inputs: usize,
}

/// The rows of a matrix in Q8_0 on the CPU. None but on x86-64: elsewhere candle uses instructions that are not used here.
pub(super) fn lines(matrix: &QTensor) -> Result<Option<Box<dyn Lines + '_>>> {
    let (outputs, inputs) = matrix.shape().dims2()?;
    if matrix.dtype() != GgmlDType::Q8_0 || !cfg!(target_arch = "x86_64") || outputs == 0 || inputs == 0 {
        return Ok(None);
    }
    let Cow::Borrowed(bytes) = matrix.data()? else { return Ok(None) };
    let (blocks, rest) = bytes.as_chunks::<BYTES>();
    let is_whole =
        rest.is_empty() && inputs.is_multiple_of(BLOCK) && blocks.len() * BLOCK == outputs * inputs;
    Ok(is_whole.then(|| Box::new(Blocks { blocks, inputs }) as Box<dyn Lines>))
}

impl Blocks<'_> {
    fn in_row(&self) -> usize {
        self.inputs / BLOCK
    }
}

impl Lines for Blocks<'_> {
    fn shape(&self) -> (usize, usize) {
        (self.blocks.len() / self.in_row(), self.inputs)
    }

    fn prepare(&self, x: &Row<'_>) {
        Rounded::of(x);
    }

    fn dots(&self, x: &Row<'_>, first: usize, out: &mut [f32]) {
        dots(Rounded::of(x), &self.blocks[first * self.in_row()..][..out.len() * self.in_row()], out);
    }
}

/// The dot product of `x` with every row.
fn dots(x: &Rounded, blocks: &[[u8; BYTES]], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return simd.vectorize(avx2::Dots { simd, x, blocks, out });
    }
    portable_dots(x, blocks, out);
}

fn portable_dots(x: &Rounded, blocks: &[[u8; BYTES]], out: &mut [f32]) {
    for (out, row) in out.iter_mut().zip(blocks.chunks_exact(x.factors.len())) {
        let mut lanes = [0.0f32; LANES];
        for (block, (numbers, factor)) in row.iter().zip(x.numbers.iter().zip(&x.factors)) {
            let [low, high, weights @ ..] = block;
            let factor = widened(u16::from_le_bytes([*low, *high])) * factor;
            let product = |at: usize| i32::from(weights[at].cast_signed()) * i32::from(numbers[at]);
            for (lane, sum) in lanes.iter_mut().enumerate() {
                let products: i32 = (4 * lane..4 * lane + 4).map(product).sum();
                *sum += factor * products as f32;
            }
        }
        *out = fold(lanes);
    }
}

/// A number in half precision. `to_f32` asks each time what the machine can do, which takes longer than a block.
#[inline(always)]
fn widened(bits: u16) -> f32 {
    const SHIFT: f32 = f32::from_bits((127 + 112) << 23); // 2¹¹²: exponents are counted from 15 here and from 127 there
    if bits & 0x7c00 == 0x7c00 {
        return f16::from_bits(bits).to_f32();
    }
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * SHIFT;
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::__m256i;

    use pulp::cast;
    use pulp::x86::V3;

    use super::{BYTES, LANES, Rounded, widened};
    use crate::ops::simd::fold;

    pub(super) struct Dots<'a> {
        pub simd: V3,
        pub x: &'a Rounded,
        pub blocks: &'a [[u8; BYTES]],
        pub out: &'a mut [f32],
    }

    impl pulp::NullaryFnOnce for Dots<'_> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            for (out, row) in self.out.iter_mut().zip(self.blocks.chunks_exact(self.x.factors.len())) {
                *out = dot(self.simd, self.x, row);
            }
        }
    }

    #[inline(always)]
    fn dot(simd: V3, x: &Rounded, row: &[[u8; BYTES]]) -> f32 {
        let (avx, avx2) = (simd.avx, simd.avx2);
        let (mut lanes, ones) = (avx._mm256_setzero_ps(), avx._mm256_set1_epi16(1));
        for (block, (numbers, factor)) in row.iter().zip(x.numbers.iter().zip(&x.factors)) {
            let [low, high, weights @ ..] = block;
            let factor = widened(u16::from_le_bytes([*low, *high])) * factor;
            let (weights, numbers): (__m256i, __m256i) = (cast(*weights), cast(*numbers));
            // One side has to be without signs. Two products of up to 128 · 127 are no more than 16 bits hold.
            let (size, signed) = (avx2._mm256_abs_epi8(weights), avx2._mm256_sign_epi8(numbers, weights));
            let pairs = avx2._mm256_maddubs_epi16(size, signed);
            let products = avx._mm256_cvtepi32_ps(avx2._mm256_madd_epi16(pairs, ones));
            lanes = avx._mm256_add_ps(lanes, avx._mm256_mul_ps(avx._mm256_set1_ps(factor), products));
        }
        fold::<LANES>(cast(lanes))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{CpuStorage, CustomOp1, Device, Layout, Tensor, bail};

    use super::*;
    use crate::ops::few_rows::one_row;
    use crate::ops::testing::is_sum;

    fn spread(count: usize, step: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * step).sin()).collect()
    }

    fn matrix(outputs: usize, inputs: usize) -> Result<QTensor> {
        let values = Tensor::from_vec(spread(outputs * inputs, 0.7), (outputs, inputs), &Device::Cpu)?;
        QTensor::quantize(&values, GgmlDType::Q8_0)
    }

    #[test]
    fn numbers_in_half_precision_are_widened() {
        for bits in 0..=u16::MAX {
            let (found, expected) = (widened(bits), f16::from_bits(bits).to_f32());
            assert!(
                found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(),
                "{bits:#x}"
            );
        }
    }

    #[test]
    fn rows_are_rounded_to_the_nearest() {
        for block in spread(4 * BLOCK, 0.37).as_chunks::<BLOCK>().0 {
            let mut numbers = [0; BLOCK];
            let factor = round(block, &mut numbers);
            assert!(numbers.iter().any(|number| number.abs() == 127));
            for (&number, &x) in numbers.iter().zip(block) {
                assert!((f32::from(number) * factor - x).abs() <= 0.5001 * factor);
            }
        }
        for (of, numbers, expected) in [(0.0f32, 0, 0.0f32), (1e-40, 0, 0.0), (-1e-30, -127, 1e-30 / 127.0)] {
            let mut found = [1; BLOCK];
            assert_eq!(round(&[of; BLOCK], &mut found).to_bits(), expected.to_bits());
            assert_eq!(found, [numbers; BLOCK]);
        }
    }

    /// Sums of what is rounded, against the definition; and against candle's product, whose factors of the row are in half
    /// precision.
    #[test]
    fn products_are_sums_of_what_is_rounded() -> Result<()> {
        // More outputs than one task has.
        let (outputs, inputs) = (301, 96);
        let (matrix, x) = (matrix(outputs, inputs)?, spread(inputs, 0.37));
        let Some(rows) = lines(&matrix)? else {
            return if cfg!(target_arch = "x86_64") { bail!("no lines") } else { Ok(()) };
        };
        let found = one_row(&x, &[&*rows])?.concat();
        let (row, wide) = (Rounded::new(&x), matrix.dequantize(&Device::Cpu)?.to_vec2::<f32>()?);
        let heard: Vec<f64> = (row.numbers.iter().zip(&row.factors))
            .flat_map(|(numbers, &factor)| numbers.map(|number| f64::from(number) * f64::from(factor)))
            .collect();
        let CpuStorage::F32(candles) =
            matrix.cpu_fwd(&CpuStorage::F32(x), &Layout::contiguous((1, inputs)))?.0
        else {
            bail!("a product that is not in f32")
        };
        assert_eq!(found.len(), outputs);
        for ((found, wide), candles) in found.iter().zip(&wide).zip(candles) {
            let terms = wide.iter().zip(&heard).map(|(&a, &b)| f64::from(a) * b);
            assert!(is_sum(*found, terms.clone()));
            let magnitude: f64 = terms.map(f64::abs).sum();
            assert!(f64::from(found - candles).abs() <= 5e-4 * magnitude);
        }
        Ok(())
    }

    #[test]
    fn sums_do_not_depend_on_the_width_of_registers() -> Result<()> {
        let (outputs, inputs) = (5, 576);
        let (matrix, x) = (matrix(outputs, inputs)?, Rounded::new(&spread(inputs, 0.37)));
        let data = matrix.data()?;
        let (blocks, _) = data.as_chunks::<BYTES>();
        let (mut found, mut expected) = ([0.0; 5], [0.0; 5]);
        dots(&x, blocks, &mut found);
        portable_dots(&x, blocks, &mut expected);
        assert_eq!(found.map(f32::to_bits), expected.map(f32::to_bits));
        assert!(found.iter().all(|sum| *sum != 0.0));
        Ok(())
    }

    /// Of the largest numbers of either sign, of which there is one more below zero.
    #[test]
    fn sums_of_the_largest_products_are_exact() {
        let mut block = [0x80; BYTES];
        block[..2].copy_from_slice(&f16::ONE.to_bits().to_le_bytes());
        for sign in [1.0, -1.0] {
            let (x, mut found, mut portable) = (Rounded::new(&[sign * 127.0; BLOCK]), [0.0], [0.0]);
            dots(&x, &[block], &mut found);
            portable_dots(&x, &[block], &mut portable);
            let expected = -sign * 32.0 * 128.0 * 127.0;
            assert_eq!([found[0].to_bits(), portable[0].to_bits()], [f32::to_bits(expected); 2]);
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let mut block = [1u8; BYTES];
        block[..2].copy_from_slice(&f16::NAN.to_bits().to_le_bytes());
        let product = |x: &[f32], block| {
            let (x, mut out, mut portable) = (Rounded::new(x), [0.0], [0.0]);
            dots(&x, &[block], &mut out);
            portable_dots(&x, &[block], &mut portable);
            assert_eq!(out[0].is_nan(), portable[0].is_nan());
            out[0]
        };
        assert!(product(&[1.0; BLOCK], block).is_nan());
        block[..2].copy_from_slice(&f16::ONE.to_bits().to_le_bytes());
        assert!(product(&[1.0; BLOCK], block).is_finite());
        for wrong in [f32::NAN, f32::INFINITY] {
            let mut x = [1.0; BLOCK];
            x[7] = wrong;
            assert!(product(&x, block).is_nan());
        }
    }
}
