//! Reports as HTML: the same numbers, nothing from outside, and figures that say what they show.
#![allow(clippy::unwrap_used, clippy::panic)]

mod reports;

use std::collections::BTreeSet;

use foldgpt::report::ReportFiles;
use reports::{HOSTILE, full, plain};
use roxmltree::Document;

/// The exact numbers of a page's table of before and after, row by row.
fn numbers(page: &str) -> Vec<Vec<f64>> {
    let (_, table) = page.split_once("<caption>Before and after</caption>").unwrap();
    let (_, table) = table.split_once("<tbody>").unwrap();
    let (table, _) = table.split_once("</tbody>").unwrap();
    let rows = table.split("<tr>").skip(1);
    rows.map(|row| {
        row.split("<data value=\"")
            .skip(1)
            .map(|cell| cell.split('"').next().unwrap().parse().unwrap())
            .collect()
    })
    .collect()
}

#[test]
fn the_page_has_the_numbers_of_the_json() {
    for report in [full(), plain()] {
        let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
        let rows = json["comparison"].as_array().unwrap();
        let shown = numbers(&report.to_html().unwrap());
        assert_eq!(shown.len(), rows.len());
        for (shown, row) in shown.iter().zip(rows) {
            let fields = [
                &row["dense"]["value"],
                &row["folded"]["value"],
                &row["compressed"]["value"],
                &row["difference"],
                &row["relative"],
            ];
            let expected: Vec<f64> = fields.iter().filter_map(|field| field.as_f64()).collect();
            assert_eq!(shown, &expected, "{row}");
        }
    }
}

#[test]
fn the_same_data_gives_the_same_page() {
    assert!(full().to_html().unwrap() == full().to_html().unwrap());
}

#[test]
fn the_page_needs_nothing_and_runs_nothing() {
    for report in [full(), plain()] {
        let page = report.to_html().unwrap();
        assert!(page.starts_with("<!doctype html>"));
        for outside in
            ["<script", "<link", "<iframe", "@import", "url(", "src=\"", "href=\"http", "<img", "onerror=\""]
        {
            assert!(!page.contains(outside), "{outside}");
        }
        let namespace = "http://www.w3.org/2000/svg";
        assert_eq!(
            page.matches("http").count() - page.matches("http-equiv").count(),
            page.matches(namespace).count()
        );
        // All but the doctype and tags that HTML leaves open is XML, so that nothing from outside closed anything.
        let body = page.split_once("<body>").unwrap().1.split_once("</body>").unwrap().0;
        let body = format!("<body>{body}</body>");
        let document = Document::parse(&body).unwrap();
        let anchors: BTreeSet<&str> =
            document.descendants().filter_map(|node| node.attribute("id")).collect();
        for link in document.descendants().filter_map(|node| node.attribute("href")) {
            assert!(anchors.contains(link.trim_start_matches('#')), "{link}");
        }
        assert!(!page.contains('\u{1b}') && !page.contains('\u{202e}'));
    }
    let page = full().to_html().unwrap();
    let body = page.split_once("<body>").unwrap().1.split_once("</body>").unwrap().0;
    let body = format!("<body>{body}</body>");
    let document = Document::parse(&body).unwrap();
    let sample = document.descendants().find(|node| node.has_tag_name("blockquote")).unwrap();
    assert_eq!(sample.text().unwrap(), HOSTILE.replace(['\u{1b}', '\u{202e}'], "\u{fffd}"));
}

#[test]
fn figures_are_xml_with_title_axes_and_legend() {
    let report = full();
    let figures = report.figures().unwrap();
    let expected = [
        ("importance", "block of the original model", "removed (×)"),
        ("depth", "block of the original model", "its own matrices"),
        ("coupling", "nats per token", "cover for each other"),
        ("trajectory", "training step", "stays"),
        ("size-and-loss", "NLL, nats per token", "front"),
        ("mixes", "parameters, millions", "beaten mix"),
        ("training-loss", "step", "divergence from the teacher"),
        ("held-out-loss", "NLL, nats per token", "weights that were kept"),
    ];
    assert_eq!(figures.iter().map(|figure| figure.name).collect::<Vec<_>>(), expected.map(|(name, ..)| name));
    for (figure, (name, axis, legend)) in figures.iter().zip(expected) {
        let document = Document::parse(&figure.svg).unwrap_or_else(|error| panic!("{name}: {error}"));
        let root = document.root_element();
        assert_eq!((root.tag_name().name(), root.attribute("role")), ("svg", Some("img")));
        let title = root.children().find(roxmltree::Node::is_element).unwrap();
        assert_eq!((title.tag_name().name(), title.text()), ("title", Some(figure.title.as_str())));
        let texts: Vec<&str> = root
            .descendants()
            .filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "text")))
            .filter_map(|node| node.text().map(str::trim))
            .collect();
        for text in [figure.title.as_str(), axis, legend] {
            assert!(texts.contains(&text), "{name}: {text} is not in {texts:?}");
        }
        let ticks = texts.iter().filter(|text| text.parse::<f64>().is_ok()).count();
        assert!(ticks >= 4, "{name}: {ticks} ticks");
        // Nothing is drawn where it cannot be seen.
        let (width, height): (f64, f64) = (960.0, root.attribute("height").unwrap().parse().unwrap());
        for node in root.descendants() {
            for (attribute, most) in
                [("x", width), ("x1", width), ("cx", width), ("y", height), ("y1", height), ("cy", height)]
            {
                let at: f64 = node.attribute(attribute).map_or(0.0, |value| value.parse().unwrap());
                assert!((0.0..=most).contains(&at), "{name}: {attribute} is {at}");
            }
        }
    }
    let removed = |svg: &str| svg.matches("×\n").count();
    assert_eq!(removed(&figures[0].svg), 4);
    // And one in the legend.
    assert_eq!(removed(&figures[1].svg), 5);
    let dark = report.to_html().unwrap();
    let page_rules = dark.split_once("prefers-color-scheme: dark").unwrap().1;
    for figure in &figures {
        for colour in figure.svg.split(['"']).filter(|part| part.len() == 7 && part.starts_with('#')) {
            assert!(
                page_rules.contains(&format!("\"{colour}\"] {{")),
                "{}: {colour} has no dark one",
                figure.name
            );
        }
    }
}

#[test]
fn figures_without_data_are_left_out() {
    let report = plain();
    let names: Vec<&str> = report.figures().unwrap().iter().map(|figure| figure.name).collect();
    assert_eq!(names, ["importance", "depth", "size-and-loss"]);
    let page = report.to_html().unwrap();
    for absent in ["id=\"healing\"", "id=\"samples\"", "id=\"coupling\"", "id=\"trajectory\"", ">cut</th>"] {
        assert!(!page.contains(absent), "{absent}");
    }
}

#[test]
fn models_of_any_depth_and_scores_of_any_size_are_drawn() {
    let json = plain().to_json().unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&json).unwrap();
    for (depth, scale) in [(2, 0.0), (2, -3.0), (5, 1e-9), (100, 1e9)] {
        let blocks: Vec<serde_json::Value> = (0..depth)
            .map(|index| serde_json::json!({ "index": index, "importance": scale * f64::from(index) }))
            .collect();
        value["plan"]["depth"] = depth.into();
        value["plan"]["removed"] = serde_json::json!([1]);
        value["plan"]["scores"]["blocks"] = blocks.into();
        let report = foldgpt::pipeline::Report::from_json(&value.to_string()).unwrap();
        for figure in report.figures().unwrap() {
            Document::parse(&figure.svg).unwrap();
            assert!(!figure.svg.contains("NaN") && !figure.svg.contains("inf"));
        }
    }
}

#[test]
fn three_files_are_written_and_nothing_else_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let files = ReportFiles::new(path("new/report.html")).unwrap();
    files.write(&full()).unwrap();
    let read = |path: &std::path::Path| std::fs::read_to_string(path).unwrap();
    assert!(read(files.html()) == full().to_html().unwrap());
    assert!(read(files.markdown()) == full().to_markdown().unwrap());
    assert!(read(files.json()) == full().to_json().unwrap());
    // A report makes way for another one, and nothing else does.
    ReportFiles::new(files.html()).unwrap().write(&plain()).unwrap();
    assert!(read(files.json()) == plain().to_json().unwrap());
    for (name, text) in
        [("a.json", "{ \"model\": \"my recipe\" }"), ("b.md", "# My notes"), ("c.html", "<p>mine</p>")]
    {
        std::fs::write(path(name), text).unwrap();
        let error = ReportFiles::new(path(name).with_extension("html")).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("no report"), "{error}");
        assert_eq!(read(&path(name)), text);
    }
    let late = ReportFiles::new(path("late.html")).unwrap();
    std::fs::write(path("late.md"), "# My notes").unwrap();
    assert!(late.write(&plain()).is_err());
    assert!(!path("late.html").exists() && !path("late.json").exists());
    for name in ["report", "report.txt", "report.json", ".html"] {
        assert!(ReportFiles::new(path(name)).is_err(), "{name}");
    }
}
