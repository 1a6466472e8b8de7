//! Linear maps, frozen and trained.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::frozen::Frozen;
use super::simd::{add_scaled, vectorised};
use super::{Kernels, Matrix, task_rows};

impl Kernels {
    /// `x · Wᵀ + bias`: `x` is `(…, in)`, `weight` is `(out, in)`, `bias` is `(out)`.
    ///
    /// A weight that is not trained gets no gradient computed and none kept. It may be of a smaller type than `x`,
    /// whose type the result has: with a weight in bf16, 8 rows of f32 and more are rounded to bf16 and summed in f32, and
    /// fewer are not rounded; with a quantised one 16 rows and more are rounded to bf16 too, and fewer to 8 bits a
    /// number, each block of a row with a factor of its own.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub fn linear(self, x: &Tensor, weight: impl Into<Matrix>, bias: Option<&Tensor>) -> Result<Tensor> {
        let weight = weight.into();
        let frozen_bias = bias.is_none_or(|bias| !bias.track_op() && self.fuses(&[bias]));
        if let (Some(weight), true) = (self.frozen(&weight), frozen_bias && self.fuses(&[x])) {
            return x.contiguous()?.apply_op1(FrozenLinear { weight, bias: bias.cloned() });
        }
        let (mut shape, (output, input)) = (x.dims().to_vec(), weight.dims2()?);
        let mut y = x.reshape(((), input))?.matmul(&weight.widened(x.dtype())?.t()?)?;
        if let Some(bias) = bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(last) = shape.last_mut() {
            *last = output;
        }
        y.reshape(shape)
    }

    /// `grad · W`: the gradient of the input of [`linear`](Self::linear) from that of its output. `grad` is
    /// `(…, out)`, `weight` is `(out, in)`. A step of a backward pass, itself not differentiated.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub(crate) fn linear_back(self, grad: &Tensor, weight: &Matrix) -> Result<Tensor> {
        let (mut shape, (output, input)) = (grad.dims().to_vec(), weight.dims2()?);
        if let Some(last) = shape.last_mut() {
            *last = input;
        }
        if let (Some(weight), true) = (self.frozen(weight), self.fuses(&[grad])) {
            return weight.back(grad, shape);
        }
        let weight = weight.widened(grad.dtype())?.detach();
        grad.detach().reshape(((), output))?.matmul(&weight)?.reshape(shape)
    }
}

struct FrozenLinear {
    weight: Frozen,
    bias: Option<Tensor>,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        let (output, input) = self.weight.dims()?;
        super::checked_width(lx, input)?;
        let mut y = self.weight.forward(x, lx.start_offset(), lx.shape().elem_count() / input)?;
        if let Some(bias) = &self.bias {
            super::with_elements([&bias.contiguous()?], |[bias]| {
                y.par_chunks_mut(task_rows(output) * output).for_each(|rows| {
                    vectorised(
                        #[inline(always)]
                        || {
                            for row in rows.chunks_exact_mut(output) {
                                add_scaled(row, 1.0, bias);
                            }
                        },
                    );
                });
                Ok(())
            })?;
        }
        let mut shape = lx.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = output;
        }
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.weight.back(grad, x.dims().to_vec())?))
    }
}

impl Frozen {
    /// `grad · W` as a tensor of this shape.
    fn back(&self, grad: &Tensor, shape: Vec<usize>) -> Result<Tensor> {
        let output = self.dims()?.0;
        let grad = grad.contiguous()?;
        let (storage, layout) = grad.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("gradient is not on the cpu") };
        super::checked_width(layout, output)?;
        let dx = self.backward(storage, layout.start_offset(), grad.elem_count() / output)?;
        Tensor::from_vec(dx, shape, grad.device())
    }
}
