//! Answering tasks by likelihood, as lm-evaluation-harness does.

use candle_core::{D, DType, Tensor};
use serde::{Deserialize, Serialize};

use super::task::{Choice, Item, Task};
use crate::data::Tokenizer;
use crate::error::{Error, Result};
use crate::model::{Decoder, KvCache};
use crate::progress::{self, Observer};

/// How well a model does on a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Accuracy {
    /// The share of items whose right choice is the most likely; of items with one choice, the share where the model
    /// would have said it, token by token.
    pub acc: f64,
    /// As `acc`, with each log-likelihood divided by the choice's length in characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<f64>,
    /// The standard error of `acc`.
    pub stderr: f64,
    /// The standard error of `acc_norm`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_norm_stderr: Option<f64>,
    /// Of items with one choice, `exp` of the mean negative log-likelihood of the whole continuation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Items answered.
    pub items: usize,
}

/// What a model makes of one item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Answer {
    /// The log-likelihood of every choice, in nats.
    pub log_likelihoods: Vec<f64>,
    /// The place of the right choice.
    pub gold: usize,
    /// Whether the right choice is the most likely; of an item with one choice, whether the model would have said it.
    pub right: bool,
    /// As `right`, with each log-likelihood divided by the choice's length in characters.
    pub right_by_length: bool,
}

impl Accuracy {
    /// The accuracy that answers amount to.
    #[must_use]
    pub fn of(answers: &[Answer]) -> Self {
        let single = answers.iter().all(|answer| answer.log_likelihoods.len() == 1);
        let (acc, stderr) = mean_and_error(answers.iter().map(|answer| answer.right));
        let by_length = mean_and_error(answers.iter().map(|answer| answer.right_by_length));
        let (acc_norm, acc_norm_stderr) = Some(by_length).filter(|_| !single).unzip();
        let nll = answers.iter().filter_map(|answer| answer.log_likelihoods.get(answer.gold)).sum::<f64>();
        let perplexity = single.then(|| (-nll / answers.len() as f64).exp());
        Self { acc, stderr, acc_norm, acc_norm_stderr, perplexity, items: answers.len() }
    }
}

/// How well a model does on a task: the accuracy of its [`answers`].
///
/// # Errors
/// As [`answers`].
pub fn accuracy(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    task: &Task,
    observer: &mut dyn Observer,
) -> Result<Accuracy> {
    Ok(Accuracy::of(&answers(decoder, tokenizer, task, observer)?))
}

/// Answers every item of a task: the choice whose continuation the model finds most likely after its context.
///
/// Texts are tokenised as a whole, begin with the begin-of-text token where the model expects it, and lose tokens on
/// the left where the model has learned no positions for them. What consecutive choices have in common is read once.
///
/// # Errors
/// A text that cannot be tokenised, a likelihood that is not finite, or a cancelling observer.
pub fn answers(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    task: &Task,
    observer: &mut dyn Observer,
) -> Result<Vec<Answer>> {
    let mut reader = Reader::new(decoder, tokenizer);
    let mut answers = Vec::with_capacity(task.items.len());
    progress::steps("task", task.items.len(), observer, |index| {
        if let Some(item) = task.items.get(index) {
            answers.push(reader.answer(item).map_err(|error| in_item(error, index))?);
        }
        Ok(())
    })?;
    Ok(answers)
}

fn in_item(error: Error, index: usize) -> Error {
    match error {
        Error::NotFinite { what, value } => {
            Error::NotFinite { what: format!("{what} of item {index}"), value }
        }
        other => other,
    }
}

/// The mean of truths, and its standard error with n − 1 degrees of freedom.
fn mean_and_error(truths: impl Iterator<Item = bool> + Clone) -> (f64, f64) {
    let count = truths.clone().count() as f64;
    let mean = truths.filter(|truth| *truth).count() as f64 / count;
    (mean, if count > 1.0 { (mean * (1.0 - mean) / (count - 1.0)).sqrt() } else { 0.0 })
}

/// Reads texts one after the other; what a text has in common with the one before is remembered.
struct Reader<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    cache: KvCache,
    tokens: Vec<u32>,
    /// The states of `tokens` after the last block, `(1, tokens, hidden)`.
    states: Option<Tensor>,
}

impl<'a> Reader<'a> {
    fn new(decoder: &'a Decoder, tokenizer: &'a Tokenizer) -> Self {
        Self { decoder, tokenizer, cache: decoder.cache(), tokens: Vec::new(), states: None }
    }

    fn answer(&mut self, item: &Item) -> Result<Answer> {
        let mut scores = Vec::with_capacity(item.choices.len());
        for choice in &item.choices {
            let (log_likelihood, greedy) = self.log_likelihood(choice)?;
            if !log_likelihood.is_finite() {
                return Err(Error::NotFinite { what: "a log-likelihood".into(), value: log_likelihood });
            }
            scores.push((log_likelihood, greedy, log_likelihood / choice.length.max(1) as f64));
        }
        Ok(Answer {
            log_likelihoods: scores.iter().map(|score| score.0).collect(),
            gold: item.gold,
            right: match scores.as_slice() {
                [(_, greedy, _)] => *greedy,
                _ => first_largest(scores.iter().map(|score| score.0)) == Some(item.gold),
            },
            right_by_length: first_largest(scores.iter().map(|score| score.2)) == Some(item.gold),
        })
    }

    /// The log-likelihood of a continuation in nats, and whether each of its tokens is the likeliest.
    fn log_likelihood(&mut self, choice: &Choice) -> Result<(f64, bool)> {
        let (ids, first) = self.ids(choice)?;
        let rows = self.read(ids.get(..ids.len() - 1).unwrap_or_default())?;
        let count = ids.len() - first;
        let rows = rows.narrow(1, first - 1, count)?.squeeze(0)?; // (count, hidden)
        let logits = self.decoder.logits(&rows)?.to_dtype(DType::F32)?;
        let log_probabilities = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
        let targets = Tensor::from_slice(ids.get(first..).unwrap_or_default(), (count, 1), rows.device())?;
        let chosen = log_probabilities.gather(&targets, 1)?.flatten_all()?.to_vec1::<f32>()?;
        let likeliest = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
        let greedy = ids.get(first..) == Some(likeliest.as_slice());
        Ok((chosen.into_iter().map(f64::from).sum(), greedy))
    }

    /// The ids of context and continuation together, and where the continuation begins.
    fn ids(&self, choice: &Choice) -> Result<(Vec<u32>, usize)> {
        // White space that ends a context belongs to what follows: tokens begin with a space, they do not end with one.
        let context = choice.context.trim_end();
        let whole = self.tokenizer.encode(&format!("{}{}", choice.context, choice.continuation))?;
        let mut first = self.tokenizer.encode(context)?.len();
        let begins = self.tokenizer.adds_bos() || first == 0;
        let bos = self.tokenizer.bos().or(self.tokenizer.eos().first().copied()).filter(|_| begins);
        let mut ids: Vec<u32> = bos.into_iter().chain(whole).collect();
        first += usize::from(bos.is_some());
        if first == 0 || first >= ids.len() {
            let reason = format!("\"{}\" gives no token after its context", choice.continuation);
            return Err(Error::Text(reason));
        }
        let limit = self.decoder.architecture().max_position_embeddings;
        let excess = (ids.len() - 1).saturating_sub(limit).min(first - 1);
        ids.drain(..excess);
        Ok((ids, first - excess))
    }

    /// The states of all of `ids`, `(1, ids, hidden)`.
    fn read(&mut self, ids: &[u32]) -> Result<Tensor> {
        let mut common = self.tokens.iter().zip(ids).take_while(|(known, id)| known == id).count();
        if self.states.is_none() {
            common = 0;
        }
        let vocab = self.decoder.architecture().vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::argument("token id", id, format!("less than the vocabulary of {vocab}")));
        }
        self.cache.truncate(common);
        self.tokens.truncate(common);
        let known = self.states.take().map(|states| states.narrow(1, 0, common)).transpose()?;
        let rest = ids.get(common..).unwrap_or_default();
        let states = match (known, rest.is_empty()) {
            (Some(known), true) => known,
            (known, _) => {
                let rest = Tensor::from_slice(rest, (1, rest.len()), self.decoder.device())?;
                let new = self.decoder.extend(&rest, &mut self.cache)?;
                match known.filter(|known| known.elem_count() > 0) {
                    Some(known) => Tensor::cat(&[&known, &new], 1)?,
                    None => new,
                }
            }
        };
        self.tokens.extend_from_slice(ids.get(common..).unwrap_or_default());
        self.states = Some(states.clone());
        Ok(states)
    }
}

/// The place of the largest number; of equals the first.
fn first_largest(numbers: impl Iterator<Item = f64>) -> Option<usize> {
    let largest = |best: Option<(usize, f64)>, (place, number): (usize, f64)| match best {
        Some((_, highest)) if highest >= number => best,
        _ => Some((place, number)),
    };
    numbers.enumerate().fold(None, largest).map(|(place, _)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equals_wins() {
        assert_eq!(first_largest([1.0, 3.0, 3.0].into_iter()), Some(1));
        assert_eq!(first_largest(std::iter::empty()), None);
    }

    #[test]
    fn standard_errors_are_those_of_a_sample() {
        // statistics.stdev([1, 1, 1, 0]) / sqrt(4) of Python 3.
        let (mean, error) = mean_and_error([true, true, true, false].into_iter());
        assert!((mean - 0.75).abs() < 1e-12 && (error - 0.25).abs() < 1e-12);
    }
}
