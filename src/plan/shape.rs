//! The architecture that a plan makes, from the plan alone.

use std::collections::BTreeMap;

use super::Plan;
use super::sharing::{Matrices, lost};
use crate::error::Result;
use crate::model::{AdapterShape, Architecture, FoldMap, FoldedBlock, Part, Projection};

/// Whose matrices a block uses: depths with the same ones share them.
#[derive(PartialEq, Clone, Copy)]
enum Holder {
    /// Those that this depth of the original model uses, without the half that the second names.
    Kept(usize, Part),
    /// New ones, made for this group.
    Made(usize),
}

impl Plan {
    /// The architecture of the folded model, from that of the original one.
    ///
    /// # Errors
    /// A plan for another model.
    pub fn architecture(&self, arch: &Architecture) -> Result<Architecture> {
        self.check_model(arch)?;
        let kept = self.kept();
        let blocks: Vec<(Holder, FoldedBlock)> = kept.iter().map(|&block| self.folded(arch, block)).collect();
        let first = |holder: Holder| blocks.iter().position(|(other, _)| *other == holder);
        let map = blocks.iter().enumerate().map(|(depth, (holder, block))| FoldedBlock {
            weights: first(*holder).unwrap_or(depth),
            // What holds its matrices holds its norms.
            own_norms: block.own_norms || first(*holder) == Some(depth),
            ..block.clone()
        });
        let folded = Architecture { fold: FoldMap::new(map.collect()), ..arch.with_blocks(&kept)? };
        folded.fold.check(&folded)?;
        Ok(folded)
    }

    /// What becomes of one block that stays; `weights` is not yet right.
    fn folded(&self, arch: &Architecture, block: usize) -> (Holder, FoldedBlock) {
        let mut folded = arch.fold.block(block);
        folded.part = match lost(block, self.removed_halves()).map(|unit| unit.part) {
            Some(Part::Attention) => Part::Mlp,
            Some(Part::Mlp) => Part::Attention,
            _ => folded.part,
        };
        let part = folded.part;
        folded.adapters.retain(|projection, _| part == Part::Whole || part == projection.half());
        let Some((place, sharing, group)) = self.sharing().and_then(|sharing| {
            let place = sharing.groups.iter().position(|group| group.blocks.contains(&block))?;
            Some((place, sharing, sharing.groups.get(place)?))
        }) else {
            return (Holder::Kept(folded.weights, part), folded);
        };
        let holder = match group.donor {
            // A donor that was adapted itself gives matrices into which that is merged.
            Matrices::Block(donor) if arch.fold.block(donor).adapters.is_empty() => {
                Holder::Kept(arch.fold.block(donor).weights, part)
            }
            Matrices::Block(_) | Matrices::Mean => Holder::Made(place),
        };
        let adapted = group.strangers().any(|stranger| stranger == block);
        folded.own_norms = sharing.own.norms;
        folded.adapters = if adapted { self.adapters(arch, block, part) } else { BTreeMap::new() };
        (holder, folded)
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
            (projection, AdapterShape { scale: sharing.own.scales.is_some(), rank })
        });
        adapters.filter(|(_, shape)| !shape.is_empty()).collect()
    }
}
