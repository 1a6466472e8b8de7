//! Which depths share matrices, and what each adds to them: the shape of a folded decoder.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::adapter::AdapterShape;
use super::architecture::Architecture;
use super::block::Block;
use super::params::{BlockParam, Param, Projection};
use super::unit::Part;
use crate::error::{Error, Result};

/// What every depth of a folded decoder shares and has for itself; of a decoder that is not folded it is empty.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FoldMap(Vec<FoldedBlock>);

/// One depth of a [`FoldMap`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FoldedBlock {
    /// The first depth that uses the same matrices; its own index where no earlier one does.
    pub weights: usize,
    /// What the block has: both halves, or the one that it kept.
    #[serde(default, skip_serializing_if = "Part::is_whole")]
    pub part: Part,
    /// Whether it has norms of its own, or uses those of the depth that holds its matrices.
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    pub own_norms: bool,
    /// What it adds to the projections that it does not use as they are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub adapters: BTreeMap<Projection, AdapterShape>,
}

fn yes() -> bool {
    true
}

impl FoldedBlock {
    fn plain(depth: usize) -> Self {
        Self { weights: depth, part: Part::Whole, own_norms: true, adapters: BTreeMap::new() }
    }

    /// Whether it has the half that `part` is, or is in.
    pub(crate) fn has(&self, part: Part) -> bool {
        self.part == Part::Whole || self.part == part
    }

    /// The depth that a parameter of this block, which is the one at `depth`, is stored under.
    pub(crate) fn holder(&self, depth: usize, param: BlockParam) -> usize {
        match param {
            BlockParam::Weight(_) => self.weights,
            BlockParam::Norm(..) if !self.own_norms => self.weights,
            BlockParam::LoraA(at) | BlockParam::LoraB(at) => self.residual(depth, at).unwrap_or(depth),
            _ => depth,
        }
    }

    /// The depth whose residual it uses for a projection, where it uses one.
    fn residual(&self, depth: usize, projection: Projection) -> Option<usize> {
        let adapter = self.adapters.get(&projection).filter(|adapter| adapter.rank > 0)?;
        Some(adapter.residual_of.unwrap_or(depth))
    }
}

impl FoldMap {
    /// A map of these depths, first to last.
    pub(crate) fn new(blocks: Vec<FoldedBlock>) -> Self {
        let plain = blocks.iter().enumerate().all(|(depth, block)| *block == FoldedBlock::plain(depth));
        Self(if plain { Vec::new() } else { blocks })
    }

    /// The map of blocks in memory: what holds the same `Arc` is shared.
    pub(super) fn of(blocks: &[Block]) -> Self {
        let depths = blocks.iter().enumerate().map(|(depth, block)| {
            let first = blocks.iter().position(|other| Arc::ptr_eq(&other.weights, &block.weights));
            let adapters = Projection::ALL.into_iter().map(|at| {
                let adapter = &block.own.adapters[at];
                let shares = |other: &Block| {
                    Arc::ptr_eq(&other.weights, &block.weights)
                        && adapter.has_residual_of(&other.own.adapters[at])
                };
                let residual_of = blocks.iter().take(depth).position(shares);
                (at, AdapterShape { residual_of, ..adapter.shape() })
            });
            let holder = first.filter(|&first| first < depth).and_then(|first| blocks.get(first));
            FoldedBlock {
                weights: first.unwrap_or(depth),
                part: block.part(),
                own_norms: holder.is_none_or(|holder| !block.own.has_norms_of(&holder.own)),
                adapters: adapters.filter(|(_, shape)| !shape.is_empty()).collect(),
            }
        });
        Self::new(depths.collect())
    }

    /// Whether nothing is shared, added or missing.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.0.is_empty()
    }

    /// What a depth shares and has for itself.
    #[must_use]
    pub fn block(&self, depth: usize) -> FoldedBlock {
        self.0.get(depth).cloned().unwrap_or_else(|| FoldedBlock::plain(depth))
    }

    /// The map of the depths of `kept` alone, in that order.
    pub(super) fn with_blocks(&self, kept: &[usize]) -> Self {
        let blocks: Vec<FoldedBlock> = kept.iter().map(|&depth| self.block(depth)).collect();
        let settled = blocks.iter().enumerate().map(|(depth, block)| {
            let first = blocks.iter().position(|other| other.weights == block.weights).unwrap_or(depth);
            // Where the depth whose norms were used is gone, the first that used them holds them now.
            let first_has_others = blocks.get(first).is_some_and(|first| first.own_norms);
            let holder_left = kept.get(first) != Some(&block.weights);
            // A block that is kept twice shares its norms with itself.
            let again = first < depth && kept.get(first) == kept.get(depth);
            let own_norms =
                !again && (block.own_norms || first == depth || (holder_left && first_has_others));
            let mut settled = FoldedBlock { weights: first, own_norms, ..block.clone() };
            for (&projection, adapter) in &mut settled.adapters {
                let used = |place: usize| blocks.get(place)?.residual(*kept.get(place)?, projection);
                let same = |place: &usize| used(*place).is_some() && used(*place) == used(depth);
                adapter.residual_of = (0..depth).find(same);
            }
            settled
        });
        Self::new(settled.collect())
    }

    /// Fails where the map is not one of a decoder of this architecture.
    pub(crate) fn check(&self, arch: &Architecture) -> Result<()> {
        if !self.is_plain() && self.0.len() != arch.depth() {
            let reason = format!("{} blocks in the fold map, expected {}", self.0.len(), arch.depth());
            return Err(Error::Plan(reason));
        }
        self.0.iter().enumerate().try_for_each(|(depth, block)| self.check_block(arch, depth, block))
    }

    fn check_block(&self, arch: &Architecture, depth: usize, block: &FoldedBlock) -> Result<()> {
        let holder = self.block(block.weights);
        let norms = block.own_norms || (block.weights < depth && holder.own_norms);
        if !norms || block.weights > depth || holder.weights != block.weights || holder.part != block.part {
            let expected =
                "expected its own index, or an earlier block that holds its own and has the same halves";
            let reason = format!("block {depth} uses the matrices of block {}, {expected}", block.weights);
            return Err(Error::Plan(reason));
        }
        for (&projection, &adapter) in &block.adapters {
            let shape = arch.projection_shape(projection).filter(|_| block.has(projection.half()));
            let largest = shape.map_or(0, |(output, input)| output.min(input));
            if adapter.is_empty() || shape.is_none() || adapter.rank > largest {
                let (name, rank) = (projection.name(), adapter.rank);
                let reason = match shape {
                    None => format!("adapts {name}, which it does not have"),
                    Some(_) => {
                        format!("adapts {name} by rank {rank}, expected a scale or a rank up to {largest}")
                    }
                };
                return Err(Error::Plan(format!("block {depth} {reason}")));
            }
            self.check_residual(depth, block, projection, adapter)?;
        }
        Ok(())
    }

    /// Fails where a depth uses a residual that is not there.
    fn check_residual(
        &self,
        depth: usize,
        block: &FoldedBlock,
        projection: Projection,
        adapter: AdapterShape,
    ) -> Result<()> {
        let Some(place) = adapter.residual_of else { return Ok(()) };
        let (holder, rank) = (self.block(place), adapter.rank);
        let lends = |own: &AdapterShape| own.rank == rank && own.residual_of.is_none();
        let lent = holder.adapters.get(&projection).is_some_and(lends);
        if rank > 0 && place < depth && holder.weights == block.weights && lent {
            return Ok(());
        }
        let expected =
            format!("an earlier block with the same matrices and a residual of its own of rank {rank}");
        let name = projection.name();
        Err(Error::Plan(format!(
            "block {depth} uses block {place}'s residual for {name}, expected {expected}"
        )))
    }
}

impl Architecture {
    /// What removing blocks frees, ascending: the first k of these are the least that any k blocks free together, for
    /// every k. What depths share goes with the last of them. `size` is that of a parameter of this shape.
    pub(crate) fn freed(&self, size: impl Fn(Param, &[usize]) -> u64) -> Vec<u64> {
        let mut freed = Vec::with_capacity(self.depth());
        for holder in (0..self.depth()).filter(|&depth| self.fold.block(depth).weights == depth) {
            let users = (0..self.depth()).filter(|&depth| self.fold.block(depth).weights == holder);
            let users: Vec<usize> = users.collect();
            let sum = |depth: usize, shared: bool| -> u64 {
                let lent = |param: BlockParam| {
                    let mut others = users.iter().filter(|&&other| other != depth);
                    others.any(|&other| self.fold.block(other).holder(other, param) == depth)
                };
                let params = self.params_at(depth).into_iter().filter(|(param, _)| lent(*param) == shared);
                params.map(|(param, shape)| size(Param::Block(depth, param), &shape)).sum()
            };
            let mut own: Vec<u64> = users.iter().map(|&depth| sum(depth, false)).collect();
            own.sort_unstable();
            if let Some(last) = own.last_mut() {
                *last += users.iter().map(|&depth| sum(depth, true)).sum::<u64>();
            }
            freed.extend(own);
        }
        freed.sort_unstable();
        freed
    }

    /// The same architecture with nothing shared, added or missing: what a standard checkpoint holds.
    #[must_use]
    pub fn expanded(&self) -> Self {
        Self { fold: FoldMap::default(), ..self.clone() }
    }

    /// Every parameter that the block at `depth` has in storage: of matrices, norms and residuals those that no earlier
    /// depth holds, and all that is never shared.
    #[must_use]
    pub fn params_at(&self, depth: usize) -> Vec<(BlockParam, Vec<usize>)> {
        let block = self.fold.block(depth);
        let stored = |param: BlockParam| block.holder(depth, param) == depth && block.has(param.half());
        let mut params = self.block_params();
        params.retain(|(param, _)| stored(*param));
        for (&projection, adapter) in &block.adapters {
            let Some((output, input)) = self.projection_shape(projection) else { continue };
            if adapter.scale {
                params.push((BlockParam::Scale(projection), vec![output]));
            }
            if adapter.rank > 0 && adapter.residual_of.is_none() {
                params.push((BlockParam::LoraA(projection), vec![adapter.rank, input]));
                params.push((BlockParam::LoraB(projection), vec![output, adapter.rank]));
            }
        }
        params
    }
}
