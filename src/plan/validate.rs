//! What makes a plan consistent.

use std::collections::BTreeSet;

use super::sharing::{Group, Matrices, Sharing};
use super::{Fields, check_version};
use crate::error::{Error, Result};
use crate::importance::BlockScore;
use crate::model::{Part, Projection, Unit};

impl Fields {
    pub(super) fn validate(&self) -> Result<()> {
        check_version(self.version)?;
        self.validate_scores()?;
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
        match &self.sharing {
            Some(sharing) => self.validate_sharing(sharing),
            None => Ok(()),
        }
    }

    fn validate_scores(&self) -> Result<()> {
        let Some(scores) = &self.scores else {
            if self.removed.is_empty() && self.removed_halves.is_empty() {
                return Ok(());
            }
            return Err(Error::Plan("removes blocks, and has no scores that say why".into()));
        };
        let units: Vec<Unit> = scores.blocks.iter().map(BlockScore::unit).collect();
        if units == Unit::blocks(self.depth) || units == Unit::halves(self.depth) {
            return Ok(());
        }
        let reason = format!("{} scores for a model of {} blocks", units.len(), self.depth);
        Err(Error::Plan(format!("{reason}, expected one for each block or half, in order")))
    }

    fn validate_sharing(&self, sharing: &Sharing) -> Result<()> {
        let mut seen = BTreeSet::new();
        for group in &sharing.groups {
            self.validate_group(group)?;
            if let Some(block) = group.blocks.iter().find(|block| !seen.insert(**block)) {
                return Err(Error::Plan(format!("block {block} is in two groups")));
            }
        }
        let strangers: BTreeSet<usize> = sharing.groups.iter().flat_map(Group::strangers).collect();
        if let Some(block) = sharing.ranks.keys().find(|block| !strangers.contains(block)) {
            return Err(Error::Plan(format!("block {block} has residuals, and uses its own matrices")));
        }
        if sharing.own.residual.is_none() && !sharing.ranks.is_empty() {
            return Err(Error::Plan("has ranks, and no residual (`own.residual`) that they are of".into()));
        }
        let named = |block: usize, projection: &Projection| {
            let half = Unit { block, part: projection.half() };
            self.removed_halves.contains(&half)
        };
        for (&block, ranks) in &sharing.ranks {
            if let Some(projection) = ranks.keys().find(|projection| named(block, projection)) {
                let reason = format!("block {block} has a residual for {}, which goes", projection.name());
                return Err(Error::Plan(reason));
            }
        }
        Ok(())
    }

    fn validate_group(&self, group: &Group) -> Result<()> {
        let blocks = &group.blocks;
        let refuse = |reason: &str| Err(Error::Plan(format!("group {blocks:?} {reason}")));
        if let Some(&index) = blocks.iter().find(|&&index| index >= self.depth) {
            return Err(Error::NoSuchBlock { index, depth: self.depth });
        }
        if blocks.len() < 2 || !blocks.iter().zip(blocks.iter().skip(1)).all(|(a, b)| a < b) {
            return refuse("is not two or more blocks, ascending");
        }
        if let Some(index) = blocks.iter().find(|index| self.removed.contains(index)) {
            return refuse(&format!("holds block {index}, which is removed"));
        }
        match group.donor {
            Matrices::Block(donor) if !blocks.contains(&donor) => {
                refuse(&format!("uses the matrices of block {donor}, which is not in it"))
            }
            _ => Ok(()),
        }
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
