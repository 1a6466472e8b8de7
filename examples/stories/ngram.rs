//! Count-based language models: what a model must beat to have learned more than neighbouring tokens.

use std::collections::HashMap;

/// Mean negative log-likelihood (nats per token) of `test` under the token frequencies of `train`,
/// with 0.1 added to every count.
pub fn unigram_nll(train: &[u32], test: &[u32], vocab: usize) -> f64 {
    ngram_nll(train, test, vocab, 1)
}

/// As [`unigram_nll`], each token given the one before, interpolated with the unigram model.
pub fn bigram_nll(train: &[u32], test: &[u32], vocab: usize) -> f64 {
    ngram_nll(train, test, vocab, 2)
}

/// As [`unigram_nll`], each token given the `order - 1` before (orders above four count as four).
///
/// Witten–Bell: a context seen `n` times with `d` different successors leaves `d / (n + d)` to the shorter context.
pub fn ngram_nll(train: &[u32], test: &[u32], vocab: usize, order: usize) -> f64 {
    let tables: Vec<Counts> = (0..order.clamp(1, 4)).map(|length| Counts::of(train, length)).collect();
    let total: f64 = (0..test.len())
        .map(|position| {
            let mut probability = tables[0].smoothed(test[position], vocab);
            for (length, table) in tables.iter().enumerate().skip(1).take(position) {
                probability = table.refined(&test[position - length..=position], probability);
            }
            -probability.ln()
        })
        .sum();
    total / test.len().max(1) as f64
}

#[derive(Default)]
struct Counts {
    /// Per context: how often it was seen and with how many different successors.
    contexts: HashMap<u128, (u32, u32)>,
    /// Per context and successor.
    grams: HashMap<u128, u32>,
}

impl Counts {
    fn of(tokens: &[u32], context_length: usize) -> Self {
        let mut counts = Self::default();
        for gram in tokens.windows(context_length + 1) {
            let seen = counts.grams.entry(key(gram)).or_default();
            *seen += 1;
            let context = counts.contexts.entry(key(&gram[..context_length])).or_default();
            context.0 += 1;
            context.1 += u32::from(*seen == 1);
        }
        counts
    }

    fn smoothed(&self, token: u32, vocab: usize) -> f64 {
        let total = self.contexts.get(&key(&[])).map_or(0, |context| context.0);
        let seen = self.grams.get(&key(&[token])).copied().unwrap_or(0);
        (f64::from(seen) + 0.1) / (f64::from(total) + 0.1 * vocab as f64)
    }

    /// The probability of the last token of `gram`, given what the shorter context says.
    fn refined(&self, gram: &[u32], shorter: f64) -> f64 {
        let Some(&(total, different)) = self.contexts.get(&key(&gram[..gram.len() - 1])) else {
            return shorter;
        };
        let seen = self.grams.get(&key(gram)).copied().unwrap_or(0);
        (f64::from(seen) + f64::from(different) * shorter) / f64::from(total + different)
    }
}

fn key(tokens: &[u32]) -> u128 {
    tokens.iter().fold(0, |key, &token| key << 32 | u128::from(token))
}
