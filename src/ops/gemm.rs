//! Products of strided matrices in f32.
//!
//! The one call into the `gemm` crate, which takes pointers. Its safety rests on bounds that are checked here, before
//! the call, against the slices that the pointers come from.
#![allow(unsafe_code)]

use candle_core::backend::BackendStorage;
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
    let Some(count) = m.checked_mul(n) else { bail!("a product of shape ({m}, {n}) has too many elements") };
    if count == 0 || k == 0 {
        return Ok(vec![0.0; count]);
    }
    // Checked for whoever computes it.
    let (a, b) = (strided(left)?, strided(right)?);
    if cfg!(any(feature = "mkl", feature = "accelerate")) {
        return platform(left, right, (m, k, n));
    }
    Ok(multiply(&a, &b, (m, k, n), threads))
}

/// The platform's own library, where a feature asks for it.
fn platform(
    left: &(&CpuStorage, Layout),
    right: &(&CpuStorage, Layout),
    (m, k, n): (usize, usize, usize),
) -> Result<Vec<f32>> {
    match left.0.matmul(right.0, (1, m, n, k), &left.1, &right.1)? {
        CpuStorage::F32(product) => Ok(product),
        other => bail!("product is {:?}, expected f32", other.dtype()),
    }
}

/// A matrix view whose every element lies inside of its storage.
struct Strided<'a> {
    /// The elements from the view's first on.
    values: &'a [f32],
    down: isize,
    right: isize,
}

fn multiply(
    left: &Strided<'_>,
    right: &Strided<'_>,
    (m, k, n): (usize, usize, usize),
    threads: Threads,
) -> Vec<f32> {
    let parallelism = match (threads, rayon::current_num_threads()) {
        (Threads::All, count) if count > 1 => gemm::Parallelism::Rayon(count),
        _ => gemm::Parallelism::None,
    };
    let mut out: Vec<f32> = Vec::with_capacity(m * n);
    if m == 1 || n == 1 {
        // Of one row or column `gemm` makes slices, whose elements have to be initialised.
        out.resize(m * n, 0.0);
    }
    // SAFETY: the last element of each operand, and with it every one, lies in its slice (`strided`); the result has
    // room for m × n elements, a number that does not overflow (`gemm`). Without `read_dst` each of them is written
    // before it is read, so that all are initialised when the length is set.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n.cast_signed(),
            false,
            left.values.as_ptr(),
            left.right,
            left.down,
            right.values.as_ptr(),
            right.right,
            right.down,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
        out.set_len(m * n);
    }
    out
}

/// Checks that all of a view that has elements lies inside of its storage.
fn strided<'a>((storage, layout): &(&'a CpuStorage, Layout)) -> Result<Strided<'a>> {
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
    let values = &values[layout.start_offset()..];
    Ok(Strided { values, down: down.cast_signed(), right: right.cast_signed() })
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

    #[test]
    fn more_elements_than_can_be_counted_are_refused() {
        let one = CpuStorage::F32(vec![1.0; 12]);
        // All rows and columns lie on top of each other, inside of the storage.
        let (tall, wide) = (view((1 << 61, 4), (0, 1), 0), view((4, 8), (1, 0), 0));
        let error = gemm(&(&one, tall), &(&one, wide), Threads::One).err().map(|error| error.to_string());
        assert!(error.as_ref().is_some_and(|error| error.contains("too many elements")), "{error:?}");
    }
}
