//! Text in JSON Lines.

use crate::error::{Error, Result};

/// The documents of JSON Lines as one text: the field `field` of every line, in order, parted by empty lines. Empty
/// lines are passed over.
///
/// No end-of-text token is put between documents, and [`Windows`](crate::Windows) are cut from the text as a whole: one
/// may hold the end of a document and the beginning of the next.
///
/// ```
/// let lines = "{\"text\": \"One.\"}\n{\"text\": \"Two.\", \"id\": 7}\n";
/// assert_eq!(foldgpt::data::json_lines(lines, "text")?, "One.\n\nTwo.");
/// # Ok::<(), foldgpt::Error>(())
/// ```
///
/// # Errors
/// [`Error::Text`] for a line, by its number from 1, that is no JSON object with a string in that field.
pub fn json_lines(text: &str, field: &str) -> Result<String> {
    let mut documents = Vec::new();
    for (line, number) in text.lines().zip(1u64..).filter(|(line, _)| !line.trim().is_empty()) {
        let value: serde_json::Value = serde_json::from_str(line)
            .map_err(|error| Error::Text(format!("line {number} is no json: {error}")))?;
        let document = value.get(field).and_then(serde_json::Value::as_str);
        let missing = || Error::Text(format!("line {number} has no string in its field `{field}`"));
        documents.push(document.ok_or_else(missing)?.to_string());
    }
    Ok(documents.join("\n\n"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_not_what_was_asked_for_are_named() {
        for (text, expected) in [
            ("{\"text\": \"a\"}\n\n{\"body\": \"b\"}", "line 3 has no string in its field `text`"),
            ("{\"text\": 5}", "line 1 has no string"),
            ("{\"text\": \"a\"}\n{", "line 2 is no json"),
        ] {
            let error = json_lines(text, "text").unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
