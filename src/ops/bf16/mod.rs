//! Products of f32 rows with matrices held in bf16, or brought into it from ggml's blocks.
//!
//! Rows are rounded to bf16 on the way in; sums are f32. The matrix is brought, a cache-sized part at a time, into
//! the order in which the innermost loops read it: pairs of neighbours along the inner dimension side by side, since
//! the dot-product instructions of AVX-512 take two at once.

mod tile;

use candle_core::quantized::QTensor;
use candle_core::{Device, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::simd::{dot_bf16, vectorised};
use super::with_elements;
use tile::{COLUMNS, Pairs, ROWS, Tile};

/// Pairs along the inner dimension that one tile sums at once.
const DEPTH: usize = 1024;
/// Pairs of the matrix that are brought into order at once: 1 MiB.
const PART: usize = 1 << 18;
/// Rows that one parallel task computes at most: enough to reuse what it reads of the matrix.
const TASK_ROWS: usize = 64;

/// A matrix `(outputs, inputs)`, row by row.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub values: &'a [bf16],
    pub outputs: usize,
    pub inputs: usize,
}

/// Along which dimension of the matrix a product sums.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Over {
    Inputs,
    Outputs,
}

impl Matrix<'_> {
    /// `x · Mᵀ`: `(rows, inputs)` to `(rows, outputs)`.
    pub(super) fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        if x.len() < ROWS * self.inputs {
            // Too few to be worth bringing the matrix into order.
            #[allow(clippy::redundant_closure)] // measured: the function itself is a sixth slower
            return Ok(super::few_rows(
                x,
                (self.values, self.inputs),
                #[inline(always)]
                |x, weights| dot_bf16(x, weights),
            ));
        }
        product(x, (self.inputs, self.outputs), |columns, first, panel| {
            self.bring_into_order(Over::Inputs, columns, first, panel);
            Ok(())
        })
    }

    /// `grad · M`: `(rows, outputs)` to `(rows, inputs)`.
    pub(super) fn backward(&self, grad: &[f32]) -> Result<Vec<f32>> {
        product(grad, (self.outputs, self.inputs), |columns, first, panel| {
            self.bring_into_order(Over::Outputs, columns, first, panel);
            Ok(())
        })
    }

    /// Columns `columns` of the product's right side, from pair `first` on, as a panel of tiles.
    fn bring_into_order(
        &self,
        over: Over,
        columns: std::ops::Range<usize>,
        first: usize,
        panel: &mut [Pairs],
    ) {
        if columns.len() < COLUMNS {
            panel.fill([0; COLUMNS]);
        }
        let pair = |low: bf16, high: Option<&bf16>| {
            u32::from(low.to_bits()) | high.map_or(0, |high| u32::from(high.to_bits()) << 16)
        };
        match over {
            Over::Inputs => {
                let stretch = 2 * first..(2 * (first + panel.len())).min(self.inputs);
                for (lane, output) in columns.enumerate() {
                    let row = &self.values[output * self.inputs..][stretch.clone()];
                    for (pairs, values) in panel.iter_mut().zip(row.chunks(2)) {
                        pairs[lane] = pair(values[0], values.get(1));
                    }
                }
            }
            Over::Outputs => {
                let row = |output: usize| &self.values[output * self.inputs..][columns.clone()];
                for (place, pairs) in panel.iter_mut().enumerate() {
                    let output = 2 * (first + place);
                    if output + 1 < self.outputs {
                        for ((to, low), high) in pairs.iter_mut().zip(row(output)).zip(row(output + 1)) {
                            *to = pair(*low, Some(high));
                        }
                    } else {
                        pairs.iter_mut().zip(row(output)).for_each(|(to, low)| *to = pair(*low, None));
                    }
                }
            }
        }
    }
}

/// `x · Mᵀ` by a matrix `(outputs, inputs)` in ggml's blocks: `(rows, inputs)` to `(rows, outputs)`, both rounded to
/// bf16. Candle gives rows as a whole: those of more inputs than two times [`DEPTH`] are read once for each stretch.
pub(super) fn by_blocks(x: &[f32], blocks: &QTensor) -> Result<Vec<f32>> {
    let (outputs, inputs) = blocks.shape().dims2()?;
    product(x, (inputs, outputs), |columns, first, panel| {
        if columns.len() < COLUMNS {
            panel.fill([0; COLUMNS]);
        }
        let ids: Vec<u32> = columns.clone().map(|output| output as u32).collect();
        let rows = blocks.embedding(&Tensor::new(ids, &Device::Cpu)?)?;
        let rows = with_elements([&rows], |[rows]| Ok(Left::new(rows, inputs)))?;
        for (lane, row) in rows.values.chunks_exact(rows.pairs).take(columns.len()).enumerate() {
            for (pairs, &pair) in panel.iter_mut().zip(&row[first..]) {
                pairs[lane] = pair;
            }
        }
        Ok(())
    })
}

/// Rows of `inner` numbers times a matrix of `width` columns, of which `bring` puts a range into a panel of tiles, from
/// a pair along the inner dimension on.
fn product(
    x: &[f32],
    (inner, width): (usize, usize),
    bring: impl Fn(std::ops::Range<usize>, usize, &mut [Pairs]) -> Result<()> + Sync,
) -> Result<Vec<f32>> {
    let rows = x.len() / inner;
    if rows == 0 {
        return Ok(Vec::new());
    }
    let left = Left::new(x, inner);
    let mut out = vec![0.0f32; rows * width];
    let task = rows.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(ROWS).min(TASK_ROWS);
    let mut part: Vec<Pairs> = Vec::new();
    for first in (0..left.pairs).step_by(DEPTH) {
        let depth = DEPTH.min(left.pairs - first);
        let columns = (PART / (depth * COLUMNS)).max(1) * COLUMNS;
        for column in (0..width).step_by(columns) {
            let end = (column + columns).min(width);
            part.resize((end - column).div_ceil(COLUMNS) * depth, [0; COLUMNS]);
            part.par_chunks_mut(depth).enumerate().try_for_each(|(index, panel)| {
                let from = column + index * COLUMNS;
                bring(from..(from + COLUMNS).min(end), first, panel)
            })?;
            let stretch = Stretch { left: &left, first, panels: &part, depth, columns: column..end };
            let tasks = out.par_chunks_mut(task * width).enumerate();
            tasks.for_each(|(index, out)| stretch.add(out, index * task, width));
        }
    }
    Ok(out)
}

/// The left side of a product in bf16: pairs along each row, and rows of zeros up to a whole number of tiles.
struct Left {
    values: Vec<u32>,
    pairs: usize,
}

impl Left {
    fn new(x: &[f32], inner: usize) -> Self {
        let pairs = inner.div_ceil(2);
        let mut values = vec![0u32; (x.len() / inner).next_multiple_of(ROWS) * pairs];
        let task = super::task_rows(inner);
        values.par_chunks_mut(task * pairs).zip(x.par_chunks(task * inner)).for_each(|(out, x)| {
            vectorised(
                #[inline(always)]
                || {
                    for (out, x) in out.chunks_exact_mut(pairs).zip(x.chunks_exact(inner)) {
                        let (whole, rest) = x.as_chunks::<2>();
                        for (out, &[low, high]) in out.iter_mut().zip(whole) {
                            *out = round(low) | round(high) << 16;
                        }
                        if let (Some(out), &[last]) = (out.last_mut(), rest) {
                            *out = round(last);
                        }
                    }
                },
            );
        });
        Self { values, pairs }
    }
}

/// The bits of the nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { bits >> 16 | 0x40 } else { nearest }
}

/// A stretch of the inner dimension and of the columns, with the matrix's part in order.
struct Stretch<'a> {
    left: &'a Left,
    first: usize,
    panels: &'a [Pairs],
    depth: usize,
    columns: std::ops::Range<usize>,
}

impl Stretch<'_> {
    /// Adds the stretch to rows of the result, the first of which is row `top`.
    fn add(&self, out: &mut [f32], top: usize, width: usize) {
        let (tile, rows) = (tile::best(), out.len() / width);
        let mut sums: Tile = [[0.0; COLUMNS]; ROWS];
        for (column, panel) in self.columns.clone().step_by(COLUMNS).zip(self.panels.chunks_exact(self.depth))
        {
            let columns = COLUMNS.min(self.columns.end - column);
            for row in (0..rows).step_by(ROWS) {
                let left = |r: usize| (top + row + r) * self.left.pairs + self.first;
                tile(std::array::from_fn(|r| &self.left.values[left(r)..][..self.depth]), panel, &mut sums);
                for (out, sums) in out[row * width..].chunks_exact_mut(width).zip(&sums) {
                    let out = &mut out[column..][..columns];
                    if self.first == 0 {
                        out.copy_from_slice(&sums[..columns]);
                    } else {
                        super::simd::add_scaled(out, 1.0, &sums[..columns]);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        use rand::{Rng, SeedableRng};
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect()
    }

    #[test]
    fn products_are_those_of_the_rounded_operands() -> Result<()> {
        for (rows, inputs, outputs) in
            [(1, 5, 3), (3, 64, 48), (8, 7, 50), (21, 100, 49), (70, 33, 131), (9, 2500, 2100)]
        {
            let values: Vec<bf16> = numbers(inputs * outputs, 1).into_iter().map(bf16::from_f32).collect();
            let matrix = Matrix { values: &values, outputs, inputs };
            let wide = |i: usize| f64::from(values[i].to_f32());
            let rounded = |x: f32| f64::from(bf16::from_f32(x).to_f32());
            let x = numbers(rows * inputs, 2);
            // Few rows are not rounded.
            let left = |x: f32| if rows < ROWS { f64::from(x) } else { rounded(x) };
            for (index, y) in matrix.forward(&x)?.into_iter().enumerate() {
                let (row, output) = (index / outputs, index % outputs);
                let terms = (0..inputs).map(|i| left(x[row * inputs + i]) * wide(output * inputs + i));
                assert!((f64::from(y) - terms.sum::<f64>()).abs() < 1e-4, "({rows}, {inputs}, {outputs})");
            }
            let grad = numbers(rows * outputs, 3);
            for (index, dx) in matrix.backward(&grad)?.into_iter().enumerate() {
                let (row, input) = (index / inputs, index % inputs);
                let terms = (0..outputs).map(|o| rounded(grad[row * outputs + o]) * wide(o * inputs + input));
                assert!((f64::from(dx) - terms.sum::<f64>()).abs() < 1e-4, "({rows}, {inputs}, {outputs})");
            }
        }
        Ok(())
    }

    #[test]
    fn products_by_blocks_are_those_of_the_rounded_operands() -> Result<()> {
        use candle_core::quantized::GgmlDType;
        for (dtype, rows, inputs, outputs) in
            [(GgmlDType::Q8_0, 9, 64, 50), (GgmlDType::Q4K, 20, 2560, 100), (GgmlDType::Q6K, 70, 256, 7)]
        {
            let weight = Tensor::from_vec(numbers(inputs * outputs, 1), (outputs, inputs), &Device::Cpu)?;
            let blocks = QTensor::quantize(&weight, dtype)?;
            let wide = blocks.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
            let rounded = |x: f32| f64::from(bf16::from_f32(x).to_f32());
            let x = numbers(rows * inputs, 2);
            let y = by_blocks(&x, &blocks)?;
            assert_eq!(y.len(), rows * outputs);
            for (index, y) in y.into_iter().enumerate() {
                let (row, output) = (index / outputs, index % outputs);
                let at = |i: usize| rounded(x[row * inputs + i]) * rounded(wide[output * inputs + i]);
                let expected: f64 = (0..inputs).map(at).sum();
                assert!((f64::from(y) - expected).abs() < 1e-4, "{dtype:?} ({row}, {output})");
            }
        }
        Ok(())
    }

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_nan() {
        for x in numbers(1000, 4).into_iter().chain([0.0, -0.0, f32::INFINITY, 1.0 + 1.0 / 256.0, 1e-40]) {
            assert_eq!(round(x) as u16, bf16::from_f32(x).to_bits(), "{x}");
        }
        assert!(bf16::from_bits(round(f32::NAN) as u16).is_nan());
    }
}
