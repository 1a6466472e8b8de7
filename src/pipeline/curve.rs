//! How a healing's losses went, thinned to what an eye can see.

use serde::{Deserialize, Serialize};

use crate::heal::{HealReport, Record, Terms};

/// Points of a curve, at most.
const POINTS: usize = 200;

/// Some steps of a healing that follow one another: their means.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct HealPoint {
    /// The last of the steps, the first of all being 1.
    pub step: usize,
    /// How many steps.
    pub steps: usize,
    /// The weighted loss.
    pub loss: f64,
    /// Its terms before their weights.
    #[serde(flatten)]
    pub terms: Terms,
}

/// A healing as it is kept: how it went, and its curve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Healing {
    pub report: HealReport,
    pub curve: Vec<HealPoint>,
}

/// The losses of a log's steps, at most [`POINTS`] means of equally many.
pub(super) fn curve(records: &[Record]) -> Vec<HealPoint> {
    let steps: Vec<HealPoint> = records
        .iter()
        .filter_map(|record| match record {
            Record::Step { step, loss, terms, .. } => {
                Some(HealPoint { step: *step, steps: 1, loss: *loss, terms: *terms })
            }
            Record::HeldOut { .. } => None,
        })
        .collect();
    let each = steps.len().div_ceil(POINTS).max(1);
    steps.chunks(each).filter_map(mean).collect()
}

fn mean(points: &[HealPoint]) -> Option<HealPoint> {
    let of = |value: fn(&HealPoint) -> f64| points.iter().map(value).sum::<f64>() / points.len() as f64;
    let terms = Terms {
        cross_entropy: of(|point| point.terms.cross_entropy),
        divergence: of(|point| point.terms.divergence),
        tail: of(|point| point.terms.tail),
    };
    points.last().map(|last| HealPoint {
        step: last.step,
        steps: points.len(),
        loss: of(|point| point.loss),
        terms,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn step(step: usize) -> Record {
        let line = format!(
            r#"{{"step": {step}, "tokens": 1, "loss": {step}, "cross_entropy": 1.0, "divergence": 2.0, "tail": 3.0,
            "gradient_norm": 1.0, "rate_factor": 1.0, "seconds": 1.0}}"#
        );
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn short_healings_keep_every_step_and_long_ones_means() {
        let held_out = serde_json::from_str(r#"{"step": 2, "held_out": 3.0}"#).unwrap();
        let short = curve(&[step(1), step(2), held_out, step(3)]);
        assert_eq!(
            short.iter().map(|point| (point.step, point.steps)).collect::<Vec<_>>(),
            [(1, 1), (2, 1), (3, 1)]
        );
        let records: Vec<Record> = (1..=401).map(step).collect();
        let long = curve(&records);
        assert_eq!(long.len(), 134);
        assert_eq!((long[0].step, long[0].steps, long[0].loss.to_bits()), (3, 3, 2.0f64.to_bits()));
        assert_eq!((long[133].step, long[133].steps), (401, 2));
        assert!(curve(&[]).is_empty());
    }
}
