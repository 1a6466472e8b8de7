//! What is to be done to a model, as data.

mod builder;
mod shape;
mod sharing;
mod target;
mod validate;

pub use builder::PlanBuilder;
pub use sharing::{
    Budget, Calibration, Donor, Group, Groups, Matrices, Own, RankTable, Ranks, Residual, ResidualStart,
    ScaleStart, Sharing,
};
pub use target::Target;
pub(crate) use target::fewest;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::importance::Scores;
use crate::model::{Architecture, Part, Unit};

/// The version of the format that this crate writes, and the newest that it reads.
pub const PLAN_VERSION: u32 = 2;

/// Which blocks go, which stay and which of those share their matrices, why, and from what this was decided.
///
/// A plan is validated once, when it is made or read; a plan that exists is consistent.
///
/// ```
/// use foldgpt::importance::{BlockInfluence, Importance};
/// use foldgpt::{Bos, Checkpoint, Plan, Target, Windows, candle::{DType, Device}};
///
/// let checkpoint = Checkpoint::open("examples/tiny-stories")?;
/// let decoder = checkpoint.decoder(DType::F32, &Device::Cpu)?;
/// let text = "Once there was a kite. ".repeat(40);
/// let windows = Windows::from_text(&checkpoint.tokenizer()?, &text, 64, Some(2), Bos::Auto)?;
/// let scores = BlockInfluence::default().score(&decoder, &windows, &mut ())?;
/// let first_and_last = [0, decoder.depth() - 1];
/// let plan = Plan::new(decoder.architecture(), &scores, Target::Rate(0.25), &first_and_last)?;
/// assert_eq!(plan.removed().len(), (decoder.depth() as f64 * 0.25).round() as usize);
/// # Ok::<(), foldgpt::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Fields")]
pub struct Plan(Fields);

/// A plan that nobody has checked yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    version: u32,
    model_type: String,
    depth: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model_sha256: Option<String>,
    target: Target,
    protected: Vec<usize>,
    removed: Vec<usize>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    removed_halves: Vec<Unit>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scores: Option<Scores>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sharing: Option<Sharing>,
}

impl Plan {
    /// A plan that does nothing yet.
    pub fn builder() -> PlanBuilder {
        PlanBuilder::default()
    }

    /// The plan in the making again, with all that was asked for: another rate needs no scores but those it has.
    pub fn to_builder(&self) -> PlanBuilder {
        let sharing = self.0.sharing.as_ref();
        PlanBuilder {
            target: self.0.scores.as_ref().map(|_| self.0.target),
            scores: self.0.scores.clone(),
            protected: self.0.protected.clone(),
            groups: sharing.map(|sharing| sharing.asked.clone()),
            donor: sharing.map(|sharing| sharing.donor),
            own: sharing.map(|sharing| sharing.own).unwrap_or_default(),
            model_sha256: self.0.model_sha256.clone(),
        }
    }

    /// A plan that removes blocks and shares nothing: [`PlanBuilder::remove`] and [`PlanBuilder::protect`].
    ///
    /// # Errors
    /// A target that cannot be met, scores of another model, or a protected block that does not exist.
    pub fn new(arch: &Architecture, scores: &Scores, target: Target, protected: &[usize]) -> Result<Self> {
        Self::builder().remove(target, scores).protect(protected).build(arch)
    }

    /// The plan with the hash of the model that it was made for, [`Checkpoint::sha256`](crate::Checkpoint::sha256).
    #[must_use]
    pub fn for_model(mut self, sha256: impl Into<String>) -> Self {
        self.0.model_sha256 = Some(sha256.into());
        self
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// Text that is no plan, a plan of a newer version, or one that contradicts itself.
    pub fn from_json(json: &str) -> Result<Self> {
        // Read alone before the rest: a newer plan may have other fields, and its version is the better message.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } =
            serde_json::from_str(json).map_err(|error| Error::Plan(error.to_string()))?;
        check_version(version)?;
        serde_json::from_str(json).map_err(|error| Error::Plan(error.to_string()))
    }

    /// The plan as JSON text.
    ///
    /// # Errors
    /// None in practice: every plan can be written.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|error| Error::Plan(error.to_string()))
    }

    /// The attentions and MLPs that go from blocks that stay, ascending.
    #[must_use]
    pub fn removed_halves(&self) -> &[Unit] {
        &self.0.removed_halves
    }

    /// All that goes: blocks, then halves.
    #[must_use]
    pub fn units(&self) -> Vec<Unit> {
        self.0.removed.iter().copied().map(Unit::whole).chain(self.0.removed_halves.iter().copied()).collect()
    }

    /// The blocks that go, ascending.
    #[must_use]
    pub fn removed(&self) -> &[usize] {
        &self.0.removed
    }

    /// The blocks that stay, whole or in part, ascending.
    #[must_use]
    pub fn kept(&self) -> Vec<usize> {
        (0..self.0.depth).filter(|index| !self.0.removed.contains(index)).collect()
    }

    /// The number of blocks of the model that the plan is for.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.0.depth
    }

    /// The SHA-256 of the weights of the model that the plan is for, where it is known.
    #[must_use]
    pub fn model_sha256(&self) -> Option<&str> {
        self.0.model_sha256.as_deref()
    }

    /// What was asked for.
    #[must_use]
    pub fn target(&self) -> Target {
        self.0.target
    }

    /// The scores that decided what goes; a plan that removes nothing may have none.
    #[must_use]
    pub fn scores(&self) -> Option<&Scores> {
        self.0.scores.as_ref()
    }

    /// What is shared, where anything is.
    #[must_use]
    pub fn sharing(&self) -> Option<&Sharing> {
        self.0.sharing.as_ref()
    }

    /// The index among the blocks that stay of a block of the original model.
    pub(crate) fn depth_of(&self, block: usize) -> Result<usize> {
        let missing = || Error::Plan(format!("block {block} does not stay"));
        self.kept().iter().position(|&kept| kept == block).ok_or_else(missing)
    }

    /// Whether the plan is for a model of this architecture.
    pub(crate) fn check_model(&self, arch: &Architecture) -> Result<()> {
        if (self.0.depth, &self.0.model_type) == (arch.depth(), &arch.model_type) {
            return Ok(());
        }
        let (wanted, found) = ((&self.0.model_type, self.0.depth), (&arch.model_type, arch.depth()));
        let reason = format!(
            "is for a {} of {} blocks, the model is a {} of {}",
            wanted.0, wanted.1, found.0, found.1
        );
        Err(Error::Plan(reason))
    }
}

impl TryFrom<Fields> for Plan {
    type Error = Error;

    fn try_from(fields: Fields) -> Result<Self> {
        fields.validate()?;
        // What was read from an older version is written as this one.
        Ok(Self(Fields { version: PLAN_VERSION, ..fields }))
    }
}

fn check_version(version: u32) -> Result<()> {
    if (1..=PLAN_VERSION).contains(&version) {
        return Ok(());
    }
    Err(Error::Plan(format!("version {version} is not known, expected at most {PLAN_VERSION}")))
}

/// The blocks that go, and the halves of others.
fn choose(
    arch: &Architecture,
    scores: &Scores,
    count: usize,
    protected: &[usize],
) -> Result<(Vec<usize>, Vec<Unit>)> {
    let may_go = |chosen: &&[usize]| chosen.iter().all(|index| !protected.contains(index));
    let units: Vec<Unit> = match scores.chosen_of(count).filter(may_go) {
        Some(chosen) => chosen.iter().copied().map(Unit::whole).collect(),
        None => lowest(arch, scores, count, protected)?,
    };
    Ok(merged(&units))
}

/// The units of least importance that have the parameters of `count` blocks.
fn lowest(arch: &Architecture, scores: &Scores, count: usize, protected: &[usize]) -> Result<Vec<Unit>> {
    let (depth, free) = (arch.depth(), free(arch, protected));
    if count > free {
        return Err(Error::Plan(format!("{count} of {depth} blocks should go, and only {free} may")));
    }
    let mut left = (count * arch.parameters_of(Part::Whole)) as f64;
    let mut chosen = Vec::new();
    for unit in scores.ascending().into_iter().filter(|unit| !protected.contains(&unit.block)) {
        let has = arch.fold.block(unit.block).part;
        // A half that went before cannot go again.
        if ![unit.part, has].contains(&Part::Whole) && unit.part != has {
            continue;
        }
        let cost = arch.parameters_of(unit.part) as f64;
        if left < cost / 2.0 {
            break;
        }
        left -= cost;
        // What is left of a block is the block.
        chosen.push(if unit.part == has { Unit::whole(unit.block) } else { unit });
    }
    Ok(chosen)
}

/// How many blocks may go.
fn free(arch: &Architecture, protected: &[usize]) -> usize {
    (0..arch.depth()).filter(|block| !protected.contains(block)).count()
}

/// Blocks, and halves of other blocks, both ascending: a block that loses both halves goes.
fn merged(units: &[Unit]) -> (Vec<usize>, Vec<Unit>) {
    let has = |block, part| units.contains(&Unit { block, part });
    let mut blocks: Vec<usize> = units.iter().map(|unit| unit.block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let whole =
        |block: usize| has(block, Part::Whole) || (has(block, Part::Attention) && has(block, Part::Mlp));
    let mut halves: Vec<Unit> =
        units.iter().copied().filter(|unit| unit.part != Part::Whole && !whole(unit.block)).collect();
    halves.sort_unstable();
    (blocks.into_iter().filter(|&block| whole(block)).collect(), halves)
}
