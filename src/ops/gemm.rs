//! Products of strided matrices in f32.
//!
//! The one call into the `gemm` crate, which takes pointers. Its safety rests on bounds that are checked here, before
//! the call, against the slices that the pointers come from.
#![allow(unsafe_code)]

use candle_core::{CpuStorage, Layout, Result, bail};

/// Who computes a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    /// All threads of the pool share the work.
    All,
    /// The calling thread alone: it is one of many that compute products of their own.
    One,
}

/// A matrix view: `rows` × `columns`, elements `(row_stride, column_stride)` apart, from `offset` on.
pub(super) fn view(shape: (usize, usize), strides: (usize, usize), offset: usize) -> Layout {
    Layout::new(shape.into(), vec![strides.0, strides.1], offset)
}

/// The product of two matrices inside of f32 storages: `(rows, inner) · (inner, columns)`.
pub(super) fn gemm(
    left: &(&CpuStorage, Layout),
    right: &(&CpuStorage, Layout),
    threads: Threads,
) -> Result<Vec<f32>> {
    let (m, k) = left.1.shape().dims2()?;
    let (inner, n) = right.1.shape().dims2()?;
    if k != inner {
        bail!("matrices of shapes ({m}, {k}) and ({inner}, {n}) cannot be multiplied");
    }
    multiply(left, right, (m, k, n), threads)
}

/// The platform's own library, where a feature asks for it.
#[cfg(any(feature = "mkl", feature = "accelerate"))]
fn multiply(
    left: &(&CpuStorage, Layout),
    right: &(&CpuStorage, Layout),
    (m, k, n): (usize, usize, usize),
    _: Threads,
) -> Result<Vec<f32>> {
    use candle_core::backend::BackendStorage;
    match left.0.matmul(right.0, (1, m, n, k), &left.1, &right.1)? {
        CpuStorage::F32(product) => Ok(product),
        other => bail!("product is {:?}, expected f32", other.dtype()),
    }
}

#[cfg(not(any(feature = "mkl", feature = "accelerate")))]
fn multiply(
    left: &(&CpuStorage, Layout),
    right: &(&CpuStorage, Layout),
    (m, k, n): (usize, usize, usize),
    threads: Threads,
) -> Result<Vec<f32>> {
    if m == 0 || n == 0 || k == 0 {
        return Ok(vec![0.0; m * n]);
    }
    let (a, a_down, a_right) = strided(left)?;
    let (b, b_down, b_right) = strided(right)?;
    let parallelism = match (threads, rayon::current_num_threads()) {
        (Threads::All, count) if count > 1 => gemm::Parallelism::Rayon(count),
        _ => gemm::Parallelism::None,
    };
    let mut out: Vec<f32> = Vec::with_capacity(m * n);
    // SAFETY: `strided` checked that the last element of each operand, and with it every one, lies in its slice; the
    // result has room for m × n elements. Without `read_dst` each of them is written and none is read, so that all are
    // initialised when the length is set.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n.cast_signed(),
            false,
            a.as_ptr(),
            a_right,
            a_down,
            b.as_ptr(),
            b_right,
            b_down,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
        out.set_len(m * n);
    }
    Ok(out)
}

/// The elements from a view's first on, and how far its rows and columns are apart; all of it lies inside.
#[cfg(not(any(feature = "mkl", feature = "accelerate")))]
fn strided<'a>((storage, layout): &(&'a CpuStorage, Layout)) -> Result<(&'a [f32], isize, isize)> {
    let values = storage.as_slice::<f32>()?;
    let (rows, columns) = layout.shape().dims2()?;
    let &[down, right] = layout.stride() else { bail!("a matrix has two strides") };
    let last = (rows - 1)
        .checked_mul(down)
        .zip((columns - 1).checked_mul(right))
        .and_then(|(rows, columns)| rows.checked_add(columns)?.checked_add(layout.start_offset()));
    if last.is_none_or(|last| last >= values.len()) {
        bail!(
            "a view of {:?} from {} on is outside of {} values",
            layout,
            layout.start_offset(),
            values.len()
        );
    }
    Ok((&values[layout.start_offset()..], down.cast_signed(), right.cast_signed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_products_are_those_of_the_definition() -> Result<()> {
        let storage = |count: usize| CpuStorage::F32((0..count).map(|i| (i * 7 % 11) as f32 - 5.0).collect());
        let (a, b) = (storage(60), storage(90));
        let (va, vb) = (a.as_slice::<f32>()?, b.as_slice::<f32>()?);
        let (left, right) = (view((4, 5), (10, 2), 3), view((5, 6), (1, 12), 2));
        for threads in [Threads::All, Threads::One] {
            let product = gemm(&(&a, left.clone()), &(&b, right.clone()), threads)?;
            for (index, found) in product.into_iter().enumerate() {
                let (row, column) = (index / 6, index % 6);
                let terms = (0..5).map(|i| va[3 + row * 10 + i * 2] * vb[2 + i + column * 12]);
                assert!((found - terms.sum::<f32>()).abs() < 1e-4);
            }
        }
        Ok(())
    }

    #[test]
    fn views_outside_of_their_storage_are_refused() {
        let a = CpuStorage::F32(vec![1.0; 12]);
        let fits = (&a, view((3, 4), (4, 1), 0));
        for outside in [view((4, 3), (3, 1), 1), view((4, 3), (4, 1), 0), view((4, 3), (usize::MAX, 1), 0)] {
            assert!(gemm(&fits, &(&a, outside), Threads::One).is_err());
        }
        assert!(
            gemm(&fits, &(&a, view((3, 4), (4, 1), 0)), Threads::One).is_err(),
            "inner dimensions differ"
        );
    }
}
