//! Numbers as text.

/// A number with this many digits after the point, and groups of three before it.
pub(super) fn fixed(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    let (sign, text) = text.strip_prefix('-').map_or(("", text.as_str()), |rest| ("-", rest));
    let (whole, rest) = text.split_once('.').map_or((text, None), |(whole, rest)| (whole, Some(rest)));
    let groups: Vec<&str> =
        whole.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    let rest = rest.map(|rest| format!(".{rest}")).unwrap_or_default();
    format!("{sign}{}{rest}", groups.join(","))
}

/// The same with its sign; what rounds to nothing has none.
pub(super) fn signed(value: f64, digits: usize) -> String {
    let text = fixed(value, digits);
    if !text.contains(|digit| ('1'..='9').contains(&digit)) {
        return text.trim_start_matches('-').into();
    }
    if value > 0.0 { format!("+{text}") } else { text }
}

/// Four significant digits, however large or small.
pub(super) fn significant(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".into()
    } else if (1e-4..1e6).contains(&size) {
        fixed(value, (3.0 - size.log10().floor()).clamp(0.0, 7.0) as usize)
    } else {
        format!("{value:.3e}")
    }
}

/// Whole numbers, as a list.
pub(super) fn list(numbers: &[usize]) -> String {
    if numbers.is_empty() {
        return "none".into();
    }
    numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_signed() {
        assert_eq!(fixed(134_515_008.0, 0), "134,515,008");
        assert_eq!((fixed(-1234.5678, 2), fixed(999.0, 1)), ("-1,234.57".into(), "999.0".into()));
        assert_eq!(
            (signed(0.5, 1), signed(-0.5, 1), signed(-0.001, 2)),
            ("+0.5".into(), "-0.5".into(), "0.00".into())
        );
        assert_eq!((significant(0.012_345_6), significant(123.456)), ("0.01235".into(), "123.5".into()));
        assert_eq!((significant(1.5e-7), significant(0.0)), ("1.500e-7".into(), "0".into()));
    }
}
