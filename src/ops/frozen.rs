//! Matrices that are not trained, as operands of products.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Storage, Tensor, bail};

use super::few_rows::{self, Lines};
use super::gemm::{Threads, gemm, view};
use super::{Kernels, Matrix, product, q8_0};

/// From so many rows on a product by a matrix in f32, which is one of panels or `gemm`'s, is faster than one row after the other.
const F32_ROWS: usize = 2;

/// The same by one in bf16, to which fewer rows are not rounded.
const BF16_ROWS: usize = 8;

/// From so many rows on by blocks of Q8_0, candle's product is used, which reads the matrix once for all rows.
const BLOCK_ROWS: usize = 2;

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
        let blocks = match &self.0 {
            Matrix::Tensor(tensor) => return product(tensor, Way::There, (x, offset, rows)),
            Matrix::Quantized(blocks) => blocks,
        };
        let numbers = || Ok::<_, candle_core::Error>(&x.as_slice::<f32>()?[offset..][..rows * inputs]);
        if rows >= QUANTIZED_ROWS {
            return product::by_blocks(numbers()?, blocks);
        }
        if rows < BLOCK_ROWS
            && let Some(lines) = q8_0::lines(blocks)?
        {
            return few_rows::few_rows(numbers()?, &*lines);
        }
        let x_rows = Layout::contiguous_with_offset((rows, inputs), offset);
        match blocks.cpu_fwd(x, &x_rows)?.0 {
            CpuStorage::F32(mut y) => {
                // Candle rounds what is not a number to zero.
                for (x, y) in numbers()?.chunks_exact(inputs).zip(y.chunks_exact_mut(outputs)) {
                    if !x.iter().all(|x| x.is_finite()) {
                        y.fill(f32::NAN);
                    }
                }
                Ok(y)
            }
            other => bail!("product of {outputs} outputs is {:?}, expected f32", other.dtype()),
        }
    }

    /// `grad · M`: `rows` contiguous rows of outputs from `offset` on to `(rows, inputs)`.
    pub(super) fn backward(&self, grad: &CpuStorage, offset: usize, rows: usize) -> Result<Vec<f32>> {
        match &self.0 {
            Matrix::Tensor(tensor) => product(tensor, Way::Back, (grad, offset, rows)),
            Matrix::Quantized(_) => bail!("a quantised matrix has no backward, expected one in f32 or bf16"),
        }
    }
}

/// The products of one row with each of these matrices, in one go; `None` where one of them does not lie row by row.
pub(super) fn one_row(x: &[f32], matrices: &[Frozen]) -> Result<Option<Vec<Vec<f32>>>> {
    let guards: Vec<_> =
        matrices.iter().map(|matrix| matrix.0.as_tensor().map(Tensor::storage_and_layout)).collect();
    let lines = matrices.iter().zip(&guards).map(|(matrix, guard)| match (&matrix.0, guard) {
        (Matrix::Quantized(blocks), _) => q8_0::lines(blocks),
        (Matrix::Tensor(_), Some((storage, layout))) => match &**storage {
            Storage::Cpu(storage) => Ok(few_rows::lines(storage, layout)),
            _ => Ok(None),
        },
        (Matrix::Tensor(_), None) => Ok(None),
    });
    let Some(lines) = lines.collect::<Result<Option<Vec<_>>>>()? else { return Ok(None) };
    let lines: Vec<&dyn Lines> = lines.iter().map(|lines| &**lines).collect();
    few_rows::one_row(x, &lines).map(Some)
}

/// From which side of a matrix the rows come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Inputs, to outputs.
    There,
    /// Gradients of outputs, to those of inputs.
    Back,
}

/// The product of contiguous rows with a tensor.
fn product(matrix: &Tensor, way: Way, (x, offset, rows): (&CpuStorage, usize, usize)) -> Result<Vec<f32>> {
    let (outputs, inputs) = matrix.dims2()?;
    let (storage, layout) = matrix.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("matrix is not on the cpu") };
    let inner = if way == Way::There { inputs } else { outputs };
    let numbers = || Ok::<_, candle_core::Error>(&x.as_slice::<f32>()?[offset..][..rows * inner]);
    let few = if matrix.dtype() == DType::BF16 { BF16_ROWS } else { F32_ROWS };
    if way == Way::There
        && rows < few
        && let Some(lines) = few_rows::lines(storage, layout)
    {
        return few_rows::few_rows(numbers()?, &*lines);
    }
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::BF16(values), Some((start, end))) => {
            by_panels(product::Matrix { values: &values[start..end], outputs, inputs }, way, numbers()?)
        }
        (CpuStorage::F32(values), Some((start, end))) if rows > 1 && is_faster_than_gemm() => {
            by_panels(product::Matrix { values: &values[start..end], outputs, inputs }, way, numbers()?)
        }
        (_, _) => {
            let &[down, right] = layout.stride() else { bail!("a matrix has two strides") };
            let matrix = match way {
                Way::There => view((inputs, outputs), (right, down), layout.start_offset()),
                Way::Back => view((outputs, inputs), (down, right), layout.start_offset()),
            };
            gemm(&(x, view((rows, inner), (inner, 1), offset)), &(storage, matrix), Threads::All)
        }
    }
}

fn by_panels<T: product::Number>(matrix: product::Matrix<'_, T>, way: Way, x: &[f32]) -> Result<Vec<f32>> {
    match way {
        Way::There => matrix.forward(x),
        Way::Back => matrix.backward(x),
    }
}

/// Whether our own products in f32 are, of two rows and more.
fn is_faster_than_gemm() -> bool {
    product::Matrix::<f32>::is_fast() && !cfg!(any(feature = "mkl", feature = "accelerate"))
}
