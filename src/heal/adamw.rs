//! The optimiser.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Adam with decoupled weight decay (Loshchilov and Hutter, 2019, arXiv 1711.05101), as `torch.optim.AdamW` computes
/// it; learning rates and decay belong to the parameter groups.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct AdamW {
    /// Decay of the mean of gradients; 0.9 by default.
    pub beta1: f64,
    /// Decay of the mean of their squares; 0.999 by default.
    pub beta2: f64,
    /// Added to the root of the latter; 1e-8 by default.
    pub eps: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

/// The running means of a tensor's gradients and of their squares.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Moments {
    pub mean: Vec<f32>,
    pub variance: Vec<f32>,
}

/// What one update depends on beside the gradient.
#[derive(Debug, Clone, Copy)]
pub(super) struct Update {
    /// Updates so far, this one included.
    pub count: u64,
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// Gradients are multiplied by this first: the clipping of their common norm.
    pub clip: f64,
    /// The value is `factor` times the number that is trained.
    pub factor: f64,
}

/// Elements for one parallel task.
const TASK: usize = 16 * 1024;

impl Moments {
    pub(super) fn zeros(count: usize) -> Self {
        Self { mean: vec![0.0; count], variance: vec![0.0; count] }
    }
}

impl AdamW {
    pub(super) fn check(&self) -> Result<()> {
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::argument(name, beta, "at least 0 and below 1"));
            }
        }
        if self.eps.is_finite() && self.eps > 0.0 {
            return Ok(());
        }
        Err(Error::argument("eps", self.eps, "a positive number"))
    }

    /// Moves `value` against `gradient`; the three are as long as each other.
    ///
    /// With a `factor` c, `value` is c·θ of the number θ that is trained, and `gradient` that of c·θ: θ's is c times
    /// it, and a step of θ is c times as long here. This is how LoRA's α / r lives in a `B` that holds it already.
    pub(super) fn update(&self, value: &mut [f32], gradient: &[f32], moments: &mut Moments, how: Update) {
        let exponent = i32::try_from(how.count).unwrap_or(i32::MAX);
        let (c1, c2) = (1.0 - self.beta1.powi(exponent), 1.0 - self.beta2.powi(exponent));
        let keep = (1.0 - how.learning_rate * how.weight_decay) as f32;
        let step = (how.learning_rate / c1 * how.factor) as f32;
        let root = c2.sqrt() as f32;
        let (scale, eps) = ((how.clip * how.factor) as f32, self.eps as f32);
        let (b1, b2) = ((1.0 - self.beta1) as f32, self.beta2 as f32);
        let rest = (1.0 - self.beta2) as f32;
        let moments = moments.mean.par_chunks_mut(TASK).zip(moments.variance.par_chunks_mut(TASK));
        let tensors = value.par_chunks_mut(TASK).zip(gradient.par_chunks(TASK));
        tensors.zip(moments).for_each(|((value, gradient), (mean, variance))| {
            let moments = mean.iter_mut().zip(variance);
            for ((value, gradient), (mean, variance)) in value.iter_mut().zip(gradient).zip(moments) {
                let gradient = gradient * scale;
                *mean += b1 * (gradient - *mean);
                *variance = b2 * *variance + rest * gradient * gradient;
                *value = *value * keep - step * *mean / (variance.sqrt() / root + eps);
            }
        });
    }
}

/// What gradients of this norm are multiplied by to be no longer than `limit`, as torch's `clip_grad_norm_` has it.
pub(super) fn clip(norm: f64, limit: Option<f64>) -> f64 {
    limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0))
}

/// Σ x² in f64, over fixed chunks in a fixed order.
pub(super) fn square(values: &[f32]) -> f64 {
    let parts = values.par_chunks(TASK).map(|part| part.iter().map(|&x| f64::from(x) * f64::from(x)).sum());
    parts.collect::<Vec<f64>>().into_iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: &[f32], expected: &[f32]) {
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found - expected).abs() <= 1e-6 * expected.abs().max(0.1),
                "{found}, expected {expected}"
            );
        }
    }

    /// `torch.optim.AdamW(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)`, torch 2.9.1.
    #[test]
    fn three_updates_are_those_of_torch() {
        let adamw = AdamW { beta2: 0.95, ..AdamW::default() };
        let gradients = [[0.1, -0.2, 0.3, 1e-3], [0.4, 0.0, -0.6, 2e-3], [-1.0, 0.5, 0.25, -4e-3]];
        let expected = [
            [0.489_500_02, -1.238_75, 1.988, -0.009_999_9],
            [0.480_263_2, -1.230_724_8, 1.989_645_8, -0.019_569_7],
            [0.483_016_16, -1.233_432_3, 1.988_076_6, -0.017_646_225],
        ];
        let (mut value, mut moments) = ([0.5, -1.25, 2.0, 0.0], Moments::zeros(4));
        for (count, (gradient, expected)) in (1..).zip(gradients.iter().zip(expected)) {
            let how = Update { count, learning_rate: 0.01, weight_decay: 0.1, clip: 1.0, factor: 1.0 };
            adamw.update(&mut value, gradient, &mut moments, how);
            close(&value, &expected);
        }
    }

    /// torch 2.9.1 training `b` where the loss sees `2 b`; what is compared is `2 b`.
    #[test]
    fn a_factor_within_the_value_trains_as_one_outside_of_it() {
        let adamw = AdamW { eps: 1e-3, ..AdamW::default() };
        let gradients = [[0.1, -0.2], [0.3, 0.05], [-0.2, 0.4]];
        let expected =
            [[-0.019_900_497, 0.619_350_2], [-0.038_195_275, 0.628_088_1], [-0.043_303_25, 0.619_439]];
        let (mut value, mut moments) = ([0.0, 0.6], Moments::zeros(2));
        for (count, (gradient, expected)) in (1..).zip(gradients.iter().zip(expected)) {
            let how = Update { count, learning_rate: 0.01, weight_decay: 0.1, clip: 1.0, factor: 2.0 };
            adamw.update(&mut value, gradient, &mut moments, how);
            close(&value, &expected);
        }
    }

    /// `clip_grad_norm_` of (3, 4) and (12) to 1, torch 2.9.1.
    #[test]
    fn clipping_is_that_of_torch() {
        let norm = (square(&[3.0, 4.0]) + square(&[12.0])).sqrt();
        assert!((norm - 13.0).abs() < 1e-12);
        let clip = clip(norm, Some(1.0)) as f32;
        close(&[3.0 * clip, 4.0 * clip, 12.0 * clip], &[0.230_769_2, 0.307_692_3, 0.923_076_9]);
        assert!((super::clip(0.5, Some(1.0)) - 1.0).abs() < 1e-12);
        assert!((super::clip(13.0, None) - 1.0).abs() < 1e-12);
    }
}
