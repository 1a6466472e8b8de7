//! Products of one row, as in decoding, or a few: what they take is the time to read the matrix.
//!
//! A matrix is read once for each row, as it lies.

use std::sync::OnceLock;

use candle_core::{CpuStorage, Layout, Result, bail};
use half::bf16;
use rayon::prelude::*;

use super::dots::dots;
use super::simd::{dot_bf16, vectorised};
use super::{q8_0, task_rows};

/// A matrix `(outputs, inputs)` whose rows are multiplied as they lie.
pub(super) trait Lines: Sync {
    /// `(outputs, inputs)`, at least one of each.
    fn shape(&self) -> (usize, usize);

    /// Makes of a row what it is multiplied as, before it is multiplied by several threads.
    fn prepare(&self, _: &Row<'_>) {}

    /// The dot product of `x` with every row from `first` on, as many as `out` has room for.
    fn dots(&self, x: &Row<'_>, first: usize, out: &mut [f32]);
}

/// A row that goes in, and what it is rounded to where a matrix asks for that.
pub(super) struct Row<'a> {
    pub numbers: &'a [f32],
    pub rounded: OnceLock<q8_0::Rounded>,
}

impl<'a> Row<'a> {
    fn new(numbers: &'a [f32]) -> Self {
        Self { numbers, rounded: OnceLock::new() }
    }
}

/// A matrix with one number for each element.
struct Numbers<'a, T> {
    values: &'a [T],
    inputs: usize,
}

/// The rows of a matrix, where it is held in f32 or bf16 and row by row.
pub(super) fn lines<'a>(storage: &'a CpuStorage, layout: &Layout) -> Option<Box<dyn Lines + 'a>> {
    let (start, end) = layout.contiguous_offsets()?;
    let &[outputs, inputs] = layout.dims() else { return None };
    if outputs == 0 || inputs == 0 {
        return None;
    }
    match storage {
        CpuStorage::F32(values) => Some(Box::new(Numbers { values: values.get(start..end)?, inputs })),
        CpuStorage::BF16(values) => Some(Box::new(Numbers { values: values.get(start..end)?, inputs })),
        _ => None,
    }
}

impl<T> Numbers<'_, T> {
    fn outputs(&self) -> usize {
        self.values.len() / self.inputs
    }

    /// So many rows from `first` on.
    fn rows(&self, first: usize, count: usize) -> &[T] {
        &self.values[first * self.inputs..][..count * self.inputs]
    }
}

impl Lines for Numbers<'_, f32> {
    fn shape(&self) -> (usize, usize) {
        (self.outputs(), self.inputs)
    }

    fn dots(&self, x: &Row<'_>, first: usize, out: &mut [f32]) {
        dots(x.numbers, (self.rows(first, out.len()), self.inputs), out);
    }
}

impl Lines for Numbers<'_, bf16> {
    fn shape(&self) -> (usize, usize) {
        (self.outputs(), self.inputs)
    }

    fn dots(&self, x: &Row<'_>, first: usize, out: &mut [f32]) {
        let rows = self.rows(first, out.len());
        vectorised(
            #[inline(always)]
            || {
                for (out, row) in out.iter_mut().zip(rows.chunks_exact(self.inputs)) {
                    *out = dot_bf16(x.numbers, row);
                }
            },
        );
    }
}

/// `x · Mᵀ` by each of these matrices: from `(inputs)`, one `(outputs)` a matrix.
pub(super) fn one_row(x: &[f32], matrices: &[&dyn Lines]) -> Result<Vec<Vec<f32>>> {
    let x = Row::new(x);
    let mut results: Vec<_> = matrices.iter().map(|matrix| vec![0.0f32; matrix.shape().0]).collect();
    let products = matrices.iter().zip(&mut results);
    multiply(products.map(|(&matrix, out)| (&x, matrix, out.as_mut_slice())))?;
    Ok(results)
}

/// `x · Mᵀ`: `(rows, inputs)` to `(rows, outputs)`.
pub(super) fn few_rows(x: &[f32], matrix: &dyn Lines) -> Result<Vec<f32>> {
    let (outputs, inputs) = matrix.shape();
    let rows: Vec<_> = x.chunks(inputs).map(Row::new).collect();
    let mut result = vec![0.0f32; rows.len() * outputs];
    multiply(rows.iter().zip(result.chunks_mut(outputs)).map(|(x, out)| (x, matrix, out)))?;
    Ok(result)
}

/// Puts what each matrix makes of a row where it belongs. All are shared out to threads at once: to hand work over, and to
/// wait for it, takes as long as a small matrix.
fn multiply<'a>(products: impl Iterator<Item = (&'a Row<'a>, &'a dyn Lines, &'a mut [f32])>) -> Result<()> {
    let mut tasks = Vec::new();
    for (x, matrix, out) in products {
        let (outputs, inputs) = matrix.shape();
        if x.numbers.len() != inputs {
            bail!("a row of {} numbers by a matrix ({outputs}, {inputs})", x.numbers.len());
        }
        matrix.prepare(x);
        let task = task_rows(inputs);
        tasks.extend(out.chunks_mut(task).enumerate().map(|(at, out)| (x, matrix, at * task, out)));
    }
    // A part of a matrix is in the caches while it is multiplied by one row after the other.
    tasks.sort_by_key(|&(_, _, first, _)| first);
    tasks.into_par_iter().for_each(|(x, matrix, first, out)| matrix.dots(x, first, out));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{is_sum, numbers};

    fn matrix(values: &[f32], inputs: usize) -> Numbers<'_, f32> {
        Numbers { values, inputs }
    }

    /// Matrices of both types at once, of more rows than one task has, against the definition.
    #[test]
    fn products_by_several_matrices_are_sums() -> Result<()> {
        let (inputs, x) = (576, numbers(576, 3));
        let wide = numbers(100 * inputs, 4);
        let narrow: Vec<bf16> = numbers(3 * inputs, 5).into_iter().map(bf16::from_f32).collect();
        let widened: Vec<f32> = narrow.iter().map(|value| value.to_f32()).collect();
        let narrow = Numbers { values: &narrow, inputs };
        let found = one_row(&x, &[&matrix(&wide, inputs), &narrow, &matrix(&wide[..inputs], inputs)])?;
        let rows = wide.chunks(inputs).chain(widened.chunks(inputs)).chain([&wide[..inputs]]);
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [100, 3, 1]);
        for (found, row) in found.iter().flatten().zip(rows) {
            assert!(is_sum(*found, row.iter().zip(&x).map(|(&a, &b)| f64::from(a) * f64::from(b))));
        }
        Ok(())
    }

    #[test]
    fn few_rows_are_as_each_alone() -> Result<()> {
        let (values, x) = (numbers(7 * 40, 6), numbers(3 * 40, 7));
        let found = few_rows(&x, &matrix(&values, 40))?;
        let alone = x.chunks(40).map(|x| one_row(x, &[&matrix(&values, 40)]));
        let expected = alone.collect::<Result<Vec<_>>>()?.into_iter().flatten().flatten();
        assert_eq!(found, expected.collect::<Vec<_>>());
        assert_eq!(found.len(), 21);
        assert!(few_rows(&[], &matrix(&values, 40))?.is_empty());
        Ok(())
    }

    #[test]
    fn a_row_that_does_not_fit_is_refused() {
        // 24 numbers are two rows of 12 as well.
        let values = [0.0; 24];
        assert!(one_row(&[1.0; 12], &[&matrix(&values, 6)]).is_err());
        assert!(few_rows(&[1.0; 13], &matrix(&values, 6)).is_err());
    }
}
