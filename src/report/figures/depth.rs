//! The depth as a drawing: which block runs which weights.

use plotters::prelude::*;

use super::Figure;
use super::chart::{
    Area, Axes, BLUE, Chart, Colour, Entry, GREEN, GROUND, MUTED, Mark, ORANGE, Sheet, centred, put, whole,
};
use crate::error::Result;
use crate::model::Part;
use crate::pipeline::Report;
use crate::report::document::Topic;
use crate::report::roles::{Role, groups, letter, role_of};

/// The heights of the three rows, and half of a box.
const ORIGINAL: f64 = 2.0;
const RUNS: f64 = 1.0;
const STORED: f64 = 0.0;
const HALF: f64 = 0.2;

pub(super) fn draw(report: &Report) -> Result<Figure> {
    let roles: Vec<Role> =
        (0..report.plan.depth()).map(|block| role_of(&report.plan, block, Part::Whole)).collect();
    let any = |wanted: fn(&Role) -> bool| roles.iter().any(wanted);
    let mut legend = Vec::new();
    if any(|role| matches!(role, Role::Stays)) {
        legend.push(Entry::new(Mark::Area, BLUE, "its own matrices"));
    }
    if any(|role| matches!(role, Role::Shares(_))) {
        legend.push(Entry::new(Mark::Area, GREEN, "shared (letter: group)"));
    }
    if any(|role| matches!(role, Role::Removed)) {
        legend.push(Entry::new(Mark::Cross, ORANGE, "removed"));
    }
    if any(|role| matches!(role, Role::Lost(_))) {
        legend.push(Entry::new(Mark::Area, MUTED, "half removed"));
    }
    let stored = roles.iter().filter(|role| matches!(role, Role::Stays | Role::Lost(_))).count()
        + groups(&report.plan).len();
    let runs = roles.iter().filter(|role| **role != Role::Removed).count();
    let sheet = Sheet {
        name: "depth",
        topic: Topic::Blocks,
        title: "Which block runs which matrices".into(),
        caption: format!(
            "{} blocks were there, {runs} run, one after the other from left to right, with {stored} sets of matrices.",
            roles.len()
        ),
        height: 620,
        legend,
    };
    sheet.draw(|area| rows(area, report, &roles))
}

fn rows(area: &Area<'_>, report: &Report, roles: &[Role]) -> Result<()> {
    let row = |height: f64| match height {
        height if (height - ORIGINAL).abs() < 1e-6 => "original".to_string(),
        height if (height - RUNS).abs() < 1e-6 => "runs".to_string(),
        height if (height - STORED).abs() < 1e-6 => "matrices".to_string(),
        _ => String::new(),
    };
    let axes = Axes {
        x: -0.6..roles.len() as f64 - 0.4,
        y: -0.5..2.5,
        x_title: "block of the original model",
        y_title: "",
        x_label: &whole,
        y_label: &row,
        labels: (12, 4),
        left: 164,
        lines: false,
    };
    let mut chart = axes.on(area)?;
    let size = ((1000.0 / roles.len() as f64) as i32).clamp(16, 40);
    for (block, role) in roles.iter().enumerate() {
        let x = block as f64;
        if *role == Role::Removed {
            put(&mut chart, [Text::new("×", (x, ORIGINAL), centred(size, ORANGE))])?;
            put(&mut chart, [outline(x, ORIGINAL, ORANGE)])?;
            continue;
        }
        let (colour, half) = match role {
            Role::Shares(_) => (GREEN, HALF),
            Role::Lost(_) => (MUTED, HALF / 2.0),
            Role::Stays | Role::Removed => (BLUE, HALF),
        };
        // Matrices of a group lie under its first block: none of its own are there.
        let holder = match role {
            Role::Shares(group) => groups(&report.plan).get(*group).and_then(|group| group.blocks.first()),
            _ => None,
        };
        let holder = holder.map_or(x, |&first| first as f64);
        put(&mut chart, [outline(x, ORIGINAL, MUTED)])?;
        line(&mut chart, (x, ORIGINAL - HALF), (x, RUNS + half), MUTED)?;
        line(&mut chart, (x, RUNS - half), (holder, STORED + HALF), colour)?;
        put(&mut chart, [filled(x, RUNS, half, colour)])?;
        if (holder - x).abs() < 1e-6 {
            put(&mut chart, [filled(x, STORED, half, colour)])?;
        }
        if let Role::Shares(group) = role {
            let name = letter(*group);
            put(&mut chart, [Text::new(name.clone(), (x, RUNS), centred(size, GROUND))])?;
            if (holder - x).abs() < 1e-6 {
                put(&mut chart, [Text::new(name, (x, STORED), centred(size, GROUND))])?;
            }
        }
    }
    Ok(())
}

fn filled(x: f64, y: f64, half: f64, colour: Colour) -> Rectangle<(f64, f64)> {
    Rectangle::new([(x - 0.4, y - half), (x + 0.4, y + half)], colour.area())
}

fn outline(x: f64, y: f64, colour: Colour) -> PathElement<(f64, f64)> {
    let (left, right, low, high) = (x - 0.4, x + 0.4, y - HALF, y + HALF);
    PathElement::new(
        vec![(left, low), (right, low), (right, high), (left, high), (left, low)],
        colour.line(2),
    )
}

fn line(chart: &mut Chart<'_>, from: (f64, f64), to: (f64, f64), colour: Colour) -> Result<()> {
    put(chart, [PathElement::new(vec![from, to], colour.line(3))])
}
