//! Learnable gates.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::gate_functions::{Gated, epsilon, hard_concrete, logit, sigmoid, smoothed};
use super::gate_state::State;
use super::gate_walk::{Draw, Drawn, walk};
use super::{Importance, Scores, check_blocks, check_removal, check_units, spearman};
use crate::checkpoint::StreamedDecoder;
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::{Architecture, BlockSource, Decoder, Part, Unit, fingerprint};
use crate::progress::{self, Observer};

/// One scalar gate a block, trained on the model's loss with all weights frozen: 1 is the original block, 0 removes
/// it. All gates train together, so that each learns what it is worth while others are gone.
///
/// After the gates of `FoldGPT` (arXiv 2407.00928). The two halves of the windows train a set of gates each, in turn;
/// a block's score is the mean of its two gates, averaged over the last third of the steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Gates {
    /// How many blocks the gates are driven to remove, at least one; with `halves`, as many parameters as these have. 0
    /// by default, which training refuses: the caller says.
    pub remove: usize,
    /// A gate for the attention and one for the MLP of every block, and not one for both, as by default.
    pub halves: bool,
    /// Blocks whose gates stay open; none by default.
    pub protected: Vec<usize>,
    /// How a gate is made of its parameter; by hard concrete by default.
    pub kind: GateKind,
    /// Training steps, both sets of gates together; 240 by default.
    pub steps: usize,
    /// Windows in each step; 2 by default.
    pub batch: usize,
    /// Adam's learning rate; 0.1 by default.
    pub learning_rate: f64,
    /// Seed of batches and samples; 0 by default.
    pub seed: u64,
    /// Scores to start from, one a block: the gates of those with low scores begin nearer to closing. All alike
    /// where absent, as by default. Both sets of gates start from them, so that their correlation says less of the text.
    pub warm_start: Option<Vec<f64>>,
    /// Stops when every gate's probability of being open has stayed within this of 0 or 1 for a tenth of the steps; 0.02
    /// by default.
    pub polarised: f64,
    /// Keeps only the inputs of blocks on the way forward, and computes each block again on the way back; so by default,
    /// and always where blocks are read from disk. Without it all activations of a window are kept, which changes
    /// nothing but time and memory, and is no part of what results say of their options.
    #[serde(skip_serializing)]
    pub gradient_checkpointing: bool,
    /// Where the state is kept: written every few steps or seconds, and gone on from where it exists and fits. Nowhere by
    /// default.
    #[serde(skip)]
    pub state_file: Option<PathBuf>,
}

/// How a gate is made of its parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum GateKind {
    /// Stochastic gates with mass at exactly 0 and 1 (hard concrete: Louizos et al., 2018, arXiv 1712.01312). The
    /// expected number of open gates is held at the target by a common offset, at every step.
    #[default]
    HardConcrete,
    /// Gates of 0 and 1 in the forward pass, the lowest ones under logistic noise closed; the gradient goes straight
    /// through to the parameters.
    StraightThrough,
    /// The paper's gate `φ² / (φ² + ε)`, ε annealed from 1e-1 to 1e-4, with the penalty `λ · max(0, F − (1 − p))²`
    /// on the share of open gates. Never 0 in the forward pass: kept for comparison.
    SmoothedL0,
}

impl Default for Gates {
    fn default() -> Self {
        Self {
            remove: 0,
            halves: false,
            protected: Vec::new(),
            kind: GateKind::default(),
            steps: 240,
            batch: 2,
            learning_rate: 0.1,
            seed: 0,
            warm_start: None,
            polarised: 0.02,
            gradient_checkpointing: true,
            state_file: None,
        }
    }
}

const STAGE: &str = "gates";
/// The state is kept after so many steps, or so much time if they are slow.
const SAVE_STEPS: usize = 10;
const SAVE_TIME: Duration = Duration::from_secs(5);

impl Importance for Gates {
    fn method(&self) -> &'static str {
        STAGE
    }

    fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores> {
        self.score_on(decoder, windows, observer)
    }

    fn score_streamed(
        &self,
        model: &StreamedDecoder<'_>,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Scores> {
        self.score_on(model, windows, observer)
    }
}

/// What training gates over any units gives.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TrainedGates {
    /// The units, in the order of the other fields.
    pub units: Vec<Unit>,
    /// The mean probability of being open of each unit's two gates over the last third of the steps.
    pub gates: Vec<f64>,
    /// Spearman's rank correlation of the two sets of gates; absent with a single window.
    pub stability: Option<f64>,
    /// The gates after every step, the two sets in turn.
    pub trajectory: Vec<Vec<f64>>,
    /// Seconds spent, those of interrupted runs included.
    pub seconds: f64,
    /// Blocks computed on a window; a backward counts as two, and a removed block as none.
    pub block_runs: f64,
}

impl TrainedGates {
    fn scores(self, method: &str, windows: &Windows) -> Result<Scores> {
        let mut scores = Scores::of_units(method, windows, &self.units, self.gates)?;
        if let Some(stability) = self.stability {
            scores = scores.with_stability(stability);
        }
        scores.trajectory = self.trajectory;
        scores.seconds = self.seconds;
        scores.block_runs = self.block_runs;
        Ok(scores)
    }
}

impl Gates {
    /// Trains gates over `units`: all blocks, or the halves of all blocks for twice as many gates.
    ///
    /// # Errors
    /// Options outside of their range, other units, a loss that is not finite, a state file of another training, or a
    /// cancelling observer (what was kept in the state file stays).
    pub fn train(
        &self,
        decoder: &Decoder,
        windows: &Windows,
        units: &[Unit],
        observer: &mut dyn Observer,
    ) -> Result<TrainedGates> {
        let start = self.warm_start.as_deref();
        self.train_from([start, start], decoder, windows, units, observer)
    }

    fn score_on(
        &self,
        source: &dyn BlockSource,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Scores> {
        let depth = source.architecture().depth();
        let units = self.units(depth);
        let start = self.warm_start.as_deref();
        let trained = self.train_from([start, start], source, windows, &units, observer)?;
        trained.scores(STAGE, windows)?.with_options(self)
    }

    /// As [`train`](Self::train), wherever the blocks come from, and each set of gates from scores of its own: what is
    /// known of one half of the windows should not reach the gates of the other.
    pub(super) fn train_from(
        &self,
        starts: [Option<&[f64]>; 2],
        source: &dyn BlockSource,
        windows: &Windows,
        units: &[Unit],
        observer: &mut dyn Observer,
    ) -> Result<TrainedGates> {
        let arch = source.architecture();
        check_blocks(&self.protected, arch.depth())?;
        check_units(units, arch.depth())?;
        self.check(units, starts)?;
        let gated = self.gated(arch, units);
        let total = self.steps as u64;
        let state = progress::stage(STAGE, total, observer, |observer| {
            let mut state = self.resume(starts, source, windows, &gated, &mut || {
                progress::advance(STAGE, 0, total, observer)
            })?;
            if state.step > 0 {
                tracing::debug!(step = state.step, "gates go on from their state");
            }
            let mut saved = Instant::now();
            // Each set has had a step, at least.
            while state.step < self.steps && state.quiet < (self.steps / 10).max(2) {
                let start = Instant::now();
                let done = state.step as u64;
                self.step(&mut state, source, windows, &gated, &mut || {
                    progress::advance(STAGE, done, total, observer)
                })?;
                state.seconds += start.elapsed().as_secs_f64();
                let due = state.step == self.steps
                    || state.step.is_multiple_of(SAVE_STEPS)
                    || saved.elapsed() >= SAVE_TIME;
                if let Some(path) = self.state_file.as_deref().filter(|_| due) {
                    state.save(path)?;
                    saved = Instant::now();
                }
                progress::advance(STAGE, state.step as u64, total, observer)?;
            }
            if state.step < self.steps {
                tracing::debug!(step = state.step, "gates have come to rest");
            }
            Ok(state)
        })?;
        Ok(TrainedGates {
            units: units.to_vec(),
            gates: state.averaged(None),
            stability: (windows.len() > 1)
                .then(|| spearman(&state.averaged(Some(0)), &state.averaged(Some(1)))),
            block_runs: state.block_runs,
            trajectory: state.trajectory,
            seconds: state.seconds,
        })
    }

    /// Fails for options that no model can be trained by.
    pub(crate) fn check_options(&self) -> Result<()> {
        if self.steps < 2 {
            return Err(Error::argument("steps", self.steps, "at least 2, one for each set of gates"));
        }
        if self.batch == 0 {
            return Err(Error::argument("batch", 0, "at least 1 window in a step"));
        }
        if !(0.0..=0.5).contains(&self.polarised) {
            return Err(Error::argument("polarised", self.polarised, "a distance from 0 or 1, at most 0.5"));
        }
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            return Err(Error::argument("learning_rate", self.learning_rate, "a positive number"));
        }
        Ok(())
    }

    /// Fails for options that a model of so many blocks cannot be scored by.
    pub(crate) fn check_depth(&self, depth: usize) -> Result<()> {
        let start = self.warm_start.as_deref();
        self.check(&self.units(depth), [start, start])
    }

    /// What has a gate in a model of so many blocks.
    fn units(&self, depth: usize) -> Vec<Unit> {
        if self.halves { Unit::halves(depth) } else { Unit::blocks(depth) }
    }

    fn check(&self, units: &[Unit], starts: [Option<&[f64]>; 2]) -> Result<()> {
        if self.remove == 0 {
            return Err(Error::argument("blocks to remove", 0, "at least 1: gates are trained towards it"));
        }
        self.check_options()?;
        let mut free: Vec<usize> = units.iter().map(|unit| unit.block).collect();
        free.retain(|block| !self.protected.contains(block));
        free.dedup();
        check_removal(self.remove, free.len())?;
        match starts.into_iter().flatten().find(|scores| scores.len() != units.len()) {
            Some(scores) => {
                let expected = format!("one for each of {} units", units.len());
                Err(Error::argument("warm start", format!("{} scores", scores.len()), expected))
            }
            None => Ok(()),
        }
    }

    fn gated<'a>(&self, arch: &Architecture, units: &'a [Unit]) -> Gated<'a> {
        let cost = |unit: &Unit| arch.parameters_of(unit.part) as f64;
        let costs: Vec<f64> = units.iter().map(cost).collect();
        let target = costs.iter().sum::<f64>() - self.remove as f64 * arch.parameters_of(Part::Whole) as f64;
        Gated {
            units,
            open: units.iter().map(|unit| self.protected.contains(&unit.block)).collect(),
            costs,
            target,
        }
    }

    /// The state to go on from: that of the file, or a new one. Only a file asks which model it is.
    fn resume(
        &self,
        starts: [Option<&[f64]>; 2],
        source: &dyn BlockSource,
        windows: &Windows,
        gated: &Gated<'_>,
        tick: &mut dyn FnMut() -> Result<()>,
    ) -> Result<State> {
        let units = gated.units;
        let phis = starts.map(|start| self.initial(start, units.len()));
        let Some(path) = self.state_file.as_deref() else {
            return Ok(State::new(String::new(), String::new(), phis));
        };
        let starts = serde_json::to_string(&starts).map_err(|error| Error::Plan(error.to_string()))?;
        match self.state(source, windows, units, tick)? {
            (_, Some(state)) => state.from(path, &starts),
            (identity, None) => Ok(State::new(identity, starts, phis)),
        }
    }

    /// What a state has to belong to, and the one in the file, where there is one. Fails where that is of another training.
    pub(super) fn state(
        &self,
        source: &dyn BlockSource,
        windows: &Windows,
        units: &[Unit],
        tick: &mut dyn FnMut() -> Result<()>,
    ) -> Result<(String, Option<State>)> {
        let options = Self { state_file: None, ..self.clone() };
        let parts = (options, units, windows.ids_sha256(), fingerprint(source, tick)?);
        let identity = serde_json::to_string(&parts).map_err(|error| Error::Plan(error.to_string()))?;
        let path = self.state_file.as_deref().filter(|path| path.exists());
        let state = path.map(|path| State::read(path, &identity, units.len())).transpose()?;
        Ok((identity, state))
    }

    /// Parameters before the first step: ranks of the warm start, spread over two units of log-odds.
    fn initial(&self, start: Option<&[f64]>, units: usize) -> Vec<f64> {
        let level = if self.kind == GateKind::SmoothedL0 { 1.0 } else { 0.0 };
        let Some(scores) = start else { return vec![level; units] };
        let below = |score: f64| scores.iter().filter(|other| other.total_cmp(&score).is_lt()).count() as f64;
        let centre = (scores.len() as f64 - 1.0) / 2.0;
        scores
            .iter()
            .map(|&score| level + (below(score) - centre) / scores.len() as f64 * (2.0 - level))
            .collect()
    }

    fn step(
        &self,
        state: &mut State,
        source: &dyn BlockSource,
        windows: &Windows,
        gated: &Gated<'_>,
        tick: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let units = gated.units;
        let which = state.step % 2;
        // Drawn from seed and step alone: a resumed run draws what an uninterrupted one does.
        let mut rng =
            StdRng::seed_from_u64(self.seed ^ (state.step as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let progress = state.step as f64 / self.steps as f64;
        let Some(set) = state.sets.get_mut(which) else { return Ok(()) };
        let (batch, half) = (self.batch as f64 * (windows.seq_len() - 1) as f64, windows.len() / 2);
        let draw = |_| {
            let range = if which == 0 && half > 0 { 0..half } else { half..windows.len() };
            let window = rng.random_range(range);
            Draw { window, drawn: self.draw(&set.phi, gated, progress, &mut rng) }
        };
        let draws: Vec<Draw> = (0..self.batch).map(draw).collect();
        let mut slopes = vec![0.0; units.len()];
        let walked = walk(source, windows, units, &draws, !self.gradient_checkpointing, tick)?;
        for (walked, draw) in walked.into_iter().zip(&draws) {
            if !walked.loss.is_finite() {
                let what = format!("the loss of gate step {}", state.step);
                return Err(Error::NotFinite { what, value: walked.loss });
            }
            state.block_runs += walked.block_runs;
            for ((sum, gradient), slope) in slopes.iter_mut().zip(walked.gradients).zip(&draw.drawn.slopes) {
                *sum += gradient * slope / batch;
            }
        }
        match self.kind {
            GateKind::SmoothedL0 => {
                let (_, penalty) = gated.penalty(&set.phi, progress);
                slopes.iter_mut().zip(penalty).for_each(|(slope, more)| *slope += more);
            }
            GateKind::HardConcrete | GateKind::StraightThrough => gated.follow_offset(&set.phi, &mut slopes),
        }
        set.update(&slopes, &gated.open, self.learning_rate);
        let gates = self.openness(&set.phi, gated, progress);
        let settled = gates.iter().all(|gate| gate.min(1.0 - gate) < self.polarised);
        state.quiet = if settled { state.quiet + 1 } else { 0 };
        state.trajectory.push(gates);
        state.step += 1;
        Ok(())
    }

    /// Each gate's probability of being open; for smoothed-L0 gates, the gate itself.
    fn openness(&self, phi: &[f64], gated: &Gated<'_>, progress: f64) -> Vec<f64> {
        let offset = match self.kind {
            GateKind::SmoothedL0 => 0.0,
            GateKind::HardConcrete | GateKind::StraightThrough => gated.offset(phi),
        };
        let gate = |(&phi, &open): (&f64, &bool)| match self.kind {
            _ if open => 1.0,
            GateKind::SmoothedL0 => smoothed(phi, epsilon(progress)).0,
            GateKind::HardConcrete | GateKind::StraightThrough => sigmoid(phi + offset),
        };
        phi.iter().zip(&gated.open).map(gate).collect()
    }

    /// Gates for one forward pass, and how each follows its parameter.
    fn draw(&self, phi: &[f64], gated: &Gated<'_>, progress: f64, rng: &mut StdRng) -> Drawn {
        let mut drawn = match self.kind {
            GateKind::SmoothedL0 => {
                let pairs = phi.iter().map(|&phi| smoothed(phi, epsilon(progress)));
                let (gates, slopes) = pairs.unzip();
                Drawn { gates, slopes }
            }
            GateKind::HardConcrete => {
                let offset = gated.offset(phi);
                let pairs =
                    phi.iter().map(|&phi| hard_concrete(phi + offset, rng.random_range(1e-6..1.0 - 1e-6)));
                let (gates, slopes) = pairs.unzip();
                Drawn { gates, slopes }
            }
            GateKind::StraightThrough => {
                let noisy = phi.iter().zip(&gated.open).enumerate().map(|(place, (&phi, &open))| {
                    let noise = logit(rng.random_range(1e-6..1.0 - 1e-6)) * (1.0 - progress);
                    (if open { f64::INFINITY } else { phi + noise }, place)
                });
                let mut order: Vec<(f64, usize)> = noisy.collect();
                order.sort_by(|a, b| a.0.total_cmp(&b.0));
                let closed = gated.cheapest(order.iter().map(|(_, place)| *place));
                let gates =
                    (0..phi.len()).map(|place| if closed.contains(&place) { 0.0 } else { 1.0 }).collect();
                Drawn { gates, slopes: vec![1.0; phi.len()] }
            }
        };
        for ((gate, slope), _) in
            drawn.gates.iter_mut().zip(&mut drawn.slopes).zip(&gated.open).filter(|(_, open)| **open)
        {
            (*gate, *slope) = (1.0, 0.0);
        }
        drawn
    }
}
