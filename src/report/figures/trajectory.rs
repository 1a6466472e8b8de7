//! How gates opened and closed while they were trained.

use plotters::prelude::*;

use super::Figure;
use super::chart::{Axes, BLUE, Entry, GREEN, Mark, ORANGE, Sheet, put, tick, whole};
use crate::error::Result;
use crate::importance::Scores;
use crate::pipeline::Report;
use crate::report::document::Topic;
use crate::report::roles::{Role, role_of};

/// Points of a line, at most.
const POINTS: usize = 80;

pub(super) fn draw(report: &Report) -> Result<Option<Figure>> {
    let Some(scores) = report.plan.scores().filter(|scores| scores.trajectory.len() > 1) else {
        return Ok(None);
    };
    let lines = lines(scores);
    let roles: Vec<Role> =
        scores.blocks.iter().map(|score| role_of(&report.plan, score.index, score.part)).collect();
    let any = |wanted: fn(&Role) -> bool| roles.iter().any(wanted);
    let mut legend = Vec::new();
    if any(|role| matches!(role, Role::Stays | Role::Lost(_))) {
        legend.push(Entry::new(Mark::Line, BLUE, "stays"));
    }
    if any(|role| matches!(role, Role::Shares(_))) {
        legend.push(Entry::new(Mark::Line, GREEN, "shares matrices"));
    }
    if any(|role| matches!(role, Role::Removed)) {
        legend.push(Entry::new(Mark::Line, ORANGE, "removed (thick)"));
    }
    let sheet = Sheet {
        name: "trajectory",
        topic: Topic::Blocks,
        title: "Gates in training".into(),
        caption: "A line for each gate, the mean of its two sets. Where a search decides by losses, what is removed need \
                  not be what the gates closed."
            .into(),
        height: 620,
        legend,
    };
    let steps = scores.trajectory.len() as f64;
    let figure = sheet.draw(|area| {
        let axes = Axes {
            x: 0.0..steps,
            y: -0.02..1.02,
            x_title: "training step",
            y_title: "probability that it is open",
            x_label: &whole,
            y_label: &|value| tick(&(0.0..1.0), value),
            labels: (8, 6),
            left: 134,
            lines: true,
        };
        let mut chart = axes.on(area)?;
        // What is removed lies on top.
        for removed in [false, true] {
            for (line, role) in
                lines.iter().zip(&roles).filter(|(_, role)| (**role == Role::Removed) == removed)
            {
                let style = match role {
                    Role::Removed => ORANGE.line(5),
                    Role::Shares(_) => GREEN.line(3),
                    Role::Stays | Role::Lost(_) => BLUE.line(2),
                };
                put(&mut chart, [PathElement::new(line.clone(), style)])?;
            }
        }
        Ok(())
    })?;
    Ok(Some(figure))
}

/// A line for each gate: steps and means. The two sets of gates are trained in turn, so that two steps that follow one
/// another make one mean.
fn lines(scores: &Scores) -> Vec<Vec<(f64, f64)>> {
    let steps = &scores.trajectory;
    let each = (steps.len().div_ceil(POINTS)).next_multiple_of(2);
    let line = |gate: usize| {
        let mut points = Vec::new();
        for (place, part) in steps.chunks(each).enumerate() {
            let values: Vec<f64> = part.iter().filter_map(|gates| gates.get(gate).copied()).collect();
            if !values.is_empty() {
                let last = place * each + part.len();
                points.push((last as f64, values.iter().sum::<f64>() / values.len() as f64));
            }
        }
        points
    };
    (0..scores.blocks.len()).map(line).collect()
}
