//! Inner products with a constant: where a walk back begins.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::simd::{dot, vectorised};
use super::{Kernels, TASK_ELEMENTS, elements, with_elements};

impl Kernels {
    /// `⟨x, direction⟩`, a scalar whose gradient with respect to `x` is `direction`, which is a constant.
    ///
    /// # Errors
    /// Shapes that differ, or a failed computation.
    pub fn inner(self, x: &Tensor, direction: &Tensor) -> Result<Tensor> {
        if x.dims() != direction.dims() {
            bail!("inner product of {:?} and {:?}, expected one shape", x.dims(), direction.dims());
        }
        if self.fuses(&[x, direction]) {
            return x.contiguous()?.apply_op1(Inner(direction.detach().contiguous()?));
        }
        (x.to_dtype(DType::F32)? * direction.detach().to_dtype(DType::F32)?)?.sum_all()
    }
}

struct Inner(Tensor);

impl CustomOp1 for Inner {
    fn name(&self) -> &'static str {
        "inner"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = elements(x, layout)?;
        let total: f64 = with_elements([&self.0], |[direction]| {
            let parts = x.par_chunks(TASK_ELEMENTS).zip(direction.par_chunks(TASK_ELEMENTS));
            let sums = parts.map(|(a, b)| {
                f64::from(vectorised(
                    #[inline(always)]
                    || dot(a, b),
                ))
            });
            Ok(sums.collect::<Vec<_>>().into_iter().sum())
        })?;
        Ok((CpuStorage::F32(vec![total as f32]), ().into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let factor = f64::from(grad.to_scalar::<f32>()?);
        let unit = (factor - 1.0).abs() < f64::EPSILON;
        Ok(Some(if unit { self.0.clone() } else { (&self.0 * factor)? }))
    }
}
