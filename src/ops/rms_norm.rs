//! Root-mean-square normalisation.

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor};

use super::simd::{dot, sum2};
use super::{Kernels, by_rows, elements, over_rows, with_elements};

impl Kernels {
    /// `x / sqrt(mean(x²) + eps) · (offset + gain)` over the last dimension.
    ///
    /// `x` is `(…, width)`, `gain` is `(width)`; `offset` is 1 for families that store the distance from 1, else 0.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub fn rms_norm(self, x: &Tensor, gain: &Tensor, eps: f64, offset: f64) -> Result<Tensor> {
        if self.fuses(&[x, gain]) {
            let op = RmsNorm { eps: eps as f32, offset: offset as f32 };
            return x.contiguous()?.apply_op2(&gain.contiguous()?, op);
        }
        let wide = x.to_dtype(DType::F32)?;
        let rms = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
        let gain = (gain.to_dtype(DType::F32)? + offset)?;
        wide.broadcast_div(&rms)?.broadcast_mul(&gain)?.to_dtype(x.dtype())
    }
}

struct RmsNorm {
    eps: f32,
    offset: f32,
}

impl RmsNorm {
    #[inline(always)]
    fn inverse_rms(&self, row: &[f32]) -> f32 {
        1.0 / (dot(row, row) / row.len() as f32 + self.eps).sqrt()
    }

    /// The gradient of the input: `r · (g·w − x̂ · mean(g·w·x̂))` with `x̂ = r·x` and `w` the effective gain.
    fn input_gradient(&self, x: &[f32], gain: &[f32], grad: &[f32]) -> Result<Vec<f32>> {
        let width = gain.len() as f32;
        by_rows(
            gain.len(),
            [x, grad],
            #[inline(always)]
            |_, out, [x, grad]| {
                let r = self.inverse_rms(x);
                for ((o, &g), &w) in out.iter_mut().zip(grad).zip(gain) {
                    *o = g * (self.offset + w);
                }
                let shared = sum2(out, x, |gw, x| gw * x) * r * r / width;
                for (o, &x) in out.iter_mut().zip(x) {
                    *o = r * (*o - x * shared);
                }
            },
        )
    }

    /// The gradient of the gain: Σ over rows of `g · x̂`.
    fn gain_gradient(&self, x: &[f32], grad: &[f32], width: usize) -> Vec<f32> {
        over_rows(width, width, [x, grad], |sum, x, grad| {
            let r = self.inverse_rms(x);
            for ((s, &x), &g) in sum.iter_mut().zip(x).zip(grad) {
                *s += g * x * r;
            }
        })
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, gain) = (elements(x, lx)?, elements(w, lw)?);
        let width = super::checked_width(lx, gain.len())?;
        let out = by_rows(
            width,
            [x],
            #[inline(always)]
            |_, out, [x]| {
                let r = self.inverse_rms(x);
                for ((o, &x), &w) in out.iter_mut().zip(x).zip(gain) {
                    *o = x * r * (self.offset + w);
                }
            },
        )?;
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let dx = with_elements([x, gain, &grad], |[x, gain, grad]| self.input_gradient(x, gain, grad))?;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        if !gain.track_op() {
            return Ok((Some(dx), None));
        }
        let width = gain.elem_count();
        let dw = with_elements([x, &grad], |[x, grad]| Ok(self.gain_gradient(x, grad, width)))?;
        Ok((Some(dx), Some(Tensor::from_vec(dw, gain.shape(), gain.device())?)))
    }
}
