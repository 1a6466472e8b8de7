//! How the learning rate goes up and down.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What the learning rate does after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Decay {
    /// Half a cosine down to 0.
    #[default]
    Cosine,
    /// A straight line down to 0.
    Linear,
    /// It stays.
    Constant,
}

/// The factor of all learning rates as a function of progress: a linear warm-up, then a decay.
///
/// The curves are those of transformers' `get_cosine_schedule_with_warmup` and its siblings. Step `i` of `n` takes its
/// factor in its middle, at `(i + ½) / n`, so that neither the first nor the last step is wasted on a factor of 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Schedule {
    /// What comes after the warm-up; half a cosine by default.
    pub decay: Decay,
    /// The share of the training that warms up, from 0 to 1; 0.05 by default.
    pub warmup: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { decay: Decay::default(), warmup: 0.05 }
    }
}

impl Schedule {
    /// The factor at `progress`, from 0 to 1.
    #[must_use]
    pub fn factor(&self, progress: f64) -> f64 {
        let progress = progress.clamp(0.0, 1.0);
        if progress < self.warmup {
            return progress / self.warmup;
        }
        let done = (progress - self.warmup) / (1.0 - self.warmup).max(f64::EPSILON);
        match self.decay {
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Decay::Linear => 1.0 - done,
            Decay::Constant => 1.0,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        if (0.0..=1.0).contains(&self.warmup) {
            return Ok(());
        }
        Err(Error::argument("warmup", self.warmup, "a share of the training, from 0 to 1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// transformers 4.57's `_get_{cosine,linear,constant}_schedule_with_warmup_lr_lambda`, 2 of 20 steps of warm-up, at
    /// the middles of steps 0, 1, 2, 5, 12 and 19.
    const STEPS: [f64; 6] = [0.5, 1.5, 2.5, 5.5, 12.5, 19.5];
    const COSINE: [f64; 6] = [
        0.25,
        0.75,
        0.998_097_349_045_872_8,
        0.909_576_022_144_496,
        0.370_590_477_448_739_6,
        0.001_902_650_954_127_125_4,
    ];
    const LINEAR: [f64; 6] = [
        0.25,
        0.75,
        0.972_222_222_222_222_2,
        0.805_555_555_555_555_6,
        0.416_666_666_666_666_7,
        0.027_777_777_777_777_776,
    ];
    const CONSTANT: [f64; 6] = [0.25, 0.75, 1.0, 1.0, 1.0, 1.0];

    #[test]
    fn factors_are_those_of_transformers() {
        let expected = [(Decay::Cosine, COSINE), (Decay::Linear, LINEAR), (Decay::Constant, CONSTANT)];
        for (decay, expected) in expected {
            let schedule = Schedule { decay, warmup: 0.1 };
            for (step, expected) in STEPS.into_iter().zip(expected) {
                let found = schedule.factor(step / 20.0);
                assert!(
                    (found - expected).abs() < 1e-12,
                    "{decay:?} at {step}: {found}, expected {expected}"
                );
            }
        }
    }

    #[test]
    fn shares_outside_of_the_training_are_refused() {
        assert!(Schedule { warmup: 1.5, ..Schedule::default() }.check().is_err());
        assert!(Schedule { warmup: f64::NAN, ..Schedule::default() }.check().is_err());
        assert!(Schedule::default().check().is_ok());
    }
}
