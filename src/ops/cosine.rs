//! Cosines of the vectors of two tensors.

use candle_core::{D, DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::simd::{dot, vectorised};
use super::{Kernels, task_rows, with_elements};

/// The least length of a vector, so that the cosine with a zero vector (the embedding of a padding token) is 0, as in
/// PyTorch's `cosine_similarity`.
const LEAST: f32 = 1e-8;

impl Kernels {
    /// The mean over all tokens of the cosine of their vectors in `x` and `y`, `(batch, seq, hidden)` each. No gradient
    /// flows through it.
    pub(crate) fn mean_cosine(self, x: &Tensor, y: &Tensor) -> Result<f64> {
        if x.dims() != y.dims() || x.elem_count() == 0 {
            bail!("cosines of {:?} and {:?}, expected one shape with elements", x.dims(), y.dims());
        }
        if !self.fuses(&[x, y]) {
            let (x, y) = (x.to_dtype(DType::F32)?, y.to_dtype(DType::F32)?);
            let length = |x: &Tensor| x.sqr()?.sum(D::Minus1)?.sqrt()?.maximum(LEAST);
            let cosines = ((&x * &y)?.sum(D::Minus1)? / (length(&x)? * length(&y)?)?)?;
            return Ok(f64::from(cosines.mean_all()?.to_scalar::<f32>()?));
        }
        let (width, tokens) = (x.dim(D::Minus1)?, x.elem_count() / x.dim(D::Minus1)?);
        let total: f64 = with_elements([&x.contiguous()?, &y.contiguous()?], |[x, y]| {
            let task = task_rows(width) * width;
            let sums = x.par_chunks(task).zip(y.par_chunks(task)).map(|(x, y)| {
                vectorised(
                    #[inline(always)]
                    || sum_of_cosines(x, y, width),
                )
            });
            Ok(sums.collect::<Vec<f64>>().into_iter().sum())
        })?;
        Ok(total / tokens as f64)
    }
}

#[inline(always)]
fn sum_of_cosines(x: &[f32], y: &[f32], width: usize) -> f64 {
    let mut sum = 0.0;
    for (x, y) in x.chunks_exact(width).zip(y.chunks_exact(width)) {
        let lengths = dot(x, x).sqrt().max(LEAST) * dot(y, y).sqrt().max(LEAST);
        sum += f64::from(dot(x, y) / lengths);
    }
    sum
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn cosines_are_those_of_the_primitives_and_of_a_closed_form() -> Result<()> {
        // More than one task, and a width that no vector register fills.
        let (tokens, width) = (3_000, 7);
        let (x, y) = (
            Tensor::randn(0f32, 1.0, (2, tokens, width), &Device::Cpu)?,
            Tensor::randn(0f32, 1.0, (2, tokens, width), &Device::Cpu)?,
        );
        let (fused, primitive) =
            (Kernels::Fused.mean_cosine(&x, &y)?, Kernels::Primitive.mean_cosine(&x, &y)?);
        assert!((fused - primitive).abs() < 1e-6, "{fused} {primitive}");
        assert!((Kernels::Fused.mean_cosine(&x, &(&x * -2.0)?)? + 1.0).abs() < 1e-6);

        // Right angle, 45°, and a zero vector: (0 + 1/√2 + 0) / 3.
        let x = Tensor::new(&[[[1f32, 0.0], [1.0, 0.0], [0.0, 0.0]]], &Device::Cpu)?;
        let y = Tensor::new(&[[[0f32, 3.0], [2.0, 2.0], [1.0, 1.0]]], &Device::Cpu)?;
        for kernels in [Kernels::Fused, Kernels::Primitive] {
            let cosine = kernels.mean_cosine(&x, &y)?;
            assert!((cosine - std::f64::consts::FRAC_1_SQRT_2 / 3.0).abs() < 1e-7, "{kernels:?}: {cosine}");
        }
        assert!(Kernels::Fused.mean_cosine(&x, &y.narrow(1, 0, 2)?).is_err());
        Ok(())
    }
}
