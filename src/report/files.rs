//! A report as files beside each other.

use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use super::{html, markdown};
use crate::error::{Error, Result};
use crate::file;
use crate::pipeline::Report;

/// Where a report goes: `FILE.html`, and beside it `FILE.md` and `FILE.json`.
///
/// ```
/// use foldgpt::report::ReportFiles;
///
/// let files = ReportFiles::new("smaller.html")?;
/// assert_eq!(files.json(), std::path::Path::new("smaller.json"));
/// assert!(ReportFiles::new("smaller.txt").is_err());
/// # Ok::<(), foldgpt::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportFiles {
    html: PathBuf,
    markdown: PathBuf,
    json: PathBuf,
}

impl ReportFiles {
    /// The files of a report, named by the first of them. To be called before there is any work: what is at these
    /// places and no report is never written over.
    ///
    /// # Errors
    /// A name that does not end in `.html` or `.htm`, or a file at one of the three places that is no report.
    pub fn new(html: impl Into<PathBuf>) -> Result<Self> {
        let html = html.into();
        let ends = |end: &str| html.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(end));
        if !(ends("html") || ends("htm")) || html.file_stem().is_none() {
            return Err(Error::argument("report", html.display(), "a file that ends in .html"));
        }
        let files = Self { markdown: html.with_extension("md"), json: html.with_extension("json"), html };
        files.check()?;
        Ok(files)
    }

    /// The page.
    #[must_use]
    pub fn html(&self) -> &Path {
        &self.html
    }

    /// The same as Markdown.
    #[must_use]
    pub fn markdown(&self) -> &Path {
        &self.markdown
    }

    /// All numbers.
    #[must_use]
    pub fn json(&self) -> &Path {
        &self.json
    }

    /// Writes a report to all three, each whole or not at all; a report that was there is replaced.
    ///
    /// # Errors
    /// What [`new`](Self::new) fails with, a figure that cannot be drawn, or a file that cannot be written.
    pub fn write(&self, report: &Report) -> Result<()> {
        self.check()?;
        let texts = [
            (&self.json, report.to_json()?),
            (&self.markdown, report.to_markdown()?),
            (&self.html, report.to_html()?),
        ];
        if let Some(parent) = self.html.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        for (path, text) in texts {
            file::replace(path, |file| file.write_all(text.as_bytes()).map_err(Error::io("write", path)))?;
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let marks =
            [(&self.html, html::MARK), (&self.markdown, markdown::MARK), (&self.json, "\"saved_sha256\"")];
        marks.into_iter().try_for_each(|(path, mark)| check_replaceable(path, mark))
    }
}

/// Fails for a file that is there and does not hold the mark in its first part.
fn check_replaceable(path: &Path, mark: &str) -> Result<()> {
    const FIRST: u64 = 1 << 16;
    let mut first = Vec::new();
    match std::fs::File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", path)(error)),
        Ok(file) => file.take(FIRST).read_to_end(&mut first).map_err(Error::io("read", path))?,
    };
    if String::from_utf8_lossy(&first).contains(mark) {
        return Ok(());
    }
    Err(Error::format(path, "exists and is no report: it would be lost"))
}
