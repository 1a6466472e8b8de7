//! Plans, step by step.

use std::collections::BTreeMap;

use super::sharing::{
    Budget, Calibration, Donor, Group, Groups, Matrices, Own, RankTable, Ranks, Residual, ResidualStart,
    ScaleStart, Sharing,
};
use super::target::{Target, unmet};
use super::{Fields, PLAN_VERSION, Plan, choose, free};
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::fold;
use crate::importance::Scores;
use crate::model::{Architecture, Decoder, Part, Projection, StoredTypes};
use crate::progress::Observer;

/// A plan in the making: what goes, what is shared, what stays each block's own.
///
/// ```
/// use foldgpt::importance::{BlockInfluence, Importance};
/// use foldgpt::{Bos, Checkpoint, Plan, Target, Windows, candle::{DType, Device}, fold_on};
/// use foldgpt::plan::{Donor, Groups, Ranks, ResidualStart, ScaleStart};
///
/// let checkpoint = Checkpoint::open("examples/tiny-stories")?;
/// let decoder = checkpoint.decoder(DType::F32, &Device::Cpu)?;
/// let text = "Once there was a kite. ".repeat(40);
/// let windows = Windows::from_text(&checkpoint.tokenizer()?, &text, 64, Some(2), Bos::Auto)?;
/// let scores = BlockInfluence::default().score(&decoder, &windows, &mut ())?;
/// let plan = Plan::builder()
///     .remove(Target::Rate(0.2), &scores)
///     .protect(&[0])
///     .share(Groups::of(2))
///     .donor(Donor::Mean)
///     .scales(ScaleStart::LeastSquares)
///     .residual(Ranks::Uniform(4), ResidualStart::Whitened)
///     .build(decoder.architecture())?;
/// let folded = fold_on(&decoder, &plan, &windows, &mut ())?;
/// assert_eq!(folded.architecture(), &plan.architecture(decoder.architecture())?);
/// # Ok::<(), foldgpt::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
#[must_use = "a builder makes a plan when it is built"]
pub struct PlanBuilder {
    pub(super) target: Option<Target>,
    pub(super) scores: Option<Scores>,
    pub(super) protected: Vec<usize>,
    pub(super) groups: Option<Groups>,
    pub(super) donor: Option<Donor>,
    pub(super) own: Own,
    pub(super) model_sha256: Option<String>,
}

/// How far removal went for a limit.
#[derive(Debug)]
pub(crate) struct Cut {
    /// The blocks that go, or that halves make up: as few as meet the limit, or else as many as may go.
    pub blocks: usize,
    /// The plan that removes them.
    pub plan: Plan,
    /// The least size on the way; above the limit where nothing meets it.
    pub least: u64,
}

impl PlanBuilder {
    /// Removes as many blocks as `target` asks for: the set that the method chose where it chose one of this size, the
    /// first of its order where it removes block after block, else the blocks of least importance. Scores of halves
    /// remove halves, as many as have, as nearly as they can, the parameters of that many blocks.
    pub fn remove(mut self, target: Target, scores: &Scores) -> Self {
        (self.target, self.scores) = (Some(target), Some(scores.clone()));
        self
    }

    /// Removes another number of blocks by the scores that there are; nothing is scored again. There is no plan where
    /// there are no scores.
    pub fn at(mut self, target: Target) -> Self {
        self.target = Some(target);
        self
    }

    /// Blocks that may not be removed.
    pub fn protect(mut self, blocks: &[usize]) -> Self {
        self.protected = blocks.to_vec();
        self
    }

    /// Ties blocks: those of a group use the same matrices. All that follows is for blocks that are tied: there is no
    /// plan that has it and not this.
    pub fn share(mut self, groups: Groups) -> Self {
        self.groups = Some(groups);
        self
    }

    /// Whose matrices a group uses; the mean of its blocks' unless this says otherwise.
    pub fn donor(mut self, donor: Donor) -> Self {
        self.donor = Some(donor);
        self
    }

    /// Ties norms too: the blocks of a group use those of its donor, or their mean.
    pub fn share_norms(mut self) -> Self {
        self.own.norms = false;
        self
    }

    /// Gives every block that uses matrices of others a factor for each output.
    pub fn scales(mut self, start: ScaleStart) -> Self {
        self.own.scales = Some(start);
        self
    }

    /// Gives every block that uses matrices of others a low-rank residual for each projection.
    pub fn residual(mut self, ranks: Ranks, start: ResidualStart) -> Self {
        self.own.residual = Some(Residual { ranks, start });
        self
    }

    /// Notes the hash of the model that the plan is made for, [`Checkpoint::sha256`](crate::Checkpoint::sha256).
    pub fn for_model(mut self, sha256: impl Into<String>) -> Self {
        self.model_sha256 = Some(sha256.into());
        self
    }

    /// Makes the plan, where nothing in it has to be measured.
    ///
    /// # Errors
    /// What has to be measured ([`Groups::Budget`], [`Donor::Best`], [`Ranks::Parameters`]); a target that cannot be
    /// met; scores or blocks of another model; words without effect.
    pub fn build(self, arch: &Architecture) -> Result<Plan> {
        let plan = self.removed(arch)?;
        let Some(asked) = self.groups.clone() else { return Ok(plan) };
        let matrices = |blocks: &[usize]| match self.donor.unwrap_or_default() {
            Donor::First => blocks.first().copied().map(Matrices::Block),
            Donor::Mean => Some(Matrices::Mean),
            Donor::Best => None,
        };
        let unmeasured = |what| {
            let instead = "`measure` builds the plan then, and not `build`";
            Error::Plan(format!("{what} have to be measured on calibration windows: {instead}"))
        };
        let blocks = asked.decide(&plan.parts(arch)?);
        let blocks = blocks.ok_or_else(|| unmeasured("groups for a budget"))?;
        let groups = blocks.into_iter().map(|blocks| {
            let donor = matrices(&blocks).ok_or_else(|| unmeasured("best donors"))?;
            Ok(Group { blocks, donor, cost: None, tried: Vec::new() })
        });
        if matches!(self.own.residual, Some(Residual { ranks: Ranks::Parameters(_), .. })) {
            return Err(unmeasured("ranks for a budget"));
        }
        let groups = groups.collect::<Result<_>>()?;
        plan.share(arch, Sharing { groups, ..self.sharing(asked) })
    }

    /// Makes the plan, measuring on calibration windows what has to be measured, and what every group costs.
    ///
    /// # Errors
    /// As [`build`](Self::build) but for what has to be measured; a budget that no grouping meets, groups whose loss is
    /// not finite by any donor, or a cancelling observer.
    pub fn measure(self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Plan> {
        let (arch, own) = (decoder.architecture(), self.own);
        let plan = self.removed(arch)?;
        let Some(asked) = self.groups.clone() else { return Ok(plan) };
        let groups = match (asked.decide(&plan.parts(arch)?), &asked) {
            (Some(blocks), _) => {
                // Refuses groups that cannot be before anything is measured.
                let unmeasured =
                    |blocks| Group { blocks, donor: Matrices::Mean, cost: None, tried: Vec::new() };
                let unmeasured = blocks.iter().cloned().map(unmeasured).collect();
                plan.with_groups(arch, unmeasured, Own::default())?;
                let asked = (self.donor.unwrap_or_default(), own.norms);
                fold::measured_groups(decoder, &plan, &blocks, asked, windows, observer)?
            }
            (None, Groups::Budget { budget, largest }) => {
                let ties = fold::Ties {
                    budget: *budget,
                    largest: *largest,
                    donor: self.donor.unwrap_or_default(),
                    own,
                };
                ties.choose(decoder, &plan, windows, observer)?
            }
            (None, _) => Vec::new(),
        };
        let measured = Some(Calibration::from(windows));
        let plan = plan.share(arch, Sharing { groups, measured, ..self.sharing(asked) })?;
        match own.residual {
            Some(residual) => plan.with_residual(decoder, residual, windows, observer),
            None => Ok(plan),
        }
    }

    /// What was asked for, with nothing decided.
    fn sharing(&self, asked: Groups) -> Sharing {
        let (groups, ranks, measured) = (Vec::new(), BTreeMap::new(), None);
        Sharing { asked, donor: self.donor.unwrap_or_default(), own: self.own, groups, ranks, measured }
    }

    /// The plan of the removal alone.
    fn removed(&self, arch: &Architecture) -> Result<Plan> {
        if self.target.is_some() && self.scores.is_none() {
            return Err(Error::Plan("has a target (`at`), and no scores to remove by (`remove`)".into()));
        }
        if self.groups.is_none() && (self.donor.is_some() || self.own != Own::default()) {
            return Err(Error::Plan("says what tied blocks use or keep, and ties none (`share`)".into()));
        }
        if let Some(groups) = &self.groups {
            groups.check()?;
            groups.check_depth(arch.depth())?;
        }
        let target = self.target.unwrap_or(Target::Blocks(0));
        let Target::Parameters(budget) = target else { return self.without(arch, target.blocks(arch)?) };
        let cut = self.fewest(arch, usize::MAX, budget as u64, |plan| plan.parameters(arch))?;
        if cut.least <= budget as u64 { Ok(cut.plan) } else { Err(unmet(budget, cut.least as usize)) }
    }

    /// Removes ever more blocks by the scores that there are, until the model is no larger than `limit`: at most `most`
    /// of those that are not protected, and never all. Nothing is shared.
    ///
    /// # Errors
    /// Scores or blocks of another model, and what `size` fails with.
    pub(crate) fn fewest(
        &self,
        arch: &Architecture,
        most: usize,
        limit: u64,
        size: impl Fn(&Plan) -> Result<u64>,
    ) -> Result<Cut> {
        let free = free(arch, &self.protected).min(arch.depth().saturating_sub(1));
        let most = if self.scores.is_some() { most.min(free) } else { 0 };
        let (mut blocks, mut least) = (0, u64::MAX);
        loop {
            // What a number of blocks leaves depends on which they are: halves, or blocks that share.
            let plan = self.without(arch, blocks)?;
            least = least.min(size(&plan)?);
            if least <= limit || blocks == most {
                return Ok(Cut { blocks, plan, least });
            }
            blocks += 1;
        }
    }

    /// The plan that removes so many blocks, or as many halves as make them up.
    fn without(&self, arch: &Architecture, count: usize) -> Result<Plan> {
        let mut protected = self.protected.clone();
        protected.sort_unstable();
        protected.dedup();
        let (removed, removed_halves) = match &self.scores {
            Some(scores) => choose(arch, scores, count, &protected)?,
            None => (Vec::new(), Vec::new()),
        };
        Plan::try_from(Fields {
            version: PLAN_VERSION,
            model_type: arch.model_type.clone(),
            depth: arch.depth(),
            model_sha256: self.model_sha256.clone(),
            target: self.target.unwrap_or(Target::Blocks(0)),
            protected,
            removed,
            removed_halves,
            scores: self.scores.clone(),
            sharing: None,
        })
    }
}

impl Plan {
    /// The parameters of the model that it makes of one of this architecture.
    pub(crate) fn parameters(&self, arch: &Architecture) -> Result<u64> {
        Ok(self.architecture(arch)?.parameter_count() as u64)
    }

    /// What the whole model takes with these groups and all that their blocks keep for themselves, in a budget's unit;
    /// `types` are those of the blocks that stay.
    pub(crate) fn size(
        &self,
        arch: &Architecture,
        budget: Budget,
        (groups, own): (&[Group], Own),
        types: &StoredTypes,
    ) -> Result<usize> {
        let folded = self.with_groups(arch, groups.to_vec(), own)?.architecture(arch)?;
        let spread = match own.residual.map(|residual| residual.ranks) {
            Some(Ranks::Parameters(count)) if !groups.is_empty() => count,
            _ => 0,
        };
        Ok(budget.taken(&folded, spread, types))
    }

    /// The plan with these groups and own parameters in place of those it has; ranks for a budget are left out.
    fn with_groups(&self, arch: &Architecture, groups: Vec<Group>, own: Own) -> Result<Self> {
        let asked = Groups::Explicit(groups.iter().map(|group| group.blocks.clone()).collect());
        let sharing = PlanBuilder { own, ..PlanBuilder::default() }.sharing(asked);
        self.share(arch, Sharing { groups, ..sharing })
    }

    /// The plan with this residual in place of the one it has; groups stay as they were decided, and a budget for which
    /// they were is raised to what the model takes then.
    ///
    /// # Errors
    /// A plan that shares nothing or is for another model, a failed computation, or a cancelling observer.
    pub fn with_residual(
        &self,
        decoder: &Decoder,
        residual: Residual,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        self.check_model(decoder.architecture())?;
        let mut sharing = self.sharing().cloned().ok_or_else(|| Error::Plan("shares nothing".into()))?;
        if let Some(unit) = self.unit_of_rank(decoder.architecture())? {
            residual.ranks.check(unit)?;
        }
        sharing.own.residual = Some(residual);
        sharing.measured = Some(Calibration::from(windows));
        sharing.ranks = match residual.ranks {
            Ranks::Uniform(_) => RankTable::new(),
            Ranks::Parameters(count) => {
                fold::spread_ranks(decoder, self, (count, residual.start), windows, observer)?
            }
        };
        let arch = decoder.architecture();
        if let Groups::Budget { budget, .. } = &mut sharing.asked {
            // The budget is that of the whole model: asked again, it gives the same groups.
            let types = decoder.stored_types().of_blocks(&self.kept());
            *budget = budget.raised_to(self.size(arch, *budget, (&sharing.groups, sharing.own), &types)?);
        }
        self.share(arch, sharing)
    }

    /// The plan that shares so, with uniform ranks where these were asked for.
    fn share(&self, arch: &Architecture, mut sharing: Sharing) -> Result<Self> {
        if let Some(Residual { ranks: ranks @ Ranks::Uniform(rank), .. }) = sharing.own.residual {
            ranks.check(1)?;
            sharing.ranks = self.uniform(arch, &sharing.groups, rank)?;
        }
        let plan = Self::try_from(Fields { sharing: Some(sharing), ..self.0.clone() })?;
        // Refuses groups that this model does not allow.
        plan.architecture(arch)?;
        Ok(plan)
    }

    /// The same rank for every projection of every block that uses matrices of others, as far as its size allows.
    fn uniform(&self, arch: &Architecture, groups: &[Group], rank: usize) -> Result<RankTable> {
        let ranks = |block: usize| -> Result<BTreeMap<Projection, usize>> {
            let shapes = self.shapes(arch, block)?.into_iter();
            Ok(shapes.map(|(at, (output, input))| (at, rank.min(output).min(input))).collect())
        };
        let strangers = groups.iter().flat_map(Group::strangers);
        strangers.map(|block| Ok((block, ranks(block)?))).collect()
    }

    /// Fails where ranks that should be uniform are others: folding goes by the ranks alone.
    pub(super) fn check_uniform_ranks(&self, arch: &Architecture) -> Result<()> {
        let Some(sharing) = self.sharing() else { return Ok(()) };
        let Some(Residual { ranks: Ranks::Uniform(rank), .. }) = sharing.own.residual else { return Ok(()) };
        let expected = self.uniform(arch, &sharing.groups, rank)?;
        let differs = |block: &&usize| sharing.ranks.get(block) != expected.get(block);
        match sharing.ranks.keys().chain(expected.keys()).find(differs) {
            Some(block) => {
                let reason = format!("block {block} has other ranks than those of uniform rank {rank}");
                Err(Error::Plan(reason))
            }
            None => Ok(()),
        }
    }

    /// The parameters of the smallest residual of rank 1 that a block may have; none where no block may have any.
    pub(crate) fn unit_of_rank(&self, arch: &Architecture) -> Result<Option<usize>> {
        let groups = self.sharing().into_iter().flat_map(|sharing| &sharing.groups);
        let shapes = groups.flat_map(Group::strangers).map(|block| self.shapes(arch, block));
        let shapes = shapes.collect::<Result<Vec<_>>>()?.into_iter().flatten();
        Ok(shapes.map(|(_, (output, input))| output + input).min())
    }

    /// The projections that a block that stays will have, with their `(out, in)`.
    fn shapes(&self, arch: &Architecture, block: usize) -> Result<Vec<(Projection, (usize, usize))>> {
        let part = self.part(arch, block)?;
        let there = Projection::ALL.into_iter().filter(|at| part == Part::Whole || part == at.half());
        Ok(there.filter_map(|at| Some((at, arch.projection_shape(at)?))).collect())
    }
}
