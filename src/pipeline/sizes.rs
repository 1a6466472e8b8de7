//! What a compressed model will take, as far as that is known before it is made.

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::inputs::Inputs;
use super::recipe::Goal;
use crate::account::{Account, Held};
use crate::checkpoint::Format;
use crate::error::Result;
use crate::importance::Scores;
use crate::model::Architecture;
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
    pub(super) fn planned_sizes(&self, plan: &Plan) -> Result<Sizes> {
        let arch = plan.architecture(self.checkpoint.architecture())?;
        Ok(Sizes {
            blocks: arch.depth(),
            parameters: arch.parameter_count(),
            stored_bytes: self.stored_bytes(plan, &arch),
            assumed: Vec::new(),
        })
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
        if self.remove > 0 && self.unequal() {
            assumed.push("blocks of the end go, and blocks differ in size".to_string());
        }
        if self.recipe.gates.as_ref().is_some_and(|gates| gates.halves) {
            assumed.push("whole blocks go, and not their halves".to_string());
        }
        let target = self.recipe.target.map_or(Target::Blocks(self.remove), |goal| self.target(goal));
        let scores = (self.remove > 0).then_some(&scores);
        let plan = bare.builder(target, scores).build(arch)?;
        let mut sizes = self.planned_sizes(&plan)?;
        sizes.parameters += extra;
        sizes.stored_bytes += (extra * self.checkpoint.narrowest_dtype().size_in_bytes()) as u64;
        sizes.assumed = assumed;
        if let Some(budget) = budget {
            self.fit(budget, &mut sizes);
        }
        Ok(Some(sizes))
    }

    /// Sharing that is measured goes on until the budget is met.
    fn fit(&self, budget: Budget, sizes: &mut Sizes) {
        let (parameters, per) = (sizes.parameters, self.checkpoint.narrowest_dtype().size_in_bytes() as u64);
        sizes.parameters = match budget {
            Budget::Parameters(most) => parameters.min(most),
            Budget::Bytes(most) => parameters.min((most / per) as usize),
        };
        if sizes.parameters == parameters {
            return;
        }
        sizes.assumed.push("the budget is used up".to_string());
        match self.recipe.format {
            Format::Compact => sizes.stored_bytes = sizes.parameters as u64 * per,
            Format::Expanded => {
                sizes.assumed.push("no scale or residual is merged into a matrix".to_string());
            }
        }
    }

    /// Whether blocks differ in size.
    fn unequal(&self) -> bool {
        let bytes = self.checkpoint.block_bytes();
        bytes.iter().any(|size| Some(size) != bytes.first())
    }

    /// Bytes of all tensors of what a plan makes, in the recipe's format.
    fn stored_bytes(&self, plan: &Plan, arch: &Architecture) -> u64 {
        let narrow = self.checkpoint.narrowest_dtype();
        if plan.sharing().is_none() && plan.removed_halves().is_empty() {
            let bytes = self.checkpoint.block_bytes();
            let removed = plan.removed().iter().filter_map(|&block| bytes.get(block));
            return self.checkpoint.tensor_bytes() - removed.sum::<u64>();
        }
        let held = |arch: &Architecture| {
            let held = Held { stored: narrow, resident: narrow, context: 1 };
            Account::planned(arch, held).stored_bytes
        };
        match self.recipe.format {
            Format::Compact => held(arch),
            // What is merged is written in f32.
            Format::Expanded => held(&arch.expanded()) + widened(arch, narrow),
        }
    }
}

/// The bytes that merged matrices take more in f32.
fn widened(arch: &Architecture, narrow: DType) -> u64 {
    let more = DType::F32.size_in_bytes().saturating_sub(narrow.size_in_bytes());
    let merged = (0..arch.depth()).flat_map(|depth| arch.fold.block(depth).adapters.into_keys());
    let sizes = merged.filter_map(|projection| arch.projection_shape(projection));
    sizes.map(|(output, input)| (output * input * more) as u64).sum()
}
