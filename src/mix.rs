//! Meeting a total by removal, sharing and rank together, and finding the mix that costs the least.

use serde::{Deserialize, Serialize};

use crate::data::Windows;
use crate::error::{Error, Result};
use crate::eval::perplexity;
use crate::fold::{Ties, fold_on};
use crate::importance::Scores;
use crate::model::{Architecture, Decoder};
use crate::plan::{
    Budget, Donor, Groups, Own, Plan, PlanBuilder, Ranks, Residual, ResidualStart, ScaleStart, Target,
};
use crate::progress::Observer;

/// How a number of parameters is met: removal first, then sharing, then rank.
///
/// 1. Blocks are removed by their scores: [`removed`](Self::removed) of them, or fewer where fewer do.
/// 2. Where that is not enough, the neighbours whose tying costs the least loss are tied, each block keeping its
///    norms and getting scales, until the model is smaller than the budget by the share that is kept for residuals, or
///    all are tied.
/// 3. What is then left of the budget becomes rank, each unit where it removes the most error (whitened).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Mix {
    /// The parameters that the whole model may have.
    pub parameters: usize,
    /// At most this many blocks are removed, and fewer where fewer may go.
    pub removed: usize,
    /// Blocks that are not removed; they may be tied.
    #[serde(default)]
    pub protected: Vec<usize>,
    /// The share of the budget that is kept for residuals where blocks are tied: from 0 to below 1.
    pub residual_share: f64,
    /// Whose matrices tied blocks use.
    pub donor: Donor,
}

/// A mix that was tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Candidate {
    /// The mix.
    pub mix: Mix,
    /// What it amounts to.
    pub plan: Plan,
    /// Parameters of the folded model.
    pub parameters: usize,
    /// Its loss on the calibration windows without any training, in nats per predicted token.
    pub loss: f64,
}

impl Mix {
    /// No more than `parameters`, with no block removed, 5 % of the budget for residuals, and means as donors.
    #[must_use]
    pub fn new(parameters: usize) -> Self {
        Self { parameters, removed: 0, protected: Vec::new(), residual_share: 0.05, donor: Donor::default() }
    }

    /// The plan of this mix for a decoder whose blocks have these scores.
    ///
    /// # Errors
    /// A budget that cannot be met, or a cancelling observer.
    pub fn plan(
        &self,
        decoder: &Decoder,
        scores: &Scores,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Plan> {
        if !(0.0..1.0).contains(&self.residual_share) {
            return Err(Error::argument("share for residuals", self.residual_share, "from 0 to below 1"));
        }
        let arch = decoder.architecture();
        let builder = self.removal(arch, scores)?;
        let cut = builder.clone().build(arch)?;
        if cut.parameters(arch)? <= self.parameters as u64 {
            return Ok(cut);
        }
        let builder = builder
            .share(Groups::until(Budget::Parameters(self.tied_to(decoder, &cut)?)))
            .donor(self.donor)
            .scales(ScaleStart::LeastSquares);
        let tied = builder.measure(decoder, windows, observer)?;
        let left = self.parameters.saturating_sub(tied.architecture(arch)?.parameter_count());
        if self.residual_share <= 0.0 || tied.unit_of_rank(arch)?.is_none_or(|unit| left < unit) {
            return Ok(tied);
        }
        let residual = Residual { ranks: Ranks::Parameters(left), start: ResidualStart::Whitened };
        tied.with_residual(decoder, residual, windows, observer)
    }

    /// The parameters down to which blocks are tied: the total less the share for residuals, or what ties can reach, where
    /// that is more and still meets the total.
    fn tied_to(&self, decoder: &Decoder, cut: &Plan) -> Result<usize> {
        let without_rank = (self.parameters as f64 * (1.0 - self.residual_share)) as usize;
        let own = Own { scales: Some(ScaleStart::LeastSquares), ..Own::default() };
        let budget = Budget::Parameters(without_rank);
        let ties = Ties { budget, largest: None, donor: self.donor, own };
        let types = decoder.stored_types().of_blocks(&cut.kept());
        let least = ties.least(decoder.architecture(), cut, &types)?;
        Ok(without_rank.max(least).min(self.parameters))
    }

    /// Removal alone: of as few blocks as meet the total, else of as many as may go.
    pub(crate) fn removal(&self, arch: &Architecture, scores: &Scores) -> Result<PlanBuilder> {
        let builder = Plan::builder().protect(&self.protected).remove(Target::Blocks(0), scores);
        let parameters = |plan: &Plan| plan.parameters(arch);
        let cut = builder.fewest(arch, self.removed, self.parameters as u64, parameters)?;
        Ok(builder.at(Target::Blocks(cut.blocks)))
    }

    /// Plans this mix, folds by it, and measures the loss on the same windows.
    ///
    /// # Errors
    /// As [`plan`](Self::plan), and a loss that is not finite.
    pub fn measure(
        &self,
        decoder: &Decoder,
        scores: &Scores,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Candidate> {
        let plan = self.plan(decoder, scores, windows, observer)?;
        self.measure_plan(plan, decoder, windows, observer)
    }

    /// Folds by the plan of this mix, and measures the loss.
    fn measure_plan(
        &self,
        plan: Plan,
        decoder: &Decoder,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Candidate> {
        let folded = fold_on(decoder, &plan, windows, observer)?;
        let loss = perplexity(&folded, windows, observer)?.mean_nll;
        Ok(Candidate { mix: self.clone(), plan, parameters: folded.parameter_count(), loss })
    }

    /// This mix with every number of removed blocks and every share for residuals of these.
    #[must_use]
    pub fn variants(&self, removed: &[usize], residual_shares: &[f64]) -> Vec<Self> {
        let of = |removed: usize| {
            residual_shares.iter().map(move |&residual_share| Self {
                removed,
                residual_share,
                ..self.clone()
            })
        };
        removed.iter().flat_map(|&removed| of(removed)).collect()
    }
}

/// Measures every mix, and returns those that no other beats in both parameters and loss (the Pareto front), the
/// smallest model first. A mix whose budget cannot be met is passed over, and so is one whose loss is not finite, and one
/// whose plan is that of an earlier one.
///
/// # Errors
/// No mix that can be met, a failed computation, or a cancelling observer.
pub fn search_mixes(
    decoder: &Decoder,
    scores: &Scores,
    mixes: &[Mix],
    windows: &Windows,
    observer: &mut dyn Observer,
) -> Result<Vec<Candidate>> {
    Ok(pareto_front(measure_mixes(decoder, scores, mixes, windows, observer)?))
}

/// Measures every mix whose budget can be met by a finite loss, in their order, and of those that come to the same plan
/// the first.
pub(crate) fn measure_mixes(
    decoder: &Decoder,
    scores: &Scores,
    mixes: &[Mix],
    windows: &Windows,
    observer: &mut dyn Observer,
) -> Result<Vec<Candidate>> {
    let mut candidates: Vec<Candidate> = Vec::with_capacity(mixes.len());
    let mut passed_over = None;
    for mix in mixes {
        let planned = mix.plan(decoder, scores, windows, observer);
        let measured = planned.and_then(|plan| {
            if candidates.iter().any(|known| known.plan == plan) {
                return Ok(None);
            }
            mix.measure_plan(plan, decoder, windows, observer).map(Some)
        });
        match measured {
            Ok(candidate) => candidates.extend(candidate),
            Err(error @ (Error::Budget { .. } | Error::NotFinite { .. })) => {
                tracing::warn!(%error, "a mix was passed over");
                passed_over = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    if candidates.is_empty() {
        return Err(passed_over.unwrap_or_else(|| Error::argument("mixes", 0, "at least one")));
    }
    Ok(candidates)
}

/// The candidates that no other beats in both parameters and loss, the smallest first.
#[must_use]
pub fn pareto_front(mut candidates: Vec<Candidate>) -> Vec<Candidate> {
    candidates.sort_by(|a, b| a.parameters.cmp(&b.parameters).then(a.loss.total_cmp(&b.loss)));
    let mut best = f64::INFINITY;
    candidates.retain(|candidate| {
        let better = candidate.loss < best;
        best = best.min(candidate.loss);
        better
    });
    candidates
}
