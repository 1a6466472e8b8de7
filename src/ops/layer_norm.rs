//! Layer normalisation.

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor};

use super::simd::{sum, sum2};
use super::{Kernels, by_rows, elements, over_rows, with_elements};

impl Kernels {
    /// `(x − mean) / sqrt(var + eps) · gain + bias` over the last dimension.
    ///
    /// `x` is `(…, width)`, `gain` and `bias` are `(width)`; the variance is the biased one.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub fn layer_norm(self, x: &Tensor, gain: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
        if self.fuses(&[x, gain, bias]) {
            let op = LayerNorm { eps: eps as f32 };
            return x.contiguous()?.apply_op3(&gain.contiguous()?, &bias.contiguous()?, op);
        }
        let wide = x.to_dtype(DType::F32)?;
        let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
        centred.broadcast_div(&deviation)?.to_dtype(x.dtype())?.broadcast_mul(gain)?.broadcast_add(bias)
    }
}

struct LayerNorm {
    eps: f32,
}

impl LayerNorm {
    /// Mean, and one over the standard deviation.
    #[inline(always)]
    fn moments(&self, row: &[f32]) -> (f32, f32) {
        let width = row.len() as f32;
        let mean = sum(row, |x| x) / width;
        let variance = sum(row, |x| (x - mean) * (x - mean)) / width;
        (mean, 1.0 / (variance + self.eps).sqrt())
    }

    /// The gradient of the input: `r · (gw − mean(gw) − x̂ · mean(gw·x̂))` with `gw = g·gain`.
    fn input_gradient(&self, x: &[f32], gain: &[f32], grad: &[f32]) -> Result<Vec<f32>> {
        let width = gain.len() as f32;
        by_rows(
            gain.len(),
            [x, grad],
            #[inline(always)]
            |_, out, [x, grad]| {
                let (mean, r) = self.moments(x);
                for ((o, &g), &w) in out.iter_mut().zip(grad).zip(gain) {
                    *o = g * w;
                }
                let level = sum(out, |gw| gw) / width;
                let slope = sum2(out, x, |gw, x| gw * (x - mean)) * r * r / width;
                for (o, &x) in out.iter_mut().zip(x) {
                    *o = r * (*o - level - (x - mean) * slope);
                }
            },
        )
    }

    /// The gradients of gain and bias: Σ over rows of `g · x̂` and of `g`, one after the other.
    fn parameter_gradients(&self, x: &[f32], grad: &[f32], width: usize) -> Vec<f32> {
        over_rows(width, 2 * width, [x, grad], |sums, x, grad| {
            let (gain, bias) = sums.split_at_mut(width);
            let (mean, r) = self.moments(x);
            for (((dw, db), &x), &g) in gain.iter_mut().zip(bias).zip(x).zip(grad) {
                *dw += g * (x - mean) * r;
                *db += g;
            }
        })
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, gain, bias) = (elements(x, lx)?, elements(w, lw)?, elements(b, lb)?);
        let width = super::checked_width(lx, gain.len())?;
        super::checked_width(lb, width)?;
        let out = by_rows(
            width,
            [x],
            #[inline(always)]
            |_, out, [x]| {
                let (mean, r) = self.moments(x);
                for (((o, &x), &w), &b) in out.iter_mut().zip(x).zip(gain).zip(bias) {
                    *o = (x - mean) * r * w + b;
                }
            },
        )?;
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let dx = with_elements([x, gain, &grad], |[x, gain, grad]| self.input_gradient(x, gain, grad))?;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        if !gain.track_op() && !bias.track_op() {
            return Ok((Some(dx), None, None));
        }
        let width = gain.elem_count();
        let sums = with_elements([x, &grad], |[x, grad]| Ok(self.parameter_gradients(x, grad, width)))?;
        let sums = Tensor::from_vec(sums, (2, width), x.device())?;
        Ok((Some(dx), Some(sums.get(0)?), Some(sums.get(1)?)))
    }
}
