//! Answering tasks by likelihood, as lm-evaluation-harness does.

use candle_core::{D, Tensor};
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
    /// As `acc`, with each log-likelihood divided by the choice's length in characters; absent where the harness has
    /// none ([`Item::by_length`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<f64>,
    /// The standard error of `acc`; absent of one item, which has no spread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stderr: Option<f64>,
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
    /// As `right`, with each log-likelihood divided by the choice's length in characters; absent where the harness
    /// does not ([`Item::by_length`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub right_by_length: Option<bool>,
    /// Tokens that the model ran for it: those that all choices begin with once, and of the others as many for each
    /// choice as the longest of its batch has.
    pub tokens: usize,
}

impl Accuracy {
    /// The accuracy that answers amount to.
    #[must_use]
    pub fn of(answers: &[Answer]) -> Self {
        let single = answers.iter().all(|answer| answer.log_likelihoods.len() == 1);
        let right: Vec<bool> = answers.iter().map(|answer| answer.right).collect();
        let right_by_length: Option<Vec<bool>> =
            answers.iter().map(|answer| answer.right_by_length).collect();
        let (acc, stderr) = mean_and_error(&right);
        let (acc_norm, acc_norm_stderr) = right_by_length.map(|right| mean_and_error(&right)).unzip();
        let nll = answers.iter().filter_map(|answer| answer.log_likelihoods.get(answer.gold)).sum::<f64>();
        let perplexity = single.then(|| (-nll / answers.len() as f64).exp());
        let acc_norm_stderr = acc_norm_stderr.flatten();
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
/// the left where the model has learned no positions for them. What all choices of an item begin with is run once, and
/// what is left of them together. Nothing is kept from one item to the next: no answer depends on the items before it.
///
/// # Errors
/// A text that cannot be tokenised, a likelihood that is not finite, or a cancelling observer.
pub fn answers(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    task: &Task,
    observer: &mut dyn Observer,
) -> Result<Vec<Answer>> {
    let mut answers = Vec::with_capacity(task.items.len());
    progress::steps("task", task.items.len(), observer, |index| {
        if let Some(item) = task.items.get(index) {
            let reader = Reader { decoder, tokenizer, tokens: 0 };
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

/// The mean of truths, and its standard error with n − 1 degrees of freedom, where there are any.
fn mean_and_error(truths: &[bool]) -> (f64, Option<f64>) {
    let count = truths.len() as f64;
    let mean = truths.iter().filter(|truth| **truth).count() as f64 / count;
    (mean, (count > 1.0).then(|| (mean * (1.0 - mean) / (count - 1.0)).sqrt()))
}

/// So many choices are run together at most, each of which has a copy of the query's keys and values.
const BATCH: usize = 8;

/// Reads the choices of one item.
struct Reader<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    /// Tokens that were run so far.
    tokens: usize,
}

/// A choice as tokens: context, and from `first` on continuation.
struct Text {
    ids: Vec<u32>,
    first: usize,
}

impl Text {
    /// What is run: nothing follows the last token.
    fn run(&self) -> &[u32] {
        self.ids.split_last().map_or(&[], |(_, run)| run)
    }

    fn continuation(&self) -> &[u32] {
        self.ids.get(self.first..).unwrap_or_default()
    }
}

impl Reader<'_> {
    fn answer(mut self, item: &Item) -> Result<Answer> {
        let texts = item.choices.iter().map(|choice| self.text(choice)).collect::<Result<Vec<_>>>()?;
        let rows = self.rows(&texts)?;
        let targets: Vec<u32> = texts.iter().flat_map(Text::continuation).copied().collect();
        let nll = self.decoder.nll(&rows, &targets)?.to_vec1::<f32>()?;
        let mut nll = nll.into_iter().map(f64::from);
        let sum = |text: &Text| -nll.by_ref().take(text.continuation().len()).sum::<f64>();
        let log_likelihoods: Vec<f64> = texts.iter().map(sum).collect();
        if let Some(&value) = log_likelihoods.iter().find(|value| !value.is_finite()) {
            return Err(Error::NotFinite { what: "a log-likelihood".into(), value });
        }
        let right = match texts.as_slice() {
            [_] => self.decoder.logits(&rows)?.argmax(D::Minus1)?.to_vec1::<u32>()? == targets,
            _ => first_largest(log_likelihoods.iter().copied()) == Some(item.gold),
        };
        let by_length = log_likelihoods
            .iter()
            .zip(&item.choices)
            .map(|(log_likelihood, choice)| log_likelihood / choice.length.max(1) as f64);
        let right_by_length = item.by_length.then(|| first_largest(by_length) == Some(item.gold));
        Ok(Answer { log_likelihoods, gold: item.gold, right, right_by_length, tokens: self.tokens })
    }

    /// The tokens of context and continuation together.
    fn text(&self, choice: &Choice) -> Result<Text> {
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
        let vocab = self.decoder.architecture().vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::argument("token id", id, format!("less than the vocabulary of {vocab}")));
        }
        let limit = self.decoder.architecture().max_position_embeddings;
        let excess = (ids.len() - 1).saturating_sub(limit).min(first - 1);
        ids.drain(..excess);
        Ok(Text { ids, first: first - excess })
    }

    /// The states after the last block that foretell the tokens of all continuations, one after the other:
    /// `(tokens of continuations, hidden)`.
    fn rows(&mut self, texts: &[Text]) -> Result<Tensor> {
        let common = common_prefix(texts);
        let mut query = self.decoder.cache();
        let prefix = texts.first().and_then(|text| text.run().get(..common)).filter(|ids| !ids.is_empty());
        let prefix = prefix.map(|ids| self.run(ids, 1, &mut query)).transpose()?;
        let mut rows = Vec::with_capacity(texts.len());
        for batch in texts.chunks(BATCH) {
            let rests = self.rests(batch, common, &query)?;
            for (place, text) in batch.iter().enumerate() {
                let own = rests.as_ref().map(|rests| rests.narrow(0, place, 1)).transpose()?;
                let states: Vec<&Tensor> = prefix.iter().chain(&own).collect();
                let states = Tensor::cat(&states, 1)?; // (1, tokens and padding, hidden)
                rows.push(states.narrow(1, text.first - 1, text.continuation().len())?.squeeze(0)?);
            }
        }
        Ok(Tensor::cat(&rows, 0)?)
    }

    /// The states of what follows the first `common` tokens, `(texts, tokens of the longest, hidden)`; nothing where
    /// nothing follows.
    fn rests(&mut self, texts: &[Text], common: usize, query: &KvCache) -> Result<Option<Tensor>> {
        let rest = |text: &Text| text.run().get(common..).unwrap_or_default().to_vec();
        let mut rests: Vec<Vec<u32>> = texts.iter().map(rest).collect();
        let longest = rests.iter().map(Vec::len).max().unwrap_or_default();
        if longest == 0 {
            return Ok(None);
        }
        // No token sees those after it: what stands there is of no consequence.
        for rest in &mut rests {
            rest.resize(longest, 0);
        }
        let mut cache = query.repeated(texts.len(), longest)?;
        self.run(&rests.concat(), texts.len(), &mut cache).map(Some)
    }

    /// The states of so many texts of one length that go on after the cache's tokens, `(texts, tokens, hidden)`.
    fn run(&mut self, ids: &[u32], texts: usize, cache: &mut KvCache) -> Result<Tensor> {
        self.tokens += ids.len();
        let ids = Tensor::from_slice(ids, (texts, ids.len() / texts), self.decoder.device())?;
        self.decoder.extend(&ids, cache)
    }
}

/// With how many tokens all of the texts begin, of those that are run.
fn common_prefix(texts: &[Text]) -> usize {
    let Some((first, others)) = texts.split_first() else { return 0 };
    let with = |other: &Text| first.run().iter().zip(other.run()).take_while(|(a, b)| a == b).count();
    others.iter().map(with).min().unwrap_or(first.run().len())
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
        let (mean, error) = mean_and_error(&[true, true, true, false]);
        assert!((mean - 0.75).abs() < 1e-12 && (error.unwrap_or_default() - 0.25).abs() < 1e-12);
    }

    #[test]
    fn one_item_has_no_standard_error() {
        assert_eq!(mean_and_error(&[true]), (1.0, None));
    }
}
