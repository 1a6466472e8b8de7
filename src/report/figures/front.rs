//! Losses against sizes, with the front of what nothing beats.

use plotters::prelude::*;

use super::Figure;
use super::chart::{
    Axes, BLUE, Chart, Colour, Entry, INK, MUTED, Mark, ORANGE, PURPLE, Sheet, around, beside, failed, put,
    tick,
};
use crate::error::Result;
use crate::pipeline::Report;
use crate::report::document::Topic;

/// A model.
struct Point {
    parameters: f64,
    loss: f64,
    mark: Mark,
    colour: Colour,
    /// What it is called in the drawing; nothing where it is one of many.
    name: &'static str,
}

/// The models of this report and the others of its working directory, on the evaluation windows.
pub(super) fn sizes(report: &Report) -> Result<Figure> {
    let of = |model: &crate::pipeline::Measured, mark, colour, name| Point {
        parameters: model.parameters as f64,
        loss: model.perplexity.mean_nll,
        mark,
        colour,
        name,
    };
    let mut points: Vec<Point> = report
        .others
        .iter()
        .map(|other| Point {
            parameters: other.parameters as f64,
            loss: other.mean_nll,
            mark: Mark::Ring,
            colour: PURPLE,
            name: "",
        })
        .collect();
    let mut legend = vec![Entry::new(Mark::Dot, INK, "dense")];
    points.push(of(&report.dense, Mark::Dot, INK, "dense"));
    if let Some(folded) = &report.folded {
        legend.push(Entry::new(Mark::Ring, ORANGE, "cut, not healed"));
        points.push(of(folded, Mark::Ring, ORANGE, "cut"));
    }
    let name = report.result_name();
    legend.push(Entry::new(Mark::Dot, BLUE, format!("{name}, saved")));
    points.push(of(&report.compressed, Mark::Dot, BLUE, name));
    if !report.others.is_empty() {
        legend.push(Entry::new(Mark::Ring, PURPLE, "others"));
    }
    legend.push(Entry::new(Mark::Line, MUTED, "front"));
    let found = &report.compressed.perplexity;
    let sheet = Sheet {
        name: "size-and-loss",
        topic: Topic::Size,
        title: "Loss against stored parameters".into(),
        caption: format!(
            "On the {} evaluation windows of {} tokens; parameters that blocks share count once. Nothing measured here \
             is both smaller and better than what is on the front.",
            found.windows, found.seq_len
        ),
        height: 640,
        legend,
    };
    draw(sheet, &points)
}

/// The mixes that were tried, on the calibration windows.
pub(super) fn mixes(report: &Report) -> Result<Option<Figure>> {
    if report.mixes.is_empty() {
        return Ok(None);
    }
    let mut points: Vec<Point> = report
        .mixes
        .iter()
        .map(|mix| {
            let (mark, colour) = if mix.beaten { (Mark::Ring, PURPLE) } else { (Mark::Dot, BLUE) };
            Point { parameters: mix.parameters as f64, loss: mix.loss, mark, colour, name: "" }
        })
        .collect();
    let mut legend = vec![Entry::new(Mark::Dot, BLUE, "mix on the front")];
    if report.mixes.iter().any(|mix| mix.beaten) {
        legend.push(Entry::new(Mark::Ring, PURPLE, "beaten mix"));
    }
    if let Some(loss) = report.calibration_nll {
        let parameters = report.dense.parameters as f64;
        points.push(Point { parameters, loss, mark: Mark::Dot, colour: INK, name: "dense" });
        legend.push(Entry::new(Mark::Dot, INK, "dense"));
    }
    legend.push(Entry::new(Mark::Line, MUTED, "front"));
    let sheet = Sheet {
        name: "mixes",
        topic: Topic::Size,
        title: "Mixes that were tried".into(),
        caption:
            "On the calibration windows, before any healing: these losses are not those of the evaluation."
                .into(),
        height: 640,
        legend,
    };
    draw(sheet, &points).map(Some)
}

fn draw(sheet: Sheet, points: &[Point]) -> Result<Figure> {
    let largest = points.iter().map(|point| point.parameters).fold(0.0, f64::max);
    let (unit, title) = match largest {
        largest if largest >= 2e9 => (1e9, "parameters, billions"),
        largest if largest >= 2e6 => (1e6, "parameters, millions"),
        _ => (1e3, "parameters, thousands"),
    };
    let (x, y) = (
        around(points.iter().map(|point| point.parameters / unit)),
        around(points.iter().map(|point| point.loss)),
    );
    let middle = f64::midpoint(x.start, x.end);
    sheet.draw(|area| {
        let axes = Axes {
            x: x.clone(),
            y: y.clone(),
            x_title: title,
            y_title: "NLL, nats per token",
            x_label: &|value| tick(&x, value),
            y_label: &|value| tick(&y, value),
            labels: (7, 7),
            left: 150,
            lines: true,
        };
        let mut chart = axes.on(area)?;
        let mut front = stairs(points, unit);
        // Nothing larger is better than the last corner.
        front.extend(front.last().map(|&(_, best)| (x.end, best)));
        put(&mut chart, [PathElement::new(front, MUTED.line(3))])?;
        points.iter().try_for_each(|point| place(&mut chart, point, unit, middle))
    })
}

fn place(chart: &mut Chart<'_>, point: &Point, unit: f64, middle: f64) -> Result<()> {
    let at = (point.parameters / unit, point.loss);
    let (size, style) = match point.mark {
        Mark::Ring => (10, point.colour.line(4)),
        _ => (12, point.colour.area()),
    };
    put(chart, [Circle::new(at, size, style)])?;
    // To the side where there is more room, and above the front.
    let left = at.0 > middle;
    let aside = EmptyElement::at(at)
        + Text::new(point.name, (if left { -20 } else { 20 }, -24), beside(point.colour, left));
    chart.plotting_area().draw(&aside).map_err(failed)
}

/// The corners of the front: from the smallest model on, every one with a lower loss than all smaller ones.
fn stairs(points: &[Point], unit: f64) -> Vec<(f64, f64)> {
    let mut sorted: Vec<(f64, f64)> =
        points.iter().map(|point| (point.parameters / unit, point.loss)).collect();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let mut corners: Vec<(f64, f64)> = Vec::new();
    for (parameters, loss) in sorted {
        match corners.last().copied() {
            Some((_, best)) if loss >= best => {}
            Some((_, best)) => corners.extend([(parameters, best), (parameters, loss)]),
            None => corners.push((parameters, loss)),
        }
    }
    corners
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_goes_down_in_steps() {
        let point = |parameters, loss| Point { parameters, loss, mark: Mark::Dot, colour: INK, name: "" };
        let points = [point(3.0, 1.0), point(1.0, 3.0), point(2.0, 4.0), point(2.0, 2.0), point(4.0, 1.5)];
        assert_eq!(stairs(&points, 1.0), [(1.0, 3.0), (2.0, 3.0), (2.0, 2.0), (3.0, 2.0), (3.0, 1.0)]);
        assert!(stairs(&[], 1.0).is_empty());
    }
}
