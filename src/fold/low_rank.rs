//! The best residual of a given rank: truncated singular value decompositions.

use candle_core::{DType, Device, Tensor};
use faer::linalg::solvers::Llt;
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Mat, MatRef, Par, Side};

use crate::error::{Error, Result};

/// Added to a moment's diagonal, as a share of its mean: directions that the calibration text never took would else
/// weigh nothing.
const RIDGE: f64 = 1e-6;

/// A matrix taken apart: `D L = U S Vᵀ`, with `L Lᵀ` the moment of its inputs, or the identity.
pub(super) struct Decomposition {
    left: Mat<f64>,              // (out, k)
    singular: Vec<f64>,          // descending
    right: Mat<f64>,             // (in, k)
    whitening: Option<Mat<f64>>, // L, (in, in), lower
}

impl Decomposition {
    /// Of `matrix` `(out, in)`; with `moment` `(in, in)` in the sense of its outputs. `place` says which projection it is.
    ///
    /// # Errors
    /// A value that is not finite, or factors that do not converge.
    pub(super) fn of(matrix: &Tensor, moment: Option<&Tensor>, place: &str) -> Result<Self> {
        let matrix = finite(to_faer(matrix)?, || format!("what {place} lacks"))?;
        let whitening = moment.map(|moment| whitening(moment, place)).transpose()?;
        let product = match &whitening {
            Some(lower) => &matrix * lower,
            None => matrix,
        };
        let svd = product.thin_svd().map_err(|error| Error::Decomposition {
            factors: "singular values",
            what: format!("what {place} lacks"),
            reason: format!("{error:?}"),
        })?;
        let singular = (0..svd.S().dim()).map(|k| svd.S()[k]).collect();
        Ok(Self { left: svd.U().to_owned(), singular, right: svd.V().to_owned(), whitening })
    }

    /// The squared singular values, descending: what each unit of rank takes off the squared error.
    pub(super) fn gains(&self) -> impl Iterator<Item = f64> {
        self.singular.iter().map(|value| value * value)
    }

    /// `A` `(rank, in)` and `B` `(out, rank)` of the best residual of this rank, each with half of the singular
    /// values: f64.
    pub(super) fn truncated(&self, rank: usize) -> Result<(Tensor, Tensor)> {
        let rank = rank.min(self.singular.len());
        let root = |k: usize| self.singular.get(k).copied().unwrap_or_default().sqrt();
        let up = Mat::from_fn(self.left.nrows(), rank, |row, k| self.left[(row, k)] * root(k));
        // A L = √S Vᵀ, so that Lᵀ Aᵀ = V √S.
        let mut down = Mat::from_fn(self.right.nrows(), rank, |row, k| self.right[(row, k)] * root(k));
        if let Some(lower) = &self.whitening {
            solve_upper_triangular_in_place(lower.transpose(), down.as_mut(), Par::Seq);
        }
        Ok((to_candle(down.transpose())?, to_candle(up.as_ref())?))
    }
}

/// The lower Cholesky factor of a moment with a ridge.
fn whitening(moment: &Tensor, place: &str) -> Result<Mat<f64>> {
    let what = || format!("the second moment of the inputs of {place}");
    let mut moment = finite(to_faer(moment)?, what)?;
    let size = moment.nrows();
    let trace: f64 = (0..size).map(|k| moment[(k, k)]).sum();
    // Inputs that are all zero have no direction: any will do.
    let ridge = if trace > 0.0 { RIDGE * trace / size as f64 } else { 1.0 };
    for k in 0..size {
        moment[(k, k)] += ridge;
    }
    let factor = Llt::new(moment.as_ref(), Side::Lower).map_err(|error| Error::Decomposition {
        factors: "cholesky factor",
        what: what(),
        reason: format!("{error:?}"),
    })?;
    Ok(factor.L().to_owned())
}

/// The matrix, if all of it is finite.
fn finite(matrix: Mat<f64>, what: impl FnOnce() -> String) -> Result<Mat<f64>> {
    let (view, (height, width)) = (matrix.as_ref(), matrix.shape());
    let mut values = (0..height).flat_map(|row| (0..width).map(move |column| view[(row, column)]));
    match values.find(|value| !value.is_finite()) {
        Some(value) => Err(Error::NotFinite { what: what(), value }),
        None => Ok(matrix),
    }
}

fn to_faer(matrix: &Tensor) -> Result<Mat<f64>> {
    let rows = matrix.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let (height, width) = matrix.dims2()?;
    let value = |row: usize, column: usize| rows.get(row).and_then(|row| row.get(column)).copied();
    Ok(Mat::from_fn(height, width, |row, column| value(row, column).unwrap_or_default()))
}

fn to_candle(matrix: MatRef<'_, f64>) -> Result<Tensor> {
    let (height, width) = matrix.shape();
    let values = (0..height).flat_map(|row| (0..width).map(move |column| matrix[(row, column)]));
    Ok(Tensor::from_vec(values.collect::<Vec<f64>>(), (height, width), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn tensor<const ROWS: usize>(values: &[[f64; 3]; ROWS]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    /// `‖(D − B A) L‖²`, where `M = L Lᵀ`: the trace of `(D − B A) M (D − B A)ᵀ`.
    fn error(matrix: &Tensor, moment: &Tensor, rank: usize, start: Option<&Tensor>) -> f64 {
        let (a, b) = Decomposition::of(matrix, start, "q_proj").unwrap().truncated(rank).unwrap();
        let rest = (matrix - b.matmul(&a).unwrap()).unwrap();
        super::super::moments::energy(&rest, moment).unwrap()
    }

    /// By Eckart and Young the error that is left is the sum of the squared singular values that were left out. With a
    /// moment `M = diag(m²)` and rows that are orthogonal those are the rows' weighted lengths.
    #[test]
    fn what_is_left_is_what_was_left_out() {
        let matrix = tensor(&[[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]);
        let identity = tensor(&[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]);
        let moment = tensor(&[[1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 100.0]]);
        for (rank, left) in [(1, 5.0), (2, 1.0), (3, 0.0)] {
            assert!((error(&matrix, &identity, rank, None) - left).abs() < 1e-9);
        }
        // Weighted squares 9, 16 and 100: the last row goes first, and the plain start gets it wrong.
        for (rank, left, plain) in [(1, 25.0, 116.0), (2, 9.0, 100.0), (3, 0.0, 0.0)] {
            assert!((error(&matrix, &moment, rank, Some(&moment)) - left).abs() < 1e-3);
            assert!((error(&matrix, &moment, rank, None) - plain).abs() < 1e-9);
        }
        let gains: Vec<f64> = Decomposition::of(&matrix, None, "q_proj").unwrap().gains().collect();
        assert!(gains.iter().zip([9.0, 4.0, 1.0]).all(|(found, expected)| (found - expected).abs() < 1e-9));
    }

    #[test]
    fn what_cannot_be_taken_apart_is_named_with_its_value() {
        let sound = tensor(&[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]);
        let broken = tensor(&[[1.0, 2.0, 3.0], [4.0, f64::INFINITY, 6.0], [7.0, 8.0, 9.0]]);
        let negative = tensor(&[[2.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 2.0]]);
        let error = |matrix: &Tensor, moment: Option<&Tensor>| {
            Decomposition::of(matrix, moment, "block 3 q_proj").err().unwrap()
        };
        let found = error(&broken, None);
        assert!(matches!(found, Error::NotFinite { value: f64::INFINITY, .. }), "{found}");
        assert_eq!(found.to_string(), "what block 3 q_proj lacks is not finite (inf)");
        let found = error(&sound, Some(&broken)).to_string();
        assert_eq!(found, "the second moment of the inputs of block 3 q_proj is not finite (inf)");
        // Nothing of it is not a number: that there is no factor is the whole truth.
        let found = error(&sound, Some(&negative));
        assert!(matches!(found, Error::Decomposition { factors: "cholesky factor", .. }), "{found}");
        assert!(found.to_string().contains("block 3 q_proj"), "{found}");
    }

    #[test]
    fn inputs_that_are_always_zero_do_no_harm() {
        let matrix = tensor(&[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
        for moment in [tensor(&[[0.0; 3]; 3]), tensor(&[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])] {
            let (a, b) = Decomposition::of(&matrix, Some(&moment), "q_proj").unwrap().truncated(2).unwrap();
            let product: Vec<f64> = b.matmul(&a).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert!(product.iter().zip([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).all(|(p, e)| (p - e).abs() < 1e-4));
        }
    }
}
