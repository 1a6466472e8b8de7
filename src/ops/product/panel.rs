//! Some columns of a product's right side in the order in which sums run along them.

use std::ops::Range;

use super::number::{LANES, Number, Step};
use super::tile::COLUMNS;
use crate::ops::simd::vectorised;

/// The columns of a tile side by side, step by step.
pub(super) struct Panel<S>(Vec<[S; COLUMNS]>);

impl<S: Step> Panel<S> {
    /// Zeros.
    pub(super) fn empty(depth: usize) -> Self {
        Self(vec![[S::default(); COLUMNS]; depth])
    }

    pub(super) fn steps(&self) -> &[[S; COLUMNS]] {
        &self.0
    }

    /// A range of the steps of rows of `inner` numbers, one row after the other, as its first columns.
    pub(super) fn bring_rows<T: Number<Step = S>>(&mut self, rows: &[T], inner: usize, steps: Range<usize>) {
        let stretch = steps.start * T::A_STEP..(steps.end * T::A_STEP).min(inner);
        for (group, rows) in rows.chunks(LANES * inner).enumerate() {
            let rows = Rows { numbers: rows, inner, stretch: stretch.clone(), column: group * LANES };
            #[cfg(target_arch = "x86_64")]
            if super::avx512::bring(&rows, &mut self.0) {
                continue;
            }
            rows.bring(&mut self.0, turn);
        }
    }

    /// A range of the columns of a matrix, given row by row, of `width` columns in all, as its first columns; of the rows,
    /// those of a range of steps.
    pub(super) fn bring_columns<T: Number<Step = S>>(
        &mut self,
        rows: &[T],
        width: usize,
        columns: Range<usize>,
        steps: Range<usize>,
    ) {
        let a_step = T::A_STEP * width;
        vectorised(
            #[inline(always)]
            || {
                for (step, rows) in self.0.iter_mut().zip(rows[steps.start * a_step..].chunks(a_step)) {
                    let (low, high) = rows.split_at(width);
                    let places = step.iter_mut().zip(&low[columns.clone()]);
                    if let Some(high) = high.get(columns.clone()) {
                        for ((to, &low), &high) in places.zip(high) {
                            *to = T::step(&[low, high]);
                        }
                    } else {
                        for (to, &low) in places {
                            *to = T::step(&[low]);
                        }
                    }
                }
            },
        );
    }
}

/// Bits of steps: as many rows as columns.
pub(super) type Block = [[u32; LANES]; LANES];

/// As many rows as there are lanes, or fewer, a stretch of which becomes columns of a panel from `column` on.
pub(super) struct Rows<'a, T> {
    numbers: &'a [T],
    inner: usize,
    stretch: Range<usize>,
    column: usize,
}

impl<T: Number> Rows<'_, T> {
    /// `turn` makes the columns of a block its rows.
    #[inline(always)]
    pub(super) fn bring(&self, panel: &mut [[T::Step; COLUMNS]], turn: impl Fn(&mut Block)) {
        let width = LANES * T::A_STEP;
        let all = self.numbers.len() == LANES * self.inner;
        let blocks = if all { self.stretch.len() / width } else { 0 };
        let (squares, rest) = panel.split_at_mut(blocks * LANES);
        let mut block: Block = [[0; LANES]; LANES];
        for (index, square) in squares.chunks_exact_mut(LANES).enumerate() {
            let first = self.stretch.start + index * width;
            for (lanes, row) in block.iter_mut().zip(self.numbers.chunks_exact(self.inner)) {
                for (bits, numbers) in lanes.iter_mut().zip(row[first..][..width].chunks_exact(T::A_STEP)) {
                    *bits = T::step(numbers).to_bits();
                }
            }
            turn(&mut block);
            for (step, lanes) in square.iter_mut().zip(&block) {
                for (place, &bits) in step[self.column..][..LANES].iter_mut().zip(lanes) {
                    *place = T::Step::from_bits(bits);
                }
            }
        }
        let first = self.stretch.start + blocks * width;
        for (lane, row) in self.numbers.chunks_exact(self.inner).enumerate() {
            for (step, numbers) in rest.iter_mut().zip(row[first..self.stretch.end].chunks(T::A_STEP)) {
                step[self.column + lane] = T::step(numbers);
            }
        }
    }
}

/// Makes the columns of a block its rows.
fn turn(block: &mut Block) {
    for row in 1..LANES {
        let (above, below) = block.split_at_mut(row);
        let Some(left) = below.first_mut() else { continue };
        for (upper, lower) in above.iter_mut().zip(left) {
            std::mem::swap(&mut upper[row], lower);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// Small integers, which bf16 has.
    fn number(row: usize, column: usize) -> f32 {
        ((row * 31 + column * 7) % 101) as f32
    }

    /// Rows and columns of any number and length, and stretches of them, become the steps of a panel, and what is
    /// beyond them stays zero.
    fn brought<T: Number>(from: fn(f32) -> T) {
        for (rows, inner, first) in [
            (1, 1, 0),
            (5, 3, 1),
            (16, 16, 0),
            (17, 33, 0),
            (48, 32, 3),
            (47, 100, 20),
            (48, 65, 0),
            (48, 90, 7),
        ] {
            let numbers: Vec<T> =
                (0..rows * inner).map(|index| from(number(index / inner, index % inner))).collect();
            let steps = first..inner.div_ceil(T::A_STEP).max(first);
            let mut panel = Panel::<T::Step>::empty(steps.len());
            panel.bring_rows(&numbers, inner, steps.clone());
            for (place, found) in steps.zip(panel.steps()) {
                for (row, step) in found.iter().enumerate() {
                    let of_step = (place * T::A_STEP..inner).take(T::A_STEP);
                    let numbers: Vec<T> = of_step.map(|column| from(number(row, column))).collect();
                    let expected = if row < rows { T::step(&numbers).to_bits() } else { 0 };
                    assert_eq!(step.to_bits(), expected, "({rows}, {inner}) {place} {row}");
                }
            }
            let columns = inner / 3..inner.min(inner / 3 + COLUMNS);
            let steps = first.min(rows)..rows.div_ceil(T::A_STEP).max(first.min(rows));
            let mut panel = Panel::<T::Step>::empty(steps.len());
            panel.bring_columns(&numbers, inner, columns.clone(), steps.clone());
            for (place, found) in steps.zip(panel.steps()) {
                for (column, step) in found.iter().enumerate() {
                    let of_step = (place * T::A_STEP..rows).take(T::A_STEP);
                    let numbers: Vec<T> =
                        of_step.map(|row| from(number(row, columns.start + column))).collect();
                    let expected = if column < columns.len() { T::step(&numbers).to_bits() } else { 0 };
                    assert_eq!(step.to_bits(), expected, "({rows}, {inner}) {place} {column}");
                }
            }
        }
    }

    #[test]
    fn numbers_in_f32_are_brought_into_order() {
        brought::<f32>(|x| x);
    }

    #[test]
    fn numbers_in_bf16_are_brought_into_order() {
        brought::<bf16>(bf16::from_f32);
    }

    #[test]
    fn blocks_are_turned_alike_without_instructions_of_their_own() {
        let numbers: Vec<f32> = (0..LANES * 40).map(|index| number(index / 40, index % 40)).collect();
        let rows = Rows { numbers: &numbers, inner: 40, stretch: 0..40, column: 16 };
        let (mut plain, mut best) = (Panel::empty(40), Panel::empty(40));
        rows.bring(&mut plain.0, turn);
        best.bring_rows(&[vec![0.0; LANES * 40], numbers.clone()].concat(), 40, 0..40);
        assert_eq!(plain.0, best.0);
    }
}
