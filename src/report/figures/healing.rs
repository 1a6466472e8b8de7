//! How a healing went.

use plotters::prelude::*;

use super::Figure;
use super::chart::{
    Axes, BLUE, Colour, Entry, GREEN, INK, Mark, ORANGE, PURPLE, Sheet, around, put, tick, whole,
};
use crate::error::Result;
use crate::pipeline::{HealPoint, Report};
use crate::report::document::Topic;

/// A loss by the step.
struct Curve {
    name: &'static str,
    colour: Colour,
    points: Vec<(f64, f64)>,
}

/// The losses that it trained by.
pub(super) fn training(report: &Report) -> Result<Option<Figure>> {
    let Some(heal) = report.recipe.heal.as_ref().filter(|_| !report.heal_curve.is_empty()) else {
        return Ok(None);
    };
    let curve = |name, colour, value: &dyn Fn(&HealPoint) -> f64| Curve {
        name,
        colour,
        points: report.heal_curve.iter().map(|point| (point.step as f64, value(point))).collect(),
    };
    let losses = &heal.losses;
    let mut curves = vec![curve("all, weighted", INK, &|point| point.loss)];
    if losses.cross_entropy > 0.0 {
        curves.push(curve("NLL of the text", BLUE, &|point| point.terms.cross_entropy));
    }
    if losses.divergence > 0.0 {
        curves.push(curve("divergence from the teacher", ORANGE, &|point| point.terms.divergence));
    }
    if losses.tail > 0.0 {
        curves.push(curve("distance of hidden states", GREEN, &|point| point.terms.tail));
    }
    let text_alone = (curves.len(), losses.cross_entropy) == (2, 1.0);
    if text_alone {
        curves.remove(0);
    }
    let each = report.heal_curve.iter().map(|point| point.steps).max().unwrap_or(1);
    let mean = if each > 1 { format!(" Means of {each} steps.") } else { String::new() };
    let sheet = Sheet {
        name: "training-loss",
        topic: Topic::Healing,
        title: if text_alone { "Loss that healing trains by" } else { "Losses that healing trains by" }
            .into(),
        caption: if text_alone {
            format!("On the windows of each step.{mean}")
        } else {
            format!(
                "Terms before their weights: NLL and divergence in nats per token, the distance relative to the \
                 teacher's states.{mean}"
            )
        },
        height: 640,
        legend: curves.iter().map(|curve| Entry::new(Mark::Line, curve.colour, curve.name)).collect(),
    };
    draw(sheet, &curves, if text_alone { "NLL, nats per token" } else { "loss" }, None).map(Some)
}

/// The loss on windows held out of it.
pub(super) fn held_out(report: &Report) -> Result<Option<Figure>> {
    let Some(heal) = report.heal.as_ref().filter(|heal| heal.held_out.len() > 1) else { return Ok(None) };
    let points: Vec<(f64, f64)> = heal.held_out.iter().map(|&(step, loss)| (step as f64, loss)).collect();
    let kept = points.iter().copied().find(|(step, _)| (step - heal.kept as f64).abs() < 0.5);
    let mut legend = vec![Entry::new(Mark::Line, BLUE, "held-out windows")];
    legend.extend(kept.map(|_| Entry::new(Mark::Ring, PURPLE, "weights that were kept")));
    let sheet = Sheet {
        name: "held-out-loss",
        topic: Topic::Healing,
        title: "Loss that healing is judged by".into(),
        caption:
            "On windows that are neither trained on nor evaluated on; they choose the weights that are kept."
                .into(),
        height: 640,
        legend,
    };
    draw(sheet, &[Curve { name: "", colour: BLUE, points }], "NLL, nats per token", kept).map(Some)
}

fn draw(sheet: Sheet, curves: &[Curve], y_title: &str, kept: Option<(f64, f64)>) -> Result<Figure> {
    let values = || curves.iter().flat_map(|curve| curve.points.iter().copied());
    let last = values().map(|(step, _)| step).fold(1.0, f64::max);
    let y = around(values().map(|(_, loss)| loss));
    sheet.draw(|area| {
        let axes = Axes {
            x: 0.0..last * 1.02,
            y: y.clone(),
            x_title: "step",
            y_title,
            x_label: &whole,
            y_label: &|value| tick(&y, value),
            labels: (8, 7),
            left: 144,
            lines: true,
        };
        let mut chart = axes.on(area)?;
        for curve in curves {
            put(&mut chart, [PathElement::new(curve.points.clone(), curve.colour.line(4))])?;
            if curve.points.len() <= 40 {
                let dot = |point: &(f64, f64)| Circle::new(*point, 6, curve.colour.area());
                put(&mut chart, curve.points.iter().map(dot))?;
            }
        }
        put(&mut chart, kept.map(|point| Circle::new(point, 15, PURPLE.line(4))))
    })
}
