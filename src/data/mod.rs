//! Text to tokens to windows.

mod tokenizer;
mod windows;

pub use tokenizer::Tokenizer;
pub use windows::{Bos, Windows};

/// Lower-case hexadecimal digits of a hash.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
