//! How fast models are, and what they take, side by side.

use std::time::Instant;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::account::Account;
use crate::error::{Error, Result};
use crate::model::{Architecture, Decoder, KvCache};
use crate::progress::{self, Observer};

const STAGE: &str = "latency";
/// More tokens or runs than these are mistakes.
const MOST: usize = 1 << 20;

/// How speed is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LatencyOptions {
    /// Tokens of the prompt, read at once.
    pub prompt: usize,
    /// Tokens made after it, one by one.
    pub new_tokens: usize,
    /// Timed runs of every model; one before them is not timed.
    pub runs: usize,
}

impl Default for LatencyOptions {
    /// 5 runs of 128 tokens read and 32 made.
    fn default() -> Self {
        Self { prompt: 128, new_tokens: 32, runs: 5 }
    }
}

/// How fast a model is and what it takes, with what the numbers depend on beside the machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Latency {
    /// Reading the prompt, until the token after it is known.
    pub prefill: Throughput,
    /// Making tokens one by one, with the prompt and all tokens before in the cache.
    pub decode: Throughput,
    /// Bytes of all tensors in memory; those that the model shares with others count. What candle lays out anew of
    /// quantised matrices, for the processor's instructions, does not.
    pub resident_bytes: u64,
    /// Bytes of keys and values that each token adds to the cache.
    pub kv_bytes_per_token: u64,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens made after it.
    pub new_tokens: usize,
    /// The types of the matrices in memory, that of the most numbers first: `f32`, `bf16`, `q4_k+q8_0`.
    pub dtype: String,
    /// Threads of rayon's pool.
    pub threads: usize,
}

/// Tokens per second, over several runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Throughput {
    /// The median of the runs; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// The slowest run.
    pub min: f64,
    /// The fastest run.
    pub max: f64,
    /// How many runs.
    pub runs: usize,
}

/// Measures models side by side: each reads a prompt and makes tokens greedily, once without being timed, then again
/// and again, in turns, so that whatever else the machine does meets all of them alike.
///
/// ```
/// use foldgpt::candle::{DType, Device};
/// use foldgpt::{Checkpoint, LatencyOptions, latency};
///
/// let dense = Checkpoint::open("examples/tiny-stories")?.decoder(DType::F32, &Device::Cpu)?;
/// let cut = dense.with_blocks(&[0, 1, 2, 3, 10, 11])?;
/// let mut options = LatencyOptions::default();
/// (options.prompt, options.new_tokens, options.runs) = (16, 4, 3);
/// let measured = latency(&[&dense, &cut], &options, &mut ())?;
/// assert_eq!(measured[1].decode.runs, 3);
/// assert_eq!(measured[0].kv_bytes_per_token, 2 * measured[1].kv_bytes_per_token);
/// # Ok::<(), foldgpt::Error>(())
/// ```
///
/// # Errors
/// No token to read or to make, no run, more tokens than a model has positions for, a failed computation, or a
/// cancelling observer.
pub fn latency(
    models: &[&Decoder],
    options: &LatencyOptions,
    observer: &mut dyn Observer,
) -> Result<Vec<Latency>> {
    options.check()?;
    models.iter().try_for_each(|model| options.check_model(model.architecture()))?;
    let accounts = models.iter().map(|model| Account::counted(model, options.tokens()));
    let accounts = accounts.collect::<Result<Vec<_>>>()?;
    let mut timed: Vec<Times> = models.iter().map(|_| Times::default()).collect();
    let passes = (1 + options.new_tokens) as u64;
    let total = (options.runs as u64 + 1) * models.len() as u64 * passes;
    progress::stage(STAGE, total, observer, |observer| {
        let mut done = 0;
        let mut tell = || {
            done += 1;
            progress::advance(STAGE, done, total, observer)
        };
        for run in 0..=options.runs {
            // No model is always the one after another.
            let turns = (0..models.len()).map(|turn| (turn + run) % models.len());
            for place in turns {
                let (Some(model), Some(times)) = (models.get(place), timed.get_mut(place)) else { continue };
                let (prefill, decode) = options.run(model, &mut tell)?;
                if run > 0 {
                    times.prefill.push(options.prompt as f64 / prefill);
                    times.decode.push(options.new_tokens as f64 / decode);
                }
            }
        }
        Ok(())
    })?;
    let measured = models.iter().zip(accounts).zip(timed);
    Ok(measured.map(|((model, account), times)| options.latency(model, &account, times)).collect())
}

/// Tokens per second of every run.
#[derive(Default)]
struct Times {
    prefill: Vec<f64>,
    decode: Vec<f64>,
}

impl LatencyOptions {
    /// Fails for what cannot be measured with any model.
    pub(crate) fn check(&self) -> Result<()> {
        let counts = [("prompt", self.prompt), ("new_tokens", self.new_tokens), ("runs", self.runs)];
        match counts.into_iter().find(|(_, count)| !(1..=MOST).contains(count)) {
            Some((name, count)) => Err(Error::argument(name, count, format!("from 1 to {MOST}"))),
            None => Ok(()),
        }
    }

    /// Fails for more tokens than the model has positions for.
    pub(crate) fn check_model(&self, arch: &Architecture) -> Result<()> {
        match arch.position_limit() {
            Some(limit) if self.tokens() > limit => {
                let expected = format!("at most the {limit} positions that the model knows");
                Err(Error::argument("prompt and new tokens together", self.tokens(), expected))
            }
            _ => Ok(()),
        }
    }

    /// Tokens of one run.
    fn tokens(&self) -> usize {
        self.prompt + self.new_tokens
    }

    /// One run: seconds for the prompt, and for all tokens after the first. `tell` is not timed.
    fn run(&self, model: &Decoder, tell: &mut impl FnMut() -> Result<()>) -> Result<(f64, f64)> {
        let vocab = model.architecture().vocab_size.max(1);
        // Which tokens they are makes no difference to the work.
        let prompt: Vec<u32> = (0..self.prompt).map(|place| (7 * place % vocab) as u32).collect();
        let mut cache = model.cache();
        let (mut next, prefill) = step(model, &prompt, &mut cache)?;
        tell()?;
        let mut decode = 0.0;
        for _ in 0..self.new_tokens {
            let (made, seconds) = step(model, &[next], &mut cache)?;
            (next, decode) = (made, decode + seconds);
            tell()?;
        }
        Ok((prefill, decode))
    }

    fn latency(&self, model: &Decoder, account: &Account, times: Times) -> Latency {
        Latency {
            prefill: Throughput::of(times.prefill),
            decode: Throughput::of(times.decode),
            resident_bytes: account.resident_bytes,
            kv_bytes_per_token: account.kv_bytes_per_token,
            prompt: self.prompt,
            new_tokens: self.new_tokens,
            dtype: model.matrix_types(),
            threads: rayon::current_num_threads(),
        }
    }
}

/// Reads `ids`; the likeliest token after them, and the seconds until it was known.
fn step(model: &Decoder, ids: &[u32], cache: &mut KvCache) -> Result<(u32, f64)> {
    let start = Instant::now();
    let ids = Tensor::from_slice(ids, (1, ids.len()), model.device())?;
    let hidden = model.extend(&ids, cache)?; // (1, ids, hidden)
    let logits = model.logits(&hidden.narrow(1, ids.dim(1)? - 1, 1)?)?;
    // Read back: other devices compute while the host goes on.
    let next = logits.flatten_all()?.to_dtype(DType::F32)?.argmax(0)?.to_scalar::<u32>()?;
    // A clock may be too coarse to see it.
    Ok((next, start.elapsed().as_secs_f64().max(1e-9)))
}

impl Throughput {
    fn of(mut runs: Vec<f64>) -> Self {
        runs.sort_by(f64::total_cmp);
        let at = |place: usize| runs.get(place).copied().unwrap_or(f64::NAN);
        let last = runs.len().saturating_sub(1);
        Self {
            median: f64::midpoint(at(last / 2), at(runs.len() / 2)),
            min: at(0),
            max: at(last),
            runs: runs.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_that_of_the_sorted_runs() {
        let of = |runs: &[f64]| {
            let found = Throughput::of(runs.to_vec());
            (found.median, found.min, found.max, found.runs)
        };
        assert_eq!(of(&[3.0, 1.0, 2.0]), (2.0, 1.0, 3.0, 3));
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]), (2.5, 1.0, 4.0, 4));
        assert_eq!(of(&[5.0]), (5.0, 5.0, 5.0, 1));
    }
}
