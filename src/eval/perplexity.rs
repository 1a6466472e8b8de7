//! Perplexity on windows of text.

use serde::{Deserialize, Serialize};

use crate::checkpoint::StreamedDecoder;
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::importance::sweep::{each, groups, side_by_side, sweep};
use crate::model::{Architecture, BlockSource, Decoder};
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
    /// Whether special tokens that the text writes out were read as any other characters.
    #[serde(default)]
    pub split_special_tokens: bool,
    /// SHA-256 of the text.
    pub text_sha256: String,
}

impl Perplexity {
    /// What the number depends on besides the model: two with the same can be compared.
    pub(crate) fn protocol(&self) -> (&str, usize, usize, usize, bool, bool) {
        let (bos, split) = (self.bos, self.split_special_tokens);
        (&self.text_sha256, self.tokens, self.windows, self.seq_len, bos, split)
    }
}

/// Scores every window alone: `exp(Σ nll / Σ predicted tokens)`.
///
/// # Errors
/// A token outside of the vocabulary, a loss that is not finite, or a cancelling observer.
pub fn perplexity(decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Perplexity> {
    measure(decoder, windows, observer)
}

/// As [`perplexity`], of a model whose blocks are read from disk one at a time: the same loss, bit for bit.
///
/// # Errors
/// As [`perplexity`], and what reading fails with.
pub fn perplexity_streamed(
    model: &StreamedDecoder<'_>,
    windows: &Windows,
    observer: &mut dyn Observer,
) -> Result<Perplexity> {
    measure(model, windows, observer)
}

fn measure(source: &dyn BlockSource, windows: &Windows, observer: &mut dyn Observer) -> Result<Perplexity> {
    let arch = source.architecture();
    windows.iter().try_for_each(|window| check_vocabulary(arch, window))?;
    let pass = source.pass_over(windows.seq_len())?;
    // Windows that have passed a block, or the head.
    let steps = (windows.len() * (arch.depth() + 1)) as u64;
    let mut total = 0.0f64;
    progress::counted("perplexity", steps, observer, |report| {
        let mut done = 0;
        for group in groups(source, windows) {
            let mut states = sweep(source, windows, &group, &pass, &|_, _| Ok(()), &mut |_, ()| {
                done += 1;
                report(done)
            })?;
            let back = source.back()?;
            let slots: Vec<usize> = (0..group.len()).collect();
            for slots in slots.chunks(side_by_side(source.device())) {
                let ends = slots.iter().map(|&slot| Ok((group.start + slot, states.take(slot)?)));
                let ends = ends.collect::<Result<Vec<_>>>()?;
                let losses = each(&ends, |(index, state)| {
                    back.window_nll(state, windows.window(*index)?.get(1..).unwrap_or_default())
                })?;
                for ((index, _), nll) in ends.iter().zip(losses) {
                    if !nll.is_finite() {
                        let what = format!("the loss of window {index}");
                        return Err(Error::NotFinite { what, value: nll });
                    }
                    total += nll;
                    done += 1;
                    report(done)?;
                }
            }
        }
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
        split_special_tokens: windows.split_special_tokens(),
        text_sha256: windows.text_sha256().into(),
    })
}

fn check_vocabulary(arch: &Architecture, ids: &[u32]) -> Result<()> {
    let vocab = arch.vocab_size;
    match ids.iter().find(|&&id| id as usize >= vocab) {
        Some(id) => Err(Error::argument("token id", id, format!("less than the vocabulary of {vocab}"))),
        None => Ok(()),
    }
}
