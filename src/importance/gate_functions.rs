//! Gates as functions of their parameters, and how many of them may be open.

use crate::model::Unit;

/// Stretch and temperature of hard concrete gates, as in the paper.
const GAMMA: f64 = -0.1;
const ZETA: f64 = 1.1;
const BETA: f64 = 2.0 / 3.0;

/// The units under gates, and what is asked of them.
pub(super) struct Gated<'a> {
    pub units: &'a [Unit],
    /// True where a gate has to stay open.
    pub open: Vec<bool>,
    /// Parameters of each unit.
    pub costs: Vec<f64>,
    /// Parameters that are to be open in expectation.
    pub target: f64,
}

pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub(super) fn logit(p: f64) -> f64 {
    (p / (1.0 - p)).ln()
}

/// The paper's gate and its derivative.
pub(super) fn smoothed(phi: f64, epsilon: f64) -> (f64, f64) {
    let sum = phi * phi + epsilon;
    (phi * phi / sum, 2.0 * phi * epsilon / (sum * sum))
}

/// 1e-1 to 1e-4, geometric.
pub(super) fn epsilon(progress: f64) -> f64 {
    10f64.powf(-1.0 - 3.0 * progress)
}

/// A hard concrete gate from a uniform draw, and its derivative with respect to the log-odds of being open.
pub(super) fn hard_concrete(log_odds: f64, uniform: f64) -> (f64, f64) {
    // Shifted so that the probability of a gate above 0 is the sigmoid of the log-odds.
    let log_alpha = log_odds + BETA * (-GAMMA / ZETA).ln();
    let s = sigmoid((logit(uniform) + log_alpha) / BETA);
    let stretched = s * (ZETA - GAMMA) + GAMMA;
    if stretched <= 0.0 {
        (0.0, 0.0)
    } else if stretched >= 1.0 {
        (1.0, 0.0)
    } else {
        (stretched, (ZETA - GAMMA) * s * (1.0 - s) / BETA)
    }
}

impl Gated<'_> {
    /// The paper's penalty on what is open beyond the target, `λ · max(0, F − (1 − p))²`, and its derivative by every
    /// parameter. λ grows to 60 over two thirds of the steps.
    pub(super) fn penalty(&self, phi: &[f64], progress: f64) -> (f64, Vec<f64>) {
        let lambda = 60.0 * (progress * 1.5).min(1.0);
        let gate =
            |(&phi, &open): (&f64, &bool)| if open { (1.0, 0.0) } else { smoothed(phi, epsilon(progress)) };
        let gates: Vec<(f64, f64)> = phi.iter().zip(&self.open).map(gate).collect();
        let total: f64 = self.costs.iter().sum();
        let kept: f64 = gates.iter().zip(&self.costs).map(|((gate, _), cost)| gate * cost).sum();
        let excess = ((kept - self.target) / total).max(0.0);
        let slope = |((_, slope), cost): (&(f64, f64), &f64)| 2.0 * lambda * excess * cost / total * slope;
        (lambda * excess * excess, gates.iter().zip(&self.costs).map(slope).collect())
    }

    /// The common offset of the log-odds under which as much is open, in expectation, as should be.
    pub(super) fn offset(&self, phi: &[f64]) -> f64 {
        let expected = |offset: f64| {
            let gate = |(&phi, &open): (&f64, &bool)| if open { 1.0 } else { sigmoid(phi + offset) };
            let gates = phi.iter().zip(&self.open).map(gate);
            gates.zip(&self.costs).map(|(gate, cost)| gate * cost).sum::<f64>()
        };
        let (mut low, mut high) = (-60.0, 60.0);
        for _ in 0..60 {
            let middle = f64::midpoint(low, high);
            if expected(middle) < self.target { low = middle } else { high = middle }
        }
        f64::midpoint(low, high)
    }

    /// From the gradient with respect to the log-odds to that with respect to the parameters, which move the common
    /// offset too: `∂L/∂φ_i = s_i − Σ_j s_j · w_i / Σ_j w_j` with `w = cost · p · (1 − p)`. A gate that changes nothing
    /// closes by this alone, since every other one gains from it.
    pub(super) fn follow_offset(&self, phi: &[f64], slopes: &mut [f64]) {
        let offset = self.offset(phi);
        let weight = |((&phi, &open), &cost): ((&f64, &bool), &f64)| {
            let p = sigmoid(phi + offset);
            if open { 0.0 } else { cost * p * (1.0 - p) }
        };
        let weights: Vec<f64> = phi.iter().zip(&self.open).zip(&self.costs).map(weight).collect();
        let total = weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let sum: f64 = slopes.iter().sum();
        for (slope, weight) in slopes.iter_mut().zip(weights) {
            *slope -= sum * weight / total;
        }
    }

    /// The first of `order` that together cost, as nearly as whole units can, what should be closed.
    pub(super) fn cheapest(&self, order: impl Iterator<Item = usize>) -> Vec<usize> {
        let mut left = self.costs.iter().sum::<f64>() - self.target;
        let cost = |place: usize| self.costs.get(place).copied().unwrap_or(f64::INFINITY);
        order
            .take_while(|&place| {
                let takes = left >= cost(place) / 2.0;
                left -= cost(place);
                takes
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Unit;

    #[test]
    fn the_penalty_is_the_papers_and_its_gradient_that_of_differences() {
        const STEP: f64 = 1e-6;
        let units = Unit::blocks(3);
        let gated =
            Gated { units: &units, open: vec![false, true, false], costs: vec![2.0, 1.0, 1.0], target: 2.0 };
        let phi = [1.2, 0.1, -0.7];
        for progress in [0.0, 0.3, 1.0] {
            let (penalty, slopes) = gated.penalty(&phi, progress);
            let gate = |phi: f64| smoothed(phi, epsilon(progress)).0;
            let excess = (2.0 * gate(1.2) + 1.0 + gate(-0.7) - 2.0) / 4.0;
            assert!((penalty - 60.0 * (1.5 * progress).min(1.0) * excess * excess).abs() < 1e-12);
            for (place, slope) in slopes.iter().enumerate() {
                let moved = |step: f64| {
                    let mut phi = phi;
                    phi[place] += step;
                    gated.penalty(&phi, progress).0
                };
                let expected = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
                assert!(
                    (slope - expected).abs() < 1e-6,
                    "{place} at {progress}: {slope}, expected {expected}"
                );
            }
        }
        // As much is closed as should be: nothing is asked.
        assert_eq!(gated.penalty(&[0.01, 0.0, 0.01], 0.5), (0.0, vec![0.0; 3]));
    }

    #[test]
    fn gates_follow_their_parameters() {
        const STEP: f64 = 1e-6;
        for phi in [-1.5, -0.2, 0.3, 1.0, 2.0] {
            for epsilon in [1e-1, 1e-3] {
                let slope =
                    (smoothed(phi + STEP, epsilon).0 - smoothed(phi - STEP, epsilon).0) / (2.0 * STEP);
                assert!((slope - smoothed(phi, epsilon).1).abs() < 1e-6);
            }
            for uniform in [0.1, 0.4, 0.6, 0.9] {
                let slope = (hard_concrete(phi + STEP, uniform).0 - hard_concrete(phi - STEP, uniform).0)
                    / (2.0 * STEP);
                assert!((slope - hard_concrete(phi, uniform).1).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn hard_concrete_gates_are_open_as_often_as_they_should() {
        for log_odds in [-2.0, 0.0, 1.5] {
            let draws = 20_000;
            let above = (0..draws)
                .filter(|i| hard_concrete(log_odds, (f64::from(*i) + 0.5) / f64::from(draws)).0 > 0.0);
            let share = above.count() as f64 / f64::from(draws);
            assert!((share - sigmoid(log_odds)).abs() < 1e-3, "{share}");
        }
    }

    #[test]
    fn gradients_follow_the_offset() {
        const STEP: f64 = 1e-5;
        let gated = Gated {
            units: &[],
            open: vec![false, true, false, false],
            costs: vec![1.0, 1.0, 2.0, 3.0],
            target: 4.0,
        };
        let (phi, scale) = (vec![0.3, 0.0, -1.0, 0.8], [0.5, 0.0, -2.0, 1.5]);
        // A loss that is a function of the log-odds alone, offset included.
        let log_odds = |phi: &[f64]| phi.iter().map(|p| p + gated.offset(phi)).collect::<Vec<_>>();
        let loss = |phi: &[f64]| log_odds(phi).iter().zip(scale).map(|(x, s)| s * x * x).sum::<f64>();
        let mut slopes: Vec<f64> = log_odds(&phi).iter().zip(scale).map(|(x, s)| 2.0 * s * x).collect();
        gated.follow_offset(&phi, &mut slopes);
        for place in [0, 2, 3] {
            let at = |step: f64| {
                let mut moved = phi.clone();
                moved[place] += step;
                loss(&moved)
            };
            let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            assert!(
                (slopes[place] - expected).abs() < 1e-4,
                "{place}: {}, expected {expected}",
                slopes[place]
            );
        }
    }

    #[test]
    fn the_offset_holds_the_target() {
        let phi = [0.3, -1.0, 2.0, 0.0, 5.0];
        let open = vec![false, false, false, true, false];
        for target in [1.5, 2.0, 4.0] {
            let gated = Gated { units: &[], open: open.clone(), costs: vec![1.0; 5], target };
            let offset = gated.offset(&phi);
            let sum: f64 =
                phi.iter().zip(&open).map(|(&p, &open)| if open { 1.0 } else { sigmoid(p + offset) }).sum();
            assert!((sum - target).abs() < 1e-9);
        }
    }
}
