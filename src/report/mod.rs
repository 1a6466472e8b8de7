//! What a compression found, for people: one HTML file, Markdown, JSON, and model cards.
//!
//! A [`Report`] is data. Here it becomes a document of sections, tables and figures, which
//! Markdown and (with the feature `report`, on by default) HTML are written from, so that they cannot disagree. The
//! same data gives the same bytes.
//!
//! ```no_run
//! use foldgpt::report::ReportFiles;
//! use foldgpt::Compressor;
//!
//! let files = ReportFiles::new("report.html")?; // and report.md, report.json
//! let report = Compressor::new("org/name", "text.txt", "smaller").run(&mut ())?;
//! files.write(&report)?;
//! println!("{}", report.to_markdown()?);
//! # Ok::<(), foldgpt::Error>(())
//! ```

mod card;
mod comparison;
mod document;
pub(crate) mod escape;
#[cfg(feature = "report")]
mod figures;
#[cfg(feature = "report")]
mod files;
#[cfg(feature = "report")]
mod html;
mod markdown;
mod number;
mod roles;
mod sections;
mod words;

pub(crate) use card::{plan_facts, removed_facts};
pub use comparison::{Row, Value};
#[cfg(feature = "report")]
pub use figures::Figure;
#[cfg(feature = "report")]
pub use files::ReportFiles;

use crate::error::Result;
use crate::pipeline::Report;

impl Report {
    /// The report as Markdown.
    ///
    /// # Errors
    /// None in practice: every report can be written.
    pub fn to_markdown(&self) -> Result<String> {
        Ok(markdown::document(&self.document()?))
    }

    /// The report as one HTML page, figures and style inside of it, that needs no network and no script.
    ///
    /// # Errors
    /// [`Error::Report`](crate::Error::Report) for a figure that cannot be drawn.
    #[cfg(feature = "report")]
    pub fn to_html(&self) -> Result<String> {
        html::page(self)
    }

    /// The figures alone, those that the report has data for.
    ///
    /// # Errors
    /// As [`to_html`](Self::to_html).
    #[cfg(feature = "report")]
    pub fn figures(&self) -> Result<Vec<Figure>> {
        figures::all(self)
    }
}
