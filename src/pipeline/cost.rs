//! How much work a stage is: blocks computed on a window, and heads.

use super::inputs::Inputs;
use super::recipe::Goal;
use crate::eval::{Choice, Item};
use crate::heal::Budget;
use crate::importance::Method;
use crate::plan::{Donor, Groups};

/// Work in passes of one window through one block, forwards, and through the head.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Cost {
    pub blocks: f64,
    pub heads: f64,
    /// Seconds that were asked for, where the work is told by time.
    pub seconds: f64,
}

impl Cost {
    fn of(blocks: f64, heads: f64) -> Self {
        Self { blocks, heads, seconds: 0.0 }
    }

    fn times(self, count: f64) -> Self {
        Self { blocks: self.blocks * count, heads: self.heads * count, seconds: self.seconds * count }
    }

    pub(super) fn and(self, other: Self) -> Self {
        Self {
            blocks: self.blocks + other.blocks,
            heads: self.heads + other.heads,
            seconds: self.seconds + other.seconds,
        }
    }
}

/// A token that is made alone takes about as long as so many that are read together: all matrices come from memory for
/// it.
const ALONE: f64 = 8.0;

/// One window without each block of `depth` apart: what comes before the block is computed once.
fn singles(depth: f64) -> Cost {
    Cost::of(depth * (depth + 1.0) / 2.0, depth)
}

impl Inputs<'_> {
    /// Scoring, by formula; of the search after gates and coupling, its whole budget.
    pub(super) fn scoring_cost(&self) -> Cost {
        let (depth, windows) = (self.depth() as f64, self.calibration.len() as f64);
        let options = self.method_options();
        let gates = |gates: &crate::importance::Gates| {
            let walks = gates.steps as f64 * gates.batch as f64;
            Cost::of(3.0 * walks * depth, walks)
        };
        match self.recipe.method {
            Method::BlockInfluence | Method::Angular => Cost::of(windows * depth, 0.0),
            Method::Perplexity => singles(depth).times(windows),
            Method::GreedyPerplexity | Method::MacroInfluence => {
                let round = |gone: usize| singles(depth - gone as f64);
                let rounds = (0..self.remove.max(1)).map(round);
                rounds.fold(Cost::of(depth, 0.0), Cost::and).times(windows)
            }
            Method::Taylor => Cost::of(4.0 * windows * depth, windows),
            Method::Random => Cost::default(),
            Method::Gates => gates(&options.gates),
            Method::Coupling => {
                let searched = (options.coupling.search_windows as f64).min(windows);
                let pairs = depth * (depth - 1.0) / 2.0;
                let coupling = Cost::of(pairs * depth / 3.0, pairs).times(searched);
                let all = singles(depth).times(windows);
                let known = coupling.and(all);
                if self.remove == 0 {
                    return known;
                }
                let budget = options.coupling.budget_block_runs;
                known.and(gates(&options.coupling.gates)).and(Cost::of(budget, budget / depth))
            }
        }
    }

    /// How often scoring reads all blocks, where they are on disk.
    pub(super) fn scoring_passes(&self) -> usize {
        match self.recipe.method {
            // Forth and back, and once to tell the model from others.
            Method::Gates => self.method_options().gates.steps.saturating_mul(2).saturating_add(1),
            _ => 1,
        }
    }

    /// Planning: every neighbour tied at every step, at half the depth each, where ties are measured.
    pub(super) fn planning_cost(&self) -> Cost {
        let (depth, windows) = (self.depth() as f64, self.calibration.len() as f64);
        let whole = Cost::of(depth, 1.0).times(windows);
        if let Some(Goal::NllIncrease(_)) = self.recipe.target {
            return singles(depth).times(windows);
        }
        let candidates = |donor| if donor == Donor::Best { 3.0 } else { 1.0 };
        let ties = |donor, left: f64| whole.times(left * left / 4.0 * candidates(donor));
        if let Some(mix) = &self.recipe.mix {
            let (removed, shares) = self.proportions(mix);
            let of = |gone: &usize| ties(mix.donor, depth - *gone as f64).and(whole.times(4.0));
            return removed.iter().map(of).fold(Cost::default(), Cost::and).times(shares.len() as f64);
        }
        let left = self.most_left() as f64;
        match &self.recipe.share {
            Some(share) if matches!(share.groups, Groups::Budget { .. }) => ties(share.donor, left),
            Some(share) if share.donor == Donor::Best => whole.times(left),
            // Every group once, and what was decided once more, at half the depth each.
            Some(_) => whole.times(left / 2.0),
            None => Cost::default(),
        }
    }

    /// Folding: where starts are fitted, every block runs as it was and as it is.
    pub(super) fn folding_cost(&self) -> Cost {
        let fitted = self.recipe.mix.is_some()
            || self.recipe.share.as_ref().is_some_and(|share| share.own.needs_windows());
        let runs = if fitted { 2 * self.depth() * self.calibration.len() } else { 0 };
        Cost::of(runs as f64, 0.0)
    }

    /// Healing: the student forward, forward again and back; the teacher forward; held-out windows.
    pub(super) fn healing_cost(&self) -> Cost {
        let (Some(heal), Some((train, choosing))) = (self.heal(), &self.healing) else {
            return Cost::default();
        };
        if let Budget::Minutes(minutes) = heal.budget {
            return Cost { seconds: minutes * 60.0, ..Cost::default() };
        }
        let steps = heal.steps(train.seq_len()).unwrap_or_default() as f64;
        let (depth, left) = (self.depth() as f64, self.most_left() as f64);
        let teacher = if heal.losses.need_teacher() { Cost::of(depth, 1.0) } else { Cost::default() };
        let step = Cost::of(4.0 * left, 3.0).and(teacher).times(heal.batch as f64);
        let evaluations = (steps / heal.evaluate_every as f64).ceil() + 1.0;
        step.times(steps).and(Cost::of(left, 1.0).times(evaluations * choosing.len() as f64))
    }

    /// The samples of a model of so many blocks: a token at a time, each of which reads all weights as a window of some
    /// ten tokens does.
    pub(super) fn sampling_cost(&self, blocks: usize) -> Cost {
        let options = &self.recipe.samples;
        let prompts = if options.prompts.is_empty() { 2 } else { options.prompts.len() };
        let tokens = 10.0 * options.tokens as f64 * prompts as f64 / self.evaluation.seq_len() as f64;
        Cost::of(blocks as f64, 1.0).times(tokens)
    }

    /// One evaluation of a model of so many blocks; of a text, four characters are taken for a token.
    pub(super) fn evaluation_cost(&self, blocks: usize) -> Cost {
        let characters: usize = self.tasks.iter().flat_map(|task| &task.items).map(characters).sum();
        let tasks = characters as f64 / 4.0 / self.evaluation.seq_len() as f64;
        Cost::of(blocks as f64, 1.0).times(self.evaluation.len() as f64 + tasks)
    }

    /// Measuring the speed of two models of so many blocks together; nothing where it is not asked for.
    pub(super) fn latency_cost(&self, blocks: usize) -> Cost {
        let Some(options) = self.recipe.latency else { return Cost::default() };
        let windows = |tokens: f64| tokens / self.evaluation.seq_len() as f64;
        let prompt = Cost::of(blocks as f64, 0.0).times(windows(options.prompt as f64));
        let made = Cost::of(blocks as f64, 2.0).times(windows(ALONE * options.new_tokens as f64));
        prompt.and(made).times((options.runs + 1) as f64)
    }
}

/// The characters of an item that are read: what its choices begin with alike, once.
fn characters(item: &Item) -> usize {
    let first = item.choices.first().map_or("", |choice| choice.context.as_str());
    let alike =
        |choice: &Choice| first.bytes().zip(choice.context.bytes()).take_while(|(a, b)| a == b).count();
    let once = item.choices.iter().map(alike).min().unwrap_or_default();
    let rest = item.choices.iter().map(|choice| choice.context.len() - once + choice.continuation.len());
    once + rest.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_choices_begin_with_alike_is_read_once() {
        let choice = |(context, continuation): (&str, &str)| Choice {
            context: context.into(),
            continuation: continuation.into(),
            length: continuation.len(),
        };
        let item = |choices: [(&str, &str); 2]| Item {
            choices: choices.map(choice).into(),
            gold: 0,
            by_length: false,
        };
        assert_eq!(characters(&item([("Is it?", " Yes"), ("Is it?", " No")])), 6 + 4 + 3);
        assert_eq!(
            characters(&item([("He met Anna", " ran"), ("He met Ben", " ran")])),
            7 + (4 + 4) + (3 + 4)
        );
    }
}
