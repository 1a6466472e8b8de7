//! The architecture that a plan makes, from the plan alone.

use std::collections::BTreeMap;

use super::Plan;
use super::sharing::{Matrices, lost};
use crate::error::{Error, Result};
use crate::model::{AdapterShape, Architecture, FoldMap, FoldedBlock, Part, Projection, Unit};

/// Whose matrices a block uses: depths with the same ones share them.
#[derive(PartialEq, Clone, Copy)]
enum Holder {
    /// Those that this depth of the original model uses, without the half that the second names.
    Kept(usize, Part),
    /// New ones, made for this group.
    Made(usize),
}

/// Whose norms a block uses.
#[derive(PartialEq, Clone, Copy)]
enum Norms {
    /// Those of this depth of the original model.
    Kept(usize),
    /// New ones, made for this group.
    Made(usize),
}

/// What becomes of one block that stays; `weights` and `own_norms` are not yet right, and `residual_of` is a depth of the
/// original model: that of a residual which the block keeps, its own or another's.
struct Folded {
    matrices: Holder,
    norms: Norms,
    block: FoldedBlock,
}

impl Folded {
    /// Whether it keeps the residual that the other keeps, and shares its matrices.
    fn has_residual_of(&self, other: &Self, projection: Projection) -> bool {
        let kept = |folded: &Self| folded.block.adapters.get(&projection).and_then(|own| own.residual_of);
        kept(self).is_some() && kept(self) == kept(other) && self.matrices == other.matrices
    }
}

impl Plan {
    /// The architecture of the folded model, from that of the original one.
    ///
    /// # Errors
    /// A plan for another model, or one that removes a half which that model does not have.
    pub fn architecture(&self, arch: &Architecture) -> Result<Architecture> {
        self.check_model(arch)?;
        self.check_uniform_ranks(arch)?;
        let kept = self.kept();
        let blocks = kept.iter().map(|&block| self.folded(arch, block)).collect::<Result<Vec<_>>>()?;
        let map = blocks.iter().enumerate().map(|(depth, folded)| {
            let first = blocks.iter().position(|other| other.matrices == folded.matrices).unwrap_or(depth);
            // What holds its matrices holds its norms, if they are the same.
            let lends = first < depth && blocks.get(first).is_some_and(|holder| holder.norms == folded.norms);
            let mut block = FoldedBlock { weights: first, own_norms: !lends, ..folded.block.clone() };
            for (&projection, adapter) in &mut block.adapters {
                let mut earlier = blocks.iter().take(depth);
                adapter.residual_of = earlier.position(|other| folded.has_residual_of(other, projection));
            }
            block
        });
        let folded = Architecture { fold: FoldMap::new(map.collect()), ..arch.with_blocks(&kept)? };
        folded.fold.check(&folded)?;
        Ok(folded)
    }

    /// The blocks that stay, ascending, with the halves that each will have.
    pub(crate) fn parts(&self, arch: &Architecture) -> Result<Vec<(usize, Part)>> {
        self.kept().into_iter().map(|block| Ok((block, self.part(arch, block)?))).collect()
    }

    /// The halves that a block that stays will have.
    pub(super) fn part(&self, arch: &Architecture, block: usize) -> Result<Part> {
        let has = arch.fold.block(block).part;
        match (has, lost(block, self.removed_halves())) {
            (has, None) => Ok(has),
            (Part::Whole, Some(Unit { part: Part::Attention, .. })) => Ok(Part::Mlp),
            (Part::Whole, Some(_)) => Ok(Part::Attention),
            (part, Some(unit)) => {
                let left = Unit { block, part };
                Err(Error::Plan(format!("half {unit} should go, and of that block there is only {left}")))
            }
        }
    }

    fn folded(&self, arch: &Architecture, block: usize) -> Result<Folded> {
        let part = self.part(arch, block)?;
        let mut folded = FoldedBlock { part, ..arch.fold.block(block) };
        folded.adapters.retain(|projection, _| part == Part::Whole || part == projection.half());
        let norms = |block: usize| {
            let source = arch.fold.block(block);
            Norms::Kept(if source.own_norms { block } else { source.weights })
        };
        let Some((place, sharing, group)) = self.sharing().and_then(|sharing| {
            let place = sharing.groups.iter().position(|group| group.blocks.contains(&block))?;
            Some((place, sharing, sharing.groups.get(place)?))
        }) else {
            for adapter in folded.adapters.values_mut().filter(|adapter| adapter.rank > 0) {
                adapter.residual_of.get_or_insert(block);
            }
            let matrices = Holder::Kept(folded.weights, part);
            return Ok(Folded { matrices, norms: norms(block), block: folded });
        };
        for &member in &group.blocks {
            if self.part(arch, member)? != part {
                let reason = "holds blocks that do not have the same halves";
                return Err(Error::Plan(format!("group {:?} {reason}", group.blocks)));
            }
        }
        let (matrices, given) = match group.donor {
            Matrices::Block(donor) => {
                let source = arch.fold.block(donor);
                let bare = |projection: &Projection| part != Part::Whole && part != projection.half();
                // A donor that was adapted itself gives matrices into which that is merged.
                let bare = source.adapters.keys().all(bare);
                let matrices = if bare { Holder::Kept(source.weights, part) } else { Holder::Made(place) };
                (matrices, norms(donor))
            }
            Matrices::Mean => (Holder::Made(place), Norms::Made(place)),
        };
        let adapted = group.strangers().any(|stranger| stranger == block);
        folded.adapters = if adapted { self.adapters(arch, block, part) } else { BTreeMap::new() };
        let norms = if sharing.own.norms { norms(block) } else { given };
        Ok(Folded { matrices, norms, block: folded })
    }

    /// The adapters of a block that uses matrices of others.
    fn adapters(&self, arch: &Architecture, block: usize, part: Part) -> BTreeMap<Projection, AdapterShape> {
        let Some(sharing) = self.sharing() else { return BTreeMap::new() };
        let ranks = sharing.ranks.get(&block);
        let there = Projection::ALL.into_iter().filter(|&projection| {
            arch.projection_shape(projection).is_some() && (part == Part::Whole || part == projection.half())
        });
        let adapters = there.map(|projection| {
            let rank = ranks.and_then(|ranks| ranks.get(&projection)).copied().unwrap_or_default();
            (projection, AdapterShape { scale: sharing.own.scales.is_some(), rank, residual_of: None })
        });
        adapters.filter(|(_, shape)| !shape.is_empty()).collect()
    }
}
