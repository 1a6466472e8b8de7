//! The decoder's operations, each with its own forward and backward.
//!
//! [`Kernels::Fused`] runs one parallel, vectorised pass per operation for f32 on the CPU and knows its analytic
//! gradient; on any other device or type the same call runs on candle's differentiable primitives, which
//! [`Kernels::Primitive`] asks for everywhere. Callers never branch, and either way gradients flow.

mod activation;
mod add;
mod attention;
mod cosine;
mod cross_entropy;
mod distillation;
mod dots;
mod few_rows;
mod frozen;
mod gemm;
mod inner;
mod layer_norm;
mod linear;
mod matrix;
mod product;
mod q8_0;
mod rectangles;
mod rms_norm;
mod rope;
mod scale;
mod simd;
#[cfg(test)]
mod testing;

pub use attention::AttentionShape;
pub use distillation::{Head, HeadLoss, HeadWeights, Soft, TopTokens};
pub use matrix::Matrix;
pub(crate) use matrix::{MatrixId, expected_instead_of, ggml_name};

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};
use rayon::prelude::*;

/// Which implementation computes the operations of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Kernels {
    /// Fused kernels where there are any (f32 on the CPU), candle's primitives elsewhere.
    #[default]
    Fused,
    /// Candle's differentiable primitives everywhere: slow, and what the fused kernels are tested against.
    Primitive,
}

impl Kernels {
    fn fuses(self, tensors: &[&Tensor]) -> bool {
        self == Self::Fused && tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32)
    }
}

/// How many elements one parallel task should touch at least, so that its work outweighs its scheduling.
const TASK_ELEMENTS: usize = 16 * 1024;

/// Rows of `width` for one parallel task. Fixed by the shape alone: sums over tasks are always the same.
fn task_rows(width: usize) -> usize {
    (TASK_ELEMENTS / width.max(1)).max(1)
}

/// Rows of `width`, each made by `row` from its index and the same row of every input; in parallel, and vectorised where
/// `row` is `#[inline(always)]`. Inputs are as long as each other. `row` writes every number, and reads none before.
fn by_rows<const N: usize>(
    width: usize,
    inputs: [&[f32]; N],
    row: impl Fn(usize, &mut [f32], [&[f32]; N]) + Sync,
) -> Result<Vec<f32>> {
    let rows = inputs.first().and_then(|input| input.len().checked_div(width)).unwrap_or(0);
    rectangles::filled((rows, width), (task_rows(width), width.max(1)), |part| {
        simd::vectorised(
            #[inline(always)]
            || {
                let mut out = vec![0.0f32; width];
                for index in part.rows() {
                    row(index, &mut out, inputs.map(|input| &input[index * width..][..width]));
                    part.push(&out)?;
                }
                Ok(())
            },
        )
    })
}

/// The elements of a contiguous f32 operand.
fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("operand is not contiguous") };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Calls `f` with the elements of contiguous f32 tensors on the CPU.
fn with_elements<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> Result<R>,
) -> Result<R> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let mut slices = [&[][..]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        let Storage::Cpu(storage) = &**storage else { bail!("operand is not on the cpu") };
        *slice = elements(storage, layout)?;
    }
    f(slices)
}

/// The last dimension of `layout`, which has to be `width`.
fn checked_width(layout: &Layout, width: usize) -> Result<usize> {
    match layout.dims().last() {
        Some(&last) if last == width && width > 0 => Ok(width),
        last => bail!("last dimension is {last:?}, expected {width}"),
    }
}

/// `sums` values added up over the rows of two operands by `row`, in parallel; in an order that depends on the shape
/// alone, and not on the number of threads.
fn over_rows(
    width: usize,
    sums: usize,
    [x, grad]: [&[f32]; 2],
    row: impl Fn(&mut [f32], &[f32], &[f32]) + Sync,
) -> Vec<f32> {
    let task = task_rows(width) * width;
    let partial: Vec<Vec<f32>> = (x.par_chunks(task).zip(grad.par_chunks(task)))
        .map(|(x, grad)| {
            let mut sum = vec![0.0f32; sums];
            for (x, grad) in x.chunks_exact(width).zip(grad.chunks_exact(width)) {
                row(&mut sum, x, grad);
            }
            sum
        })
        .collect();
    let mut total = vec![0.0f32; sums];
    for sum in &partial {
        simd::add_scaled(&mut total, 1.0, sum);
    }
    total
}
