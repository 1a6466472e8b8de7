//! Products of many rows with a matrix in f32, in bf16, or in ggml's blocks.
//!
//! The result is made in stripes of a few dozen columns, each by one task: it brings what the matrix has for these
//! columns into the order in which the innermost loops read it, a panel, and multiplies all rows by it, a few at a time,
//! while it stays in the caches. Every number of the result is one sum from first to last: which, and in which
//! order, does not depend on who computes it.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod number;
mod panel;
mod tile;

use std::ops::Range;

use candle_core::quantized::QTensor;
use candle_core::{Device, Result, Tensor};
use half::bf16;

use super::{rectangles, with_elements};
pub(super) use number::Number;
use number::Step;
use panel::Panel;
use tile::{COLUMNS, ROWS, TileFn};

/// Steps of a panel at most, 1.5 MiB: those of one that is deeper are summed one stretch after the other.
const DEPTH: usize = 8192;

/// Rows that are worth bringing a panel into order once more for, where there are fewer stripes than threads.
const TASK_ROWS: usize = 128;

/// A matrix `(outputs, inputs)`, row by row.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    pub values: &'a [T],
    pub outputs: usize,
    pub inputs: usize,
}

impl<T: Number> Matrix<'_, T> {
    /// Whether this machine has the instructions that this is written for.
    pub(super) fn is_fast() -> bool {
        T::Step::fast().is_some()
    }

    /// `x · Mᵀ`: `(rows, inputs)` to `(rows, outputs)`.
    pub(super) fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        self.forward_by(tile::best(), x)
    }

    /// `grad · M`: `(rows, outputs)` to `(rows, inputs)`.
    pub(super) fn backward(&self, grad: &[f32]) -> Result<Vec<f32>> {
        self.backward_by(tile::best(), grad)
    }

    fn forward_by(&self, tile: TileFn<T::Step>, x: &[f32]) -> Result<Vec<f32>> {
        let rows = T::Step::rows(x, self.inputs);
        let depth = self.inputs.div_ceil(T::A_STEP);
        multiply(tile, (&rows, depth), self.outputs, |columns, steps, panel| {
            let rows = columns.start * self.inputs..columns.end * self.inputs;
            panel.bring_rows(&self.values[rows], self.inputs, steps);
            Ok(())
        })
    }

    fn backward_by(&self, tile: TileFn<T::Step>, grad: &[f32]) -> Result<Vec<f32>> {
        let rows = T::Step::rows(grad, self.outputs);
        let depth = self.outputs.div_ceil(T::A_STEP);
        multiply(tile, (&rows, depth), self.inputs, |columns, steps, panel| {
            panel.bring_columns(self.values, self.inputs, columns, steps);
            Ok(())
        })
    }
}

/// `x · Mᵀ` by a matrix `(outputs, inputs)` in ggml's blocks: `(rows, inputs)` to `(rows, outputs)`, both rounded to
/// bf16. Candle gives rows as a whole: those of more inputs than two times [`DEPTH`] are read once for each stretch.
pub(super) fn by_blocks(x: &[f32], blocks: &QTensor) -> Result<Vec<f32>> {
    let (outputs, inputs) = blocks.shape().dims2()?;
    let depth = inputs.div_ceil(bf16::A_STEP);
    multiply(tile::best(), (&u32::rows(x, inputs), depth), outputs, |columns, steps, panel| {
        let ids: Vec<u32> = columns.map(|output| output as u32).collect();
        let rows = blocks.embedding(&Tensor::new(ids, &Device::Cpu)?)?;
        with_elements([&rows], |[rows]| {
            panel.bring_rows::<u32>(&u32::rows(rows, inputs), depth, steps);
            Ok(())
        })
    })
}

/// Rows of `depth` steps times a matrix of `width` columns, of which `bring` puts a range, over a range of steps, into an
/// empty panel.
fn multiply<S: Step>(
    tile: TileFn<S>,
    (rows, depth): (&[S], usize),
    width: usize,
    bring: impl Fn(Range<usize>, Range<usize>, &mut Panel<S>) -> Result<()> + Sync,
) -> Result<Vec<f32>> {
    let count = rows.len().checked_div(depth).unwrap_or(0);
    let tasks = (2 * rayon::current_num_threads()).div_ceil(width.div_ceil(COLUMNS).max(1));
    let task_rows = count.div_ceil(tasks).max(TASK_ROWS).next_multiple_of(ROWS);
    let stretch = depth.div_ceil(depth.div_ceil(DEPTH).max(1)).max(1);
    rectangles::filled((count, width), (task_rows, COLUMNS), |part| {
        let bottom = part.rows().end;
        // Sums that later stretches add to.
        let held = if stretch < depth { part.rows().len().div_ceil(ROWS) } else { 1 };
        let mut tiles = vec![tile::EMPTY; held];
        for first in (0..depth).step_by(stretch) {
            let steps = first..(first + stretch).min(depth);
            let mut panel = Panel::empty(steps.len());
            bring(part.columns(), steps.clone(), &mut panel)?;
            for (index, top) in part.rows().step_by(ROWS).enumerate() {
                let sums = &mut tiles[index % held];
                if first == 0 {
                    *sums = tile::EMPTY;
                }
                if steps.end == depth {
                    part.prefetch(ROWS);
                }
                // Where there are no more rows, the last one is multiplied again, for nothing.
                let row = |r: usize| &rows[(top + r).min(bottom - 1) * depth..][steps.clone()];
                tile(std::array::from_fn(row), panel.steps(), sums);
                if steps.end == depth {
                    for sums in sums.iter().take(bottom - top) {
                        part.push(&sums[..part.columns().len()])?;
                    }
                }
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{is_sum, numbers};

    /// Products by a matrix whose numbers are made by `from`, of rows rounded by `rounded`, are those of the definition, by
    /// the machine's own instructions and without them.
    fn defined<T: Number>(from: fn(f32) -> T, wide: fn(T) -> f32, rounded: fn(f32) -> f32) -> Result<()> {
        for (rows, inputs, outputs) in [
            (1, 5, 3),
            (3, 64, 48),
            (8, 7, 50),
            (21, 100, 49),
            (270, 33, 131),
            (9, 2500, 2100),
            (130, 1, 1),
            (9, 17000, 10),
            (9, 10, 17000),
        ] {
            let values: Vec<T> = numbers(inputs * outputs, 1).into_iter().map(from).collect();
            let matrix = Matrix { values: &values, outputs, inputs };
            let at = |output: usize, input: usize| f64::from(wide(values[output * inputs + input]));
            let (x, grad) = (numbers(rows * inputs, 2), numbers(rows * outputs, 3));
            for tile in [tile::best(), tile::portable] {
                let y = matrix.forward_by(tile, &x)?;
                assert_eq!(y.len(), rows * outputs);
                for (index, y) in y.into_iter().enumerate() {
                    let (row, output) = (index / outputs, index % outputs);
                    let terms = (0..inputs).map(|i| f64::from(rounded(x[row * inputs + i])) * at(output, i));
                    assert!(is_sum(y, terms), "({rows}, {inputs}, {outputs})");
                }
                let dx = matrix.backward_by(tile, &grad)?;
                assert_eq!(dx.len(), rows * inputs);
                for (index, dx) in dx.into_iter().enumerate() {
                    let (row, input) = (index / inputs, index % inputs);
                    let of = |o: usize| f64::from(rounded(grad[row * outputs + o]));
                    let terms = (0..outputs).map(|o| of(o) * at(o, input));
                    assert!(is_sum(dx, terms), "({rows}, {inputs}, {outputs})");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn products_in_f32_are_those_of_the_definition() -> Result<()> {
        defined::<f32>(|x| x, |x| x, |x| x)
    }

    #[test]
    fn products_in_bf16_are_those_of_the_rounded_operands() -> Result<()> {
        defined::<bf16>(bf16::from_f32, bf16::to_f32, |x| bf16::from_f32(x).to_f32())
    }

    #[test]
    fn products_by_blocks_are_those_of_the_rounded_operands() -> Result<()> {
        use candle_core::quantized::GgmlDType;
        for (dtype, rows, inputs, outputs) in [
            (GgmlDType::Q8_0, 9, 64, 50),
            (GgmlDType::Q8_0, 9, 17408, 10),
            (GgmlDType::Q4K, 20, 2560, 100),
            (GgmlDType::Q6K, 70, 256, 7),
        ] {
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
                assert!(is_sum(y, (0..inputs).map(at)), "{dtype:?} ({row}, {output})");
            }
        }
        Ok(())
    }

    #[test]
    fn products_of_nothing_are_empty() -> Result<()> {
        for (rows, inputs, outputs) in [(0, 4, 3), (2, 4, 0)] {
            let (values, x) = (vec![1.0f32; inputs * outputs], vec![1.0f32; rows * inputs]);
            assert!(Matrix { values: &values, outputs, inputs }.forward(&x)?.is_empty());
        }
        for (rows, inputs, outputs) in [(0, 4, 3), (2, 0, 3)] {
            let (values, grad) = (vec![1.0f32; inputs * outputs], vec![1.0f32; rows * outputs]);
            assert!(Matrix { values: &values, outputs, inputs }.backward(&grad)?.is_empty());
        }
        Ok(())
    }

    /// There, back and by ggml's blocks, deeper than one stretch and not.
    #[test]
    fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
        use candle_core::quantized::GgmlDType;
        let all = || {
            let mut results = Vec::new();
            for (rows, inputs, outputs) in [(575, 170, 100), (20, 17408, 100)] {
                let (values, x) = (numbers(outputs * inputs, 1), numbers(rows * inputs, 2));
                let short: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
                let wide = Matrix { values: &values, outputs, inputs };
                results.push(wide.forward(&x)?);
                results.push(Matrix { values: &short, outputs, inputs }.forward(&x)?);
                // The same numbers as a matrix of so many outputs.
                results.push(Matrix { values: &values, outputs: inputs, inputs: outputs }.backward(&x)?);
                results.push(Matrix { values: &short, outputs: inputs, inputs: outputs }.backward(&x)?);
                if inputs % 32 == 0 {
                    let weight = Tensor::from_slice(&values, (outputs, inputs), &Device::Cpu)?;
                    results.push(by_blocks(&x, &QTensor::quantize(&weight, GgmlDType::Q8_0)?)?);
                }
            }
            Ok::<Vec<u32>, candle_core::Error>(results.concat().into_iter().map(f32::to_bits).collect())
        };
        let by = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.map_err(candle_core::Error::wrap)?.install(all)
        };
        assert!(by(1)? == by(5)?);
        Ok(())
    }
}
