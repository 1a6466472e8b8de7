//! Numbers of bytes as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A number of bytes, written with a suffix or without: `3GB` and `1.5 GB` are powers of ten, `512MiB` is one of two.
///
/// ```
/// use foldgpt::Bytes;
///
/// assert_eq!("3GB".parse::<Bytes>()?, Bytes(3_000_000_000));
/// assert_eq!("512 MiB".parse::<Bytes>()?, Bytes(512 << 20));
/// assert_eq!(Bytes(1_500_000_000).to_string(), "1.50 GB");
/// # Ok::<(), foldgpt::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "u64")]
pub struct Bytes(pub u64);

/// In a file: a number, or a text with a suffix.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number of bytes, or a text such as 3GB")]
enum Written {
    Number(u64),
    Text(String),
}

/// Every suffix, and what it stands for.
const SUFFIXES: [(&str, f64); 10] = [
    ("", 1.0),
    ("B", 1.0),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("KIB", 1024.0),
    ("MIB", 1_048_576.0),
    ("GIB", 1_073_741_824.0),
    ("TIB", 1_099_511_627_776.0),
];

impl FromStr for Bytes {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::argument("number of bytes", text, "a number such as 3GB, 512MiB or 1000000");
        let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
        let (number, suffix) = text.split_at(end);
        let suffix = suffix.trim().to_ascii_uppercase();
        let (_, unit) = SUFFIXES.iter().find(|(name, _)| *name == suffix).ok_or_else(wrong)?;
        let bytes = number.trim().parse::<f64>().map_err(|_| wrong())? * unit;
        // What is beyond is no number of bytes that anything has.
        if (0.0..1e18).contains(&bytes) { Ok(Self(bytes.round() as u64)) } else { Err(wrong()) }
    }
}

impl TryFrom<Written> for Bytes {
    type Error = Error;

    fn try_from(written: Written) -> Result<Self> {
        match written {
            Written::Number(bytes) => Ok(Self(bytes)),
            Written::Text(text) => text.parse(),
        }
    }
}

impl From<Bytes> for u64 {
    fn from(bytes: Bytes) -> Self {
        bytes.0
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..1_000_000 => write!(f, "{} bytes", self.0),
            1_000_000..1_000_000_000 => write!(f, "{:.0} MB", bytes / 1e6),
            _ => write!(f, "{:.2} GB", bytes / 1e9),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_those_that_people_write() {
        let cases = [
            ("0", 0),
            ("17", 17),
            ("17 b", 17),
            ("1.5GB", 1_500_000_000),
            ("3 gb", 3_000_000_000),
            ("2kB", 2000),
            ("2KiB", 2048),
            ("1TiB", 1 << 40),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse::<Bytes>().unwrap(), Bytes(bytes), "{text}");
        }
        for text in ["", "GB", "-1", "3G", "three", "1e40", "nan", "inf", "3 GB more", "0x10"] {
            let error = text.parse::<Bytes>().unwrap_err().to_string();
            assert!(error.contains("3GB"), "{text}: {error}");
        }
    }

    #[test]
    fn files_have_numbers_or_texts() {
        for json in ["3000000000", "\"3GB\""] {
            assert_eq!(serde_json::from_str::<Bytes>(json).unwrap(), Bytes(3_000_000_000));
        }
        assert_eq!(serde_json::to_string(&Bytes(7)).unwrap(), "7");
        for json in ["\"much\"", "-1", "true"] {
            let error = serde_json::from_str::<Bytes>(json).unwrap_err().to_string();
            assert!(error.contains("3GB"), "{json}: {error}");
        }
    }
}
