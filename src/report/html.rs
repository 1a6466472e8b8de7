//! A report as one HTML file that needs nothing else.

use std::fmt::Write;

use super::document::{Document, Part, Section, Table, Text, Topic};
use super::escape::html as escaped;
use super::figures::{self, Figure};
use super::number::{fixed, signed};
use crate::error::Result;
use crate::pipeline::Report;

const STYLE: &str = include_str!("style.css");
/// What tells a report of this crate from other files.
pub(super) const MARK: &str = "<meta name=\"generator\" content=\"foldgpt";

/// The whole page.
pub(super) fn page(report: &Report) -> Result<String> {
    let document = report.document()?;
    let drawn = figures::all(report)?;
    let (title, summary) = (escaped(&document.title), escaped(&document.summary));
    let style = STYLE.replace("/* figures in the dark */", &figures::dark_rules());
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         {MARK} {}\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n\
         <header>\n<h1>{title}</h1>\n<p>{summary}</p>\n{}{}</header>\n<main>\n",
        escaped(&report.version),
        tiles(report),
        contents(&document)
    );
    for section in &document.sections {
        page += &self::section(section, &drawn);
    }
    page += "</main>\n</body>\n</html>\n";
    Ok(page)
}

/// The most important numbers, large.
fn tiles(report: &Report) -> String {
    let mut tiles = String::from("<dl class=\"tiles\">\n");
    for row in report.comparison().into_iter().take(4) {
        let Some(value) = row.compressed else { continue };
        let relative = row.relative.map(|share| format!(" <span>({} %)</span>", signed(100.0 * share, 1)));
        let difference = row.difference.map(|difference| signed(difference, row.digits)).unwrap_or_default();
        let unit = if row.unit.is_empty() { String::new() } else { format!(", {}", row.unit) };
        let _ = writeln!(
            tiles,
            "<div><dt>{}</dt><dd>{}</dd><dd class=\"change\">{difference}{}</dd></div>",
            escaped(&(row.quantity + &unit)),
            fixed(value.value, row.digits),
            relative.unwrap_or_default()
        );
    }
    tiles + "</dl>\n"
}

fn contents(document: &Document) -> String {
    let link = |section: &Section| format!("<a href=\"#{}\">{}</a>\n", anchor(section), section.title);
    let links: String = document.sections.iter().map(link).collect();
    format!("<nav aria-label=\"Sections\">\n{links}</nav>\n")
}

fn anchor(section: &Section) -> String {
    section.title.to_lowercase().replace(' ', "-")
}

fn section(section: &Section, drawn: &[Figure]) -> String {
    let id = anchor(section);
    let mut text = format!("<section id=\"{id}\">\n<h2>{}</h2>\n", section.title);
    for part in &section.parts {
        match part {
            Part::Text(paragraph) => {
                let _ = writeln!(text, "<p>{}</p>", escaped(paragraph));
            }
            Part::Facts(facts) => {
                text += "<dl class=\"facts\">\n";
                for (name, fact) in facts {
                    let _ = writeln!(text, "<div><dt>{name}</dt><dd>{}</dd></div>", span(fact));
                }
                text += "</dl>\n";
            }
            Part::Table(content) => text += &table(content),
            Part::Quote(name, quote) => {
                let (name, quote) = (escaped(name), escaped(quote));
                let _ = writeln!(
                    text,
                    "<figure class=\"quote {name}\"><figcaption>{name}</figcaption><blockquote>{quote}</blockquote></figure>"
                );
            }
            Part::Code(name, _, code) => {
                let code = escaped(code);
                let _ = writeln!(text, "<details><summary>{name}</summary><pre>{code}</pre></details>");
            }
            Part::Figures(topic) => text += &figures_about(*topic, drawn),
        }
    }
    text + "</section>\n"
}

fn figures_about(topic: Topic, drawn: &[Figure]) -> String {
    let mut text = String::from("<div class=\"figures\">\n");
    for figure in drawn.iter().filter(|figure| figure.topic == topic) {
        let caption = escaped(&figure.caption);
        let _ = writeln!(
            text,
            "<figure id=\"{}\">\n{}<figcaption>{caption}</figcaption>\n</figure>",
            figure.name, figure.svg
        );
    }
    text + "</div>\n"
}

fn span(text: &Text) -> String {
    match text {
        Text::Plain(text) => escaped(text),
        Text::Code(text) if text.is_empty() => String::new(),
        Text::Code(text) => format!("<code>{}</code>", escaped(text)),
    }
}

/// A table; numbers carry all their digits as `data`.
fn table(table: &Table) -> String {
    let class = |column: usize| if table.is_numeric(column) { " class=\"number\"" } else { "" };
    // Where there is no room for many columns, rows are shown one below the other.
    let many = if table.heads.len() > 4 { " class=\"many\"" } else { "" };
    let mut text = format!("<div class=\"wide\"><table{many}>\n{}<thead><tr>", caption(table));
    for (column, head) in table.heads.iter().enumerate() {
        let _ = write!(text, "<th scope=\"col\"{}>{}</th>", class(column), escaped(head));
    }
    text += "</tr></thead>\n<tbody>\n";
    for row in &table.rows {
        text += "<tr>";
        for (column, cell) in row.iter().enumerate() {
            let shown = span(&cell.text);
            let shown = match cell.exact {
                Some(exact) => format!("<data value=\"{exact}\">{shown}</data>"),
                None => shown,
            };
            let head = table.heads.get(column).map(|head| escaped(head)).unwrap_or_default();
            let _ = match column {
                0 => write!(text, "<th scope=\"row\"{}>{shown}</th>", class(column)),
                _ => write!(text, "<td data-head=\"{head}\"{}>{shown}</td>", class(column)),
            };
        }
        text += "</tr>\n";
    }
    text += "</tbody>\n</table></div>\n";
    if table.aside {
        return format!("<details><summary>{}</summary>\n{text}</details>\n", escaped(table.caption));
    }
    text
}

/// A table's caption, unless it stands behind it.
fn caption(table: &Table) -> String {
    if table.aside { String::new() } else { format!("<caption>{}</caption>\n", escaped(table.caption)) }
}
