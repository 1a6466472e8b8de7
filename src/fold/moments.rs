//! Second moments of what goes into a block's projections.

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::model::{Block, Pass, Projection};

/// `E[x xᵀ]` of the inputs of one or more projections, accumulated in f64 window by window.
#[derive(Debug)]
pub(super) struct Moment {
    projections: Vec<Projection>,
    sum: Tensor, // (in, in), f64
    tokens: usize,
}

/// The moments of the inputs of every projection of a block; projections with one input have one moment.
#[derive(Debug, Default)]
pub(super) struct Moments(Vec<Moment>);

impl Moments {
    /// Adds what the block sees of one window: `x` is its input, `(1, seq, hidden)`.
    pub(super) fn add(&mut self, block: &Block, x: &Tensor, pass: &Pass<'_>) -> Result<()> {
        for (place, (projections, input)) in block.projection_inputs(x, pass)?.into_iter().enumerate() {
            let rows = input.flatten_to(1)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?; // (tokens, in)
            let product = rows.t()?.matmul(&rows)?;
            let tokens = rows.dim(0)?;
            match self.0.get_mut(place) {
                Some(moment) => {
                    moment.sum = (&moment.sum + product)?;
                    moment.tokens += tokens;
                }
                None => self.0.push(Moment { projections, sum: product, tokens }),
            }
        }
        Ok(())
    }

    /// The moment of a projection's input: `(in, in)`, f64.
    pub(super) fn of(&self, projection: Projection) -> Result<Tensor> {
        let moment = self.0.iter().find(|moment| moment.projections.contains(&projection));
        let missing = || Error::Plan(format!("no window was read for {}", projection.name()));
        let moment = moment.ok_or_else(missing)?;
        Ok((&moment.sum / moment.tokens as f64)?)
    }
}

/// `tr(D M Eᵀ)` of each output: `(out)`, from `(out, in)` matrices and a moment.
pub(super) fn energies(left: &Tensor, moment: &Tensor, right: &Tensor) -> Result<Vec<f64>> {
    Ok((left.matmul(moment)? * right)?.sum(1)?.to_vec1::<f64>()?)
}

/// `tr(D M Dᵀ)`: the mean squared length of what a matrix makes of inputs with this moment.
pub(super) fn energy(matrix: &Tensor, moment: &Tensor) -> Result<f64> {
    Ok(energies(matrix, moment, matrix)?.into_iter().sum())
}
