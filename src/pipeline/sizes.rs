//! What a compressed model will take, as far as that is known before it is made.

use serde::{Deserialize, Serialize};

use super::inputs::Inputs;
use super::recipe::Goal;
use crate::checkpoint::Format;
use crate::error::{Error, Result};
use crate::importance::Scores;
use crate::plan::{Budget, Donor, Groups, Own, Plan, Ranks, Target};

/// What a model takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Sizes {
    /// Blocks that run.
    pub blocks: usize,
    /// Parameters; what depths share counts once.
    pub parameters: usize,
    /// Bytes of all tensors as they are stored.
    pub stored_bytes: u64,
    /// What was taken for granted; empty where nothing was.
    pub assumed: Vec<String>,
}

impl Inputs<'_> {
    /// The dense model's sizes.
    pub(super) fn dense_sizes(&self) -> Sizes {
        let arch = self.checkpoint.architecture();
        Sizes {
            blocks: arch.depth(),
            parameters: arch.parameter_count(),
            stored_bytes: self.checkpoint.tensor_bytes(),
            assumed: Vec::new(),
        }
    }

    /// The sizes of what a plan makes.
    pub(super) fn planned_sizes(&self, plan: &Plan, format: Format) -> Result<Sizes> {
        let arch = plan.architecture(self.checkpoint.architecture())?;
        Ok(Sizes {
            blocks: arch.depth(),
            parameters: arch.parameter_count(),
            stored_bytes: self.stored_bytes(plan, format)?,
            assumed: Vec::new(),
        })
    }

    /// The bytes that are saved of what a plan makes, after the recipe's healing.
    fn stored_bytes(&self, plan: &Plan, format: Format) -> Result<u64> {
        let groups = || self.recipe.heal.iter().flat_map(|heal| &heal.groups);
        let moved = |param, depth| groups().any(|group| group.params.moves(param, depth));
        self.checkpoint.stored_bytes_after(plan, format, moved)
    }

    /// The sizes where nothing has been scored yet; `None` where they depend on what will be measured.
    pub(super) fn assumed_sizes(&self) -> Result<Option<Sizes>> {
        if let Some(Goal::NllIncrease(_)) = self.recipe.target {
            return Ok(None);
        }
        let arch = self.checkpoint.architecture();
        let (mut bare, mut assumed) = (self.recipe.clone(), Vec::new());
        let mut extra = 0;
        let mut budget = self.recipe.mix.map(|mix| Budget::Parameters(self.total(&mix)));
        if let Some(share) = &mut bare.share {
            if share.donor == Donor::Best {
                share.donor = Donor::Mean;
                assumed.push("the best donors are means".to_string());
            }
            let ranks = share.own.residual.map(|residual| residual.ranks);
            if let Some(Ranks::Parameters(count)) = ranks {
                (extra, share.own) = (count, Own { residual: None, ..share.own });
                assumed.push("all parameters for ranks are used".to_string());
            }
            if let Groups::Budget { budget: asked, .. } = share.groups {
                budget = Some(asked);
                bare.share = None;
            }
        }
        // Blocks of groups that are named stay: where they go, there is no plan.
        let named = match self.recipe.share.as_ref().map(|share| &share.groups) {
            Some(Groups::Explicit(groups)) => groups.concat(),
            _ => Vec::new(),
        };
        let importance = (0..arch.depth()).map(|block| f64::from(u8::from(named.contains(&block))));
        let scores = Scores::new("assumed", &self.calibration, importance.collect())?;
        assumed.extend(self.assumed_of_removal());
        let some = (self.remove > 0).then_some(&scores);
        let builder = match (self.recipe.mix, self.recipe.target) {
            (Some(mix), _) => self.mix(&mix).removal(arch, &scores)?,
            (None, Some(goal)) => bare.builder(self.target(goal, some)?, some),
            (None, None) => bare.builder(Target::Blocks(0), None),
        };
        if self.recipe.mix.is_some_and(|mix| mix.search) && self.remove > 0 {
            assumed.push("the search takes the mix that removes the most".to_string());
        }
        let plan = builder.build(arch)?;
        let mut sizes = self.planned_sizes(&plan, self.expected_format())?;
        sizes.parameters = sizes.parameters.saturating_add(extra);
        let size = self.checkpoint.stored_types().narrowest().size_in_bytes() as u64;
        let more = size.saturating_mul(extra as u64);
        sizes.stored_bytes = sizes.stored_bytes.saturating_add(more);
        sizes.assumed = assumed;
        if let Some(budget) = budget {
            let compact = self.checkpoint.stored_bytes(&plan, Format::Compact)?.saturating_add(more);
            self.fit(budget, compact, &mut sizes);
        }
        Ok(Some(sizes))
    }

    /// What is taken for granted of the blocks that go, where the sizes depend on which these are.
    fn assumed_of_removal(&self) -> Vec<String> {
        let mut assumed = Vec::new();
        let (freed, _) = self.checkpoint.freed_bytes(self.expected_format());
        if self.remove > 0 && freed.first() != freed.last() {
            assumed.push("blocks of the end go, and blocks differ in size".to_string());
        }
        let groups = self.recipe.share.as_ref().map(|share| &share.groups).filter(|_| self.remove > 0);
        if let Some(Groups::Consecutive { within: Some((first, last)), .. }) = groups {
            let which = format!("how many of blocks {first} to {last} share depends on which");
            assumed.push(format!("blocks of the end go, and {which}"));
        }
        if self.recipe.gates.as_ref().is_some_and(|gates| gates.halves) {
            assumed.push("whole blocks go, and not their halves".to_string());
        }
        assumed
    }

    /// Sharing that is measured goes on until the budget is met; so far the model takes `compact` bytes where what is
    /// shared is stored once.
    fn fit(&self, budget: Budget, compact: u64, sizes: &mut Sizes) {
        // Sharing leaves about the same mixture of types.
        let share = match budget {
            Budget::Parameters(most) => most as f64 / sizes.parameters as f64,
            Budget::Bytes(most) => most as f64 / compact as f64,
        };
        if share >= 1.0 {
            return;
        }
        let of = |size: u64| (size as f64 * share).round() as u64;
        sizes.parameters = match budget {
            Budget::Parameters(most) => most,
            Budget::Bytes(_) => of(sizes.parameters as u64) as usize,
        };
        sizes.assumed.push("the budget is used up".to_string());
        match (self.expected_format(), budget) {
            (Format::Compact, Budget::Bytes(most)) => sizes.stored_bytes = most,
            (Format::Compact, Budget::Parameters(_)) => sizes.stored_bytes = of(compact),
            (Format::Expanded, _) => {
                sizes.assumed.push("no scale or residual is merged into a matrix".to_string());
            }
        }
    }

    /// The fewest blocks whose removal leaves at most so many bytes, in the recipe's format.
    pub(super) fn fewest_for_bytes(&self, most: u64, scores: Option<&Scores>) -> Result<usize> {
        let arch = self.checkpoint.architecture();
        let mut builder = Plan::builder().protect(&self.recipe.protect);
        if let Some(scores) = scores {
            builder = builder.remove(Target::Blocks(0), scores);
        }
        let format = self.expected_format();
        let bytes = |plan: &Plan| self.stored_bytes(plan, format);
        let cut = builder.fewest(arch, self.recipe.free(arch.depth()), most, bytes)?;
        if cut.least <= most {
            return Ok(cut.blocks);
        }
        Err(Error::recipe("target.bytes", format!("is {most}, expected at least {}", cut.least)))
    }
}
