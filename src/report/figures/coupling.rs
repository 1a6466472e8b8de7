//! How blocks cover for each other, as a heat map.

use plotters::prelude::*;

use super::Figure;
use super::chart::{
    Area, Axes, BLUE, Entry, GRID, INK, Mark, ORANGE, Sheet, WIDTH, centred, put, tick, whole,
};
use crate::error::Result;
use crate::pipeline::Report;
use crate::report::document::Topic;

/// Steps of the scale beside the map.
const STEPS: usize = 40;
/// The share of the pairs that the scale spans: a few are so strong that all others would be pale.
const SPANNED: f64 = 0.97;

pub(super) fn draw(report: &Report) -> Result<Option<Figure>> {
    let coupling = report.plan.scores().and_then(|scores| scores.coupling.as_ref());
    let Some(matrix) = coupling.filter(|matrix| matrix.len() > 1) else { return Ok(None) };
    let limit = limit(matrix);
    let sheet = Sheet {
        name: "coupling",
        topic: Topic::Blocks,
        title: "Coupling of blocks".into(),
        caption: "How much more two blocks cost together than each alone, in nats per token. On the diagonal: × for \
                  what was removed. Values beyond the scale have the colour of its end."
            .into(),
        height: 1000,
        legend: vec![
            Entry::new(Mark::Area, ORANGE, "cover for each other"),
            Entry::new(Mark::Area, BLUE, "of little use alone"),
        ],
    };
    let figure = sheet.draw(|area| {
        let (map, bar) = area.split_horizontally(WIDTH - 190);
        cells(&map, matrix, limit, report.plan.removed())?;
        scale(&bar, limit)
    })?;
    Ok(Some(figure))
}

/// The value that has the full colour.
fn limit(matrix: &[Vec<f64>]) -> f64 {
    let pairs = matrix.iter().enumerate().flat_map(|(i, row)| row.iter().skip(i + 1));
    let mut sizes: Vec<f64> = pairs.map(|value| value.abs()).filter(|size| size.is_finite()).collect();
    sizes.sort_by(f64::total_cmp);
    let place = (SPANNED * sizes.len().saturating_sub(1) as f64).round() as usize;
    sizes.get(place).copied().filter(|limit| *limit > 0.0).unwrap_or(1.0)
}

fn cells(area: &Area<'_>, matrix: &[Vec<f64>], limit: f64, removed: &[usize]) -> Result<()> {
    let count = matrix.len() as f64;
    let axes = Axes {
        x: -0.5..count - 0.5,
        y: -0.5..count - 0.5,
        x_title: "block of the original model",
        y_title: "block of the original model",
        x_label: &whole,
        y_label: &whole,
        labels: (12, 12),
        left: 124,
        lines: false,
    };
    let mut chart = axes.on(area)?;
    let size = ((800.0 / count) as i32).clamp(16, 40);
    for (i, row) in matrix.iter().enumerate() {
        for (j, &value) in row.iter().enumerate() {
            let (x, y) = (i as f64, j as f64);
            let style = if i == j { GRID.area() } else { shade(value, limit) };
            put(&mut chart, [Rectangle::new([(x - 0.5, y - 0.5), (x + 0.5, y + 0.5)], style)])?;
        }
        if removed.contains(&i) {
            put(&mut chart, [Text::new("×", (i as f64, i as f64), centred(size, INK))])?;
        }
    }
    Ok(())
}

fn scale(area: &Area<'_>, limit: f64) -> Result<()> {
    let range = -limit..limit;
    let axes = Axes {
        x: 0.0..1.0,
        y: range.clone(),
        x_title: "",
        y_title: "nats per token",
        x_label: &|_| String::new(),
        y_label: &|value| tick(&range, value),
        labels: (1, 7),
        left: 144,
        lines: false,
    };
    let mut chart = axes.on(area)?;
    let step = 2.0 * limit / STEPS as f64;
    put(
        &mut chart,
        (0..STEPS).map(|place| {
            let low = -limit + place as f64 * step;
            Rectangle::new([(0.0, low), (1.0, low + step)], shade(low + step / 2.0, limit))
        }),
    )
}

/// The ground shines through where there is little: the same colours do on a light one and on a dark one.
fn shade(value: f64, limit: f64) -> ShapeStyle {
    let share = (value.abs() / limit).min(1.0);
    let share = (share * 100.0).round() / 100.0;
    let colour = if value > 0.0 { ORANGE } else { BLUE };
    colour.rgb().mix(share).filled()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_ends_before_the_strongest_pairs() {
        let mut matrix = vec![vec![0.1; 20]; 20];
        matrix[0][1] = 50.0;
        assert!((limit(&matrix) - 0.1).abs() < 1e-12);
        assert!((limit(&[vec![0.0; 2], vec![0.0; 2]]) - 1.0).abs() < 1e-12);
        assert!((limit(&[vec![9.0, -0.5], vec![-0.5, 9.0]]) - 0.5).abs() < 1e-12);
    }
}
