//! Windows that choose the weights that are kept.

use crate::data::Windows;
use crate::error::Result;

/// Most windows that choose.
const MOST: usize = 16;

/// Windows to train on, and the last twentieth, at least one and at most sixteen, to choose the weights that are kept:
/// what evaluates in the end should choose nothing.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for fewer than two windows.
pub fn hold_out(windows: &Windows) -> Result<(Windows, Windows)> {
    let choosing = (windows.len() / 20).clamp(1, MOST);
    windows.split_at(windows.len() - choosing)
}
