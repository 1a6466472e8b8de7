//! Text in files.

use std::path::Path;

use super::json_lines;
use crate::error::{Error, Result};

/// Whether a file holds JSON Lines, by its name: `*.jsonl`.
pub(crate) fn holds_json_lines(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl"))
}

/// The text of a file: all of it, or the documents of [JSON Lines](json_lines) where its name ends in `.jsonl`, each in
/// the field `field` of its line.
///
/// # Errors
/// A file that cannot be read, is empty, or holds a line without that field.
pub fn read_documents(path: impl AsRef<Path>, field: &str) -> Result<String> {
    let path = path.as_ref();
    let mut text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    if holds_json_lines(path) {
        text = json_lines(&text, field).map_err(|error| match error {
            Error::Text(reason) => Error::format(path, reason),
            other => other,
        })?;
    }
    if text.trim().is_empty() {
        return Err(Error::format(path, "no text in it"));
    }
    Ok(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_json_lines_from_plain_text() {
        let directory = tempfile::tempdir().unwrap();
        let (plain, lines) = (directory.path().join("a.txt"), directory.path().join("a.JSONL"));
        let text = "{\"body\": \"One.\"}\n{\"body\": \"Two.\"}\n";
        for path in [&plain, &lines] {
            std::fs::write(path, text).unwrap();
        }
        assert_eq!(read_documents(&plain, "body").unwrap(), text);
        assert_eq!(read_documents(&lines, "body").unwrap(), "One.\n\nTwo.");
        let error = read_documents(&lines, "text").unwrap_err().to_string();
        assert!(error.contains("a.JSONL") && error.contains("line 1 has no string"), "{error}");
        std::fs::write(&plain, " \n").unwrap();
        let error = read_documents(&plain, "text").unwrap_err().to_string();
        assert!(error.contains("a.txt") && error.contains("no text"), "{error}");
    }
}
