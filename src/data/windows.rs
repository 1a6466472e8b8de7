//! Non-overlapping windows of tokens, what scoring and evaluation run on.

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Tokenizer, hex, split_text};
use crate::error::{Error, Result};

/// Whether windows begin with the begin-of-text token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Bos {
    /// As the tokenizer does it.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// One unknown token in so many is worth a warning.
const MANY_UNKNOWN: usize = 100;

/// Windows of `seq_len` tokens each, cut from one text, and what a result must say of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    ids: Vec<Vec<u32>>,
    seq_len: usize,
    bos: bool,
    split_special_tokens: bool,
    /// The tokenizer's unknown token.
    unknown: Option<u32>,
    text_sha256: String,
}

impl Windows {
    /// Tokenises `text` once and cuts it into non-overlapping windows; what is left over is dropped.
    ///
    /// With a begin-of-text token each window is that token and `seq_len − 1` tokens of the text. At most `limit`
    /// windows are kept, the first ones. This warns where [many tokens are unknown](Self::has_many_unknown).
    ///
    /// ```
    /// use foldgpt::{Bos, Checkpoint, Windows};
    ///
    /// let tokenizer = Checkpoint::open("examples/tiny-stories")?.tokenizer()?;
    /// let text = "Once there was a kite. ".repeat(40);
    /// let windows = Windows::from_text(&tokenizer, &text, 64, Some(2), Bos::Auto)?;
    /// assert_eq!((windows.len(), windows.seq_len()), (2, 64));
    /// # Ok::<(), foldgpt::Error>(())
    /// ```
    ///
    /// # Errors
    /// An empty text, or one too short for a single window.
    pub fn from_text(
        tokenizer: &Tokenizer,
        text: &str,
        seq_len: usize,
        limit: Option<usize>,
        bos: Bos,
    ) -> Result<Self> {
        let first = match bos {
            Bos::Never => None,
            Bos::Auto => tokenizer.bos().filter(|_| tokenizer.adds_bos()),
            Bos::Always => Some(tokenizer.bos().ok_or_else(|| {
                Error::Tokenizer("has no begin-of-text token, and windows should begin with it".into())
            })?),
        };
        check_seq_len(seq_len)?;
        if limit == Some(0) {
            return Err(Error::argument("windows", 0, "at least 1"));
        }
        if text.trim().is_empty() {
            return Err(Error::Text("empty".into()));
        }
        let tokens = tokenizer.encode(text)?;
        let per_window = seq_len - usize::from(first.is_some());
        let windows = tokens.chunks_exact(per_window).take(limit.unwrap_or(usize::MAX));
        let ids: Vec<Vec<u32>> =
            windows.map(|window| first.into_iter().chain(window.iter().copied()).collect()).collect();
        if ids.is_empty() {
            let reason =
                format!("{} tokens are too few for one window, expected at least {per_window}", tokens.len());
            return Err(Error::Text(reason));
        }
        let text_sha256 = hex(&Sha256::digest(text.as_bytes()));
        let split_special_tokens = tokenizer.splits_special_tokens();
        let unknown = tokenizer.unknown();
        let windows = Self { ids, seq_len, bos: first.is_some(), split_special_tokens, unknown, text_sha256 };
        if windows.has_many_unknown() {
            tracing::warn!(
                windows = windows.len(),
                seq_len,
                "many tokens are the unknown one, and may decide the loss"
            );
        }
        Ok(windows)
    }

    /// The windows of the first 80 % of a text, to calibrate and to train on, and of the rest, to evaluate on, at most
    /// `evaluated` of them: see [`split_text`]. To calibrate on a few of the first, [`spread`](Self::spread) them: the
    /// beginning alone is about a few things only.
    ///
    /// # Errors
    /// As [`from_text`](Self::from_text), of either part.
    pub fn split_from_text(
        tokenizer: &Tokenizer,
        text: &str,
        seq_len: usize,
        evaluated: Option<usize>,
        bos: Bos,
    ) -> Result<(Self, Self)> {
        let (first, rest) = split_text(text);
        let of = |part: &'static str, text: &str, limit| {
            Self::from_text(tokenizer, text, seq_len, limit, bos).map_err(|error| match error {
                Error::Text(reason) => Error::Text(format!("{part}: {reason}")),
                other => other,
            })
        };
        Ok((of("the first 80 %", first, None)?, of("the last 20 %", rest, evaluated)?))
    }

    /// Windows that are token ids already, each of the same length; the hash is of the ids and not of a text.
    ///
    /// # Errors
    /// No window, windows of different lengths, or of fewer than two tokens.
    pub fn from_ids(ids: Vec<Vec<u32>>) -> Result<Self> {
        let seq_len = ids.first().map(Vec::len).ok_or_else(|| Error::Text("no windows".into()))?;
        check_seq_len(seq_len)?;
        if let Some((index, window)) = ids.iter().enumerate().find(|(_, window)| window.len() != seq_len) {
            let reason =
                format!("window {index} has {} tokens, expected {seq_len} as the first has", window.len());
            return Err(Error::Text(reason));
        }
        let text_sha256 = hash(&ids);
        Ok(Self { ids, seq_len, bos: false, split_special_tokens: false, unknown: None, text_sha256 })
    }

    /// The SHA-256 of the windows' own tokens, as little-endian `u32`, in hexadecimal.
    pub(crate) fn ids_sha256(&self) -> String {
        hash(&self.ids)
    }

    /// The hash of one window's ids.
    pub(crate) fn window_sha256(&self, index: usize) -> Result<String> {
        Ok(hash(&[self.window(index)?.to_vec()]))
    }

    /// The number of windows, at least 1.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// `count` of the windows, spread evenly over all of them; all where there are no more.
    ///
    /// # Errors
    /// [`Error::Argument`] for no windows.
    pub fn spread(&self, count: usize) -> Result<Self> {
        if count == 0 {
            return Err(Error::argument("windows", 0, "at least 1"));
        }
        Ok(self.at(&spread(self.ids.len(), count).collect::<Vec<_>>()))
    }

    /// The first `count` windows, and the rest.
    ///
    /// # Errors
    /// [`Error::Argument`] where one of the two would be empty.
    pub fn split_at(&self, count: usize) -> Result<(Self, Self)> {
        match self.ids.split_at_checked(count) {
            Some((first, rest)) if !first.is_empty() && !rest.is_empty() => {
                let of = |ids: &[Vec<u32>]| Self { ids: ids.to_vec(), ..self.clone() };
                Ok((of(first), of(rest)))
            }
            _ => {
                let expected = format!("from 1 to {}, to part {} windows", self.len() - 1, self.len());
                Err(Error::argument("windows", count, expected))
            }
        }
    }

    /// The windows at these places, in their order.
    pub(crate) fn at(&self, places: &[usize]) -> Self {
        let ids = places.iter().filter_map(|&place| self.ids.get(place).cloned()).collect();
        Self { ids, ..self.clone() }
    }

    /// The places of all windows in disjoint parts: `first` of them, as [`spread`](Self::spread) gives them, and then
    /// as many again as there have been, so that what has been seen doubles with every part.
    pub(crate) fn doubling(&self, first: usize) -> Result<Vec<Vec<usize>>> {
        if first == 0 {
            return Err(Error::argument("windows", 0, "at least 1"));
        }
        let (mut rest, mut parts, mut count) = ((0..self.len()).collect::<Vec<_>>(), Vec::new(), first);
        while !rest.is_empty() {
            let taken: Vec<usize> = spread(rest.len(), count).collect();
            let (part, left): (Vec<_>, Vec<_>) =
                rest.into_iter().enumerate().partition(|(index, _)| taken.binary_search(index).is_ok());
            if !parts.is_empty() {
                count *= 2;
            }
            parts.push(part.into_iter().map(|(_, place)| place).collect());
            rest = left.into_iter().map(|(_, place)| place).collect();
        }
        Ok(parts)
    }

    /// Tokens in each window.
    #[must_use]
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Whether each window begins with the begin-of-text token.
    #[must_use]
    pub fn bos(&self) -> bool {
        self.bos
    }

    /// Whether special tokens that the text writes out were read as any other characters.
    #[must_use]
    pub fn split_special_tokens(&self) -> bool {
        self.split_special_tokens
    }

    /// Whether one token in a hundred or more is the tokenizer's unknown one, often because the text writes it out:
    /// they, and not the words, may then decide the loss. See [`Tokenizer::with_split_special_tokens`].
    #[must_use]
    pub fn has_many_unknown(&self) -> bool {
        // Some vocabularies begin texts with it.
        let of_text = self.ids.iter().flat_map(|ids| ids.iter().skip(usize::from(self.bos)));
        let unknown = of_text.filter(|id| Some(**id) == self.unknown).count();
        unknown * MANY_UNKNOWN >= self.ids.len() * self.seq_len
    }

    /// The SHA-256 of the whole text, in hexadecimal.
    #[must_use]
    pub fn text_sha256(&self) -> &str {
        &self.text_sha256
    }

    /// The token ids of each window.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.ids.iter().map(Vec::as_slice)
    }

    /// One window as a batch of one, `(1, seq_len)`, as a decoder reads it.
    ///
    /// # Errors
    /// [`Error::Argument`] for a window that does not exist, or a failed copy to the device.
    pub fn tensor(&self, index: usize, device: &Device) -> Result<Tensor> {
        let window = self.window(index)?;
        Ok(Tensor::from_slice(window, (1, window.len()), device)?)
    }

    pub(crate) fn window(&self, index: usize) -> Result<&[u32]> {
        let missing = || Error::argument("window", index, format!("less than {}", self.ids.len()));
        self.ids.get(index).map(Vec::as_slice).ok_or_else(missing)
    }
}

fn hash(ids: &[Vec<u32>]) -> String {
    let mut hash = Sha256::new();
    for window in ids {
        hash.update((window.len() as u64).to_le_bytes());
        for id in window {
            hash.update(id.to_le_bytes());
        }
    }
    hex(&hash.finalize())
}

fn check_seq_len(seq_len: usize) -> Result<()> {
    if seq_len < 2 {
        return Err(Error::argument("seq_len", seq_len, "at least 2 tokens, one to see and one to predict"));
    }
    Ok(())
}
/// `count` of `len` places, spread evenly; all where there are no more.
fn spread(len: usize, count: usize) -> impl Iterator<Item = usize> {
    let count = count.min(len);
    (0..count).map(move |place| place * len / count)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokenizers::AddedToken;
    use tokenizers::models::bpe::{BPE, Vocab};

    use super::*;
    use crate::plan::Calibration;

    #[test]
    fn special_tokens_in_the_text_are_special_unless_they_are_split() {
        let vocab = ["<unk>", "<", "u", "n", "k", ">", "a"];
        let vocab: Vec<_> = vocab.iter().zip(0..).map(|(token, id)| ((*token).to_string(), id)).collect();
        let bpe = BPE::builder().vocab_and_merges(vocab.into_iter().collect::<Vocab>(), Vec::new());
        let mut inner = tokenizers::Tokenizer::new(bpe.unk_token("<unk>".into()).build().unwrap());
        inner.add_special_tokens([AddedToken::from("<unk>", true)]).unwrap();
        let matched = Tokenizer::new(inner, &serde_json::Value::Null);
        let split = matched.clone().with_split_special_tokens(true);
        let cut = |tokenizer: &Tokenizer, text: &str| {
            Windows::from_text(tokenizer, text, 7, Some(1), Bos::Auto).unwrap()
        };
        let text = format!("a<unk>a{}", "a".repeat(10));
        let (matched, split) = (cut(&matched, &text), cut(&split, &text));
        assert_eq!(matched.ids, [[6, 0, 6, 6, 6, 6, 6]]);
        assert_eq!(split.ids, [[6, 1, 2, 3, 4, 5, 6]]);
        assert!(matched.has_many_unknown() && !matched.split_special_tokens());
        assert!(!split.has_many_unknown() && split.split_special_tokens());
        assert!(Calibration::from(&matched).many_unknown && !Calibration::from(&split).many_unknown);
        assert!(!Windows::from_ids(matched.ids).unwrap().has_many_unknown());
    }

    #[test]
    fn doubling_parts_hold_every_window_once_and_begin_with_the_spread_ones() {
        let windows = Windows::from_ids((0..21u32).map(|i| vec![i, 1]).collect()).unwrap();
        let parts = windows.doubling(3).unwrap();
        assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 6, 9]);
        assert_eq!(windows.at(&parts[0]).ids, windows.spread(3).unwrap().ids);
        let mut all = parts.concat();
        all.sort_unstable();
        assert_eq!(all, (0..21).collect::<Vec<_>>());
        assert_eq!(windows.doubling(30).unwrap().len(), 1);
        assert!(windows.doubling(0).is_err());
    }
}
