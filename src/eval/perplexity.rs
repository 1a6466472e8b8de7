//! Perplexity on windows of text.

use serde::{Deserialize, Serialize};

use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::progress::{self, Observer};

/// A model's loss on a text, with all that the number depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Perplexity {
    /// Mean negative log-likelihood, in nats per predicted token.
    pub mean_nll: f64,
    /// `exp(mean_nll)`.
    pub perplexity: f64,
    /// Predicted tokens: every token of a window but its first.
    pub tokens: usize,
    /// Windows, each scored alone.
    pub windows: usize,
    /// Tokens in each window.
    pub seq_len: usize,
    /// Whether each window began with the begin-of-text token.
    pub bos: bool,
    /// SHA-256 of the text.
    pub text_sha256: String,
}

impl Perplexity {
    /// What the number depends on besides the model: two with the same can be compared.
    pub(crate) fn protocol(&self) -> (&str, usize, usize, usize, bool) {
        (&self.text_sha256, self.tokens, self.windows, self.seq_len, self.bos)
    }
}

/// Scores every window alone: `exp(Σ nll / Σ predicted tokens)`.
///
/// # Errors
/// A token outside of the vocabulary, a loss that is not finite, or a cancelling observer.
pub fn perplexity(decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Perplexity> {
    let mut total = 0.0f64;
    progress::steps("perplexity", windows.len(), observer, |index| {
        let nll = window_nll(decoder, windows, index)?;
        if !nll.is_finite() {
            return Err(Error::NotFinite { what: format!("the loss of window {index}"), value: nll });
        }
        total += nll;
        Ok(())
    })?;
    let tokens = windows.len() * (windows.seq_len() - 1);
    let mean_nll = total / tokens as f64;
    Ok(Perplexity {
        mean_nll,
        perplexity: mean_nll.exp(),
        tokens,
        windows: windows.len(),
        seq_len: windows.seq_len(),
        bos: windows.bos(),
        text_sha256: windows.text_sha256().into(),
    })
}

/// The summed loss of one window, in nats.
fn window_nll(decoder: &Decoder, windows: &Windows, index: usize) -> Result<f64> {
    let window = windows.window(index)?;
    check_vocabulary(decoder, window)?;
    let states = decoder.hidden(&windows.tensor(index, decoder.device())?)?;
    decoder.window_nll(&states, window.get(1..).unwrap_or_default())
}

fn check_vocabulary(decoder: &Decoder, ids: &[u32]) -> Result<()> {
    let vocab = decoder.architecture().vocab_size;
    match ids.iter().find(|&&id| id as usize >= vocab) {
        Some(id) => Err(Error::argument("token id", id, format!("less than the vocabulary of {vocab}"))),
        None => Ok(()),
    }
}
