//! A text in two parts.

/// The first 80 % of a text, for calibration, and the rest, for evaluation; parted at the end of a line, else of a
/// word, else of a character. White space alone is no rest: a text of one line is parted within it.
#[must_use]
pub fn split_text(text: &str) -> (&str, &str) {
    let target = (text.len() / 5 * 4..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
    let rest = text.get(target..).unwrap_or_default().trim_end();
    let after = rest.find('\n').or_else(|| rest.find(' ')).map_or(0, |at| at + 1);
    text.split_at(target + after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_part_at_lines_then_words_then_characters() {
        let lines = "one two three\nfour five\nsix";
        assert_eq!(split_text(lines), ("one two three\nfour five\n", "six"));
        assert_eq!(split_text("one two three fo ur"), ("one two three ", "fo ur"));
        assert_eq!(split_text("äöüäö"), ("äöüä", "ö"));
        assert_eq!(split_text("one two three fo ur\n"), ("one two three fo ", "ur\n"));
        assert_eq!(split_text("one two three four\n\n"), ("one two three fo", "ur\n\n"));
        assert_eq!(split_text(""), ("", ""));
    }
}
