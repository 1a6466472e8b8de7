//! What a run would do, without doing it.

use std::fmt::{self, Write};
use std::time::Instant;

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};

use super::cost::Cost;
use super::curve::Healing;
use super::inputs::{Inputs, Keys};
use super::planning::Planned;
use super::recipe::{Precision, Recipe};
use super::run::{EVALUATION, HEALED, LATENCY, PLAN, SAMPLES, SCORES};
use super::sizes::Sizes;
use super::stage::Stage;
use crate::account::{Account, Held};
use crate::checkpoint::check_destination;
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::eval::{Latency, perplexity};
use crate::heal::{ParamGroup, Trainable};
use crate::importance::{Method, Scores};
use crate::model::{Architecture, Part, Projection};
use crate::progress::Observer;

/// What a run would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DryRun {
    /// Every stage that the recipe has, in their order.
    pub stages: Vec<Forecast>,
    /// The model as it is.
    pub dense: Sizes,
    /// What comes out, before anything that healing leaves beside its matrices. Absent where it depends on losses that
    /// nobody has measured.
    pub compressed: Option<Sizes>,
    /// Tokens on which the speed was measured; 0 where no stage has to run.
    pub measured_tokens: usize,
}

/// What a stage would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Forecast {
    /// The stage.
    pub stage: Stage,
    /// In a few words.
    pub what: String,
    /// Whether its result is known, and nothing will be done.
    pub known: bool,
    /// About how long it takes: its work, counted, at the speed of a few tokens. Long windows are slower than that, and
    /// searches often end early.
    pub seconds: f64,
    /// About how much memory the process takes at most: weights, optimiser and kept activations, counted. What the
    /// allocator keeps beside them is not.
    pub peak_bytes: u64,
}

impl DryRun {
    /// Seconds of all stages together.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.stages.iter().map(|stage| stage.seconds).sum()
    }

    /// The most memory that any stage takes.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.stages.iter().map(|stage| stage.peak_bytes).max().unwrap_or_default()
    }
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |f: &mut fmt::Formatter<'_>, name: &str, sizes: &Sizes| {
            let Sizes { blocks, parameters, stored_bytes, .. } = sizes;
            writeln!(f, "{name:<12} {blocks} blocks, {parameters} parameters, {stored_bytes} bytes")
        };
        size(f, "dense", &self.dense)?;
        match &self.compressed {
            Some(sizes) => {
                size(f, "compressed", sizes)?;
                sizes.assumed.iter().try_for_each(|assumed| writeln!(f, "  assumed: {assumed}"))?;
            }
            None => writeln!(f, "compressed   not known before losses are measured")?,
        }
        for Forecast { stage, what, known, seconds, peak_bytes } in &self.stages {
            let name = stage.name();
            if *known {
                writeln!(f, "{name:<9} known: {what}")?;
            } else {
                let megabytes = *peak_bytes as f64 / 1e6;
                writeln!(f, "{name:<9} about {seconds:.1} s, {megabytes:.0} MB: {what}")?;
            }
        }
        write!(f, "about {:.0} s in all, at the speed of {} tokens", self.seconds(), self.measured_tokens)
    }
}

/// Tokens on which the speed is measured, at most.
const FEW: usize = 64;

/// Seconds that one window takes.
#[derive(Debug, Clone, Copy, Default)]
struct Speed {
    block: f64,
    head: f64,
    load: f64,
    tokens: usize,
}

pub(super) fn forecast(recipe: &Recipe, observer: &mut dyn Observer) -> Result<DryRun> {
    let inputs = Inputs::open(recipe, observer)?;
    let keys = inputs.keys()?;
    let saved = inputs.saved(&keys, observer)?.is_some();
    if !saved {
        check_destination(&recipe.out)?;
    }
    let known = Known::find(&inputs, &keys, saved)?;
    let planned: Option<Planned> = inputs.work.known(PLAN, &keys.plan)?;
    let dense = inputs.dense_sizes();
    let compressed = match &planned {
        Some(planned) => Some(inputs.planned_sizes(&planned.plan)?),
        None => inputs.assumed_sizes()?,
    };
    let speed = if known.all() { Speed::default() } else { Speed::measure(&inputs, observer)? };
    let blocks = compressed.as_ref().map_or(dense.blocks, |sizes| sizes.blocks);
    let stages = known.stages(&inputs, &speed, blocks);
    Ok(DryRun { stages, dense, compressed, measured_tokens: speed.tokens })
}

/// Which results are there.
#[allow(clippy::struct_excessive_bools)] // one for each result
struct Known {
    scores: bool,
    plan: bool,
    healed: bool,
    dense: bool,
    folded: bool,
    evaluated: bool,
    timed: bool,
    sampled: Sampled,
    saved: bool,
}

/// Whose samples are there, or not asked for.
struct Sampled {
    dense: bool,
    folded: bool,
    compressed: bool,
}

impl Known {
    fn find(inputs: &Inputs<'_>, keys: &Keys, saved: bool) -> Result<Self> {
        let work = &inputs.work;
        let evaluated = |key| work.known::<super::report::Measured>(EVALUATION, key);
        let scores = keys.score.as_ref().map(|key| work.known::<Scores>(SCORES, key)).transpose()?;
        let timed = |key| work.known::<(Latency, Latency)>(LATENCY, key);
        let timed = keys.latency.as_ref().map(timed).transpose()?;
        let healed = match &keys.heal {
            Some(key) => {
                let weights = work.path(HEALED, key, "");
                work.known::<Healing>(HEALED, key)?.is_some() && weights.exists()
            }
            None => true,
        };
        let silent = inputs.prompts()?.is_empty();
        let sampled = |key| Ok::<_, Error>(silent || work.known::<Vec<String>>(SAMPLES, key)?.is_some());
        let samples = &keys.samples;
        let sampled = Sampled {
            dense: sampled(&samples.dense)?,
            folded: keys.heal.is_none() || sampled(&samples.folded)?,
            compressed: sampled(&samples.compressed)?,
        };
        Ok(Self {
            sampled,
            scores: scores.is_none_or(|scores| scores.is_some()),
            plan: work.known::<Planned>(PLAN, &keys.plan)?.is_some(),
            healed,
            dense: evaluated(&keys.dense)?.is_some(),
            folded: keys.heal.is_none() || evaluated(&keys.folded)?.is_some(),
            evaluated: evaluated(&keys.evaluate)?.is_some(),
            timed: timed.is_none_or(|timed| timed.is_some()),
            saved,
        })
    }

    fn all(&self) -> bool {
        self.scores && self.plan && self.healed && self.measured() && self.saved
    }

    /// All of evaluating.
    fn measured(&self) -> bool {
        let Sampled { dense, folded, compressed } = self.sampled;
        self.dense && self.folded && self.evaluated && self.timed && dense && folded && compressed
    }

    /// Whether nobody asks for the folded model.
    fn unfolded(&self, heals: bool) -> bool {
        let Sampled { folded, compressed, .. } = self.sampled;
        if heals {
            self.healed && self.folded && folded
        } else {
            self.evaluated && compressed && self.timed && self.saved
        }
    }

    fn stages(&self, inputs: &Inputs<'_>, speed: &Speed, blocks: usize) -> Vec<Forecast> {
        let recipe = inputs.recipe;
        let memory = Memory::of(inputs);
        let of = |stage, what: String, known: bool, cost: Cost, peak: u64| Forecast {
            stage,
            what,
            known,
            seconds: if known { 0.0 } else { speed.seconds(cost) },
            peak_bytes: if known { 0 } else { peak },
        };
        let mut stages = Vec::new();
        let calibration = format!("{} windows of {}", inputs.calibration.len(), inputs.calibration.seq_len());
        if inputs.needs_scores() {
            let what = format!("importance by {} on {calibration}", recipe.method);
            stages.push(of(Stage::Score, what, self.scores, inputs.scoring_cost(), memory.scoring()));
        }
        let what = format!("{} of {} blocks may go", inputs.remove, inputs.depth());
        stages.push(of(Stage::Plan, what, self.plan, inputs.planning_cost(), memory.plain()));
        let unfolded = self.unfolded(recipe.heal.is_some());
        let what = "the plan applied, not kept".to_string();
        stages.push(of(Stage::Fold, what, unfolded, inputs.folding_cost(), memory.plain()));
        if let Some((train, _)) = &inputs.healing {
            let what = format!("a fine-tune on {} windows of {}", train.len(), train.seq_len());
            stages.push(of(Stage::Heal, what, self.healed, inputs.healing_cost(), memory.healing()));
        }
        let evaluation = &inputs.evaluation;
        let models =
            [(self.dense, inputs.depth()), (self.folded, blocks), (self.evaluated, blocks)].into_iter();
        let left: usize = models.filter(|(known, _)| !known).map(|(_, blocks)| blocks).sum();
        let Sampled { dense, folded, compressed } = self.sampled;
        let models = [(dense, inputs.depth()), (folded, blocks), (compressed, blocks)].into_iter();
        let sampling: usize = models.filter(|(known, _)| !known).map(|(_, blocks)| blocks).sum();
        let (windows, tasks) = (evaluation.len(), inputs.tasks.len());
        let mut what =
            format!("losses on {windows} windows of {}, {tasks} tasks, samples", evaluation.seq_len());
        if let Some(options) = recipe.latency {
            let _ = write!(what, ", speed in {} runs", options.runs);
        }
        let mut cost = inputs.sampling_cost(sampling);
        if left > 0 {
            cost = cost.and(inputs.evaluation_cost(left));
        }
        if !self.timed {
            cost = cost.and(inputs.latency_cost(inputs.depth() + blocks));
        }
        stages.push(of(Stage::Evaluate, what, self.measured(), cost, memory.plain()));
        // Written, read back, and hashed.
        let writing = Cost { seconds: 3.0 * speed.load, ..Cost::default() };
        let what = format!("a checkpoint at {}", recipe.out.display());
        stages.push(of(Stage::Save, what, self.saved, writing, memory.plain()));
        stages
    }
}

impl Speed {
    /// Reads the model and runs it on a few tokens, twice: the first pass touches memory for the first time.
    fn measure(inputs: &Inputs<'_>, observer: &mut dyn Observer) -> Result<Self> {
        let start = Instant::now();
        let decoder = inputs.checkpoint.decoder_observed(DType::F32, &Device::Cpu, observer)?;
        let load = start.elapsed().as_secs_f64();
        let tokens = inputs.calibration.seq_len().min(FEW);
        let ids = inputs.calibration.window(0)?.iter().take(tokens).copied().collect();
        let few = Windows::from_ids(vec![ids])?;
        perplexity(&decoder, &few, &mut ())?;
        let start = Instant::now();
        decoder.hidden(&few.tensor(0, &Device::Cpu)?)?;
        let blocks = start.elapsed().as_secs_f64();
        let start = Instant::now();
        perplexity(&decoder, &few, &mut ())?;
        let whole = start.elapsed().as_secs_f64();
        let windows = inputs.calibration.seq_len() as f64 / tokens as f64;
        Ok(Self {
            block: blocks * windows / decoder.depth().max(1) as f64,
            head: (whole - blocks).max(0.0) * windows,
            load,
            tokens,
        })
    }

    fn seconds(&self, cost: Cost) -> f64 {
        cost.blocks * self.block + cost.heads * self.head + cost.seconds
    }
}

/// What takes room beside the weights.
struct Memory<'a> {
    inputs: &'a Inputs<'a>,
    arch: &'a Architecture,
}

impl<'a> Memory<'a> {
    fn of(inputs: &'a Inputs<'a>) -> Self {
        Self { inputs, arch: inputs.checkpoint.architecture() }
    }

    fn weights(&self, resident: DType) -> u64 {
        let held = Held { stored: resident.into(), resident, context: 1 };
        Account::planned(self.arch, &held).resident_bytes
    }

    /// One hidden state of a window.
    fn state(&self) -> u64 {
        (self.inputs.calibration.seq_len() * self.arch.hidden_size * 4) as u64
    }

    /// The dense model, and the activations of one block on every core.
    fn plain(&self) -> u64 {
        let wide = self.arch.hidden_size * 8 + self.arch.intermediate_size * 3;
        let block = self.inputs.calibration.seq_len() * wide * 4 * rayon::current_num_threads();
        self.weights(DType::F32) + block as u64
    }

    fn scoring(&self) -> u64 {
        let recipe = self.inputs.recipe;
        let copy = if recipe.dtype == Precision::Bf16 { self.weights(DType::BF16) } else { 0 };
        let (depth, windows) = (self.arch.depth() as u64, self.inputs.calibration.len() as u64);
        let kept = match recipe.method {
            Method::Taylor => 2 * 4 * depth * self.arch.parameters_of(Part::Whole) as u64,
            Method::Coupling | Method::Gates => 2 * depth * self.state(),
            Method::GreedyPerplexity | Method::MacroInfluence => windows * (depth + 1) * self.state(),
            _ => depth * self.state(),
        };
        self.plain() + copy + kept
    }

    /// What is trained with its moments and its best values, in f32, and one input of every block.
    fn healing(&self) -> u64 {
        let Some(heal) = self.inputs.heal() else { return self.plain() };
        let trained: usize = heal.groups.iter().map(|group| self.trained(group)).sum();
        let inputs = (self.arch.depth() * heal.micro_batch) as u64 * self.state();
        self.plain() + 5 * 4 * trained as u64 + inputs
    }

    /// How many numbers a group trains, at most.
    fn trained(&self, group: &ParamGroup) -> usize {
        let arch = self.arch;
        let depth = arch.depth() - self.inputs.remove;
        let shapes =
            || Projection::ALL.into_iter().filter_map(|projection| arch.projection_shape(projection));
        match &group.params {
            Trainable::Norms => (4 * depth + 1) * arch.hidden_size,
            Trainable::Scales => depth * shapes().map(|(output, _)| output).sum::<usize>(),
            Trainable::Lora(lora) => {
                depth * lora.rank * shapes().map(|(output, input)| output + input).sum::<usize>()
            }
            Trainable::LastBlocks(count) => count * arch.parameters_of(Part::Whole),
            Trainable::Head => arch.vocab_size * arch.hidden_size,
            Trainable::Residuals | Trainable::SharedMatrices | Trainable::Matrices => {
                depth * arch.parameters_of(Part::Whole)
            }
            Trainable::Everything => arch.parameter_count(),
        }
    }
}
