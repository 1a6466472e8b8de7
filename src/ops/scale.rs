//! Scaling of columns.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{Kernels, by_rows, elements, over_rows, with_elements};

impl Kernels {
    /// `x ⊙ scale` over the last dimension: `x` is `(…, width)`, `scale` is `(width)`.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub fn scale(self, x: &Tensor, scale: &Tensor) -> Result<Tensor> {
        if self.fuses(&[x, scale]) {
            return x.contiguous()?.apply_op2(&scale.contiguous()?, Scale);
        }
        x.broadcast_mul(&scale.to_dtype(x.dtype())?)
    }
}

struct Scale;

impl Scale {
    fn scaled(x: &[f32], scale: &[f32]) -> Result<Vec<f32>> {
        by_rows(
            scale.len(),
            [x],
            #[inline(always)]
            |_, out, [x]| {
                for ((o, &x), &s) in out.iter_mut().zip(x).zip(scale) {
                    *o = x * s;
                }
            },
        )
    }

    /// Σ over rows of `g · x`.
    fn scale_gradient(x: &[f32], grad: &[f32], width: usize) -> Vec<f32> {
        over_rows(width, width, [x, grad], |sum, x, grad| {
            for ((s, &x), &g) in sum.iter_mut().zip(x).zip(grad) {
                *s += g * x;
            }
        })
    }
}

impl CustomOp2 for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        s: &CpuStorage,
        ls: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, scale) = (elements(x, lx)?, elements(s, ls)?);
        super::checked_width(lx, scale.len())?;
        Ok((CpuStorage::F32(Self::scaled(x, scale)?), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        scale: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let dx = with_elements([scale, &grad], |[scale, grad]| Self::scaled(grad, scale))?;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        if !scale.track_op() {
            return Ok((Some(dx), None));
        }
        let width = scale.elem_count();
        let ds = with_elements([x, &grad], |[x, grad]| Ok(Self::scale_gradient(x, grad, width)))?;
        Ok((Some(dx), Some(Tensor::from_vec(ds, scale.shape(), scale.device())?)))
    }
}
