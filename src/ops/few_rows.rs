//! Products of few rows, as in decoding, which are held to the rate at which matrices are read.
//!
//! A matrix is read once for each row, as it lies, and nothing is rounded.

use candle_core::{CpuStorage, Layout, Result, bail};
use half::bf16;
use rayon::prelude::*;

use super::simd::{dot_bf16, dots, vectorised};
use super::task_rows;

/// A matrix `(outputs, inputs)`, row by row.
#[derive(Clone, Copy)]
pub(super) enum Lines<'a> {
    F32(&'a [f32]),
    BF16(&'a [bf16]),
}

impl<'a> Lines<'a> {
    /// The matrix, where it is held in one of these types and row by row.
    pub(super) fn of(storage: &'a CpuStorage, layout: &Layout) -> Option<Self> {
        let (start, end) = layout.contiguous_offsets()?;
        match storage {
            CpuStorage::F32(values) => Some(Self::F32(values.get(start..end)?)),
            CpuStorage::BF16(values) => Some(Self::BF16(values.get(start..end)?)),
            _ => None,
        }
    }

    fn len(self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::BF16(values) => values.len(),
        }
    }

    /// Numbers `first` to `end`.
    fn part(self, first: usize, end: usize) -> Self {
        match self {
            Self::F32(values) => Self::F32(&values[first..end]),
            Self::BF16(values) => Self::BF16(&values[first..end]),
        }
    }

    /// The dot product of `x` with every row.
    fn dots(self, x: &[f32], out: &mut [f32]) {
        match self {
            Self::F32(values) => dots(x, (values, x.len()), out),
            Self::BF16(values) => vectorised(
                #[inline(always)]
                || {
                    for (out, row) in out.iter_mut().zip(values.chunks_exact(x.len())) {
                        *out = dot_bf16(x, row);
                    }
                },
            ),
        }
    }
}

/// `x · Mᵀ` for each of these matrices: `(inputs)` to `(outputs)` of every one. All are shared out at once, since to hand
/// work over and to wait for it takes as long as a small matrix.
pub(super) fn one_row(x: &[f32], matrices: &[Lines<'_>]) -> Result<Vec<Vec<f32>>> {
    let inputs = x.len();
    if inputs == 0 || matrices.iter().any(|matrix| !matrix.len().is_multiple_of(inputs)) {
        bail!("a row of {inputs} numbers does not fit its matrices");
    }
    let mut results: Vec<_> = matrices.iter().map(|matrix| vec![0.0f32; matrix.len() / inputs]).collect();
    let (task, mut tasks) = (task_rows(inputs), Vec::new());
    for (matrix, result) in matrices.iter().zip(&mut results) {
        for (index, out) in result.chunks_mut(task).enumerate() {
            let first = index * task * inputs;
            tasks.push((matrix.part(first, first + out.len() * inputs), out));
        }
    }
    tasks.into_par_iter().for_each(|(lines, out)| lines.dots(x, out));
    Ok(results)
}

/// As [`one_row`], of several rows by one matrix: `(rows, inputs)` to `(rows, outputs)`.
pub(super) fn few_rows(x: &[f32], inputs: usize, matrix: Lines<'_>) -> Result<Vec<f32>> {
    let rows = x.chunks_exact(inputs.max(1)).map(|x| Ok(one_row(x, &[matrix])?.concat()));
    Ok(rows.collect::<Result<Vec<_>>>()?.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        use rand::{Rng, SeedableRng};
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect()
    }

    /// Matrices of both types at once, of more rows than one task has, against the definition.
    #[test]
    fn products_with_several_matrices_follow_each_other() -> Result<()> {
        let (inputs, x) = (576, numbers(576, 3));
        let wide = numbers(100 * inputs, 4);
        let narrow: Vec<bf16> = numbers(3 * inputs, 5).into_iter().map(bf16::from_f32).collect();
        let widened: Vec<f32> = narrow.iter().map(|value| value.to_f32()).collect();
        let found = one_row(&x, &[Lines::F32(&wide), Lines::BF16(&narrow), Lines::F32(&wide[..inputs])])?;
        let rows = wide.chunks(inputs).chain(widened.chunks(inputs)).chain([&wide[..inputs]]);
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [100, 3, 1]);
        for (found, row) in found.iter().flatten().zip(rows) {
            let terms = || row.iter().zip(&x).map(|(&a, &b)| f64::from(a) * f64::from(b));
            let magnitude: f64 = terms().map(f64::abs).sum();
            assert!((f64::from(*found) - terms().sum::<f64>()).abs() <= 1e-6 * magnitude);
        }
        Ok(())
    }

    #[test]
    fn rows_are_multiplied_one_after_the_other() -> Result<()> {
        let matrix = numbers(7 * 40, 6);
        let x = numbers(3 * 40, 7);
        let found = few_rows(&x, 40, Lines::F32(&matrix))?;
        for (x, found) in x.chunks(40).zip(found.chunks(7)) {
            assert_eq!(found, one_row(x, &[Lines::F32(&matrix)])?.concat());
        }
        assert!(few_rows(&[], 40, Lines::F32(&matrix))?.is_empty());
        Ok(())
    }

    #[test]
    fn a_row_that_does_not_fit_is_refused() {
        assert!(one_row(&[1.0; 3], &[Lines::F32(&[0.0; 7])]).is_err());
        assert!(one_row(&[], &[Lines::F32(&[])]).is_err());
    }
}
