//! How much each block matters: one file a method, behind one trait.

mod angular;
mod basis;
mod block_influence;
mod coupling;
mod finalists;
mod footprint;
mod frontier;
mod gate_functions;
mod gate_state;
mod gate_walk;
mod gates;
mod gates_with_coupling;
mod greedy;
mod macro_influence;
mod memo;
mod method;
mod perplexity;
mod random;
mod removals;
mod residence;
mod search;
mod select;
mod statistics;
mod surrogate;
pub(crate) mod sweep;
mod taylor;

pub use angular::AngularDistance;
pub use block_influence::BlockInfluence;
pub use coupling::Coupling;
pub use gates::{GateKind, Gates, TrainedGates};
pub use gates_with_coupling::GatesWithCoupling;
pub use greedy::GreedyPerplexity;
pub use macro_influence::MacroInfluence;
pub use method::{Method, MethodOptions};
pub use perplexity::PerplexityIncrease;
pub use random::Random;
pub use residence::Residence;
pub use statistics::spearman;
pub use taylor::Taylor;

use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::StreamedDecoder;
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::{Decoder, Part, Unit};
use crate::progress::{self, Observer};
pub(crate) use footprint::{Footprint, with_overhead, without_overhead};
use memo::Memo;
use removals::Removals;

/// A method that scores the blocks of a decoder on calibration windows.
///
/// ```
/// use foldgpt::importance::{Importance, Scores};
/// use foldgpt::{Decoder, Observer, Result, Windows};
///
/// /// Says that later blocks matter more.
/// struct Depth;
///
/// impl Importance for Depth {
///     fn method(&self) -> &'static str {
///         "depth"
///     }
///     fn score(&self, decoder: &Decoder, windows: &Windows, _: &mut dyn Observer) -> Result<Scores> {
///         Scores::new(self.method(), windows, (0..decoder.depth()).map(|index| index as f64).collect())
///     }
/// }
/// ```
pub trait Importance {
    /// The method's name, as the command line and results spell it.
    fn method(&self) -> &'static str;

    /// Scores every block; the least important go first. Weights are read, never written.
    ///
    /// # Errors
    /// A failed computation, a score that is not finite, or a cancelling observer.
    fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores>;

    /// As [`score`](Self::score), of a model whose blocks are read from disk one at a time: the same scores, bit for
    /// bit. Block Influence, angular distance, perplexity and gates can do it.
    ///
    /// # Errors
    /// As [`score`](Self::score), what reading fails with, and [`Error::Argument`] for a method that needs the whole
    /// model in memory, as methods do that say nothing else.
    fn score_streamed(
        &self,
        model: &StreamedDecoder<'_>,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Scores> {
        let _ = (model, windows, observer);
        let expected = format!("a method that reads block after block: {}", Method::streaming());
        Err(Error::argument("method", self.method(), expected))
    }
}

/// What a method found, on what, and what it cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Scores {
    /// The method's name.
    pub method: String,
    /// The method's options, as far as it has any.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub options: Value,
    /// Number of calibration windows.
    pub windows: usize,
    /// Tokens in each window.
    pub seq_len: usize,
    /// Whether each window began with the begin-of-text token.
    pub bos: bool,
    /// Whether special tokens that the text writes out were read as any other characters.
    #[serde(default)]
    pub split_special_tokens: bool,
    /// SHA-256 of the calibration text.
    pub text_sha256: String,
    /// One score a block (or a half, where halves were scored), first to last.
    pub blocks: Vec<BlockScore>,
    /// The blocks that the method itself would remove, where it chooses sets and not only scores; in the order of
    /// removal where the method has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen: Option<Vec<usize>>,
    /// Spearman's rank correlation of the scores from the first and from the second half of the windows; absent
    /// with a single window, and where scores do not come from the text. Below 0.8 the ranking is more chance than
    /// measurement. Methods that remove block after block are compared in their first round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stability: Option<f64>,
    /// Pairwise coupling, where the method measures it; its diagonal is what each block costs alone. Pairs are measured
    /// on the first of the search's windows, the diagonal on all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coupling: Option<Vec<Vec<f64>>>,
    /// Every gate after every step of training, where the method trains gates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trajectory: Vec<Vec<f64>>,
    /// Seconds that scoring took.
    #[serde(default)]
    pub seconds: f64,
    /// Blocks computed on a window, forwards; a way back counts as two, and as three where the gradients of weights are
    /// computed too.
    #[serde(default)]
    pub block_runs: f64,
}

impl BlockScore {
    /// What was scored.
    #[must_use]
    pub fn unit(&self) -> Unit {
        Unit { block: self.index, part: self.part }
    }
}

/// Rank correlation of two halves of the text from which on a ranking counts as stable.
const STABLE: f64 = 0.8;

/// A block's score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BlockScore {
    /// The block's index in the scored model, from 0.
    pub index: usize,
    /// Which part of the block, where halves were scored.
    #[serde(default, skip_serializing_if = "Part::is_whole")]
    pub part: Part,
    /// How much it matters, in the method's own unit; higher matters more.
    pub importance: f64,
}

impl Scores {
    /// Scores by `method` on `windows`: `importance[i]` is block i's.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for a score that is NaN or infinite.
    pub fn new(method: &str, windows: &Windows, importance: Vec<f64>) -> Result<Self> {
        let units = Unit::blocks(importance.len());
        Self::of_units(method, windows, &units, importance)
    }

    /// Scores of any units: `importance[i]` is that of `units[i]`.
    ///
    /// # Errors
    /// As [`new`](Self::new), and as many scores as units are needed.
    pub fn of_units(method: &str, windows: &Windows, units: &[Unit], importance: Vec<f64>) -> Result<Self> {
        if importance.len() != units.len() {
            let expected = format!("one for each of {} units", units.len());
            return Err(Error::argument("scores", importance.len(), expected));
        }
        let blocks = units.iter().zip(importance).map(|(unit, importance)| {
            if importance.is_finite() {
                return Ok(BlockScore { index: unit.block, part: unit.part, importance });
            }
            Err(Error::NotFinite { what: format!("{method} of block {unit}"), value: importance })
        });
        Ok(Self {
            method: method.into(),
            options: Value::Null,
            windows: windows.len(),
            seq_len: windows.seq_len(),
            bos: windows.bos(),
            split_special_tokens: windows.split_special_tokens(),
            text_sha256: windows.text_sha256().into(),
            blocks: blocks.collect::<Result<_>>()?,
            chosen: None,
            coupling: None,
            trajectory: Vec::new(),
            stability: None,
            seconds: 0.0,
            block_runs: 0.0,
        })
    }

    /// Scores that are means over windows: `by_window[w][i]` is block i's on window w. Their stability is that of
    /// the means over the two halves.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_windows(method: &str, windows: &Windows, by_window: &[Vec<f64>]) -> Result<Self> {
        let (first, second) = by_window.split_at(by_window.len() / 2);
        let mut scores = Self::new(method, windows, statistics::means(by_window))?;
        if !first.is_empty() {
            scores = scores.with_stability(spearman(&statistics::means(first), &statistics::means(second)));
        }
        Ok(scores)
    }

    /// The scores with the options of the method that made them.
    ///
    /// # Errors
    /// Options that JSON cannot hold.
    pub fn with_options(mut self, options: &impl Serialize) -> Result<Self> {
        self.options = serde_json::to_value(options).map_err(|error| Error::Plan(error.to_string()))?;
        Ok(self)
    }

    /// The scores with the rank correlation of those of two halves of the windows; below 0.8 this warns.
    #[must_use]
    pub fn with_stability(mut self, stability: f64) -> Self {
        if stability < STABLE {
            tracing::warn!(
                method = self.method,
                stability,
                "the two halves of the text rank the blocks differently"
            );
        }
        self.stability = Some(stability);
        self
    }

    /// Whether the two halves of the text rank the blocks alike: a stability of at least 0.8. Unknown where there is
    /// none.
    #[must_use]
    pub fn is_stable(&self) -> Option<bool> {
        self.stability.map(|stability| stability >= STABLE)
    }

    /// The score of every block, first to last.
    #[must_use]
    pub fn importance(&self) -> Vec<f64> {
        self.blocks.iter().map(|block| block.importance).collect()
    }

    /// The scored units from the least important to the most; of equals the later one comes first.
    #[must_use]
    pub fn ascending(&self) -> Vec<Unit> {
        let mut order: Vec<&BlockScore> = self.blocks.iter().rev().collect();
        order.sort_by(|a, b| a.importance.total_cmp(&b.importance));
        order.into_iter().map(BlockScore::unit).collect()
    }

    /// The blocks that the method itself would remove where `count` are to go: the set that it chose, or the first ones of
    /// the order in which it removes them.
    pub(crate) fn chosen_of(&self, count: usize) -> Option<&[usize]> {
        let chosen = self.chosen.as_deref()?;
        let in_order = self.method.parse().is_ok_and(Method::is_greedy);
        if chosen.len() == count || in_order { chosen.get(..count) } else { None }
    }

    /// What it cost: the time since `start`, and block runs.
    fn costing(mut self, start: Instant, block_runs: f64) -> Self {
        self.seconds = start.elapsed().as_secs_f64();
        self.block_runs = block_runs;
        self
    }

    /// And what the values cost that an earlier run kept.
    fn costing_before(mut self, memo: Option<&Memo>) -> Self {
        let before = memo.map(Memo::used).unwrap_or_default();
        self.seconds += before.seconds;
        // Shares of what was measured together do not add up to whole numbers exactly.
        self.block_runs = ((self.block_runs + before.block_runs) * 1e6).round() / 1e6;
        self
    }
}

/// The mean loss of the decoder without each set of blocks, in nats per predicted token. What the sets have in
/// common before their first difference is computed once.
///
/// # Errors
/// [`Error::NoSuchBlock`] for an index beyond the depth, a failed computation, or a cancelling observer.
pub fn losses_without(
    decoder: &Decoder,
    windows: &Windows,
    sets: &[Vec<usize>],
    observer: &mut dyn Observer,
) -> Result<Vec<f64>> {
    sets.iter().try_for_each(|set| check_blocks(set, decoder.depth()))?;
    let units = whole_blocks(decoder);
    let mut removals = Removals::new(decoder, windows, &units)?;
    let sets: Vec<_> = sets.iter().map(|set| removals.set(set)).collect();
    let total = (windows.len() * sets.len()) as u64;
    progress::counted("losses", total, observer, |report| removals.mean_losses(&sets, report))
}

/// Fails where a block that a method is told to keep does not exist.
fn check_blocks(blocks: &[usize], depth: usize) -> Result<()> {
    match blocks.iter().find(|&&index| index >= depth) {
        Some(&index) => Err(Error::NoSuchBlock { index, depth }),
        None => Ok(()),
    }
}

/// Fails where fewer blocks may go than should.
fn check_removal(remove: usize, free: usize) -> Result<()> {
    if remove <= free {
        return Ok(());
    }
    Err(Error::argument("blocks to remove", remove, format!("at most the {free} that may go")))
}

/// Fails for units that are not all blocks or all halves: a chain of others is another model.
fn check_units(units: &[Unit], depth: usize) -> Result<()> {
    if units == Unit::blocks(depth) || units == Unit::halves(depth) {
        return Ok(());
    }
    let expected = format!("the {depth} blocks or their {} halves, first to last", 2 * depth);
    Err(Error::argument("units", format!("{} others", units.len()), expected))
}

/// The index of whole-block units is that of their block.
fn whole_blocks(decoder: &Decoder) -> Vec<Unit> {
    Unit::blocks(decoder.depth())
}
