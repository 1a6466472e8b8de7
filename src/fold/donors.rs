//! The matrices that a group shares.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::model::{
    Adapter, Block, BlockParam, BlockWeights, Decoder, Norm, NormPart, NormSite, Param, Projection,
};
use crate::plan::{Matrices, Plan, Sharing};

/// A cut decoder with every group of the plan tied, and nothing yet that makes up for it.
pub(super) fn tie_all(cut: &Decoder, plan: &Plan, sharing: &Sharing) -> Result<Decoder> {
    let mut blocks = cut.blocks().to_vec();
    for group in &sharing.groups {
        let depths = group.blocks.iter().map(|&block| plan.depth_of(block)).collect::<Result<Vec<_>>>()?;
        let donor = match group.donor {
            Matrices::Block(block) => Some(plan.depth_of(block)?),
            Matrices::Mean => None,
        };
        tie(cut, &mut blocks, &depths, donor, sharing.own.norms)?;
    }
    Ok(cut.of_blocks(blocks))
}

/// Makes `depths` of `blocks` use the matrices that depth `donor` has in `cut`, or the mean of theirs.
pub(super) fn tie(
    cut: &Decoder,
    blocks: &mut [Block],
    depths: &[usize],
    donor: Option<usize>,
    own_norms: bool,
) -> Result<()> {
    let find = |&depth: &usize| {
        cut.blocks().get(depth).ok_or(Error::NoSuchBlock { index: depth, depth: cut.depth() })
    };
    let members = depths.iter().map(find).collect::<Result<Vec<_>>>()?;
    let donor = donor.map(|depth| find(&depth)).transpose()?;
    let weights = match donor {
        Some(donor) if Projection::ALL.iter().all(|&at| donor.own.adapters[at].is_empty()) => {
            Arc::clone(&donor.weights)
        }
        Some(donor) => Arc::new(mean(cut, &[donor])?),
        None => Arc::new(mean(cut, &members)?),
    };
    for &depth in depths {
        let Some(block) = blocks.get_mut(depth) else { continue };
        block.weights = Arc::clone(&weights);
        for projection in Projection::ALL {
            block.own.adapters[projection] = Adapter::default();
        }
    }
    if own_norms {
        return Ok(());
    }
    let givers = donor.map_or(members, |donor| vec![donor]);
    for site in NormSite::ALL {
        let norm = mean_norm(cut, &givers, site)?;
        for &depth in depths {
            if let Some(block) = blocks.get_mut(depth) {
                block.own.norms[site].clone_from(&norm);
            }
        }
    }
    Ok(())
}

/// The mean of what the blocks' projections do, adapters included.
fn mean(cut: &Decoder, members: &[&Block]) -> Result<BlockWeights> {
    BlockWeights::from_fn(|projection| {
        let matrices = members.iter().map(|block| block.merged(projection)).collect::<Result<Vec<_>>>()?;
        let matrices: Vec<Tensor> = matrices.into_iter().flatten().collect();
        if matrices.is_empty() {
            return Ok(None);
        }
        let param = Param::Block(0, BlockParam::Weight(projection));
        Ok(Some(cut.as_stored(param, &mean_of(&matrices)?)?.into()))
    })
}

fn mean_norm(cut: &Decoder, members: &[&Block], site: NormSite) -> Result<Option<Norm>> {
    let norms: Vec<&Norm> = members.iter().filter_map(|block| block.own.norms[site].as_ref()).collect();
    let Some(first) = norms.first() else { return Ok(None) };
    if norms.len() == 1 {
        return Ok(Some((*first).clone()));
    }
    let part = |part: NormPart, tensors: Vec<Tensor>| -> Result<Option<Tensor>> {
        if tensors.is_empty() {
            return Ok(None);
        }
        let param = Param::Block(0, BlockParam::Norm(site, part));
        cut.as_stored(param, &mean_of(&tensors)?).map(Some)
    };
    let gains = norms.iter().map(|norm| norm.gain.clone()).collect();
    let biases = norms.iter().filter_map(|norm| norm.bias.clone()).collect();
    let gain = part(NormPart::Gain, gains)?.unwrap_or_else(|| first.gain.clone());
    Ok(Some(Norm { gain, bias: part(NormPart::Bias, biases)? }))
}

fn mean_of(tensors: &[Tensor]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for tensor in tensors {
        let wide = tensor.to_dtype(DType::F64)?;
        sum = Some(match sum {
            Some(sum) => (sum + wide)?,
            None => wide,
        });
    }
    let empty = || Error::argument("tensors", 0, "at least one to take the mean of");
    Ok((sum.ok_or_else(empty)? / tensors.len() as f64)?)
}
