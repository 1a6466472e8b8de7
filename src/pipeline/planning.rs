//! From scores to a plan, by what a recipe asks for.

use serde::{Deserialize, Serialize};

use super::inputs::Inputs;
use super::recipe::{Goal, MixOptions, Recipe, Total};
use super::report::Tried;
use crate::error::{Error, Result};
use crate::eval::perplexity;
use crate::importance::{Scores, losses_without};
use crate::mix::{Candidate, Mix, measure_mixes, pareto_front};
use crate::model::{Decoder, Unit};
use crate::plan::{Plan, PlanBuilder, Target};
use crate::progress::Observer;

/// A plan, and the mixes that it was chosen from, where there were any.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Planned {
    pub plan: Plan,
    pub mixes: Vec<Tried>,
    /// The dense model's loss on the windows that the mixes were compared on.
    pub dense_loss: Option<f64>,
}

impl From<Plan> for Planned {
    fn from(plan: Plan) -> Self {
        Self { plan, mixes: Vec::new(), dense_loss: None }
    }
}

impl Inputs<'_> {
    /// What goes and what is shared; without the dense model, where that follows from the scores alone.
    pub(super) fn decide(
        &self,
        dense: Option<&Decoder>,
        scores: Option<&Scores>,
        observer: &mut dyn Observer,
    ) -> Result<Planned> {
        let mut planned = match (self.recipe.mix, dense, scores) {
            (Some(mix), Some(dense), Some(scores)) => self.mixed(&mix, dense, scores, observer)?,
            _ => self.removed_and_shared(dense, scores, observer)?.into(),
        };
        planned.plan = planned.plan.for_model(&self.model_sha256);
        let plan = &planned.plan;
        let groups = plan.sharing().map_or(0, |sharing| sharing.groups.len());
        tracing::debug!(removed = ?plan.removed(), groups, mixes = planned.mixes.len(), "planned");
        Ok(planned)
    }

    fn removed_and_shared(
        &self,
        dense: Option<&Decoder>,
        scores: Option<&Scores>,
        observer: &mut dyn Observer,
    ) -> Result<Plan> {
        let builder = match (self.recipe.target, dense, scores) {
            (Some(Goal::NllIncrease(limit)), Some(dense), Some(scores)) => {
                let scores = self.within(limit, dense, scores, observer)?;
                let count = scores.chosen.as_ref().map_or(0, Vec::len);
                self.recipe.builder(Target::Blocks(count), Some(&scores))
            }
            (Some(goal), _, scores) => self.recipe.builder(self.target(goal, scores)?, scores),
            (None, ..) => self.recipe.builder(Target::Blocks(0), None),
        };
        match dense {
            Some(dense) => builder.measure(dense, &self.calibration, observer),
            None => builder.build(self.checkpoint.architecture()),
        }
    }

    /// A goal as a plan knows it, where blocks go by these scores.
    pub(super) fn target(&self, goal: Goal, scores: Option<&Scores>) -> Result<Target> {
        Ok(match goal {
            Goal::Rate(rate) => Target::Rate(rate),
            Goal::Parameters(most) => Target::Parameters(most),
            Goal::Bytes(most) => Target::Blocks(self.fewest_for_bytes(most, scores)?),
            Goal::Blocks(_) | Goal::NllIncrease(_) => Target::Blocks(self.remove),
        })
    }

    /// The scores with the longest beginning of their order chosen whose removal costs at most `limit`.
    fn within(
        &self,
        limit: f64,
        dense: &Decoder,
        scores: &Scores,
        observer: &mut dyn Observer,
    ) -> Result<Scores> {
        let protected = |unit: &Unit| self.recipe.protect.contains(&unit.block);
        let ascending = scores.ascending().into_iter().filter(|unit| !protected(unit));
        let by_scores = || ascending.map(|unit| unit.block).take(self.remove).collect();
        let order: Vec<usize> = scores.chosen.clone().unwrap_or_else(by_scores);
        let sets: Vec<Vec<usize>> =
            (0..=order.len()).map(|count| order.iter().take(count).copied().collect()).collect();
        let losses = losses_without(dense, &self.calibration, &sets, observer)?;
        let base = losses.first().copied().unwrap_or(f64::NAN);
        let count = losses.iter().rposition(|loss| *loss <= base + limit).unwrap_or(0);
        if count == 0 {
            let least = losses.get(1).map_or(f64::NAN, |loss| loss - base);
            let reason = format!("is {limit}, and the first block to go costs {least:.4} nats per token");
            return Err(Error::recipe("target.nll-increase", reason));
        }
        tracing::debug!(blocks = count, limit, loss = losses.get(count), "as many go as the loss allows");
        Ok(Scores { chosen: sets.into_iter().nth(count), ..scores.clone() })
    }

    /// Removal first, then sharing, then rank: once, or in several proportions.
    fn mixed(
        &self,
        options: &MixOptions,
        dense: &Decoder,
        scores: &Scores,
        observer: &mut dyn Observer,
    ) -> Result<Planned> {
        let mix = self.mix(options);
        if !options.search {
            return Ok(mix.plan(dense, scores, &self.calibration, observer)?.into());
        }
        let (removed, shares) = self.proportions(options);
        let tried =
            measure_mixes(dense, scores, &mix.variants(&removed, &shares), &self.calibration, observer)?;
        let front = pareto_front(tried.clone());
        let mut mixes: Vec<Tried> = tried.iter().map(Tried::from).collect();
        for mix in &mut mixes {
            mix.beaten = !front.iter().any(|best| (best.parameters, best.loss) == (mix.parameters, mix.loss));
        }
        mixes.sort_by(|a, b| a.parameters.cmp(&b.parameters).then(a.loss.total_cmp(&b.loss)));
        let dense_loss = Some(perplexity(dense, &self.calibration, observer)?.mean_nll);
        let none = || Error::recipe("mix.total", "no mix meets it");
        Ok(Planned { plan: front.into_iter().next_back().ok_or_else(none)?.plan, mixes, dense_loss })
    }

    /// The mix where nothing is searched.
    pub(super) fn mix(&self, options: &MixOptions) -> Mix {
        let mut mix = Mix::new(self.total(options));
        (mix.removed, mix.residual_share, mix.donor) = (self.remove, options.residual_share, options.donor);
        mix.protected.clone_from(&self.recipe.protect);
        mix
    }

    /// The parameters that a mix may have.
    pub(super) fn total(&self, options: &MixOptions) -> usize {
        match options.total {
            Total::Parameters(most) => most,
            Total::Share(share) => (share * self.checkpoint.architecture().parameter_count() as f64) as usize,
        }
    }

    /// The most blocks to remove and the shares for residuals that are tried.
    pub(super) fn proportions(&self, options: &MixOptions) -> (Vec<usize>, Vec<f64>) {
        let most = self.remove;
        let mut removed = if options.search { vec![0, most.div_ceil(2), most] } else { vec![most] };
        removed.dedup();
        (removed, options.residual_shares())
    }

    /// The blocks of the dense model.
    pub(super) fn depth(&self) -> usize {
        self.checkpoint.architecture().depth()
    }
}

impl Recipe {
    /// The plan in the making: also where only its size is asked for.
    pub(super) fn builder(&self, target: Target, scores: Option<&Scores>) -> PlanBuilder {
        let mut builder = Plan::builder().protect(&self.protect);
        if let Some(scores) = scores {
            builder = builder.remove(target, scores);
        }
        let Some(share) = &self.share else { return builder };
        builder = builder.share(share.groups.clone()).donor(share.donor);
        if !share.own.norms {
            builder = builder.share_norms();
        }
        if let Some(start) = share.own.scales {
            builder = builder.scales(start);
        }
        match share.own.residual {
            Some(residual) => builder.residual(residual.ranks, residual.start),
            None => builder,
        }
    }
}

impl From<&Candidate> for Tried {
    fn from(candidate: &Candidate) -> Self {
        Self {
            parameters: candidate.parameters,
            loss: candidate.loss,
            removed: candidate.plan.removed().len(),
            residual_share: candidate.mix.residual_share,
            beaten: false,
        }
    }
}
