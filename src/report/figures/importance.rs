//! How much each block matters, as bars.

use plotters::prelude::*;

use super::Figure;
use super::chart::{
    Axes, BLUE, Colour, Entry, GREEN, Mark, ORANGE, Sheet, around, centred, put, tick, whole,
};
use crate::error::Result;
use crate::model::Part;
use crate::pipeline::Report;
use crate::report::document::Topic;
use crate::report::roles::{Role, letter, role_of};
use crate::report::words;

pub(super) fn draw(report: &Report) -> Result<Option<Figure>> {
    let Some(scores) = report.plan.scores() else { return Ok(None) };
    let bars: Vec<Bar> = scores
        .blocks
        .iter()
        .map(|score| {
            // A half takes half of its block's width.
            let (from, to) = match score.part {
                Part::Whole => (-0.4, 0.4),
                Part::Attention => (-0.42, -0.02),
                Part::Mlp => (0.02, 0.42),
            };
            let role = role_of(&report.plan, score.index, score.part);
            let block = score.index as f64;
            Bar { from: block + from, to: block + to, height: score.importance, role }
        })
        .collect();
    let unit = words::importance(&scores.method);
    let mut caption =
        format!("By {}, in: {unit}. The lower a bar, the less the block matters by itself.", scores.method);
    if scores.coupling.is_some() {
        caption += " Which blocks go together was decided by losses.";
    }
    if scores.blocks.iter().any(|score| score.part != Part::Whole) {
        caption += " Of each block the attention is on the left and the MLP on the right.";
    }
    let sheet = Sheet {
        name: "importance",
        topic: Topic::Blocks,
        title: "Importance of each block".into(),
        caption,
        height: 620,
        legend: legend(&bars),
    };
    let range = around(bars.iter().map(|bar| bar.height).chain([0.0]));
    // Bars stand on 0.
    let range =
        if range.start < 0.0 && bars.iter().all(|bar| bar.height >= 0.0) { 0.0..range.end } else { range };
    let depth = report.plan.depth() as f64;
    let figure = sheet.draw(|area| {
        let axes = Axes {
            x: -0.6..depth - 0.4,
            y: range.clone(),
            x_title: "block of the original model",
            y_title: unit,
            x_label: &whole,
            y_label: &|value| tick(&range, value),
            labels: (12, 7),
            left: 150,
            lines: true,
        };
        let mut chart = axes.on(area)?;
        // As wide as a block, or half of one.
        let widths = scores.blocks.len() as f64;
        let size = ((1000.0 / widths) as i32).clamp(16, 40);
        for bar in &bars {
            let (colour, sign) = look(&bar.role);
            put(&mut chart, [Rectangle::new([(bar.from, 0.0), (bar.to, bar.height)], colour.area())])?;
            // Over the bar, or under one that hangs.
            let step = (range.end - range.start) * 0.04;
            let place = bar.height + if bar.height < 0.0 { -step } else { step };
            put(
                &mut chart,
                [Text::new(sign, (f64::midpoint(bar.from, bar.to), place), centred(size, colour))],
            )?;
        }
        Ok(())
    })?;
    Ok(Some(figure))
}

struct Bar {
    from: f64,
    to: f64,
    height: f64,
    role: Role,
}

fn look(role: &Role) -> (Colour, String) {
    match role {
        Role::Removed => (ORANGE, "×".into()),
        Role::Shares(group) => (GREEN, letter(*group)),
        Role::Stays | Role::Lost(_) => (BLUE, String::new()),
    }
}

fn legend(bars: &[Bar]) -> Vec<Entry> {
    let any = |wanted: fn(&Role) -> bool| bars.iter().any(|bar| wanted(&bar.role));
    let mut entries = Vec::new();
    if any(|role| matches!(role, Role::Stays | Role::Lost(_))) {
        entries.push(Entry::new(Mark::Area, BLUE, "stays"));
    }
    if any(|role| matches!(role, Role::Removed)) {
        entries.push(Entry::new(Mark::Area, ORANGE, "removed (×)"));
    }
    if any(|role| matches!(role, Role::Shares(_))) {
        entries.push(Entry::new(Mark::Area, GREEN, "shares matrices (letter: group)"));
    }
    entries
}
