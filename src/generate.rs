//! Text from a model, token by token.

use std::ops::ControlFlow;

use candle_core::{DType, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use serde::{Deserialize, Serialize};

use crate::data::Tokenizer;
use crate::error::{Error, Result};
use crate::model::Decoder;

/// How a text is continued.
///
/// ```
/// use foldgpt::{Checkpoint, Generate, candle::{DType, Device}};
/// use std::ops::ControlFlow;
///
/// let checkpoint = Checkpoint::open("examples/tiny-stories")?;
/// let decoder = checkpoint.decoder(DType::F32, &Device::Cpu)?;
/// let mut text = String::new();
/// Generate { max_tokens: 20, ..Generate::default() }.run(
///     &decoder,
///     &checkpoint.tokenizer()?,
///     "One day",
///     |piece| {
///         text.push_str(piece);
///         ControlFlow::Continue(())
///     },
/// )?;
/// assert!(!text.is_empty());
/// # Ok::<(), foldgpt::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Generate {
    /// At most this many tokens are made.
    pub max_tokens: usize,
    /// Logits are divided by this; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Only the `k` likeliest tokens are sampled.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together have this probability are sampled.
    pub top_p: Option<f64>,
    /// Seed of the draws: the same seed gives the same text.
    pub seed: u64,
}

impl Default for Generate {
    /// 100 tokens, greedily.
    fn default() -> Self {
        Self { max_tokens: 100, temperature: 0.0, top_k: None, top_p: None, seed: 0 }
    }
}

impl Generate {
    /// Continues `prompt`; `on_text` gets every piece of text as soon as it is whole, and may stop by
    /// [`ControlFlow::Break`]. Ends at an end-of-text token, or where the model has learned no further position.
    /// Returns the ids that were made.
    ///
    /// # Errors
    /// Options outside of their range, a prompt without tokens, or a failed computation.
    pub fn run(
        &self,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        prompt: &str,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Vec<u32>> {
        let mut sampler = LogitsProcessor::from_sampling(self.seed, self.sampling()?);
        let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
        let mut pending: Vec<u32> = bos.into_iter().chain(tokenizer.encode(prompt)?).collect();
        if pending.is_empty() {
            return Err(Error::Text("the prompt has no tokens, and the model no begin-of-text token".into()));
        }
        let mut text = tokenizer.inner().decode_stream(true);
        let mut cache = decoder.cache();
        let mut made = Vec::new();
        let room = decoder.architecture().position_limit().unwrap_or(usize::MAX);
        while made.len() < self.max_tokens && cache.len() + pending.len() <= room {
            let ids = Tensor::from_slice(&pending, (1, pending.len()), decoder.device())?;
            let hidden = decoder.extend(&ids, &mut cache)?; // (1, seq, hidden)
            let last = hidden.narrow(1, pending.len() - 1, 1)?;
            let logits = decoder.logits(&last)?.flatten_all()?.to_dtype(DType::F32)?;
            let next = sampler.sample(&logits)?;
            if tokenizer.eos().contains(&next) {
                break;
            }
            made.push(next);
            let piece = text.step(next).map_err(|error| Error::Tokenizer(error.to_string()))?;
            if piece.is_some_and(|piece| on_text(&piece).is_break()) {
                break;
            }
            pending = vec![next];
        }
        Ok(made)
    }

    fn sampling(&self) -> Result<Sampling> {
        let temperature = self.temperature;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::argument("temperature", temperature, "a number from 0 on"));
        }
        if self.top_k == Some(0) {
            return Err(Error::argument("top_k", 0, "at least 1"));
        }
        if let Some(p) = self.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return Err(Error::argument("top_p", p, "above 0 and at most 1"));
        }
        Ok(match (self.top_k, self.top_p) {
            _ if temperature == 0.0 => Sampling::ArgMax,
            (None, None) => Sampling::All { temperature },
            (Some(k), None) => Sampling::TopK { k, temperature },
            (None, Some(p)) => Sampling::TopP { p, temperature },
            (Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        })
    }
}
