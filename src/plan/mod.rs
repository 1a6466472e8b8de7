//! What is to be done to a model, as data.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::importance::{BlockScore, Scores};
use crate::model::{Architecture, Part, Unit};

/// The version of the format that this crate writes, and the newest that it reads.
pub const PLAN_VERSION: u32 = 1;

/// How much is to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Target {
    /// This many blocks.
    Blocks(usize),
    /// This share of the blocks, from 0 to below 1; the number is rounded to the nearest, halves up.
    Rate(f64),
    /// As few blocks as leave at most this many parameters in the whole model.
    Parameters(usize),
}

impl Target {
    /// The number of blocks that have to go.
    ///
    /// # Errors
    /// A target that no number of blocks meets.
    pub fn blocks(self, arch: &Architecture) -> Result<usize> {
        let depth = arch.depth();
        match self {
            Self::Blocks(count) if count < depth => Ok(count),
            Self::Blocks(count) => {
                Err(Error::argument("blocks to remove", count, format!("fewer than the {depth} there are")))
            }
            Self::Rate(rate) if (0.0..1.0).contains(&rate) => {
                // The product of 0.15 and 30 lies a hair below 4.5; the tolerance lets it round as it reads.
                let count = (rate * depth as f64 + 0.5 + 1e-9).floor() as usize;
                if count < depth {
                    return Ok(count);
                }
                let expected = format!("a rate that leaves one of the {depth} blocks");
                Err(Error::argument("removal rate", rate, expected))
            }
            Self::Rate(rate) => Err(Error::argument("removal rate", rate, "at least 0 and below 1")),
            Self::Parameters(budget) => {
                let total = parameter_count(arch.params().iter().map(|(_, shape)| shape.as_slice()));
                let block = parameter_count(arch.block_params().iter().map(|(_, shape)| shape.as_slice()));
                let count = total.saturating_sub(budget).div_ceil(block.max(1));
                if count < depth {
                    return Ok(count);
                }
                let least = total - (depth - 1) * block;
                Err(Error::argument(
                    "parameter budget",
                    budget,
                    format!("at least {least}, with one block left"),
                ))
            }
        }
    }
}

/// Which blocks go and which stay, why, and from what this was decided.
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
    scores: Scores,
}

impl Plan {
    /// Removes as many blocks as `target` asks for; blocks of `protected` stay. Where the method chose a set of this
    /// size itself, that set goes, otherwise the blocks of least importance. Scores of halves remove halves, as many as
    /// have, as nearly as they can, the parameters of that many blocks.
    ///
    /// # Errors
    /// A target that cannot be met, scores of another model, or a protected block that does not exist.
    pub fn new(arch: &Architecture, scores: &Scores, target: Target, protected: &[usize]) -> Result<Self> {
        let count = target.blocks(arch)?;
        let units = match scores.chosen.as_deref().filter(|chosen| suits(chosen, count, protected)) {
            Some(chosen) => chosen.iter().copied().map(Unit::whole).collect(),
            None => lowest(arch, scores, count, protected)?,
        };
        let (removed, removed_halves) = merged(&units);
        let mut protected = protected.to_vec();
        protected.sort_unstable();
        protected.dedup();
        Self::try_from(Fields {
            version: PLAN_VERSION,
            model_type: arch.model_type.clone(),
            depth: arch.depth(),
            model_sha256: None,
            target,
            protected,
            removed,
            removed_halves,
            scores: scores.clone(),
        })
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

    /// The scores that decided.
    #[must_use]
    pub fn scores(&self) -> &Scores {
        &self.0.scores
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

impl Fields {
    fn validate(&self) -> Result<()> {
        check_version(self.version)?;
        let units: Vec<Unit> = self.scores.blocks.iter().map(BlockScore::unit).collect();
        if units != Unit::blocks(self.depth) && units != Unit::halves(self.depth) {
            let reason = format!("{} scores for a model of {} blocks", units.len(), self.depth);
            return Err(Error::Plan(format!("{reason}, expected one for each block or half, in order")));
        }
        self.validate_halves()?;
        let ascending = self.removed.iter().zip(self.removed.iter().skip(1)).all(|(a, b)| a < b);
        if !ascending {
            return Err(Error::Plan(format!("removed blocks {:?} are not ascending", self.removed)));
        }
        if let Some(&index) = self.removed.iter().chain(&self.protected).find(|&&index| index >= self.depth) {
            return Err(Error::NoSuchBlock { index, depth: self.depth });
        }
        if let Some(index) = self.removed.iter().find(|index| self.protected.contains(index)) {
            return Err(Error::Plan(format!("block {index} is protected and removed")));
        }
        if self.removed.len() >= self.depth {
            return Err(Error::Plan("no block would be left".into()));
        }
        Ok(())
    }

    fn validate_halves(&self) -> Result<()> {
        let halves = &self.removed_halves;
        let ascending = halves.iter().zip(halves.iter().skip(1)).all(|(a, b)| a.block < b.block);
        let sound = |unit: &Unit| {
            unit.part != Part::Whole
                && !self.removed.contains(&unit.block)
                && !self.protected.contains(&unit.block)
        };
        if let Some(unit) = halves.iter().find(|unit| unit.block >= self.depth) {
            return Err(Error::NoSuchBlock { index: unit.block, depth: self.depth });
        }
        if ascending && halves.iter().all(sound) {
            return Ok(());
        }
        let names: Vec<String> = halves.iter().map(ToString::to_string).collect();
        let reason = "expected one half each of blocks that stay and are not protected, ascending";
        Err(Error::Plan(format!("removed halves {names:?}, {reason}")))
    }
}

impl TryFrom<Fields> for Plan {
    type Error = Error;

    fn try_from(fields: Fields) -> Result<Self> {
        fields.validate()?;
        Ok(Self(fields))
    }
}

fn check_version(version: u32) -> Result<()> {
    if (1..=PLAN_VERSION).contains(&version) {
        return Ok(());
    }
    Err(Error::Plan(format!("version {version} is not known, expected at most {PLAN_VERSION}")))
}

fn suits(chosen: &[usize], count: usize, protected: &[usize]) -> bool {
    chosen.len() == count && chosen.iter().all(|index| !protected.contains(index))
}

/// The units of least importance that have the parameters of `count` blocks.
fn lowest(arch: &Architecture, scores: &Scores, count: usize, protected: &[usize]) -> Result<Vec<Unit>> {
    let mut left = (count * arch.parameters_of(Part::Whole)) as f64;
    let mut chosen = Vec::new();
    for unit in scores.ascending().into_iter().filter(|unit| !protected.contains(&unit.block)) {
        let cost = arch.parameters_of(unit.part) as f64;
        if left < cost / 2.0 {
            return Ok(chosen);
        }
        left -= cost;
        chosen.push(unit);
    }
    if left <= 0.0 {
        return Ok(chosen);
    }
    let (depth, free) = (arch.depth(), arch.depth() - protected.len().min(arch.depth()));
    Err(Error::Plan(format!("{count} of {depth} blocks should go, and only {free} may")))
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

fn parameter_count<'a>(shapes: impl Iterator<Item = &'a [usize]>) -> usize {
    shapes.map(|shape| shape.iter().product::<usize>()).sum()
}
