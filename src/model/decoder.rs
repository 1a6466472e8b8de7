//! The decoder: embedding, blocks, final norm, head.

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Normal};

use super::architecture::{Architecture, NormKind, Positions, RopeSpec};
use super::block::{Block, Norm};
use super::cache::{KvCache, Slot};
use super::params::{BlockParam, NormPart, Param};
use super::stored_types::StoredTypes;
use super::unit::Unit;
use crate::error::{Error, Result};
use crate::ops::{Kernels, Matrix};

/// A decoder-only language model of any supported family.
///
/// Cloning is cheap: tensors are shared, never copied. Token ids go in as `(batch, seq)` tensors of `u32`.
#[derive(Debug, Clone)]
pub struct Decoder {
    pub(super) architecture: Architecture,
    pub(super) embedding: Matrix,
    pub(super) positions: Option<Tensor>,
    pub(super) blocks: Vec<Block>,
    pub(super) final_norm: Norm,
    pub(super) head: Option<Matrix>,
    pub(super) kernels: Kernels,
    pub(super) stored: Option<StoredTypes>,
}

/// What all blocks of one forward pass have in common: where the tokens stand.
///
/// Made by [`Decoder::pass`].
#[derive(Debug)]
pub struct Pass<'a> {
    pub(super) architecture: &'a Architecture,
    pub(super) kernels: Kernels,
    offset: usize,
    seq: usize,
    ropes: Vec<(RopeSpec, Tensor, Tensor)>,
}

impl<'a> Pass<'a> {
    /// As [`Decoder::pass`], of a decoder of this architecture on this device.
    pub(super) fn new(
        architecture: &'a Architecture,
        kernels: Kernels,
        device: &Device,
        offset: usize,
        seq: usize,
    ) -> Result<Self> {
        if seq == 0 {
            return Err(Error::argument("seq", 0, "at least one token"));
        }
        let mut ropes: Vec<(RopeSpec, Tensor, Tensor)> = Vec::new();
        match architecture.positions {
            Positions::Rotary => {
                for spec in architecture.blocks.iter().map(|block| block.rope) {
                    if !ropes.iter().any(|(known, ..)| *known == spec) {
                        let (cos, sin) = spec.tables(offset, seq, device)?;
                        ropes.push((spec, cos, sin));
                    }
                }
            }
            Positions::Learned => {
                let limit = architecture.max_position_embeddings;
                if offset + seq > limit {
                    return Err(Error::argument(
                        "tokens",
                        offset + seq,
                        format!("at most {limit} positions"),
                    ));
                }
            }
        }
        Ok(Self { architecture, kernels, offset, seq, ropes })
    }

    pub(super) fn rope(&self, spec: &RopeSpec) -> Option<(&Tensor, &Tensor)> {
        self.ropes.iter().find(|(known, ..)| known == spec).map(|(_, cos, sin)| (cos, sin))
    }
}

impl Decoder {
    /// A decoder whose tensors `tensor` gives, asked for one by one in the order of [`Architecture::params`] with
    /// the shape each must have.
    ///
    /// # Errors
    /// What `tensor` fails with, and [`Error::Argument`] for a tensor of another shape.
    pub fn build(
        architecture: Architecture,
        mut tensor: impl FnMut(Param, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut checked = |param: Param, shape: &[usize]| {
            let value = tensor(param, shape)?;
            if value.dims() == shape {
                return Ok(value);
            }
            Err(Error::argument("shape", format!("{:?} for {param}", value.dims()), format!("{shape:?}")))
        };
        let (vocab, hidden) = (architecture.vocab_size, architecture.hidden_size);
        let embedding = checked(Param::Embedding, &[vocab, hidden])?.into();
        let positions = (architecture.positions == Positions::Learned)
            .then(|| checked(Param::Positions, &[architecture.max_position_embeddings, hidden]))
            .transpose()?;
        architecture.fold.check(&architecture)?;
        let mut blocks: Vec<Block> = Vec::with_capacity(architecture.depth());
        for (index, spec) in architecture.blocks.iter().enumerate() {
            let folded = architecture.fold.block(index);
            let shared = blocks.get(folded.weights);
            let part = |param: BlockParam, shape: &[usize]| checked(Param::Block(index, param), shape);
            let mut block = Block::build(architecture.params_at(index), index, *spec, shared, part)?;
            for (projection, adapter) in folded.adapters {
                if let Some(holder) = adapter.residual_of.and_then(|depth| blocks.get(depth)) {
                    let residual = &holder.own.adapters[projection].low_rank;
                    block.own.adapters[projection].low_rank.clone_from(residual);
                }
            }
            blocks.push(block);
        }
        let final_norm = Norm::build(architecture.norm, |part| checked(Param::FinalNorm(part), &[hidden]))?;
        let head = (!architecture.tied).then(|| checked(Param::Head, &[vocab, hidden])).transpose()?;
        let head = head.map(Matrix::Tensor);
        let kernels = Kernels::default();
        Ok(Self { architecture, embedding, positions, blocks, final_norm, head, kernels, stored: None })
    }

    /// A decoder with random weights, as before training: matrices from a normal distribution of standard deviation
    /// 0.02, norms at identity, biases 0. The same seed gives the same weights.
    ///
    /// # Errors
    /// A failed allocation on the device.
    pub fn random(architecture: Architecture, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(seed);
        let normal = Normal::new(0.0f32, 0.02)
            .map_err(|error| Error::argument("std", 0.02, format!("a normal distribution: {error}")))?;
        let gain = match architecture.norm {
            NormKind::Rms { unit_offset: true } => 0.0f32,
            NormKind::Rms { unit_offset: false } | NormKind::Layer => 1.0,
        };
        Self::build(architecture, |param, shape| {
            let count: usize = shape.iter().product();
            let values: Vec<f32> = match param {
                Param::FinalNorm(part) | Param::Block(_, BlockParam::Norm(_, part)) => {
                    vec![if part == NormPart::Gain { gain } else { 0.0 }; count]
                }
                Param::Block(_, BlockParam::Bias(_)) => vec![0.0; count],
                Param::Block(_, BlockParam::Scale(_)) => vec![1.0; count],
                _ => (0..count).map(|_| normal.sample(&mut rng)).collect(),
            };
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
        })
    }

    /// What the decoder is made of, as data.
    #[must_use]
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The number of blocks.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.blocks.len()
    }

    /// The blocks, first to last.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Where the weights are.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.final_norm.gain.device()
    }

    /// The type of the matrices in memory; f32 where the embedding is quantised, which its rows become when they are
    /// looked up: [`matrix_types`](Self::matrix_types) says how it is held.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.embedding.as_tensor().map_or(DType::F32, Tensor::dtype)
    }

    /// The type that new tensors are rounded to, so that what is measured in memory is what a checkpoint will hold:
    /// the narrowest one that matrices have on disk, or the one they have in memory where there is no checkpoint.
    #[must_use]
    pub fn stored_dtype(&self) -> DType {
        self.stored.as_ref().map_or_else(|| self.dtype(), StoredTypes::narrowest)
    }

    /// The type that each parameter of this decoder has on disk; where there is no checkpoint, the one that matrices have
    /// in memory.
    #[must_use]
    pub fn stored_types(&self) -> StoredTypes {
        match &self.stored {
            Some(types) => types.of_blocks(&self.origins()),
            None => self.dtype().into(),
        }
    }

    /// The index that each depth has in the original model.
    pub(crate) fn origins(&self) -> Vec<usize> {
        self.blocks.iter().map(|block| block.own.origin).collect()
    }

    /// The same decoder with the types that the original model's parameters have on disk.
    pub(crate) fn stored_as(mut self, types: StoredTypes) -> Self {
        self.stored = Some(types);
        self
    }

    /// The same decoder computed by other kernels.
    #[must_use]
    pub fn with_kernels(mut self, kernels: Kernels) -> Self {
        self.kernels = kernels;
        self
    }

    /// The logits of every token, `(batch, seq, vocab)`.
    ///
    /// # Errors
    /// Ids that are not `(batch, seq)` or outside of the vocabulary, or a failed computation.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.logits(&self.hidden(ids)?)
    }

    /// As [`forward`](Self::forward), with the blocks of `skipped` passed over.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::NoSuchBlock`] for an index beyond the depth.
    pub fn forward_skipping(&self, ids: &Tensor, skipped: &[usize]) -> Result<Tensor> {
        if let Some(&index) = skipped.iter().find(|&&index| index >= self.depth()) {
            return Err(Error::NoSuchBlock { index, depth: self.depth() });
        }
        let pass = self.pass(0, seq_of(ids)?)?;
        let mut x = self.embed(ids, &pass)?;
        for index in (0..self.depth()).filter(|index| !skipped.contains(index)) {
            x = self.run_block(index, &x, &pass)?;
        }
        self.logits(&x)
    }

    /// The hidden state after the last block and before the final norm, `(batch, seq, hidden)`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn hidden(&self, ids: &Tensor) -> Result<Tensor> {
        let pass = self.pass(0, seq_of(ids)?)?;
        let mut x = self.embed(ids, &pass)?;
        for index in 0..self.depth() {
            x = self.run_block(index, &x, &pass)?;
        }
        Ok(x)
    }

    /// The embedding's output and the hidden state after every block, all before the final norm: `depth + 1`
    /// tensors `(batch, seq, hidden)`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn hidden_states(&self, ids: &Tensor) -> Result<Vec<Tensor>> {
        let pass = self.pass(0, seq_of(ids)?)?;
        let mut states = vec![self.embed(ids, &pass)?];
        for index in 0..self.depth() {
            let next = states.last().map(|x| self.run_block(index, x, &pass)).transpose()?;
            states.extend(next);
        }
        Ok(states)
    }

    /// An empty cache for [`extend`](Self::extend).
    #[must_use]
    pub fn cache(&self) -> KvCache {
        KvCache::new(self.depth())
    }

    /// Reads `ids` after the tokens in `cache` and adds them to it; the hidden state of the new tokens before the
    /// final norm, `(batch, seq, hidden)`. Reading a text in pieces gives what reading it whole gives, but for rounding: few
    /// tokens at once are multiplied by matrices in bf16, and by quantised ones, in another way than many.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and a cache of another depth or batch.
    pub fn extend(&self, ids: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        if cache.depth() != self.depth() {
            let expected = format!("{} as the model has", self.depth());
            return Err(Error::argument("cache depth", cache.depth(), expected));
        }
        let seq = seq_of(ids)?;
        let pass = self.pass(cache.len(), seq)?;
        let before = cache.len();
        // On a thread of the pool: from outside, every operation that is shared out is handed over to one and waited for,
        // which for a few tokens takes as long as a small product.
        let state = rayon::scope(|_| self.extend_blocks(ids, &pass, cache));
        // After an error no block may remember tokens that others do not.
        if state.is_ok() {
            cache.advance(seq);
        } else {
            cache.truncate(before);
        }
        state
    }

    fn extend_blocks(&self, ids: &Tensor, pass: &Pass<'_>, cache: &mut KvCache) -> Result<Tensor> {
        let mut x = self.embed(ids, pass)?;
        for (index, block) in self.blocks.iter().enumerate() {
            let slot: &mut Slot = cache.slot(index)?;
            x = block.forward(&x, pass, Some(slot))?;
        }
        Ok(x)
    }

    /// Prepares a pass over `seq` tokens that stand at positions from `offset` on.
    ///
    /// # Errors
    /// [`Error::Argument`] for positions that the model has not learned, or for no tokens.
    pub fn pass(&self, offset: usize, seq: usize) -> Result<Pass<'_>> {
        Pass::new(&self.architecture, self.kernels, self.device(), offset, seq)
    }

    /// The embedding's output for `(batch, seq)` ids: `(batch, seq, hidden)`.
    ///
    /// # Errors
    /// Ids that do not fit the pass or the vocabulary.
    pub fn embed(&self, ids: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let (batch, seq) = ids.dims2()?;
        if seq != pass.seq {
            return Err(Error::argument("tokens", seq, format!("{} as the pass was made for", pass.seq)));
        }
        let x = self.embedding.rows(&ids.flatten_all()?)?;
        let x = x.reshape((batch, seq, self.architecture.hidden_size))?;
        let mut x = x.to_dtype(self.final_norm.gain.dtype())?;
        if let Some(scale) = self.architecture.embedding_scale {
            x = (x * scale)?;
        }
        if let Some(positions) = &self.positions {
            x = x.broadcast_add(&positions.narrow(0, pass.offset, seq)?.to_dtype(x.dtype())?)?;
        }
        Ok(x)
    }

    /// One block's output: `(batch, seq, hidden)` in and out.
    ///
    /// # Errors
    /// [`Error::NoSuchBlock`] for an index beyond the depth, or a failed computation.
    pub fn run_block(&self, index: usize, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        self.block(index)?.forward(x, pass, None)
    }

    /// What a block or one of its halves makes of its input: `(batch, seq, hidden)` in and out.
    ///
    /// # Errors
    /// As [`run_block`](Self::run_block).
    pub fn run_unit(&self, unit: Unit, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        self.block(unit.block)?.forward_part(unit.part, x, pass, None)
    }

    /// Final norm and head: `(…, hidden)` to `(…, vocab)`.
    ///
    /// # Errors
    /// A failed computation.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.kernels.linear(&self.normalised(hidden)?, self.head_weight(), None)?;
        match self.architecture.logit_softcap {
            Some(cap) => Ok(((logits / cap)?.tanh()? * cap)?),
            None => Ok(logits),
        }
    }

    /// The negative log-likelihood in nats of each next token, `(rows)`.
    ///
    /// `hidden` is `(rows, hidden)`, states after the last block; `targets[i]` is the token that follows row `i`.
    /// The logits of all rows never exist at once.
    ///
    /// # Errors
    /// Targets that do not fit the rows or the vocabulary, or a failed computation.
    pub fn nll(&self, hidden: &Tensor, targets: &[u32]) -> Result<Tensor> {
        let softcap = self.architecture.logit_softcap;
        Ok(self.kernels.nll(&self.normalised(hidden)?, self.head_weight(), targets, softcap)?)
    }

    /// States after the last block as the head sees them.
    pub(crate) fn normalised(&self, hidden: &Tensor) -> Result<Tensor> {
        let pass = Pass {
            architecture: &self.architecture,
            kernels: self.kernels,
            offset: 0,
            seq: 0,
            ropes: Vec::new(),
        };
        self.final_norm.apply(hidden, &pass)
    }

    pub(super) fn head_weight(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    pub(super) fn block(&self, index: usize) -> Result<&Block> {
        self.blocks.get(index).ok_or(Error::NoSuchBlock { index, depth: self.depth() })
    }
}

/// The number of tokens in each row of `(batch, seq)` ids.
fn seq_of(ids: &Tensor) -> Result<usize> {
    Ok(ids.dims2()?.1)
}
