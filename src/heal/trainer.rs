//! The training loop.

use std::ops::ControlFlow;
use std::time::Instant;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::adamw::{self, Update};
use super::backward::{Backward, Gradients, Uses};
use super::identity::Identity;
use super::log::{Log, Record};
use super::losses::Terms;
use super::options::{Budget, Heal};
use super::order::Order;
use super::state::{self, State};
use super::teacher::{Lesson, Teacher};
use super::trainable::Student;
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::eval::perplexity;
use crate::model::Decoder;
use crate::progress::{self, Observer};

const STAGE: &str = "heal";

/// A healed decoder, and how it became one.
#[derive(Debug)]
#[non_exhaustive]
pub struct Healed {
    /// With its trained tensors rounded to what will be stored.
    pub decoder: Decoder,
    /// What happened.
    pub report: HealReport,
}

/// What happened in a healing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct HealReport {
    /// Steps done.
    pub steps: usize,
    /// Predicted tokens that they read.
    pub tokens: usize,
    /// Numbers that were trained.
    pub trained: usize,
    /// Losses on the held-out windows in nats per token, each with the number of steps before it.
    pub held_out: Vec<(usize, f64)>,
    /// The step whose weights were kept: that of the lowest held-out loss, or the last.
    pub kept: usize,
    /// Whether it ended before its budget for want of progress.
    pub stopped_early: bool,
    /// Seconds of training, those of interrupted runs included.
    pub seconds: f64,
}

impl Heal {
    /// Fails where [`run`](Self::run) would before any work: for what many healings are asked for at once.
    ///
    /// # Errors
    /// Options outside of their range, or a teacher that does not fit.
    pub fn check_run(
        &self,
        decoder: &Decoder,
        windows: &Windows,
        held_out: Option<&Windows>,
        teacher: Option<Teacher<'_>>,
    ) -> Result<()> {
        self.check()?;
        if let Some(patience) = self.patience.filter(|_| held_out.is_none()) {
            return Err(Error::argument("patience", patience, "none without held-out windows"));
        }
        match teacher {
            Some(teacher) => teacher.check(&self.losses, decoder, windows),
            None => self.losses.check(decoder.depth(), None),
        }
    }

    /// Trains what the groups name in `decoder` on `windows`. With `held_out`, the weights of its lowest loss there
    /// are kept, those before the first step included.
    ///
    /// With a state file, a run that was interrupted at any moment goes on from its last state, and ends with the
    /// same weights, bit for bit, as one that was not; unless its budget is one of time.
    ///
    /// # Errors
    /// Options outside of their range; a teacher that does not fit; [`Error::Quantized`] where there is no way back;
    /// [`Error::NoGradient`] for something trained that no loss depends on; [`Error::NotFinite`] for a loss, gradient or
    /// trained number that is not finite, with its step (the state file then holds numbers that are); a state file of
    /// another healing; a log file that is no log; files that cannot be read or written; or a cancelling observer, after
    /// what is done was saved.
    pub fn run(
        &self,
        decoder: &Decoder,
        windows: &Windows,
        held_out: Option<&Windows>,
        teacher: Option<Teacher<'_>>,
        observer: &mut dyn Observer,
    ) -> Result<Healed> {
        self.check_run(decoder, windows, held_out, teacher)?;
        let mut run = Run::start(self, decoder, windows, held_out, teacher)?;
        let total = match self.budget {
            Budget::Minutes(minutes) => (minutes * 60.0).ceil() as u64,
            Budget::Steps(_) | Budget::Tokens(_) => (run.step_limit as u64).saturating_mul(self.batch as u64),
        };
        progress::stage(STAGE, total, observer, |observer| run.train(total, observer))?;
        run.finish()
    }
}

/// A healing that runs.
struct Run<'a> {
    heal: &'a Heal,
    windows: &'a Windows,
    held_out: Option<&'a Windows>,
    teacher: Option<Teacher<'a>>,
    student: Student,
    uses: Uses,
    order: Order,
    state: State,
    log: Log,
    /// The steps that the budget allows; without end where it is one of time.
    step_limit: usize,
    /// When this process began, and what had been spent before.
    clock: (Instant, f64),
}

impl<'a> Run<'a> {
    fn start(
        heal: &'a Heal,
        decoder: &Decoder,
        windows: &'a Windows,
        held_out: Option<&'a Windows>,
        teacher: Option<Teacher<'a>>,
    ) -> Result<Self> {
        let student = Student::new(decoder, &heal.groups, heal.seed)?;
        let identity = Identity::of(heal, decoder, windows, held_out, teacher)?;
        let state = match heal.state_file.as_deref().filter(|path| path.exists()) {
            Some(path) => State::read(path, &identity, &student)?,
            None => State::new(identity, &student),
        };
        let position = &state.position;
        let log = Log::open(heal.log_file.as_deref(), position.step, position.held_out.len())?;
        Ok(Self {
            uses: Uses::of(&student),
            order: Order::new(heal.seed, windows.len()),
            step_limit: heal.steps(windows.seq_len()).unwrap_or(usize::MAX),
            clock: (Instant::now(), position.seconds),
            heal,
            windows,
            held_out,
            teacher,
            student,
            state,
            log,
        })
    }

    /// Steps until the budget is spent; what was cancelled is saved as what is done.
    fn train(&mut self, total: u64, observer: &mut dyn Observer) -> Result<()> {
        let trained = self.steps(total, observer);
        if matches!(trained, Ok(()) | Err(Error::Cancelled { .. })) {
            // No further loss tells whether the last update was good.
            self.check_finite()?;
            self.save()?;
        }
        trained
    }

    fn steps(&mut self, total: u64, observer: &mut dyn Observer) -> Result<()> {
        let first = self.state.position.step;
        if first > 0 {
            tracing::debug!(step = first, "healing goes on from its state");
        }
        loop {
            // Once: a budget of time may end between two looks at the clock.
            let spent = self.progress(0.0) >= 1.0;
            self.evaluate(spent, total, observer)?;
            if spent || self.state.position.stopped {
                return Ok(());
            }
            self.step(total, observer)?;
            progress::advance(STAGE, self.done(0.0, total), total, observer)?;
            self.tell_time_left(first, observer);
        }
    }

    /// Fails for a trained number that is not finite.
    fn check_finite(&self) -> Result<()> {
        for trained in &self.student.trained {
            if let Some(value) = state::values(trained)?.into_iter().find(|value| !value.is_finite()) {
                let what = format!("{} after healing step {}", trained.param, self.state.position.step);
                return Err(Error::NotFinite { what, value: value.into() });
            }
        }
        Ok(())
    }

    /// How much of the budget is spent, from 0 on, when this much more of a step is done.
    fn progress(&self, more: f64) -> f64 {
        match self.heal.budget {
            Budget::Minutes(minutes) => self.seconds() / (minutes * 60.0),
            Budget::Steps(_) | Budget::Tokens(_) => {
                (self.state.position.step as f64 + more) / self.step_limit as f64
            }
        }
    }

    fn seconds(&self) -> f64 {
        self.clock.1 + self.clock.0.elapsed().as_secs_f64()
    }

    /// What of `total` the observer is told to be done, windows or seconds, with this much more of a step.
    fn done(&self, more: f64, total: u64) -> u64 {
        (self.progress(more).min(1.0) * total as f64).round() as u64
    }

    fn tell_time_left(&self, first: usize, observer: &mut dyn Observer) {
        let position = &self.state.position;
        let left = match self.heal.budget {
            Budget::Minutes(minutes) => minutes * 60.0 - self.seconds(),
            Budget::Steps(_) | Budget::Tokens(_) => {
                let a_step = self.clock.0.elapsed().as_secs_f64() / (position.step - first).max(1) as f64;
                a_step * (self.step_limit - position.step) as f64
            }
        };
        observer.measured(STAGE, "seconds left", left.max(0.0));
    }

    fn step(&mut self, total: u64, observer: &mut dyn Observer) -> Result<()> {
        let rate = self.heal.schedule.factor(self.progress(0.5));
        let step = self.state.position.step + 1;
        let (terms, gradients) = self.gradients(total, observer)?;
        let loss = self.heal.losses.total(terms);
        if !loss.is_finite() {
            return Err(Error::NotFinite { what: format!("the loss of healing step {step}"), value: loss });
        }
        // Only now it is known that the weights are good: a state that was due is written.
        if self.state.position.step.is_multiple_of(self.heal.save_every) {
            self.save()?;
        }
        let norm = self.update(&gradients, rate, step)?;
        let position = &mut self.state.position;
        position.step = step;
        let tokens = step * self.heal.batch * (self.windows.seq_len() - 1);
        let seconds = self.seconds();
        let record =
            Record::Step { step, tokens, loss, terms, gradient_norm: norm, rate_factor: rate, seconds };
        self.log.add(&record)?;
        observer.measured(STAGE, "loss", loss);
        Ok(())
    }

    /// The terms of the next step's loss, means over its tokens, and the gradients of what is trained. The observer is
    /// told between micro-batches: steps may take long.
    fn gradients(&mut self, total: u64, observer: &mut dyn Observer) -> Result<(Terms, Vec<Vec<f32>>)> {
        let (batch, first) = (self.heal.batch, self.state.position.step * self.heal.batch);
        let windows = self.order.windows(first..first + batch);
        let tokens = windows.len() * (self.windows.seq_len() - 1);
        let (uses, student) = (&self.uses, &self.student);
        let backward = Backward { student, uses, losses: &self.heal.losses, weight: 1.0 / tokens as f64 };
        let mut gradients = Gradients::none(student.trained.len());
        let (mut terms, mut read) = (Terms::default(), 0);
        for part in windows.chunks(self.heal.micro_batch) {
            if read > 0 {
                progress::advance(STAGE, self.done(read as f64 / batch as f64, total), total, observer)?;
            }
            read += part.len();
            let (ids, targets) = inputs(self.windows, part, student.plain.device())?;
            let lesson = match self.teacher {
                Some(teacher) => teacher.lesson(&self.heal.losses, part, &ids)?,
                None => Lesson::none(),
            };
            terms.add(backward.accumulate((&ids, &targets), &lesson, &mut gradients)?);
        }
        // One by one: none is in memory twice but the one that is copied.
        let gradients = gradients.complete(student)?.into_iter();
        let gradients = gradients.map(|gradient| Ok(gradient.flatten_all()?.to_vec1::<f32>()?));
        Ok((terms.per(tokens), gradients.collect::<Result<_>>()?))
    }

    /// Moves what is trained; the norm of the gradient before it was clipped.
    fn update(&mut self, gradients: &[Vec<f32>], rate: f64, step: usize) -> Result<f64> {
        let trained = &self.student.trained;
        let square = |(gradient, factor): (&Vec<f32>, f64)| adamw::square(gradient) * factor * factor;
        let factors = trained.iter().map(|trained| trained.factor);
        let norm = gradients.iter().zip(factors).map(square).sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Err(Error::NotFinite {
                what: format!("the gradient of healing step {step}"),
                value: norm,
            });
        }
        let clip = adamw::clip(norm, self.heal.max_grad_norm);
        for ((trained, moments), gradient) in trained.iter().zip(&mut self.state.moments).zip(gradients) {
            let Some(group) = self.heal.groups.get(trained.group) else { continue };
            let how = Update {
                count: step as u64,
                learning_rate: group.learning_rate * rate,
                weight_decay: group.weight_decay,
                clip,
                factor: trained.factor,
            };
            let mut values = state::values(trained)?;
            self.heal.adamw.update(&mut values, gradient, moments, how);
            state::set(trained, &values)?;
        }
        Ok(norm)
    }

    /// Measures the held-out loss where that is due, and keeps the weights where it is the lowest.
    fn evaluate(&mut self, last: bool, total: u64, observer: &mut dyn Observer) -> Result<()> {
        let step = self.state.position.step;
        let known = self.state.position.held_out.last().is_some_and(|(at, _)| *at == step);
        let due = step.is_multiple_of(self.heal.evaluate_every) || last;
        let Some(held_out) = self.held_out.filter(|_| due && !known) else { return Ok(()) };
        let before = self.state.position.best();
        let mut within = Within { done: self.done(0.0, total), total, observer: &mut *observer };
        let loss = perplexity(&self.student.plain, held_out, &mut within).map_err(|error| match error {
            Error::NotFinite { value, .. } => {
                Error::NotFinite { what: format!("the held-out loss after healing step {step}"), value }
            }
            Error::Cancelled { .. } => Error::Cancelled { stage: STAGE },
            other => other,
        })?;
        let loss = loss.mean_nll;
        if before.is_none_or(|(_, best)| loss < best) {
            self.state.keep_best(&self.student)?;
        }
        let position = &mut self.state.position;
        position.held_out.push((step, loss));
        let best = position.best().map_or(0, |(at, _)| at);
        let since = position.held_out.iter().filter(|(at, _)| *at > best).count();
        position.stopped = self.heal.patience.is_some_and(|patience| since >= patience);
        observer.measured(STAGE, "held-out loss", loss);
        self.log.add(&Record::HeldOut { step, held_out: loss })
    }

    fn save(&mut self) -> Result<()> {
        self.state.position.seconds = self.seconds();
        match self.heal.state_file.as_deref() {
            Some(path) => self.state.save(path, &self.student),
            None => Ok(()),
        }
    }

    fn finish(self) -> Result<Healed> {
        self.state.restore_best(&self.student)?;
        let position = &self.state.position;
        let report = HealReport {
            steps: position.step,
            tokens: position.step * self.heal.batch * (self.windows.seq_len() - 1),
            trained: self.student.trained.iter().map(|trained| trained.var.elem_count()).sum(),
            held_out: position.held_out.clone(),
            kept: position.best().map_or(position.step, |(step, _)| step),
            stopped_early: position.stopped,
            seconds: position.seconds,
        };
        tracing::debug!(
            steps = report.steps,
            kept = report.kept,
            stopped_early = report.stopped_early,
            "weights of the lowest loss are kept"
        );
        Ok(Healed { decoder: self.student.finished()?, report })
    }
}

/// All tokens of these windows but the last ones, `(windows, seq_len − 1)`, and all but the first ones.
fn inputs(windows: &Windows, part: &[usize], device: &candle_core::Device) -> Result<(Tensor, Vec<u32>)> {
    let (mut ids, mut targets) = (Vec::new(), Vec::new());
    for &index in part {
        let window = windows.window(index)?;
        ids.extend_from_slice(window.get(..window.len() - 1).unwrap_or_default());
        targets.extend_from_slice(window.get(1..).unwrap_or_default());
    }
    Ok((Tensor::from_vec(ids, (part.len(), windows.seq_len() - 1), device)?, targets))
}

/// Lets the healing's observer cancel what runs within a step.
struct Within<'a> {
    done: u64,
    total: u64,
    observer: &'a mut dyn Observer,
}

impl Observer for Within<'_> {
    fn advanced(&mut self, _: &'static str, _: u64, _: u64) -> ControlFlow<()> {
        self.observer.advanced(STAGE, self.done, self.total)
    }
}
