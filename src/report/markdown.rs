//! A report as Markdown, aligned so that it reads well in a terminal too.

use std::fmt::Write;

use super::document::{Document, Part, Table, Text};
use super::escape;

/// What a report of this crate begins with, so that it is known as such.
pub(super) const MARK: &str = "<!-- foldgpt report -->";

/// The whole document.
pub(super) fn document(document: &Document) -> String {
    let (title, summary) = (escape::markdown(&document.title), escape::markdown(&document.summary));
    let mut text = format!("{MARK}\n\n# {title}\n\n{summary}\n");
    // Figures are not shown here: a section of nothing else says nothing.
    let silent = |part: &Part| matches!(part, Part::Figures(_));
    for section in document.sections.iter().filter(|section| !section.parts.iter().all(silent)) {
        let _ = write!(text, "\n## {}\n", section.title);
        text += &parts(&section.parts);
    }
    text
}

/// Parts one below the other, each after an empty line.
pub(super) fn parts(parts: &[Part]) -> String {
    let mut text = String::new();
    for part in parts {
        match part {
            Part::Text(paragraph) => {
                let _ = write!(text, "\n{}\n", escape::markdown(paragraph));
            }
            Part::Facts(facts) => {
                text.push('\n');
                for (name, fact) in facts {
                    let _ = writeln!(text, "- {name}: {}", span(fact));
                }
            }
            Part::Table(content) => {
                let _ = write!(text, "\n{}:\n\n{}", content.caption, table(content));
            }
            Part::Quote(name, quote) => {
                let _ = write!(text, "\n{name}:\n\n{}", escape::code_block("text", quote));
            }
            Part::Code(name, language, code) => {
                let _ = write!(text, "\n{name}:\n\n{}", escape::code_block(language, code));
            }
            // Tables say what figures show.
            Part::Figures(_) => {}
        }
    }
    text
}

fn span(text: &Text) -> String {
    match text {
        Text::Plain(text) => escape::markdown(text),
        Text::Code(text) => escape::code(text),
    }
}

/// A table with columns of even width, numbers to the right.
fn table(table: &Table) -> String {
    let heads = table.heads.iter().map(|head| escape::markdown(head)).collect::<Vec<_>>();
    // In a table even code may hold no bare bar.
    let field = |text: &Text| match text {
        Text::Plain(text) => escape::markdown(text),
        Text::Code(text) => escape::code(text).replace('|', "\\|"),
    };
    let rows: Vec<Vec<String>> =
        table.rows.iter().map(|row| row.iter().map(|cell| field(&cell.text)).collect()).collect();
    let wide = |text: &String| text.chars().count();
    let widths: Vec<usize> = heads
        .iter()
        .enumerate()
        .map(|(column, head)| {
            let cells = rows.iter().filter_map(|row| row.get(column)).map(wide);
            cells.max().unwrap_or_default().max(wide(head)).max(3)
        })
        .collect();
    let line = |cells: &[String]| {
        let padded = cells.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if table.is_numeric(column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        format!("| {} |\n", padded.collect::<Vec<_>>().join(" | "))
    };
    let rule = widths.iter().enumerate().map(|(column, &width)| {
        if table.is_numeric(column) { format!("{}:", "-".repeat(width + 1)) } else { "-".repeat(width + 2) }
    });
    let rule = format!("|{}|\n", rule.collect::<Vec<_>>().join("|"));
    line(&heads) + &rule + &rows.iter().map(|row| line(row)).collect::<String>()
}
