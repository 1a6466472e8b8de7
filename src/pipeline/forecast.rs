//! What a run would do, without doing it.

use std::fmt::{self, Write};
use std::time::Instant;

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};

use super::cost::Cost;
use super::curve::Healing;
use super::inputs::{Inputs, Keys};
use super::memory::{Memory, resident_beside};
use super::planning::Planned;
use super::recipe::Recipe;
use super::run::{EVALUATION, HEALED, LATENCY, PLAN, SAMPLES, SCORES};
use super::sizes::Sizes;
use super::stage::Stage;
use crate::checkpoint::{StreamOptions, check_destination};
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::eval::{Latency, perplexity};
use crate::importance::Scores;
use crate::model::BlockSource;
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
    /// Bytes that the process took on these tokens beside the weights, and that every peak has in it: code, threads, the
    /// text and its tokenizer, what the allocator keeps. Absent where no stage has to run, and where the system does not
    /// tell (any but Linux): peaks are then what is counted alone.
    pub process_bytes: Option<u64>,
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
    /// About how much memory the process takes at most: weights, optimiser and kept activations, counted, and
    /// [`process_bytes`](DryRun::process_bytes).
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
        match self.process_bytes {
            Some(bytes) => writeln!(f, "of every peak, {:.0} MB are the process itself", bytes as f64 / 1e6)?,
            None if self.measured_tokens > 0 => {
                writeln!(
                    f,
                    "memory is what can be counted: this system does not tell what the process takes"
                )?;
            }
            None => {}
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
    /// Bytes that the process takes beside the weights, where the system tells.
    process: Option<u64>,
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
        Some(planned) => Some(inputs.planned_sizes(&planned.plan, inputs.format(&planned.plan))?),
        None => inputs.assumed_sizes()?,
    };
    let speed = if known.all() { Speed::default() } else { Speed::measure(&inputs, observer)? };
    let blocks = compressed.as_ref().map_or(dense.blocks, |sizes| sizes.blocks);
    let stages = known.stages(&inputs, &speed, blocks);
    let Speed { tokens: measured_tokens, process: process_bytes, .. } = speed;
    Ok(DryRun { stages, dense, compressed, measured_tokens, process_bytes })
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
        let streams = inputs.streamed.is_some();
        let of = |stage, what: String, known: bool, cost: Cost, peak: u64| Forecast {
            stage,
            what,
            known,
            seconds: if known { 0.0 } else { speed.seconds(cost) },
            peak_bytes: if known { 0 } else { peak.saturating_add(speed.process.unwrap_or_default()) },
        };
        // The next block is read while one computes: what takes longer counts.
        let read = |cost: Cost, passes: usize| {
            let reading = speed.load * passes as f64;
            let waits = streams && reading > speed.seconds(cost);
            if waits { Cost { seconds: reading, ..Cost::default() } } else { cost }
        };
        let mut stages = Vec::new();
        let calibration = format!("{} windows of {}", inputs.calibration.len(), inputs.calibration.seq_len());
        if inputs.needs_scores() {
            let how = if streams { ", blocks read from disk one at a time" } else { "" };
            let what = format!("importance by {} on {calibration}{how}", recipe.method);
            let cost = read(inputs.scoring_cost(), inputs.scoring_passes());
            stages.push(of(Stage::Score, what, self.scores, cost, memory.scoring()));
        }
        let what = format!("{} of {} blocks may go", inputs.remove, inputs.depth());
        stages.push(of(Stage::Plan, what, self.plan, inputs.planning_cost(), memory.planning()));
        let unfolded = self.unfolded(recipe.heal.is_some());
        if !streams {
            let what = "the plan applied, not kept".to_string();
            stages.push(of(Stage::Fold, what, unfolded, inputs.folding_cost(), memory.folding()));
        }
        if let Some((train, _)) = &inputs.healing {
            let what = format!("a fine-tune on {} windows of {}", train.len(), train.seq_len());
            stages.push(of(Stage::Heal, what, self.healed, inputs.healing_cost(), memory.healing()));
        }
        let evaluation = &inputs.evaluation;
        let unknown = |known: [bool; 3]| {
            let models = known.into_iter().zip([inputs.depth(), blocks, blocks]);
            models.filter(|(known, _)| !known).map(|(_, blocks)| blocks).collect::<Vec<_>>()
        };
        let evaluated = unknown([self.dense, self.folded, self.evaluated]);
        let Sampled { dense, folded, compressed } = self.sampled;
        let sampled = unknown([dense, folded, compressed]);
        let (windows, tasks) = (evaluation.len(), inputs.tasks.len());
        let samples = if streams { "" } else { ", samples" };
        let mut what =
            format!("losses on {windows} windows of {}, {tasks} tasks{samples}", evaluation.seq_len());
        if let Some(options) = recipe.latency {
            let _ = write!(what, ", speed in {} runs", options.runs);
        }
        let costs = evaluated.iter().map(|&blocks| inputs.evaluation_cost(blocks));
        let costs = costs.chain(sampled.iter().map(|&blocks| inputs.sampling_cost(blocks)));
        let mut cost = costs.fold(Cost::default(), Cost::and);
        if !self.timed {
            cost = cost.and(inputs.latency_cost(inputs.depth() + blocks));
        }
        let cost = read(cost, evaluated.len());
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
        if inputs.streamed.is_some() {
            return Self::measure_streamed(inputs);
        }
        let start = Instant::now();
        let decoder = inputs.checkpoint.decoder_observed(DType::F32, &Device::Cpu, observer)?;
        let load = start.elapsed().as_secs_f64();
        let few = few(inputs)?;
        let tokens = few.seq_len();
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
            process: resident_beside(Memory::of(inputs).weights()),
        })
    }

    /// Reads one block and the ends, and runs them on a few tokens.
    fn measure_streamed(inputs: &Inputs<'_>) -> Result<Self> {
        let model = inputs.checkpoint.streamed(DType::F32, &Device::Cpu, StreamOptions::default())?;
        let few = few(inputs)?;
        let (tokens, pass) = (few.seq_len(), model.pass_over(few.seq_len())?);
        let x = model.front()?.embed(&few.tensor(0, &Device::Cpu)?, &pass)?;
        let (mut read, mut block) = (0.0, 0.0);
        let start = Instant::now();
        model.visit(&[0], &mut |first| {
            read = start.elapsed().as_secs_f64();
            first.run(&x, &pass)?;
            let start = Instant::now();
            first.run(&x, &pass)?;
            block = start.elapsed().as_secs_f64();
            Ok(())
        })?;
        let back = model.back()?;
        let start = Instant::now();
        back.window_nll(&x, few.window(0)?.get(1..).unwrap_or_default())?;
        let head = start.elapsed().as_secs_f64();
        // Read again by every stage, and counted there.
        drop(back);
        let windows = inputs.calibration.seq_len() as f64 / tokens as f64;
        let load = read * inputs.depth() as f64;
        Ok(Self { block: block * windows, head: head * windows, load, tokens, process: resident_beside(0) })
    }

    fn seconds(&self, cost: Cost) -> f64 {
        cost.blocks * self.block + cost.heads * self.head + cost.seconds
    }
}

/// The beginning of a window.
fn few(inputs: &Inputs<'_>) -> Result<Windows> {
    let ids = inputs.calibration.window(0)?.iter().take(FEW).copied().collect();
    Windows::from_ids(vec![ids])
}
