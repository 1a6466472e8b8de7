//! Matrices that are not trained, as operands of products.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Storage, Tensor, bail};

use super::gemm::{Threads, gemm, view};
use super::simd::dot;
use super::{Kernels, Matrix, bf16, few_rows, with_elements};

/// From so many rows on, blocks are brought into bf16 for a product, which was measured to be no slower than candle's.
const QUANTIZED_ROWS: usize = 16;

/// A frozen matrix `(outputs, inputs)` on the CPU: in f32, bf16, or quantised.
#[derive(Clone)]
pub(super) struct Frozen(Matrix);

impl Kernels {
    /// `matrix` for the fused products with f32 rows, where there are any.
    pub(super) fn frozen(self, matrix: impl Into<Matrix>) -> Option<Frozen> {
        let matrix = matrix.into();
        let fits = match &matrix {
            Matrix::Tensor(tensor) => {
                let holds = matches!(tensor.dtype(), DType::F32 | DType::BF16) && tensor.device().is_cpu();
                holds && tensor.rank() == 2 && tensor.elem_count() > 0 && !tensor.track_op()
            }
            Matrix::Quantized(blocks) => blocks.device().is_cpu() && blocks.rank() == 2,
        };
        if !fits || self != Self::Fused {
            return None;
        }
        Some(Frozen(match matrix {
            // Products in bf16 take rows as they lie.
            Matrix::Tensor(tensor) if tensor.dtype() == DType::BF16 => tensor.contiguous().ok()?.into(),
            matrix => matrix,
        }))
    }
}

impl Frozen {
    pub(super) fn dims(&self) -> Result<(usize, usize)> {
        self.0.dims2()
    }

    /// Whether some of its outputs can be made without the others.
    pub(super) fn divides(&self) -> bool {
        self.0.as_tensor().is_some()
    }

    /// `count` of its outputs, from `first` on; all of them where it does not divide.
    pub(super) fn outputs(&self, first: usize, count: usize) -> Result<Self> {
        match &self.0 {
            Matrix::Tensor(tensor) => Ok(Self(tensor.narrow(0, first, count)?.into())),
            Matrix::Quantized(_) if (first, count) == (0, self.dims()?.0) => Ok(self.clone()),
            Matrix::Quantized(_) => bail!("some outputs of a quantised matrix, expected all"),
        }
    }

    /// `x · Mᵀ`: `rows` contiguous rows of inputs from `offset` on to `(rows, outputs)`.
    pub(super) fn forward(&self, x: &CpuStorage, offset: usize, rows: usize) -> Result<Vec<f32>> {
        let (outputs, inputs) = self.dims()?;
        match &self.0 {
            Matrix::Tensor(tensor) if rows == 1 && tensor.dtype() == DType::F32 && tensor.is_contiguous() => {
                let x = &x.as_slice::<f32>()?[offset..][..inputs];
                with_elements([tensor], |[matrix]| Ok(few_rows(x, (matrix, inputs), dot)))
            }
            Matrix::Tensor(tensor) => product(
                tensor,
                (x, offset, rows, inputs),
                |matrix, x| matrix.forward(x),
                |(down, right), start| view((inputs, outputs), (right, down), start),
            ),
            Matrix::Quantized(blocks) if rows >= QUANTIZED_ROWS => {
                bf16::by_blocks(&x.as_slice::<f32>()?[offset..][..rows * inputs], blocks)
            }
            Matrix::Quantized(blocks) => {
                let x_rows = Layout::contiguous_with_offset((rows, inputs), offset);
                match blocks.cpu_fwd(x, &x_rows)?.0 {
                    CpuStorage::F32(y) => Ok(y),
                    other => bail!("product is {:?}, expected f32", other.dtype()),
                }
            }
        }
    }

    /// `grad · M`: `rows` contiguous rows of outputs from `offset` on to `(rows, inputs)`.
    pub(super) fn backward(&self, grad: &CpuStorage, offset: usize, rows: usize) -> Result<Vec<f32>> {
        let (outputs, inputs) = self.dims()?;
        let Matrix::Tensor(tensor) = &self.0 else {
            bail!("a quantised matrix has no backward, expected one in f32 or bf16")
        };
        product(
            tensor,
            (grad, offset, rows, outputs),
            |matrix, grad| matrix.backward(grad),
            |(down, right), start| view((outputs, inputs), (down, right), start),
        )
    }
}

/// The product of contiguous rows with a tensor, by `narrow` where it is in bf16, else with the view of it that `right`
/// gives for its strides and its first element.
fn product(
    matrix: &Tensor,
    (x, offset, rows, width): (&CpuStorage, usize, usize, usize),
    narrow: impl FnOnce(bf16::Matrix<'_>, &[f32]) -> Result<Vec<f32>>,
    right: impl FnOnce((usize, usize), usize) -> Layout,
) -> Result<Vec<f32>> {
    let (outputs, inputs) = matrix.dims2()?;
    let (storage, layout) = matrix.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("matrix is not on the cpu") };
    if let CpuStorage::BF16(values) = storage {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("matrix is not contiguous") };
        let matrix = bf16::Matrix { values: &values[start..end], outputs, inputs };
        return narrow(matrix, &x.as_slice::<f32>()?[offset..][..rows * width]);
    }
    let strides = layout.stride();
    let right = right((strides[0], strides[1]), layout.start_offset());
    gemm(&(x, view((rows, width), (width, 1), offset)), &(storage, right), Threads::All)
}
