//! A result that is made in rectangles by several tasks at once.
//!
//! Its safety rests on what is checked here: rectangles of one result do not overlap, rows that are put into one lie
//! inside of it, and the result is handed out only after every rectangle has told that all of its rows are there.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;

use candle_core::{Result, bail};
use rayon::prelude::*;

/// Numbers in a line of a cache.
const LINE: usize = 16;

/// A part of a result, whose rows come from top to bottom.
pub(super) struct Rectangle<'a> {
    /// The result's first number.
    result: *mut f32,
    /// A rectangle of one result cannot be put in the place of another's.
    of: PhantomData<&'a mut [f32]>,
    /// Columns of the result.
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    /// Rows of the result above the next one to come.
    next: usize,
}

// SAFETY: a rectangle reaches only what it owns of a result: the numbers of its rows and columns.
unsafe impl Send for Rectangle<'_> {}

impl Rectangle<'_> {
    pub(super) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    pub(super) fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// Has the caches get what the next `rows` rows will be written over, while what goes there is computed: to wait for
    /// it then was measured to take a thirtieth of a pass.
    #[inline]
    pub(super) fn prefetch(&self, rows: usize) {
        for row in self.next..(self.next + rows).min(self.rows.end) {
            for column in self.columns.clone().step_by(LINE) {
                prefetch(self.result.wrapping_add(row * self.width + column));
            }
        }
    }

    /// Puts the next row.
    ///
    /// # Errors
    /// A row of another width, or one more than there are.
    #[inline]
    pub(super) fn push(&mut self, row: &[f32]) -> Result<()> {
        if row.len() != self.columns.len() || self.next >= self.rows.end {
            bail!(
                "row {} of {} numbers in rows {:?}, columns {:?}",
                self.next,
                row.len(),
                self.rows,
                self.columns
            );
        }
        // SAFETY: row `next` and the columns are inside of the result (`filled`), which has room for rows × width
        // numbers and outlives this; no other rectangle has these places, and `row` lies elsewhere.
        unsafe {
            let place = self.result.add(self.next * self.width + self.columns.start);
            place.copy_from_nonoverlapping(row.as_ptr(), row.len());
        }
        self.next += 1;
        Ok(())
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(place: *const f32) {
    use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
    // SAFETY: a hint, which has no effect but on time.
    unsafe { _mm_prefetch::<_MM_HINT_ET0>(place.cast()) };
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: *const f32) {}

/// `rows × width` numbers, of which `fill` makes a rectangle of at most `tall × wide` at a time, in parallel.
///
/// # Errors
/// What `fill` fails with, or a rectangle that it left before its end.
pub(super) fn filled(
    (rows, width): (usize, usize),
    (tall, wide): (usize, usize),
    fill: impl for<'a> Fn(&mut Rectangle<'a>) -> Result<()> + Sync,
) -> Result<Vec<f32>> {
    let Some(count) = rows.checked_mul(width) else {
        bail!("a result of shape ({rows}, {width}) has too many numbers")
    };
    let mut out: Vec<f32> = Vec::with_capacity(count);
    let (result, mut parts) = (out.as_mut_ptr(), Vec::new());
    for left in (0..width).step_by(wide) {
        for top in (0..rows).step_by(tall) {
            let (rows, columns) = (top..(top + tall).min(rows), left..(left + wide).min(width));
            parts.push(Rectangle { result, of: PhantomData, width, rows, columns, next: top });
        }
    }
    parts.into_par_iter().with_max_len(1).try_for_each(|mut part| {
        fill(&mut part)?;
        if part.next != part.rows.end {
            bail!("rows {:?}, columns {:?} end at row {}", part.rows, part.columns, part.next);
        }
        Ok(())
    })?;
    // SAFETY: the rectangles cover the result, and each of them was filled to its end.
    unsafe { out.set_len(count) };
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_where_it_was_put() -> Result<()> {
        for shape in [(0, 5), (5, 0), (1, 1), (7, 10), (8, 12)] {
            let found = filled(shape, (4, 5), |part| {
                for row in part.rows() {
                    let numbers: Vec<f32> =
                        part.columns().map(|column| (row * 100 + column) as f32).collect();
                    part.push(&numbers)?;
                }
                Ok(())
            })?;
            let (rows, width) = shape;
            let expected =
                (0..rows).flat_map(|row| (0..width).map(move |column| (row * 100 + column) as f32));
            assert_eq!(found, expected.collect::<Vec<f32>>());
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let by = |width_of: fn(usize) -> usize, rows: usize| {
            filled((7, 10), (4, 5), |part| {
                (0..rows).try_for_each(|_| part.push(&vec![0.0; width_of(part.columns().len())]))
            })
        };
        assert!(by(|width| width + 1, 4).is_err(), "a row that is too wide");
        assert!(by(|width| width, 3).is_err(), "a row is missing");
        assert!(by(|width| width, 5).is_err(), "a row too many");
        assert!(filled((usize::MAX, 2), (usize::MAX, 2), |_| Ok(())).is_err());
    }
}
