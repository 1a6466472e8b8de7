//! A product's innermost loops, and the turning of blocks, on AVX-512.
//!
//! Its safety rests on two facts, and on no property of the data: functions compiled for AVX-512 run only after the
//! instructions were found on this machine, and every transmutation is between arrays of plain numbers and vector
//! registers of the same size, for which all bit patterns are valid.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_castpd_ps, _mm512_castps_pd, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_unpackhi_pd,
    _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};
use std::mem::transmute;

use super::number::{LANES, Number};
use super::panel::{Block, Rows};
use super::tile::{COLUMNS, ROWS, Tile, TileFn};

const REGISTERS: usize = COLUMNS / LANES;

/// A tile of numbers in f32, by fused multiply-add.
pub(super) fn numbers() -> Option<TileFn<f32>> {
    fn run(a: [&[f32]; ROWS], b: &[[f32; COLUMNS]], out: &mut Tile) {
        // SAFETY: handed out below only where the feature was detected.
        unsafe { add_numbers(a, b, out) }
    }
    is_x86_feature_detected!("avx512f").then_some(run)
}

/// A tile of pairs in bf16, by the dot-product instructions.
pub(super) fn pairs() -> Option<TileFn<u32>> {
    fn run(a: [&[u32]; ROWS], b: &[[u32; COLUMNS]], out: &mut Tile) {
        // SAFETY: handed out below only where the features were detected.
        unsafe { add_pairs(a, b, out) }
    }
    (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")).then_some(run)
}

/// A tile by the instruction `multiply`, which adds the product of two registers to a third; `spread` fills one of them
/// with a step. Registers are of type `Wide`.
// Loops that count by themselves: a range's iterator is a function call in builds that optimise little.
macro_rules! tile {
    ($name:ident, $features:literal, $Step:ty, $Wide:ty, $spread:expr, $multiply:expr) => {
        #[target_feature(enable = $features)]
        fn $name(a: [&[$Step]; ROWS], b: &[[$Step; COLUMNS]], out: &mut Tile) {
            let a = a.map(|row| &row[..b.len()]);
            // SAFETY: 8 × 48 numbers are 8 × 3 registers of 16 numbers.
            let mut sums = unsafe { transmute::<Tile, [[__m512; REGISTERS]; ROWS]>(*out) };
            let mut place = 0;
            while place < b.len() {
                // SAFETY: 48 steps of 32 bits are three registers of 512.
                let b = unsafe { transmute::<[$Step; COLUMNS], [$Wide; REGISTERS]>(b[place]) };
                let mut row = 0;
                while row < ROWS {
                    let step = $spread(a[row][place]);
                    let mut register = 0;
                    while register < REGISTERS {
                        sums[row][register] = $multiply(sums[row][register], step, b[register]);
                        register += 1;
                    }
                    row += 1;
                }
                place += 1;
            }
            // SAFETY: as above.
            *out = unsafe { transmute::<[[__m512; REGISTERS]; ROWS], Tile>(sums) };
        }
    };
}

tile!(add_numbers, "avx512f", f32, __m512, |a| _mm512_set1_ps(a), |sum, a, b| _mm512_fmadd_ps(a, b, sum));
tile!(
    add_pairs,
    "avx512f,avx512bf16",
    u32,
    __m512bh,
    // SAFETY: one register read as another type of the same width.
    |a: u32| unsafe { transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a.cast_signed())) },
    |sum, a, b| _mm512_dpbf16_ps(sum, a, b)
);

/// Brings rows into a panel, where the instructions are there.
pub(super) fn bring<T: Number>(rows: &Rows<'_, T>, panel: &mut [[T::Step; COLUMNS]]) -> bool {
    #[target_feature(enable = "avx512f")]
    fn run<T: Number>(rows: &Rows<'_, T>, panel: &mut [[T::Step; COLUMNS]]) {
        rows.bring(panel, |block| turn(block));
    }
    let found = is_x86_feature_detected!("avx512f");
    if found {
        // SAFETY: the feature was detected.
        unsafe { run(rows, panel) };
    }
    found
}

/// Makes the columns of a square block its rows.
// Loops and no closures, which the compiler would leave as functions of their own.
#[inline]
#[target_feature(enable = "avx512f")]
#[allow(clippy::needless_range_loop)] // loops over registers, which have to be unrolled
fn turn(block: &mut Block) {
    let mut rows = [_mm512_setzero_ps(); LANES];
    for (register, row) in rows.iter_mut().zip(block.iter()) {
        // SAFETY: 16 numbers of 32 bits are a register.
        *register = unsafe { transmute::<[u32; LANES], __m512>(*row) };
    }
    // Two rows side by side, then four: in quarter q of register 4i + j, column 4q + j of rows 4i to 4i + 3.
    for i in (0..LANES).step_by(4) {
        let low = [_mm512_unpacklo_ps(rows[i], rows[i + 1]), _mm512_unpacklo_ps(rows[i + 2], rows[i + 3])];
        let high = [_mm512_unpackhi_ps(rows[i], rows[i + 1]), _mm512_unpackhi_ps(rows[i + 2], rows[i + 3])];
        let [a, b] = [_mm512_castps_pd(low[0]), _mm512_castps_pd(low[1])];
        let [c, d] = [_mm512_castps_pd(high[0]), _mm512_castps_pd(high[1])];
        rows[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        rows[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        rows[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
        rows[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
    }
    // Even and odd quarters of eight rows, then one quarter of all.
    for j in 0..4 {
        let [a, b, c, d] = [rows[j], rows[4 + j], rows[8 + j], rows[12 + j]];
        let even = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)];
        let odd = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d)];
        rows[j] = _mm512_shuffle_f32x4::<0x88>(even[0], even[1]);
        rows[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]);
        rows[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]);
        rows[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]);
    }
    for (row, register) in block.iter_mut().zip(rows) {
        // SAFETY: a register is 16 numbers of 32 bits.
        *row = unsafe { transmute::<__m512, [u32; LANES]>(register) };
    }
}
