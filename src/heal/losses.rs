//! What healing minimises.

use candle_core::{D, DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ops::HeadWeights;

/// The terms of the loss and their weights. A term of weight 0 has no gradient; the teacher's terms are then not computed,
/// and the text's is, and logged, beside the divergence.
///
/// `cross_entropy · CE + divergence · τ² · KL(teacher ‖ student) + tail · mean over the last blocks of
/// ‖h − h_T‖² / ‖h_T‖²`, each a mean over tokens. The hidden states are those after each of the last `tail_blocks`
/// blocks, before the final norm, aligned from the end; the ratio is taken token by token, so that a token with a huge
/// state, as the first one often has, counts as one token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Losses {
    /// Weight of the negative log-likelihood of the text; 1 by default.
    pub cross_entropy: f64,
    /// Weight of the divergence from the teacher's next-token distribution; 0 by default.
    pub divergence: f64,
    /// τ of the divergence; 1 by default.
    pub temperature: f64,
    /// Weight of the distance from the teacher's last hidden states; 0 by default.
    pub tail: f64,
    /// How many last blocks are held to the teacher's; 1 by default.
    pub tail_blocks: usize,
}

impl Default for Losses {
    /// The text alone: what needs no teacher.
    fn default() -> Self {
        Self { cross_entropy: 1.0, divergence: 0.0, temperature: 1.0, tail: 0.0, tail_blocks: 1 }
    }
}

impl Losses {
    /// The text, and the teacher's logits at weight 0.5.
    #[must_use]
    pub fn logits() -> Self {
        Self { divergence: 0.5, ..Self::default() }
    }

    /// The text, the teacher's logits at weight 0.5, and its last hidden state at weight 0.3.
    #[must_use]
    pub fn tail() -> Self {
        Self { tail: 0.3, ..Self::logits() }
    }

    /// Whether any term needs a teacher.
    #[must_use]
    pub fn need_teacher(&self) -> bool {
        self.divergence > 0.0 || self.tail > 0.0
    }

    /// The last blocks whose states are needed.
    pub(super) fn tail_depth(&self) -> usize {
        if self.tail > 0.0 { self.tail_blocks } else { 0 }
    }

    /// The terms at the head.
    pub(super) fn head(&self) -> HeadWeights {
        let Self { cross_entropy, divergence, temperature, .. } = *self;
        HeadWeights { cross_entropy, divergence, temperature }
    }

    /// Fails for terms that cannot be computed for a student and a teacher of so many blocks.
    pub(crate) fn check(&self, student: usize, teacher: Option<usize>) -> Result<()> {
        let weights =
            [("cross_entropy", self.cross_entropy), ("divergence", self.divergence), ("tail", self.tail)];
        if let Some((name, weight)) =
            weights.iter().find(|(_, weight)| !(weight.is_finite() && *weight >= 0.0))
        {
            return Err(Error::argument(name, weight, "a weight from 0 on"));
        }
        if weights.iter().all(|(_, weight)| *weight == 0.0) {
            return Err(Error::argument("losses", "without any weight", "at least one term"));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Error::argument("temperature", self.temperature, "a positive number"));
        }
        let least = student.min(teacher.unwrap_or(student));
        if self.tail > 0.0 && !(1..=least).contains(&self.tail_blocks) {
            return Err(Error::argument("tail_blocks", self.tail_blocks, format!("from 1 to {least}")));
        }
        match teacher {
            None if self.need_teacher() => {
                Err(Error::argument("teacher", "none", "one, for its logits or hidden states"))
            }
            _ => Ok(()),
        }
    }

    /// The weighted sum of the terms.
    pub(super) fn total(&self, terms: Terms) -> f64 {
        self.cross_entropy * terms.cross_entropy + self.divergence * terms.divergence + self.tail * terms.tail
    }
}

/// The terms of a loss, before their weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Terms {
    /// Negative log-likelihood, nats per token.
    pub cross_entropy: f64,
    /// τ² times the divergence from the teacher, nats per token.
    pub divergence: f64,
    /// The squared distance of the last hidden states relative to the teacher's.
    pub tail: f64,
}

impl Terms {
    pub(super) fn add(&mut self, other: Self) {
        self.cross_entropy += other.cross_entropy;
        self.divergence += other.divergence;
        self.tail += other.tail;
    }

    /// The terms by a number of tokens.
    pub(super) fn per(self, tokens: usize) -> Self {
        let tokens = tokens as f64;
        Self {
            cross_entropy: self.cross_entropy / tokens,
            divergence: self.divergence / tokens,
            tail: self.tail / tokens,
        }
    }
}

/// Σ over tokens of `‖h − h_T‖² / ‖h_T‖²`, and its gradient with respect to `h`; both `(batch, seq, hidden)`.
pub(super) fn relative_distance(student: &Tensor, teacher: &Tensor) -> Result<(f64, Tensor)> {
    if student.dims() != teacher.dims() {
        let expected = format!("{:?} as the student's", student.dims());
        return Err(Error::argument("the teacher's hidden state", format!("{:?}", teacher.dims()), expected));
    }
    // Off the CPU, vectors of a model in half precision are in half precision too.
    let (dtype, teacher) = (student.dtype(), &teacher.to_dtype(DType::F32)?);
    let difference = (student.to_dtype(DType::F32)? - teacher)?;
    // A state of zeros has no direction to be held to; the bound keeps its term finite.
    let size = teacher.sqr()?.sum_keepdim(D::Minus1)?.maximum(1e-12)?;
    let ratios = difference.sqr()?.sum_keepdim(D::Minus1)?.div(&size)?;
    // On the CPU: not every device knows f64.
    let total = ratios.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    Ok((total, (difference.broadcast_div(&size)? * 2.0)?.to_dtype(dtype)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tensor(values: [f32; 6]) -> Tensor {
        Tensor::from_slice(&values, (1, 2, 3), &Device::Cpu).unwrap()
    }

    const STUDENT: [f32; 6] = [1.0, 2.0, -1.0, 0.5, 0.0, 2.0];
    const TEACHER: [f32; 6] = [2.0, 2.0, -2.0, 0.5, 0.5, 1.5];

    /// By hand: (1 + 0 + 1) / (4 + 4 + 4) of the first token, (0 + 1/4 + 1/4) / (1/4 + 1/4 + 9/4) of the second.
    #[test]
    fn relative_distances_are_those_of_single_tokens() {
        let (found, _) = relative_distance(&tensor(STUDENT), &tensor(TEACHER)).unwrap();
        assert!((found - (2.0 / 12.0 + 0.5 / 2.75)).abs() < 1e-6, "{found}");
        let (found, gradient) = relative_distance(&tensor(STUDENT), &tensor(STUDENT)).unwrap();
        let gradient = gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(found == 0.0 && gradient.iter().all(|g| *g == 0.0));
    }

    #[test]
    fn the_gradient_of_relative_distances_is_that_of_finite_differences() {
        const STEP: f32 = 1e-2;
        let (_, gradient) = relative_distance(&tensor(STUDENT), &tensor(TEACHER)).unwrap();
        let gradient = gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (place, expected) in gradient.into_iter().enumerate() {
            let at = |step: f32| {
                let mut moved = STUDENT;
                moved[place] += step;
                relative_distance(&tensor(moved), &tensor(TEACHER)).unwrap().0
            };
            // The distance is a square: central differences have no error but rounding.
            let slope = (at(STEP) - at(-STEP)) / f64::from(2.0 * STEP);
            assert!((slope - f64::from(expected)).abs() < 1e-4, "{place}: {slope}, expected {expected}");
        }
    }
}
