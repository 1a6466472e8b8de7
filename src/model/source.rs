//! Where a model's blocks come from: all of them in memory, or read one after the other.

use std::collections::BTreeSet;

use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use super::architecture::{Architecture, Positions};
use super::block::{Block, Norm};
use super::decoder::{Decoder, Pass};
use super::fold_map::FoldMap;
use super::params::{BlockParam, Param, Projection};
use super::states::States;
use super::unit::Part;
use crate::error::Result;
use crate::ops::{Kernels, Matrix};

/// A model whose parts are asked for one by one, so that whoever asks need not know whether they are in memory.
///
/// What is computed from the parts is the same either way, bit for bit: only when a block is there differs.
pub(crate) trait BlockSource {
    /// What the model is made of.
    fn architecture(&self) -> &Architecture;

    /// Where its weights are computed with.
    fn device(&self) -> &Device;

    /// Which kernels compute.
    fn kernels(&self) -> Kernels;

    /// The model's beginning: a decoder that can embed.
    fn front(&self) -> Result<Decoder>;

    /// The model's end: a decoder that can normalise, and has the head.
    fn back(&self) -> Result<Decoder>;

    /// Hands over the blocks of these indices, one after the other.
    ///
    /// # Errors
    /// [`NoSuchBlock`](crate::Error::NoSuchBlock) for an index beyond the depth, what reading fails with, and what
    /// `visit` fails with.
    fn visit(&self, order: &[usize], visit: &mut dyn FnMut(&Block) -> Result<()>) -> Result<()>;

    /// How many windows each visit should serve at least: one where blocks cost nothing to come by, so that few states
    /// are alive; all where each visit reads the whole model.
    fn windows_at_once(&self) -> usize;

    /// Whether blocks stay in memory once a visit is over.
    fn keeps_blocks(&self) -> bool;

    /// Room for this many states.
    fn states(&self, slots: usize) -> States;

    /// Prepares a pass over windows of `seq` tokens.
    fn pass_over(&self, seq: usize) -> Result<Pass<'_>> {
        Pass::new(self.architecture(), self.kernels(), self.device(), 0, seq)
    }

    /// All indices, first to last.
    fn all(&self) -> Vec<usize> {
        (0..self.architecture().depth()).collect()
    }
}

impl BlockSource for Decoder {
    fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    fn device(&self) -> &Device {
        Decoder::device(self)
    }

    fn kernels(&self) -> Kernels {
        self.kernels
    }

    fn front(&self) -> Result<Decoder> {
        Ok(self.clone())
    }

    fn back(&self) -> Result<Decoder> {
        Ok(self.clone())
    }

    fn visit(&self, order: &[usize], visit: &mut dyn FnMut(&Block) -> Result<()>) -> Result<()> {
        order.iter().try_for_each(|&index| visit(self.block(index)?))
    }

    fn windows_at_once(&self) -> usize {
        1
    }

    fn keeps_blocks(&self) -> bool {
        true
    }

    fn states(&self, slots: usize) -> States {
        States::in_memory(slots)
    }
}

impl Decoder {
    /// The ends of a decoder, without any block: `matrix` is its only large matrix, the embedding or the head, and
    /// `tensor` gives it and all that is small.
    pub(crate) fn ends(
        architecture: &Architecture,
        matrix: Param,
        mut tensor: impl FnMut(Param) -> Result<Tensor>,
    ) -> Result<Self> {
        let embedding = tensor(matrix)?.into();
        let learned = architecture.positions == Positions::Learned && matrix == Param::Embedding;
        let positions = learned.then(|| tensor(Param::Positions)).transpose()?;
        let final_norm = Norm::build(architecture.norm, |part| tensor(Param::FinalNorm(part)))?;
        // Tied, so that the one matrix is what embeds and what the head is.
        let architecture =
            Architecture { blocks: Vec::new(), fold: FoldMap::default(), tied: true, ..architecture.clone() };
        Ok(Self {
            architecture,
            embedding,
            positions,
            blocks: Vec::new(),
            final_norm,
            head: None,
            kernels: Kernels::default(),
            stored: None,
        })
    }
}

impl Block {
    /// The block at `depth` by itself, with what it shares with others: `tensor` gives its parameters, each asked for
    /// by the depth that it is stored under.
    pub(crate) fn alone(
        arch: &Architecture,
        depth: usize,
        mut tensor: impl FnMut(Param) -> Result<Tensor>,
    ) -> Result<Self> {
        let (spec, folded) = (*arch.block(depth)?, arch.fold.block(depth));
        let holder = |param: BlockParam| folded.holder(depth, param);
        let residuals = folded.adapters.values().filter_map(|adapter| adapter.residual_of);
        let holders: BTreeSet<usize> = residuals.chain([folded.weights, depth]).collect();
        let params = holders.into_iter().flat_map(|at| {
            let mut params = arch.params_at(at);
            params.retain(|(param, _)| holder(*param) == at);
            params
        });
        Self::build(params.collect(), depth, spec, None, |param, _| {
            tensor(Param::Block(holder(param), param))
        })
    }

    /// What the block makes of its input: `(batch, seq, hidden)` in and out.
    pub(crate) fn run(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        self.forward_part(Part::Whole, x, pass, None)
    }
}

/// A hash that tells models apart at little cost: of the architecture, and of the type and the first few values of every
/// tensor. It is the same wherever the blocks come from. `tick` is called after every block.
pub(crate) fn fingerprint(source: &dyn BlockSource, tick: &mut dyn FnMut() -> Result<()>) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(format!("{:?}", source.architecture()));
    let front = source.front()?;
    add_matrix(&mut hash, &front.embedding)?;
    front.positions.iter().try_for_each(|tensor| add_tensor(&mut hash, tensor))?;
    let final_norm = front.final_norm.clone();
    drop(front);
    source.visit(&source.all(), &mut |block| {
        block.params().try_for_each(|(_, tensor)| add_tensor(&mut hash, tensor))?;
        let quantized = |at| block.weights.get(at).filter(|matrix| matrix.as_quantized().is_some());
        Projection::ALL
            .into_iter()
            .filter_map(quantized)
            .try_for_each(|matrix| add_matrix(&mut hash, matrix))?;
        tick()
    })?;
    final_norm.params().try_for_each(|(_, tensor)| add_tensor(&mut hash, tensor))?;
    if !source.architecture().tied {
        add_matrix(&mut hash, source.back()?.head_weight())?;
    }
    Ok(crate::data::hex(&hash.finalize()))
}

/// As many values of a tensor, or bytes of quantised blocks, tell it from others.
const VALUES: usize = 64;

fn add_matrix(hash: &mut Sha256, matrix: &Matrix) -> Result<()> {
    match matrix {
        Matrix::Tensor(tensor) => add_tensor(hash, tensor),
        Matrix::Quantized(blocks) => {
            let bytes = blocks.data()?;
            hash.update(format!("{:?}", blocks.dtype()));
            hash.update(bytes.get(..VALUES.min(bytes.len())).unwrap_or_default());
            Ok(())
        }
    }
}

fn add_tensor(hash: &mut Sha256, tensor: &Tensor) -> Result<()> {
    hash.update(tensor.dtype().as_str());
    let values = tensor.flatten_all()?.narrow(0, 0, tensor.elem_count().min(VALUES))?;
    for value in values.to_dtype(DType::F32)?.to_vec1::<f32>()? {
        hash.update(value.to_le_bytes());
    }
    Ok(())
}
