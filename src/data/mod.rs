//! Text to tokens to windows.

mod documents;
mod json_lines;
mod split;
mod tokenizer;
mod windows;

pub(crate) use documents::holds_json_lines;
pub use documents::read_documents;
pub use json_lines::json_lines;
pub use split::split_text;
pub use tokenizer::Tokenizer;
pub use windows::{Bos, Windows};

/// Lower-case hexadecimal digits of a hash.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}
