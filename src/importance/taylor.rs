//! First-order Taylor scores.

use std::time::Instant;

use candle_core::{DType, Tensor};

use super::{Importance, Scores, spearman, whole_blocks};
use crate::data::Windows;
use crate::error::Result;
use crate::model::{Block, Decoder, Unit, Walk};
use crate::progress::{self, Observer};

/// Taylor+: Σ over the block's matrices of `|W ⊙ ∂L/∂W|`, `L` the mean loss of all windows. The first four and the
/// last two blocks are raised above all others: they are chosen only where no other is left.
///
/// From Shortened LLaMA (Kim et al., 2024, arXiv 2402.02834). Holds two gradients of all matrices in memory, one for
/// each half of the windows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Taylor;

const KEPT_FIRST: usize = 4;
const KEPT_LAST: usize = 2;

/// The gradient of each matrix of one block, summed over windows.
type BlockGradient = Vec<Tensor>;

impl Importance for Taylor {
    fn method(&self) -> &'static str {
        "taylor"
    }

    fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores> {
        let start = Instant::now();
        let units = whole_blocks(decoder);
        let half = windows.len() / 2;
        let mut sums: [Vec<BlockGradient>; 2] =
            [vec![Vec::new(); units.len()], vec![Vec::new(); units.len()]];
        progress::steps(self.method(), windows.len(), observer, |window| {
            let [first, second] = &mut sums;
            add_gradients(decoder, &units, windows, window, if window < half { first } else { second })
        })?;
        let [first, second] = &sums;
        let of_half = |sums: &[BlockGradient]| -> Result<Vec<f64>> {
            decoder.blocks().iter().zip(sums).map(|(block, sum)| saliency(block, sum)).collect()
        };
        let (mut importance, stability) = if half == 0 {
            (of_half(second)?, None)
        } else {
            let pairs = decoder.blocks().iter().zip(first.iter().zip(second));
            let both = pairs.map(|(block, (a, b))| saliency(block, &add(a, b)?)).collect::<Result<_>>()?;
            (both, Some(spearman(&of_half(first)?, &of_half(second)?)))
        };
        let highest = importance.iter().fold(0.0f64, |highest, &score| highest.max(score));
        let depth = importance.len();
        for (index, score) in importance.iter_mut().enumerate() {
            if index < KEPT_FIRST || index + KEPT_LAST >= depth {
                *score += highest;
            }
        }
        let runs = (4 * windows.len() * depth) as f64;
        let mut scores = Scores::new(self.method(), windows, importance)?.costing(start, runs);
        if let Some(stability) = stability {
            scores = scores.with_stability(stability);
        }
        Ok(scores)
    }
}

/// Walks one window forward and back, adding every matrix's gradient to `sums`.
fn add_gradients(
    decoder: &Decoder,
    units: &[Unit],
    windows: &Windows,
    window: usize,
    sums: &mut [BlockGradient],
) -> Result<()> {
    let ids = windows.tensor(window, decoder.device())?;
    let walk = Walk::forward(decoder, units, &vec![1.0; units.len()], &ids)?;
    let (_, upstream) =
        decoder.loss_vjp(walk.output(), windows.window(window)?.get(1..).unwrap_or_default())?;
    let scale = 1.0 / (windows.len() * (windows.seq_len() - 1)) as f64;
    walk.weight_gradients(&(upstream * scale)?, |index, gradients| {
        if let Some(sum) = sums.get_mut(index) {
            // Gradients of bf16 matrices are bf16 too; sums are not.
            let gradients = gradients
                .iter()
                .map(|gradient| Ok(gradient.to_dtype(DType::F32)?))
                .collect::<Result<Vec<_>>>()?;
            *sum = if sum.is_empty() { gradients } else { add(sum, &gradients)? };
        }
        Ok(())
    })
}

fn add(a: &[Tensor], b: &[Tensor]) -> Result<BlockGradient> {
    a.iter().zip(b).map(|(a, b)| Ok((a + b)?)).collect()
}

/// Σ `|W ⊙ G|` of one block.
fn saliency(block: &Block, gradients: &[Tensor]) -> Result<f64> {
    let products = block.matrices().zip(gradients).map(|(weight, gradient)| {
        let product = (weight.to_dtype(DType::F32)? * gradient)?;
        Ok(f64::from(product.abs()?.sum_all()?.to_scalar::<f32>()?))
    });
    products.sum()
}
