//! What all figures have in common: size, colours, letters, legend, axes.
//!
//! Drawings are twice as large as they are shown: plotters places everything on whole pixels.

use std::fmt::{Display, Write};
use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Figure;
use crate::error::{Error, Result};
use crate::report::document::Topic;
use crate::report::escape::html;

/// A part of a drawing.
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// A part with axes.
pub(super) type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

pub(super) const WIDTH: i32 = 960;
/// The size of letters. plotters writes it divided by 1.24.
const LETTERS: i32 = 36;
const TITLE: i32 = 42;
const LINE: i32 = 44;

/// A colour, and what it is in the dark. Hues that colour-blind people tell apart (after Okabe and Ito, 2008).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Colour {
    light: (u8, u8, u8),
    dark: (u8, u8, u8),
}

pub(super) const INK: Colour = Colour { light: (0x1b, 0x1f, 0x24), dark: (0xe6, 0xe9, 0xec) };
pub(super) const MUTED: Colour = Colour { light: (0x59, 0x63, 0x6e), dark: (0xa3, 0xac, 0xb6) };
pub(super) const GRID: Colour = Colour { light: (0xd5, 0xdb, 0xe1), dark: (0x39, 0x41, 0x4a) };
pub(super) const BLUE: Colour = Colour { light: (0x00, 0x72, 0xb2), dark: (0x56, 0xb4, 0xe9) };
pub(super) const ORANGE: Colour = Colour { light: (0xc4, 0x4e, 0x00), dark: (0xff, 0xa0, 0x5c) };
pub(super) const GREEN: Colour = Colour { light: (0x00, 0x80, 0x5c), dark: (0x52, 0xd3, 0xa8) };
pub(super) const PURPLE: Colour = Colour { light: (0x8a, 0x3f, 0x8f), dark: (0xdc, 0xa5, 0xdf) };
/// The page's own, for letters on coloured areas.
pub(super) const GROUND: Colour = Colour { light: (0xff, 0xff, 0xff), dark: (0x14, 0x18, 0x1d) };
const ALL: [Colour; 8] = [INK, MUTED, GRID, BLUE, ORANGE, GREEN, PURPLE, GROUND];

impl Colour {
    pub(super) fn rgb(self) -> RGBColor {
        let (red, green, blue) = self.light;
        RGBColor(red, green, blue)
    }

    /// A line of this colour.
    pub(super) fn line(self, width: u32) -> ShapeStyle {
        ShapeStyle::from(self.rgb()).stroke_width(width)
    }

    /// An area of this colour.
    pub(super) fn area(self) -> ShapeStyle {
        self.rgb().filled()
    }
}

/// Style rules that give drawings inside of a page the colours for a dark ground.
pub(in crate::report) fn dark_rules() -> String {
    let hex = |(red, green, blue): (u8, u8, u8)| format!("#{red:02X}{green:02X}{blue:02X}");
    ALL.iter().fold(String::new(), |mut rules, colour| {
        let (light, dark) = (hex(colour.light), hex(colour.dark));
        let _ = writeln!(rules, "  svg [fill=\"{light}\"] {{ fill: {dark}; }}");
        let _ = writeln!(rules, "  svg [stroke=\"{light}\"] {{ stroke: {dark}; }}");
        rules
    })
}

/// What a drawing shows, before anything is drawn.
pub(super) struct Sheet {
    pub name: &'static str,
    pub topic: Topic,
    pub title: String,
    pub caption: String,
    pub height: u32,
    pub legend: Vec<Entry>,
}

/// A line of the legend.
pub(super) struct Entry {
    pub mark: Mark,
    pub colour: Colour,
    pub text: String,
}

/// How something is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    Area,
    Line,
    Dot,
    Ring,
    Cross,
}

impl Entry {
    pub(super) fn new(mark: Mark, colour: Colour, text: impl Into<String>) -> Self {
        Self { mark, colour, text: text.into() }
    }
}

impl Sheet {
    /// Draws title and legend, and below them what `draw` draws.
    pub(super) fn draw(self, draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<Figure> {
        let mut svg = String::new();
        let root = SVGBackend::with_string(&mut svg, (WIDTH.unsigned_abs(), self.height)).into_drawing_area();
        root.draw_text(&self.title, &letters(TITLE, INK), (8, 4)).map_err(failed)?;
        let mut at = (8, TITLE + 16);
        for entry in &self.legend {
            let width = 72 + estimated_width(&entry.text);
            if at.0 > 8 && at.0 + width > WIDTH {
                at = (8, at.1 + LINE);
            }
            mark(&root, entry, (at.0 + 16, at.1 + LINE / 2))?;
            let style = letters(LETTERS, INK).pos(Pos::new(HPos::Left, VPos::Center));
            root.draw_text(&entry.text, &style, (at.0 + 40, at.1 + LINE / 2)).map_err(failed)?;
            at.0 += width;
        }
        let (_, below) = root.split_vertically(at.1 + LINE + 12);
        draw(&below)?;
        drop(below);
        root.present().map_err(failed)?;
        drop(root);
        // Who cannot see it is told what it shows.
        let named = format!(" role=\"img\">\n<title>{}</title>", html(&self.title));
        let svg = svg.replacen('>', &named, 1);
        let Self { name, topic, title, caption, .. } = self;
        Ok(Figure { name, title, caption, svg, topic })
    }
}

fn mark(area: &Area<'_>, entry: &Entry, at: (i32, i32)) -> Result<()> {
    let (x, y) = at;
    let colour = entry.colour;
    match entry.mark {
        Mark::Area => area.draw(&Rectangle::new([(x - 13, y - 13), (x + 13, y + 13)], colour.area())),
        Mark::Line => area.draw(&PathElement::new(vec![(x - 16, y), (x + 16, y)], colour.line(5))),
        Mark::Dot => area.draw(&Circle::new(at, 11, colour.area())),
        Mark::Ring => area.draw(&Circle::new(at, 10, colour.line(4))),
        Mark::Cross => area.draw(&Text::new("×", at, centred(LETTERS + 8, colour))),
    }
    .map_err(failed)
}

/// Letters of about this size, their place being that of their upper left corner.
fn letters(size: i32, colour: Colour) -> TextStyle<'static> {
    let mut style = TextStyle::from(("sans-serif", size).into_font());
    style.color = colour.rgb().to_backend_color();
    style
}

/// Letters in the middle of their place.
pub(super) fn centred(size: i32, colour: Colour) -> TextStyle<'static> {
    letters(size, colour).pos(Pos::new(HPos::Center, VPos::Center))
}

/// Letters beside their place, to the right or to the left.
pub(super) fn beside(colour: Colour, left: bool) -> TextStyle<'static> {
    let side = if left { HPos::Right } else { HPos::Left };
    letters(LETTERS, colour).pos(Pos::new(side, VPos::Center))
}

/// About how wide a text is: nobody here knows the reader's letters.
fn estimated_width(text: &str) -> i32 {
    let width = |letter: char| match letter {
        'i' | 'j' | 'l' | 't' | 'f' | 'r' | ' ' | ',' | '.' | ':' | '(' | ')' => 0.24,
        'm' | 'w' => 0.68,
        _ => 0.46,
    };
    (text.chars().map(width).sum::<f64>() * f64::from(LETTERS)) as i32
}

/// Two axes.
pub(super) struct Axes<'f> {
    pub x: Range<f64>,
    pub y: Range<f64>,
    pub x_title: &'f str,
    pub y_title: &'f str,
    pub x_label: &'f dyn Fn(f64) -> String,
    pub y_label: &'f dyn Fn(f64) -> String,
    /// Labels on each axis, at most about.
    pub labels: (usize, usize),
    /// Room for the labels of the vertical one.
    pub left: u32,
    /// Whether lines go through the ticks of the vertical one.
    pub lines: bool,
}

impl Axes<'_> {
    /// The axes drawn on an area.
    pub(super) fn on<'a>(self, area: &Area<'a>) -> Result<Chart<'a>> {
        let mut chart = ChartBuilder::on(area)
            .margin_right(24)
            .margin_top(12)
            .x_label_area_size(96)
            .y_label_area_size(self.left)
            .build_cartesian_2d(self.x, self.y)
            .map_err(failed)?;
        let (x_label, y_label) = (|x: &f64| (self.x_label)(*x), |y: &f64| (self.y_label)(*y));
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(if self.lines { GRID.line(2) } else { TRANSPARENT.into() })
            .axis_style(MUTED.line(2))
            .label_style(letters(LETTERS, INK))
            .axis_desc_style(letters(LETTERS, MUTED))
            .x_labels(self.labels.0)
            .y_labels(self.labels.1)
            .x_label_formatter(&x_label)
            .y_label_formatter(&y_label)
            .x_desc(self.x_title)
            .y_desc(self.y_title)
            .draw()
            .map_err(failed)?;
        Ok(chart)
    }
}

/// Draws elements in the coordinates of a chart.
pub(super) fn put<E>(chart: &mut Chart<'_>, elements: impl IntoIterator<Item = E>) -> Result<()>
where
    for<'e> &'e E: plotters::element::PointCollection<'e, (f64, f64)>,
    E: for<'d> plotters::element::Drawable<SVGBackend<'d>>,
{
    for element in elements {
        chart.plotting_area().draw(&element).map_err(failed)?;
    }
    Ok(())
}

/// A range that holds these values, with some room.
pub(super) fn around(values: impl IntoIterator<Item = f64>) -> Range<f64> {
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for value in values.into_iter().filter(|value| value.is_finite()) {
        (low, high) = (low.min(value), high.max(value));
    }
    if low > high {
        return 0.0..1.0;
    }
    let room = if high > low { (high - low) * 0.1 } else { high.abs().max(1e-6) * 0.05 };
    low - room..high + room
}

/// The number at a tick of an axis that spans `range`.
pub(super) fn tick(range: &Range<f64>, value: f64) -> String {
    let (width, largest) = (range.end - range.start, range.end.abs().max(range.start.abs()));
    if !(1e-3..1e6).contains(&largest) {
        return if value == 0.0 { "0".into() } else { format!("{value:.1e}") };
    }
    let digits = (1.0 - width.log10()).ceil().clamp(0.0, 6.0) as usize;
    // What rounds to nothing has no sign.
    let value = if value.abs() < 1e-9 { 0.0 } else { value };
    format!("{value:.digits$}")
}

/// The label of a whole number, and none between them.
pub(super) fn whole(value: f64) -> String {
    if (value - value.round()).abs() < 1e-6 { format!("{value:.0}") } else { String::new() }
}

pub(super) fn failed(error: impl Display) -> Error {
    Error::Report(format!("a figure cannot be drawn: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_never_empty() {
        assert_eq!(around([]), 0.0..1.0);
        assert_eq!(around([f64::NAN]), 0.0..1.0);
        let one = around([3.0]);
        assert!(one.start < 3.0 && one.end > 3.0);
        assert!(around([0.0]).end > 0.0);
        assert_eq!(around([0.0, 10.0]), -1.0..11.0);
    }

    #[test]
    fn ticks_have_the_digits_that_tell_them_apart() {
        assert_eq!(tick(&(3.0..4.0), 3.25), "3.2");
        assert_eq!((tick(&(3.2..3.4), 3.25), tick(&(0.0..200.0), 150.0)), ("3.25".into(), "150".into()));
        assert_eq!((tick(&(0.0..2e-5), 1e-5), tick(&(-1.0..1.0), -0.0)), ("1.0e-5".into(), "0.0".into()));
        assert_eq!((whole(2.0), whole(2.5)), ("2".into(), String::new()));
    }
}
