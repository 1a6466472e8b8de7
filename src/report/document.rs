//! A report as a tree of text, tables and figures: what Markdown and HTML are both written from.

/// All of it.
pub(super) struct Document {
    pub title: String,
    /// The result in a sentence.
    pub summary: String,
    pub sections: Vec<Section>,
}

/// What stands under a heading.
pub(super) struct Section {
    /// The heading, and in small letters the anchor.
    pub title: &'static str,
    pub parts: Vec<Part>,
}

/// A part of a section.
pub(super) enum Part {
    Text(String),
    Facts(Vec<(&'static str, Text)>),
    Table(Table),
    /// A text in another hand: what it is, and the text.
    Quote(String, String),
    /// What a machine reads: what it is, its language, and the text.
    Code(&'static str, &'static str, String),
    /// Where the figures about this go.
    #[cfg_attr(not(feature = "report"), allow(dead_code))] // text has none
    Figures(Topic),
}

/// What a figure is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Topic {
    Blocks,
    Size,
    Healing,
}

/// Text on one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Text {
    Plain(String),
    /// Names of files, hashes, commands.
    Code(String),
}

/// Rows under heads.
pub(super) struct Table {
    /// What it shows.
    pub caption: &'static str,
    /// Whether it stands behind its caption where that is possible, since a figure shows the same.
    pub aside: bool,
    pub heads: Vec<String>,
    pub rows: Vec<Vec<Cell>>,
}

/// A field of a table.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cell {
    pub text: Text,
    /// The number that the text shows.
    pub exact: Option<f64>,
}

impl Text {
    pub(super) fn code(text: impl Into<String>) -> Self {
        Self::Code(text.into())
    }
}

impl<T: Into<String>> From<T> for Text {
    fn from(text: T) -> Self {
        Self::Plain(text.into())
    }
}

impl Cell {
    /// A word.
    pub(super) fn word(text: impl Into<Text>) -> Self {
        Self { text: text.into(), exact: None }
    }

    /// A number as it is shown.
    pub(super) fn number(exact: f64, shown: String) -> Self {
        Self { text: Text::Plain(shown), exact: Some(exact) }
    }

    pub(super) fn empty() -> Self {
        Self::word("")
    }
}

impl Table {
    pub(super) fn new<const N: usize>(caption: &'static str, heads: [&str; N]) -> Self {
        Self { caption, aside: false, heads: heads.map(str::to_string).to_vec(), rows: Vec::new() }
    }

    /// Whether a column holds numbers.
    pub(super) fn is_numeric(&self, column: usize) -> bool {
        let mut cells = self.rows.iter().filter_map(|row| row.get(column));
        cells.any(|cell| cell.exact.is_some())
    }
}
