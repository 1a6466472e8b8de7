//! Figures as SVG.

mod chart;
mod coupling;
mod depth;
mod front;
mod healing;
mod importance;
mod trajectory;

pub(super) use chart::dark_rules;

use super::document::Topic;
use crate::error::Result;
use crate::pipeline::Report;

/// A drawing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Figure {
    /// A short name, for files and anchors.
    pub name: &'static str,
    /// What it shows, on one line; it stands in the drawing too.
    pub title: String,
    /// How it is to be read.
    pub caption: String,
    /// The drawing: one `svg` element, in colours for a light ground.
    pub svg: String,
    pub(super) topic: Topic,
}

/// All figures that a report has data for.
pub(super) fn all(report: &Report) -> Result<Vec<Figure>> {
    let drawn = [
        importance::draw(report)?,
        Some(depth::draw(report)?),
        coupling::draw(report)?,
        trajectory::draw(report)?,
        Some(front::sizes(report)?),
        front::mixes(report)?,
        healing::training(report)?,
        healing::held_out(report)?,
    ];
    Ok(drawn.into_iter().flatten().collect())
}
