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
    /// Of `matrix` `(out, in)`; with `moment` `(in, in)` in the sense of its outputs.
    pub(super) fn of(matrix: &Tensor, moment: Option<&Tensor>) -> Result<Self> {
        let matrix = to_faer(matrix)?;
        let whitening = moment.map(whitening).transpose()?;
        let product = match &whitening {
            Some(lower) => &matrix * lower,
            None => matrix,
        };
        let svd = product.thin_svd().map_err(|_| failed("singular values"))?;
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
fn whitening(moment: &Tensor) -> Result<Mat<f64>> {
    let mut moment = to_faer(moment)?;
    let size = moment.nrows();
    let trace: f64 = (0..size).map(|k| moment[(k, k)]).sum();
    // Inputs that are all zero have no direction: any will do.
    let ridge = if trace > 0.0 { RIDGE * trace / size as f64 } else { 1.0 };
    for k in 0..size {
        moment[(k, k)] += ridge;
    }
    let factor = Llt::new(moment.as_ref(), Side::Lower).map_err(|_| failed("the cholesky factor"))?;
    Ok(factor.L().to_owned())
}

fn failed(what: &str) -> Error {
    Error::NotFinite { what: format!("{what} of a residual"), value: f64::NAN }
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
