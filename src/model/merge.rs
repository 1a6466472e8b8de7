//! Adapters that become part of their matrices.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use candle_core::{Tensor, TensorId};

use super::adapter::Adapter;
use super::block::{Block, BlockWeights};
use super::decoder::Decoder;
use super::params::{BlockParam, Param, Projection};
use crate::error::Result;

/// What tells adapters apart that are not only alike but the same.
type Identity = [Option<TensorId>; 3];

impl Decoder {
    /// The same decoder with adapters merged into their matrices where that is exact: where every depth that uses a
    /// matrix adapts it by the same tensors, as a matrix of one depth always is. What depths adapt differently stays.
    /// Merged matrices are rounded to [`stored_dtype`](Self::stored_dtype).
    ///
    /// # Errors
    /// A failed computation.
    pub fn merge_adapters(&self) -> Result<Self> {
        let mut users: HashMap<*const BlockWeights, Vec<&Block>> = HashMap::new();
        for block in self.blocks() {
            users.entry(Arc::as_ptr(&block.weights)).or_default().push(block);
        }
        let mut merged: HashMap<*const BlockWeights, (Arc<BlockWeights>, Vec<Projection>)> = HashMap::new();
        let mut blocks = self.blocks().to_vec();
        for (depth, block) in blocks.iter_mut().enumerate() {
            let known = Arc::as_ptr(&block.weights);
            let (weights, projections) = match merged.entry(known) {
                Entry::Occupied(done) => done.into_mut(),
                Entry::Vacant(place) => {
                    let depths = users.get(&known).map(Vec::as_slice).unwrap_or_default();
                    place.insert(self.merge_matrices(depth, block, depths)?)
                }
            };
            block.weights = Arc::clone(weights);
            for &mut projection in projections {
                block.own.adapters[projection] = Adapter::default();
            }
        }
        Ok(self.of_blocks(blocks))
    }

    /// The matrices that blocks share with what all of them add to each, and the projections where they do.
    fn merge_matrices(
        &self,
        depth: usize,
        first: &Block,
        users: &[&Block],
    ) -> Result<(Arc<BlockWeights>, Vec<Projection>)> {
        let mergeable = |projection: &Projection| {
            let adapter = &first.own.adapters[*projection];
            let same = |block: &&Block| identity(&block.own.adapters[*projection]) == identity(adapter);
            !adapter.is_empty() && users.iter().all(same)
        };
        let projections: Vec<Projection> = Projection::ALL.into_iter().filter(mergeable).collect();
        if projections.is_empty() {
            return Ok((Arc::clone(&first.weights), projections));
        }
        let weights = BlockWeights::from_fn(|projection| {
            let Some(weight) = first.weights.get(projection) else { return Ok(None) };
            if !projections.contains(&projection) {
                return Ok(Some(weight.clone()));
            }
            let Some(matrix) = first.merged(projection)? else { return Ok(None) };
            let param = Param::Block(depth, BlockParam::Weight(projection));
            Ok(Some(self.rounded(param, &matrix)?.into()))
        })?;
        Ok((Arc::new(weights), projections))
    }

    /// A trained value of a parameter as it will be read back, in the type that this decoder holds it in. Matrices are
    /// rounded to the stored type; vectors, of which small changes count, are not: they are stored in f32 where they have
    /// to be.
    pub(crate) fn rounded(&self, param: Param, value: &Tensor) -> Result<Tensor> {
        if param.is_matrix() {
            return self.as_stored(param, value);
        }
        Ok(value.detach().to_dtype(param.dtype_in_memory(self.dtype(), value.device()))?)
    }

    /// A value that folding made of a parameter as it will be read back, in the type that this decoder holds it in. Vectors
    /// are rounded to the stored type too, so that the plan alone says what is stored.
    pub(crate) fn as_stored(&self, param: Param, value: &Tensor) -> Result<Tensor> {
        let held = param.dtype_in_memory(self.dtype(), self.device());
        Ok(value.detach().to_dtype(self.stored_dtype())?.to_dtype(held)?.to_device(self.device())?)
    }
}

fn identity(adapter: &Adapter) -> Identity {
    let id = |tensor: Option<&Tensor>| tensor.map(Tensor::id);
    let residual = adapter.low_rank.as_ref();
    [
        id(adapter.scale.as_ref()),
        id(residual.map(|residual| &residual.a)),
        id(residual.map(|residual| &residual.b)),
    ]
}
