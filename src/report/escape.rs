//! Text from outside, as text and nothing else.

use std::borrow::Cow;

/// Without characters that no text needs and that terminals, XML or the order of letters would obey: other controls
/// than line ends and tabs, and marks of direction.
pub(super) fn clean(text: &str) -> Cow<'_, str> {
    let strange = |c: char| {
        (c.is_control() && !matches!(c, '\n' | '\t'))
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{fffe}' | '\u{ffff}')
    };
    if text.contains(strange) { text.replace(strange, "\u{fffd}").into() } else { text.into() }
}

/// For the content and the quoted attributes of HTML.
#[cfg(feature = "report")]
pub(super) fn html(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in clean(text).chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// For one line of Markdown. An underscore between letters emphasises nothing and stays readable.
pub(crate) fn markdown(text: &str) -> String {
    let text = one_line(text);
    let characters: Vec<char> = text.chars().collect();
    let mut escaped = String::with_capacity(text.len());
    for (place, &c) in characters.iter().enumerate() {
        let inside = |place: Option<usize>| {
            place.and_then(|place| characters.get(place)).is_some_and(|c| c.is_alphanumeric())
        };
        let harmless = c == '_' && inside(place.checked_sub(1)) && inside(Some(place + 1));
        if !harmless && "\\`*_{}[]<>#|~&!$".contains(c) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// A span of code on one line of Markdown.
pub(crate) fn code(text: &str) -> String {
    let text = one_line(text);
    let fence = "`".repeat(longest_run(&text) + 1);
    // What begins or ends with a backtick needs a space, which is no part of the span.
    let space = if text.starts_with('`') || text.ends_with('`') { " " } else { "" };
    if text.is_empty() { String::new() } else { format!("{fence}{space}{text}{space}{fence}") }
}

/// A block of code, line by line.
pub(super) fn code_block(language: &str, text: &str) -> String {
    let text = clean(text);
    let fence = "`".repeat(longest_run(&text).max(2) + 1);
    format!("{fence}{language}\n{}\n{fence}\n", text.trim_end_matches('\n'))
}

fn one_line(text: &str) -> String {
    clean(text).split(['\n', '\t']).collect::<Vec<_>>().join(" ")
}

/// The length of the longest run of backticks.
fn longest_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_has_no_meaning_left() {
        assert_eq!(markdown("<b>*a*_b_|c|[d](e)#`f`\n&amp;"), r"\<b\>\*a\*\_b\_\|c\|\[d\](e)\#\`f\` \&amp;");
        assert_eq!(markdown("acc_norm, 1.5"), "acc_norm, 1.5");
        assert_eq!(code("a`b``c"), "```a`b``c```");
        assert_eq!(code("`a"), "`` `a ``");
        assert_eq!(code_block("text", "one\n```\ntwo"), "````text\none\n```\ntwo\n````\n");
        assert_eq!(clean("a\u{1b}[31mb\u{202e}c\n"), "a\u{fffd}[31mb\u{fffd}c\n");
    }

    #[cfg(feature = "report")]
    #[test]
    fn html_has_no_meaning_left() {
        assert_eq!(
            html("<a href=\"x\">'&'</a>\0"),
            "&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;&lt;/a&gt;\u{fffd}"
        );
    }
}
