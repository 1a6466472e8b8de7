//! What the machine allows, measured beside what is held to it.

use std::hint::black_box;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::model::{Architecture, Projection};
use foldgpt::ops::Kernels;
use rayon::prelude::*;

use super::seconds;

/// Every matrix product of one block, and of the head, on operands of the same shapes.
pub struct Products {
    block: Vec<(Tensor, Tensor)>,
    /// A stretch of the vocabulary at a time: nobody keeps all logits.
    head: Vec<(Tensor, Tensor)>,
}

/// Entries of the vocabulary whose logits are made at once.
const STRETCH: usize = 1536;

impl Products {
    /// For this many rows.
    pub fn new(arch: &Architecture, rows: usize) -> Self {
        let random = |rows, columns| Tensor::randn(0f32, 1f32, (rows, columns), &Device::Cpu).unwrap();
        let shapes = Projection::ALL.into_iter().filter_map(|projection| arch.projection_shape(projection));
        let (hidden, vocab) = (random(rows, arch.hidden_size), random(arch.vocab_size, arch.hidden_size));
        let stretch = |first| {
            let count = STRETCH.min(arch.vocab_size - first);
            (hidden.clone(), vocab.narrow(0, first, count).unwrap())
        };
        Self {
            block: shapes.map(|(output, input)| (random(rows, input), random(output, input))).collect(),
            head: (0..arch.vocab_size).step_by(STRETCH).map(stretch).collect(),
        }
    }

    /// The same with matrices in another type.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        let converted = |products: &[(Tensor, Tensor)]| {
            products.iter().map(|(x, weight)| (x.clone(), weight.to_dtype(dtype).unwrap())).collect()
        };
        Self { block: converted(&self.block), head: converted(&self.head) }
    }

    /// Seconds of the products of `blocks` blocks, and of `heads` heads, by candle's gemm.
    pub fn seconds(&self, blocks: usize, heads: usize) -> f64 {
        seconds(|| self.run(blocks, heads, |x, weight| x.matmul(&weight.t().unwrap()).unwrap()))
    }

    /// The same products by our own kernels.
    pub fn own(&self, blocks: usize, heads: usize) {
        self.run(blocks, heads, |x, weight| Kernels::Fused.linear(x, weight, None).unwrap());
    }

    fn run(&self, blocks: usize, heads: usize, product: impl Fn(&Tensor, &Tensor) -> Tensor) {
        let all = |products: &[(Tensor, Tensor)]| {
            for (x, weight) in products {
                black_box(product(x, weight));
            }
        };
        (0..blocks).for_each(|_| all(&self.block));
        (0..heads).for_each(|_| all(&self.head));
    }
}

/// Memory that is read by all threads, more of it than caches hold.
pub struct Memory(Vec<u64>);

impl Memory {
    const BYTES: usize = 1 << 30;
    /// Numbers that one task reads.
    const TASK: usize = 1 << 17;

    pub fn new() -> Self {
        Self((0..(Self::BYTES / size_of::<u64>()) as u64).collect())
    }

    /// Seconds that reading this many bytes takes, at the rate at which all of the memory is read.
    pub fn seconds(&self, bytes: u64) -> f64 {
        let sum = |numbers: &[u64]| numbers.iter().fold(0u64, |sum, number| sum.wrapping_add(*number));
        let all = seconds(|| {
            black_box(self.0.par_chunks(Self::TASK).map(sum).reduce(|| 0, u64::wrapping_add));
        });
        all * bytes as f64 / Self::BYTES as f64
    }
}
