//! The decoder as a tree of tensors: walking it, replacing them, rearranging blocks.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, TensorId};

use super::adapter::Adapter;
use super::architecture::Architecture;
use super::block::{Block, BlockWeights};
use super::decoder::Decoder;
use super::fold_map::FoldMap;
use super::params::{BlockParam, Param, Projection};
use super::source::fingerprint;
use super::unit::{Part, Unit};
use crate::error::{Error, Result};
use crate::ops::Matrix;

impl Decoder {
    /// The same decoder with its weights in another type: matrices, and, unless that type is a half-precision one
    /// and the device the CPU, all else too. There norms, biases and activations stay in f32, and products round
    /// only their operands. What is shared stays shared, and quantised matrices become what their blocks stand for.
    ///
    /// # Errors
    /// A conversion that the device does not have.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        self.dequantized(dtype)?
            .map(|param, value| Ok(value.to_dtype(param.dtype_in_memory(dtype, value.device()))?))
    }

    /// The same decoder on another device. What is shared stays shared.
    ///
    /// # Errors
    /// A device that cannot hold it, or [`Error::Quantized`].
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.check_not_quantized()?;
        let dtype = self.dtype();
        self.map(|param, value| {
            Ok(value.to_dtype(param.dtype_in_memory(dtype, device))?.to_device(device)?)
        })
    }

    /// The same decoder with only the blocks of `kept`, in that order. No weight is copied.
    ///
    /// # Errors
    /// [`Error::NoSuchBlock`] for an index beyond the depth.
    pub fn with_blocks(&self, kept: &[usize]) -> Result<Self> {
        Ok(self.of_blocks(kept.iter().map(|&index| self.block(index).cloned()).collect::<Result<_>>()?))
    }

    /// The same decoder without `removed`; a block that loses both halves is gone. No weight is copied.
    ///
    /// # Errors
    /// [`Error::NoSuchBlock`] for a block beyond the depth.
    pub fn without(&self, removed: &[Unit]) -> Result<Self> {
        if let Some(unit) = removed.iter().find(|unit| unit.block >= self.depth()) {
            return Err(Error::NoSuchBlock { index: unit.block, depth: self.depth() });
        }
        // Depths that shared their matrices share what is left of them.
        let mut left: HashMap<(*const BlockWeights, Part), Arc<BlockWeights>> = HashMap::new();
        let blocks = self.blocks.iter().enumerate().filter_map(|(index, block)| {
            let mut parts = removed.iter().filter(|unit| unit.block == index).map(|unit| unit.part);
            let mut rest = parts.try_fold(block.clone(), |block, part| block.without(part))?;
            let weights = left.entry((Arc::as_ptr(&block.weights), rest.part()));
            rest.weights = Arc::clone(weights.or_insert_with(|| Arc::clone(&rest.weights)));
            Some(rest)
        });
        Ok(self.of_blocks(blocks.collect()))
    }

    /// The same decoder where the projection at `depth` is adapted; the matrix stays as it is, and shared.
    ///
    /// # Errors
    /// [`Error::NoSuchBlock`], or an adapter whose shapes are not those of the projection.
    pub fn with_adapter(&self, depth: usize, projection: Projection, adapter: Adapter) -> Result<Self> {
        let weight = self.block(depth)?.weights.get(projection);
        let weight = weight.ok_or_else(|| {
            Error::argument("projection", projection.name(), format!("one that block {depth} has"))
        })?;
        adapter.check(weight.dims2()?)?;
        let mut blocks = self.blocks.clone();
        if let Some(block) = blocks.get_mut(depth) {
            block.own.adapters[projection] = adapter;
        }
        Ok(self.of_blocks(blocks))
    }

    /// The same decoder with its blocks taken for these ones of an original model: what was read from a checkpoint of
    /// its own no longer knows them.
    pub(crate) fn of_origins(&self, origins: &[usize]) -> Result<Self> {
        if origins.len() != self.depth() {
            return Err(Error::argument("blocks", origins.len(), format!("the {} there are", self.depth())));
        }
        let mut blocks = self.blocks.clone();
        for (block, origin) in blocks.iter_mut().zip(origins) {
            block.own.origin = *origin;
        }
        Ok(self.of_blocks(blocks))
    }

    /// The same decoder with other blocks.
    pub(crate) fn of_blocks(&self, blocks: Vec<Block>) -> Self {
        let specs = blocks.iter().map(|block| block.own.spec).collect();
        let fold = FoldMap::of(&blocks);
        let architecture = Architecture { blocks: specs, fold, ..self.architecture.clone() };
        Self { architecture, blocks, ..self.clone() }
    }

    /// The same decoder with every tensor replaced by what `tensor` gives for it. What depths share they share
    /// again: `tensor` sees each tensor once, under the first depth that holds it. Quantised matrices stay as they are.
    ///
    /// # Errors
    /// What `tensor` fails with.
    pub fn map(&self, mut tensor: impl FnMut(Param, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let mut made: HashMap<TensorId, Tensor> = HashMap::new();
        let mut tensor = |param: Param, value: &Tensor| {
            if let Some(made) = made.get(&value.id()) {
                return Ok(made.clone());
            }
            let new = tensor(param, value)?;
            made.insert(value.id(), new.clone());
            Result::Ok(new)
        };
        let mut mapped = self.clone();
        mapped.embedding = self.embedding.map(|value| tensor(Param::Embedding, value))?;
        if let Some(positions) = &mut mapped.positions {
            *positions = tensor(Param::Positions, positions)?;
        }
        let mut done: HashMap<*const BlockWeights, Arc<BlockWeights>> = HashMap::new();
        for (depth, block) in mapped.blocks.iter_mut().enumerate() {
            let known = Arc::as_ptr(&block.weights);
            *block = block.map(done.get(&known), |param, value| tensor(Param::Block(depth, param), value))?;
            done.entry(known).or_insert_with(|| Arc::clone(&block.weights));
        }
        mapped.final_norm = self.final_norm.map(|part, value| tensor(Param::FinalNorm(part), value))?;
        if let Some(head) = &mut mapped.head {
            *head = head.map(|value| tensor(Param::Head, value))?;
        }
        Ok(mapped)
    }

    /// Every parameter that is a tensor, from the embedding to the head; matrices that depths share appear at each of
    /// them, and quantised ones not at all: they are among [`matrices`](Self::matrices).
    pub fn params(&self) -> impl Iterator<Item = (Param, &Tensor)> {
        let embedding = self.embedding.as_tensor().map(|value| (Param::Embedding, value)).into_iter();
        let positions = self.positions.as_ref().map(|value| (Param::Positions, value));
        let blocks = self.blocks.iter().enumerate().flat_map(|(depth, block)| {
            block.params().map(move |(param, value)| (Param::Block(depth, param), value))
        });
        let final_norm = self.final_norm.params().map(|(part, value)| (Param::FinalNorm(part), value));
        let head = self.head.as_ref().and_then(Matrix::as_tensor).map(|value| (Param::Head, value));
        embedding.chain(positions).chain(blocks).chain(final_norm).chain(head)
    }

    /// The embedding, the matrices of all blocks, and the head where it is not tied: each once, however many depths
    /// share it, with the first parameter that it is.
    pub fn matrices(&self) -> impl Iterator<Item = (Param, &Matrix)> {
        let mut seen = HashSet::new();
        self.held_matrices().filter(move |(_, matrix)| seen.insert(matrix.id()))
    }

    /// The same, once for every depth that holds it.
    fn held_matrices(&self) -> impl Iterator<Item = (Param, &Matrix)> {
        let blocks = self.blocks.iter().enumerate().flat_map(|(depth, block)| {
            Projection::ALL.into_iter().filter_map(move |projection| {
                let param = Param::Block(depth, BlockParam::Weight(projection));
                Some((param, block.weights.get(projection)?))
            })
        });
        let embedding = std::iter::once((Param::Embedding, &self.embedding));
        let head = self.head.as_ref().map(|matrix| (Param::Head, matrix));
        embedding.chain(blocks).chain(head)
    }

    /// Every tensor once, however many depths hold it; quantised matrices are none.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let mut seen = HashSet::new();
        self.params().map(|(_, value)| value).filter(move |value| seen.insert(value.id()))
    }

    /// The number of parameters; what several depths share counts once, as it is stored once. Depths that hold the same
    /// tensor and do not share (a half that one of them lost parts them) count it each.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        let stored: HashSet<Param> = self.architecture.params().into_iter().map(|(param, _)| param).collect();
        let tensors = self.params().map(|(param, value)| (param, value.elem_count()));
        let quantized = self.held_matrices().filter(|(_, matrix)| matrix.as_quantized().is_some());
        let counts = tensors.chain(quantized.map(|(param, matrix)| (param, matrix.elem_count())));
        counts.filter(|(param, _)| stored.contains(param)).map(|(_, count)| count).sum()
    }

    /// A hash that tells decoders apart at little cost: of the architecture, and of the type and the first 64 values of
    /// every tensor. Decoders that differ in other values alone have the same one.
    pub(crate) fn fingerprint(&self) -> Result<String> {
        fingerprint(self, &mut || Ok(()))
    }
}
