//! What is trained: from a choice of parameters to a decoder of variables.

use std::collections::{HashMap, HashSet};

use candle_core::{DType, Device, Tensor, TensorId, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::{Adapter, BlockParam, Decoder, LowRank, Param, Projection};
use crate::ops::Matrix;

/// Parameters of a decoder, by kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Trainable {
    /// The norms of all blocks, and the final one.
    Norms,
    /// The output scales of all projections; those without one get one, starting at 1.
    Scales,
    /// Low-rank adapters.
    Lora(Lora),
    /// The low-rank residuals that the decoder has.
    Residuals,
    /// The matrices that several depths share.
    SharedMatrices,
    /// The matrices of all blocks.
    Matrices,
    /// All of this many last blocks.
    LastBlocks(usize),
    /// The head; where it is tied, the embedding with it.
    Head,
    /// Everything there is.
    Everything,
}

/// Low-rank adapters of linear maps (Hu et al., 2021, arXiv 2106.09685): `y = W x + (α / r) · B (A x)`.
///
/// `A` starts as PEFT's does, uniform within ±1/√in, and `B` at 0. A projection that has a low-rank residual already
/// gets no second one: the one that it has is trained in its place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Lora {
    /// r: rows of `A`, columns of `B`; 8 by default.
    pub rank: usize,
    /// α; 16 by default.
    pub alpha: f64,
    /// The projections that are adapted; all that the blocks have where empty, as by default.
    pub projections: Vec<Projection>,
    /// Whether depths that share a matrix share its adapter too, and not each have one, as they do by default. Where it
    /// is kept, a compact checkpoint stores it once.
    pub shared: bool,
    /// Whether adapters become part of their matrices in the end, where that is exact, as they do by default.
    pub merge: bool,
}

impl Default for Lora {
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, projections: Vec::new(), shared: true, merge: true }
    }
}

/// Parameters that are trained alike, as one of torch's `param_groups`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ParamGroup {
    /// Which; what several groups ask for belongs to the first of them.
    pub params: Trainable,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay; 0 by default.
    #[serde(default)]
    pub weight_decay: f64,
}

impl From<Trainable> for ParamGroup {
    /// A group at its [usual learning rate](Trainable::learning_rate), without weight decay.
    fn from(params: Trainable) -> Self {
        let learning_rate = params.learning_rate();
        Self::new(params, learning_rate)
    }
}

impl ParamGroup {
    /// A group without weight decay.
    #[must_use]
    pub fn new(params: Trainable, learning_rate: f64) -> Self {
        Self { params, learning_rate, weight_decay: 0.0 }
    }

    /// The same group with weight decay.
    #[must_use]
    pub fn with_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// Fails for more last blocks than the `depth` of a model.
    pub(crate) fn check_depth(&self, depth: usize) -> Result<()> {
        match self.params {
            Trainable::LastBlocks(count) if count > depth => {
                Err(Error::argument("last blocks", count, format!("at most the {depth} of the model")))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        for (name, value) in [("learning_rate", self.learning_rate), ("weight_decay", self.weight_decay)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::argument(
                    name,
                    value,
                    format!("a number from 0 on, for {}", self.params.name()),
                ));
            }
        }
        match &self.params {
            Trainable::Lora(lora) if lora.rank == 0 => Err(Error::argument("lora rank", 0, "at least 1")),
            Trainable::Lora(lora) if !(lora.alpha.is_finite() && lora.alpha > 0.0) => {
                Err(Error::argument("lora alpha", lora.alpha, "a positive number"))
            }
            _ => Ok(()),
        }
    }
}

impl Lora {
    fn adapts(&self, projection: Projection) -> bool {
        self.projections.is_empty() || self.projections.contains(&projection)
    }
}

impl Trainable {
    /// The highest learning rate that suits it in a healing of a few hundred steps, as the table of
    /// [`heal`](super) has it.
    #[must_use]
    pub fn learning_rate(&self) -> f64 {
        match self {
            Self::Norms | Self::Scales => 5e-3,
            Self::Lora(_) => 1e-3,
            Self::Residuals => 3e-4,
            Self::SharedMatrices | Self::Matrices | Self::LastBlocks(_) | Self::Head | Self::Everything => {
                1e-4
            }
        }
    }

    /// Whether it is this vector of a model of so many blocks that it moves, so that it is stored in f32 afterwards.
    pub(crate) fn moves(&self, param: Param, depth: usize) -> bool {
        match (self, param) {
            (Self::Everything, param) => !param.is_matrix(),
            (Self::LastBlocks(count), Param::Block(block, _)) => !param.is_matrix() && block + count >= depth,
            (Self::Norms, Param::FinalNorm(_) | Param::Block(_, BlockParam::Norm(..)))
            | (Self::Scales, Param::Block(_, BlockParam::Scale(_))) => true,
            _ => false,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Norms => "norms",
            Self::Scales => "scales",
            Self::Lora(_) => "lora",
            Self::Residuals => "residuals",
            Self::SharedMatrices => "shared matrices",
            Self::Matrices => "matrices",
            Self::LastBlocks(_) => "last blocks",
            Self::Head => "head",
            Self::Everything => "everything",
        }
    }

    fn claims(&self, param: Param, decoder: &Decoder, shared: &HashSet<TensorId>, id: TensorId) -> bool {
        use BlockParam::{LoraA, LoraB, Norm, Scale, Weight};
        match self {
            Self::Norms => matches!(param, Param::FinalNorm(_) | Param::Block(_, Norm(..))),
            Self::Scales => matches!(param, Param::Block(_, Scale(_))),
            Self::Lora(lora) => match param {
                Param::Block(_, LoraA(projection) | LoraB(projection)) => lora.adapts(projection),
                _ => false,
            },
            Self::Residuals => matches!(param, Param::Block(_, LoraA(_) | LoraB(_))),
            Self::SharedMatrices => matches!(param, Param::Block(_, Weight(_))) && shared.contains(&id),
            Self::Matrices => matches!(param, Param::Block(_, Weight(_))),
            Self::LastBlocks(count) => match param {
                Param::Block(depth, _) => depth + count >= decoder.depth(),
                _ => false,
            },
            Self::Head => param == if decoder.architecture().tied { Param::Embedding } else { Param::Head },
            Self::Everything => true,
        }
    }
}

/// A tensor that is trained.
#[derive(Debug)]
pub(super) struct Trained {
    /// The first parameter that it is.
    pub param: Param,
    pub var: Var,
    /// The place of its group.
    pub group: usize,
    /// Its value is this times the number that is trained: LoRA's α / r in a `B`, and 1 elsewhere.
    pub factor: f64,
}

/// A decoder of which some tensors are trained.
#[derive(Debug)]
pub(super) struct Student {
    /// With its trained tensors as variables: what is computed with it remembers how.
    pub tracked: Decoder,
    /// The same storage, without: what is computed with it is forgotten.
    pub plain: Decoder,
    pub trained: Vec<Trained>,
    original: Decoder,
    merge: bool,
}

impl Student {
    /// `decoder` with what the groups name as variables in f32, and what they add.
    pub(super) fn new(decoder: &Decoder, groups: &[ParamGroup], seed: u64) -> Result<Self> {
        decoder.check_not_quantized()?;
        groups.iter().try_for_each(|group| group.check_depth(decoder.depth()))?;
        let (mut grown, mut factors) = (decoder.clone(), HashMap::new());
        let mut rng = StdRng::seed_from_u64(seed);
        for group in groups {
            match &group.params {
                Trainable::Scales => grown = with_scales(&grown)?,
                Trainable::Lora(lora) => grown = with_lora(&grown, lora, &mut factors, &mut rng)?,
                _ => {}
            }
        }
        let claims = claims(&grown, groups)?;
        let mut trained = Vec::new();
        let tracked = grown.map(|param, value| {
            let Some(&group) = claims.get(&value.id()) else { return Ok(value.detach()) };
            let var = Var::from_tensor(&value.to_dtype(DType::F32)?)?;
            let factor = factors.get(&value.id()).copied().unwrap_or(1.0);
            trained.push(Trained { param, var: var.clone(), group, factor });
            Ok(var.into_inner())
        })?;
        let plain = tracked.map(|_, value| Ok(value.detach()))?;
        // Scales and LoRA are there for the training only, unless adapters are asked for.
        let keeps = |group: &ParamGroup| matches!(&group.params, Trainable::Lora(lora) if !lora.merge);
        let adds = |group: &ParamGroup| matches!(&group.params, Trainable::Scales | Trainable::Lora(_));
        let merge = groups.iter().any(adds) && !groups.iter().any(keeps);
        Ok(Self { tracked, plain, trained, original: decoder.clone(), merge })
    }

    /// The places of the trained tensors that the parameters of `of` are, in their order.
    pub(super) fn trained_in(&self, of: impl Fn(Param) -> bool) -> Vec<usize> {
        let known: HashMap<TensorId, usize> =
            self.trained.iter().enumerate().map(|(place, trained)| (trained.var.id(), place)).collect();
        let used = self.tracked.params().filter(|(param, _)| of(*param));
        let mut places: Vec<usize> = used.filter_map(|(_, value)| known.get(&value.id()).copied()).collect();
        places.sort_unstable();
        places.dedup();
        places
    }

    /// The decoder as it is now, its trained tensors rounded to what will be stored.
    pub(super) fn finished(&self) -> Result<Decoder> {
        use BlockParam::{LoraA, LoraB, Scale, Weight};
        let trained: HashSet<TensorId> = self.trained.iter().map(|trained| trained.var.id()).collect();
        // What may be merged is rounded once, after that.
        let mut unrounded = HashSet::new();
        let mut decoder = self.tracked.map(|param, value| {
            if !trained.contains(&value.id()) {
                return Ok(value.clone());
            }
            let Param::Block(_, Weight(_) | Scale(_) | LoraA(_) | LoraB(_)) = param else {
                return self.original.rounded(param, &value.detach().copy()?);
            };
            let copy = value.detach().copy()?;
            unrounded.insert(copy.id());
            Ok(copy)
        })?;
        if self.merge {
            decoder = decoder.merge_adapters()?;
        }
        decoder.map(|param, value| {
            let unrounded = unrounded.contains(&value.id());
            if unrounded { self.original.rounded(param, value) } else { Ok(value.clone()) }
        })
    }
}

/// The group of every tensor that belongs to one.
fn claims(decoder: &Decoder, groups: &[ParamGroup]) -> Result<HashMap<TensorId, usize>> {
    let fold = &decoder.architecture().fold;
    let (mut seen, mut shared) = (HashSet::new(), HashSet::new());
    for (depth, block) in decoder.blocks().iter().enumerate() {
        let borrowed = fold.block(depth).weights != depth;
        shared.extend(block.matrices().map(Tensor::id).filter(|id| !seen.insert(*id) && borrowed));
    }
    let mut claims: HashMap<TensorId, usize> = HashMap::new();
    for (param, value) in decoder.params() {
        let id = value.id();
        let group = groups.iter().position(|group| group.params.claims(param, decoder, &shared, id));
        if let Some(group) = group {
            let first = claims.entry(id).or_insert(group);
            *first = group.min(*first);
        }
    }
    let unused = (0..groups.len()).find(|place| !claims.values().any(|group| group == place));
    match unused.and_then(|place| groups.get(place)) {
        Some(group) => {
            let expected = "parameters that the model has and no group before takes";
            Err(Error::argument("trainable", group.params.name(), expected))
        }
        None if groups.is_empty() => Err(Error::argument("parameter groups", 0, "at least 1")),
        None => Ok(claims),
    }
}

/// The decoder with a scale of 1 on every projection that has none.
fn with_scales(decoder: &Decoder) -> Result<Decoder> {
    let mut grown = decoder.clone();
    for depth in 0..decoder.depth() {
        for projection in Projection::ALL {
            let Some((adapter, (output, _))) = adapter_at(&grown, depth, projection)? else { continue };
            if adapter.scale.is_none() {
                let scale = Tensor::ones(output, DType::F32, decoder.device())?;
                grown = grown.with_adapter(depth, projection, Adapter::new(Some(scale), adapter.low_rank))?;
            }
        }
    }
    Ok(grown)
}

/// The decoder with residuals that add nothing yet; `factors` learns of every new `B`.
fn with_lora(
    decoder: &Decoder,
    lora: &Lora,
    factors: &mut HashMap<TensorId, f64>,
    rng: &mut StdRng,
) -> Result<Decoder> {
    let fold = &decoder.architecture().fold;
    let mut made: HashMap<(usize, Projection), LowRank> = HashMap::new();
    let mut grown = decoder.clone();
    for depth in 0..decoder.depth() {
        for projection in Projection::ALL.into_iter().filter(|&projection| lora.adapts(projection)) {
            let Some((adapter, shape)) = adapter_at(&grown, depth, projection)? else { continue };
            if adapter.low_rank.is_some() {
                continue;
            }
            let holder = if lora.shared { fold.block(depth).weights } else { depth };
            let low_rank = match made.get(&(holder, projection)) {
                Some(low_rank) => low_rank.clone(),
                None => {
                    let low_rank = fresh(lora.rank, shape, rng, decoder.device())?;
                    factors.insert(low_rank.b.id(), lora.alpha / lora.rank as f64);
                    made.insert((holder, projection), low_rank.clone());
                    low_rank
                }
            };
            grown = grown.with_adapter(depth, projection, Adapter::new(adapter.scale, Some(low_rank)))?;
        }
    }
    Ok(grown)
}

/// The adapter of a projection and its `(out, in)`, where the block has it.
fn adapter_at(
    decoder: &Decoder,
    depth: usize,
    projection: Projection,
) -> Result<Option<(Adapter, (usize, usize))>> {
    let Some(block) = decoder.blocks().get(depth) else { return Ok(None) };
    let shape = block.weights.get(projection).map(Matrix::dims2).transpose()?;
    Ok(shape.map(|shape| (block.own.adapters[projection].clone(), shape)))
}

/// A residual that adds nothing, of `rank` for a projection of this `(out, in)`.
fn fresh(rank: usize, (output, input): (usize, usize), rng: &mut StdRng, device: &Device) -> Result<LowRank> {
    if rank > output.min(input) {
        let expected = format!("at most {} for a projection of {output} × {input}", output.min(input));
        return Err(Error::argument("lora rank", rank, expected));
    }
    let bound = 1.0 / (input as f32).sqrt();
    let values: Vec<f32> = (0..rank * input).map(|_| rng.random_range(-bound..bound)).collect();
    Ok(LowRank {
        a: Tensor::from_vec(values, (rank, input), device)?,
        b: Tensor::zeros((output, rank), DType::F32, device)?,
    })
}
