//! Matrices that are not trained, as operands of products.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};

use super::Kernels;
use super::bf16::Matrix;
use super::gemm::{Threads, gemm, view};

/// A frozen matrix `(outputs, inputs)` on the CPU, in f32 or bf16.
#[derive(Clone)]
pub(super) struct Frozen(Tensor);

impl Kernels {
    /// `matrix` for the fused products with f32 rows, where there are any.
    pub(super) fn frozen(self, matrix: &Tensor) -> Option<Frozen> {
        let holds = matches!(matrix.dtype(), DType::F32 | DType::BF16) && matrix.device().is_cpu();
        let fits = holds && self == Self::Fused && matrix.rank() == 2 && !matrix.track_op();
        fits.then(|| Frozen(matrix.clone()))
    }
}

impl Frozen {
    pub(super) fn dims(&self) -> Result<(usize, usize)> {
        self.0.dims2()
    }

    /// `count` of its outputs, from `first` on.
    pub(super) fn outputs(&self, first: usize, count: usize) -> Result<Self> {
        Ok(Self(self.0.narrow(0, first, count)?))
    }

    /// `x · Mᵀ`: `rows` contiguous rows of inputs from `offset` on to `(rows, outputs)`.
    pub(super) fn forward(&self, x: &CpuStorage, offset: usize, rows: usize) -> Result<Vec<f32>> {
        let (outputs, inputs) = self.dims()?;
        self.product(
            (x, offset, rows, inputs),
            |matrix, x| matrix.forward(x),
            |(down, right), start| view((inputs, outputs), (right, down), start),
        )
    }

    /// `grad · M`: `rows` contiguous rows of outputs from `offset` on to `(rows, inputs)`.
    pub(super) fn backward(&self, grad: &CpuStorage, offset: usize, rows: usize) -> Result<Vec<f32>> {
        let (outputs, inputs) = self.dims()?;
        self.product(
            (grad, offset, rows, outputs),
            |matrix, grad| matrix.backward(grad),
            |(down, right), start| view((outputs, inputs), (down, right), start),
        )
    }

    fn product(
        &self,
        (x, offset, rows, width): (&CpuStorage, usize, usize, usize),
        narrow: impl FnOnce(Matrix<'_>, &[f32]) -> Vec<f32>,
        right: impl FnOnce((usize, usize), usize) -> Layout,
    ) -> Result<Vec<f32>> {
        let (outputs, inputs) = self.dims()?;
        let (storage, layout) = self.0.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("matrix is not on the cpu") };
        if let CpuStorage::BF16(values) = storage {
            let Some((start, end)) = layout.contiguous_offsets() else { bail!("matrix is not contiguous") };
            let matrix = Matrix { values: &values[start..end], outputs, inputs };
            return Ok(narrow(matrix, &x.as_slice::<f32>()?[offset..][..rows * width]));
        }
        let strides = layout.stride();
        let right = right((strides[0], strides[1]), layout.start_offset());
        gemm(&(x, view((rows, width), (width, 1), offset)), &(storage, right), Threads::All)
    }
}
