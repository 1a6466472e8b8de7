//! What a run takes in memory, and whether blocks are read from disk for it.

use candle_core::DType;

use super::inputs::Inputs;
use super::recipe::{Goal, Precision, Recipe};
use crate::bytes::Bytes;
use crate::checkpoint::StreamOptions;
use crate::error::{Error, Result};
use crate::fold::FoldFootprint;
use crate::heal::{ParamGroup, Trainable};
use crate::importance::{Footprint, Method, MethodOptions, with_overhead, without_overhead};
use crate::model::{Architecture, Part, Projection};
use crate::plan::{Own, Ranks, Residual, ResidualStart, ScaleStart};

impl Inputs<'_> {
    /// How blocks are read from disk, where the run would take more memory than it may otherwise.
    pub(super) fn residence(&self) -> Result<Option<StreamOptions>> {
        let Some(most) = self.recipe.max_memory else { return Ok(None) };
        let memory = Memory::of(self);
        let stages = [memory.scoring(), memory.planning(), memory.folding(), memory.healing()];
        let needed = Bytes(with_overhead(stages.into_iter().fold(memory.plain(), u64::max)));
        if needed <= most {
            return Ok(None);
        }
        if let Some(reason) = self.recipe.needs_the_model() {
            let reason = format!("is {most}, the run takes about {needed}, and {reason}");
            return Err(Error::recipe("max_memory", reason));
        }
        let least = with_overhead(memory.streamed(0));
        let spare = most.0.checked_sub(least).ok_or_else(|| {
            let reason = "at least, with blocks read from disk one at a time";
            Error::recipe(
                "max_memory",
                format!("is {most}, and the run takes about {} {reason}", Bytes(least)),
            )
        })?;
        let all: Vec<usize> = (0..self.depth()).collect();
        let copied = self.checkpoint.bytes_to_copy(&all, self.expected_format());
        copied.map_err(|error| Error::recipe("format", error.to_string()))?;
        tracing::debug!(%needed, limit = %most, "blocks are read from disk one at a time");
        // Beside the results: the system's directory for temporary files may itself be in memory.
        let scratch = Some(self.work.0.clone());
        Ok(Some(StreamOptions { state_bytes: Some(without_overhead(spare)), scratch }))
    }
}

impl Recipe {
    /// Why the recipe cannot be followed with blocks read from disk one at a time.
    fn needs_the_model(&self) -> Option<String> {
        if !self.method.streams() {
            let names = Method::streaming();
            return Some(format!(
                "the method {} has to have the model in memory, unlike {names}",
                self.method
            ));
        }
        let halves = self.gates.as_ref().is_some_and(|gates| gates.halves);
        let keeping = self.gates.as_ref().is_some_and(|gates| !gates.gradient_checkpointing);
        let fields = [
            (self.heal.is_some(), "heal"),
            (self.share.is_some(), "share"),
            (self.mix.is_some(), "mix"),
            (!self.tasks.is_empty(), "tasks"),
            (matches!(self.target, Some(Goal::NllIncrease(_))), "target.nll-increase"),
            (halves, "gates.halves"),
            (keeping, "gates.gradient_checkpointing = false"),
            (self.latency.is_some(), "latency"),
            (self.samples.tokens > 0 && !self.samples.prompts.is_empty(), "samples.prompts"),
        ];
        let (_, field) = fields.into_iter().find(|(asked, _)| *asked)?;
        Some(format!(
            "`{field}` has to have the model in memory: blocks that are read from disk are only dropped"
        ))
    }
}

/// What takes room beside the weights.
pub(super) struct Memory<'a> {
    inputs: &'a Inputs<'a>,
    arch: &'a Architecture,
}

impl<'a> Memory<'a> {
    pub(super) fn of(inputs: &'a Inputs<'a>) -> Self {
        Self { inputs, arch: inputs.checkpoint.architecture() }
    }

    /// The counts of scoring with matrices of this type.
    fn counted(&self, dtype: DType) -> Footprint<'_> {
        Footprint::new(self.arch, dtype, &self.inputs.calibration)
    }

    /// The dense model's weights.
    pub(super) fn weights(&self) -> u64 {
        self.counted(DType::F32).weights()
    }

    /// The dense model, and the activations of one block on every core; of a run that reads blocks from disk, all of it.
    pub(super) fn plain(&self) -> u64 {
        if let Some(options) = &self.inputs.streamed {
            return self.streamed(options.state_bytes.unwrap_or(u64::MAX));
        }
        self.counted(DType::F32).in_memory(&self.inputs.checkpoint, 0)
    }

    pub(super) fn scoring(&self) -> u64 {
        if self.inputs.streamed.is_some() {
            return self.plain();
        }
        let recipe = self.inputs.recipe;
        let copy = if recipe.dtype == Precision::Bf16 { self.counted(DType::BF16).weights() } else { 0 };
        self.plain() + copy + self.counted(DType::F32).kept(recipe.method, &self.inputs.method_options())
    }

    /// What blocks that share keep, where any do.
    fn shared(&self) -> Option<Own> {
        let recipe = self.inputs.recipe;
        let mix = recipe.mix.map(|mix| {
            let residual = Residual {
                ranks: Ranks::Parameters(self.inputs.total(&mix)),
                start: ResidualStart::Whitened,
            };
            let ranked = mix.residual_shares().into_iter().any(|share| share > 0.0);
            Own {
                scales: Some(ScaleStart::LeastSquares),
                residual: Some(residual).filter(|_| ranked),
                ..Own::default()
            }
        });
        recipe.share.as_ref().map(|share| share.own).or(mix)
    }

    fn fold(&self) -> FoldFootprint<'_> {
        let windows = self.inputs.calibration.len() as u64;
        FoldFootprint { arch: self.arch, windows, state: self.counted(DType::F32).state() }
    }

    /// The dense model, and beside it the folded one.
    fn both(&self) -> u64 {
        let block = 4 * self.arch.parameters_of(Part::Whole) as u64;
        self.plain().saturating_add(self.fold().made(block))
    }

    /// Planning: ties are measured where blocks share, ranks spread, and mixes folded.
    pub(super) fn planning(&self) -> u64 {
        let Some(own) = self.shared() else { return self.plain() };
        let ranks = own.residual.map(|residual| residual.ranks);
        let started = if matches!(ranks, Some(Ranks::Parameters(_))) || self.inputs.recipe.mix.is_some() {
            self.fold().starts(own)
        } else {
            0
        };
        self.both().saturating_add(self.fold().ties().max(started))
    }

    /// Folding: both models, and starts.
    pub(super) fn folding(&self) -> u64 {
        let Some(own) = self.shared() else { return self.plain() };
        self.both().saturating_add(self.fold().starts(own))
    }

    /// Scoring or evaluating, whichever takes more, with blocks read from disk and room for so many bytes of states.
    fn streamed(&self, room: u64) -> u64 {
        let Inputs { recipe, checkpoint, evaluation, .. } = self.inputs;
        let takes = |counted: Footprint<'_>, method: Method, options: &MethodOptions| {
            let states = counted.states(method, options).min(room);
            counted.streamed(checkpoint, method, options).saturating_add(states)
        };
        let scoring = takes(self.counted(recipe.dtype.dtype()), recipe.method, &self.inputs.method_options());
        // A loss keeps what Block Influence keeps: one state a window.
        let evaluated = Footprint::new(self.arch, DType::F32, evaluation);
        scoring.max(takes(evaluated, Method::BlockInfluence, &MethodOptions::default()))
    }

    /// What is trained with its moments and its best values, in f32, one input of every block, and whichever takes more
    /// on the way back: the activations of a block or the logits of a few rows.
    pub(super) fn healing(&self) -> u64 {
        let Some(heal) = self.inputs.heal() else { return self.plain() };
        let groups = heal.groups.iter().map(|group| self.trained(group) as u64);
        let trained = groups.fold(0, u64::saturating_add).saturating_mul(5 * 4);
        let counted = self.counted(DType::F32);
        let states = self.arch.depth() as u64 * counted.state();
        let inputs = states.saturating_mul(heal.micro_batch as u64);
        let back = counted.back(heal.micro_batch as u64);
        [trained, inputs, back].into_iter().fold(self.plain(), u64::saturating_add)
    }

    /// How many numbers a group trains, at most.
    fn trained(&self, group: &ParamGroup) -> usize {
        let arch = self.arch;
        let depth = self.inputs.most_left();
        let shapes =
            || Projection::ALL.into_iter().filter_map(|projection| arch.projection_shape(projection));
        match &group.params {
            Trainable::Norms => (4 * depth + 1) * arch.hidden_size,
            Trainable::Scales => depth * shapes().map(|(output, _)| output).sum::<usize>(),
            Trainable::Lora(lora) => {
                let sides = shapes().map(|(output, input)| output + input).sum::<usize>();
                (depth * sides).saturating_mul(lora.rank)
            }
            Trainable::LastBlocks(count) => count.saturating_mul(arch.parameters_of(Part::Whole)),
            Trainable::Head => arch.vocab_size * arch.hidden_size,
            Trainable::Residuals | Trainable::SharedMatrices | Trainable::Matrices => {
                depth * arch.parameters_of(Part::Whole)
            }
            Trainable::Everything => arch.parameter_count(),
        }
    }
}

/// What the process has in memory beyond so many bytes, where the system tells.
pub(super) fn resident_beside(counted: u64) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes = line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?;
    Some((kilobytes * 1024).saturating_sub(counted))
}
