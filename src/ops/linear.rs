//! Linear maps, frozen and trained.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::simd::{add_scaled, vectorised};
use super::{Kernels, gemm, task_rows, view};

impl Kernels {
    /// `x · Wᵀ + bias`: `x` is `(…, in)`, `weight` is `(out, in)`, `bias` is `(out)`.
    ///
    /// A weight that is not trained gets no gradient computed and none kept.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub fn linear(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let frozen = !weight.track_op() && bias.is_none_or(|bias| !bias.track_op());
        if frozen && self.fuses(&[x, weight]) && bias.is_none_or(|bias| self.fuses(&[bias])) {
            let op = FrozenLinear { weight: weight.clone(), bias: bias.cloned() };
            return x.contiguous()?.apply_op1(op);
        }
        let (mut shape, input) = (x.dims().to_vec(), weight.dim(1)?);
        let mut y = x.reshape(((), input))?.matmul(&weight.t()?)?;
        if let Some(bias) = bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(last) = shape.last_mut() {
            *last = weight.dim(0)?;
        }
        y.reshape(shape)
    }
}

struct FrozenLinear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        let (output, input) = self.weight.dims2()?;
        super::checked_width(lx, input)?;
        let rows = lx.shape().elem_count() / input;
        let (weight, lw) = self.weight.storage_and_layout();
        let Storage::Cpu(weight) = &*weight else { bail!("weight is not on the cpu") };
        let strides = lw.stride();
        let (out_stride, in_stride) = (strides[0], strides[1]);
        let transposed = view((input, output), (in_stride, out_stride), lw.start_offset());
        let x = (x, view((rows, input), (input, 1), lx.start_offset()));
        let mut y = gemm(&x, &(weight, transposed))?;
        if let Some(bias) = &self.bias {
            super::with_elements([&bias.contiguous()?], |[bias]| {
                y.par_chunks_mut(task_rows(output) * output).for_each(|rows| {
                    vectorised(
                        #[inline(always)]
                        || rows.chunks_exact_mut(output).for_each(|row| add_scaled(row, 1.0, bias)),
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
        let output = self.weight.dim(0)?;
        let dx = grad.reshape(((), output))?.matmul(&self.weight)?;
        Ok(Some(dx.reshape(x.shape())?))
    }
}
