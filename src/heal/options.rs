//! What a healing is told.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::adamw::AdamW;
use super::losses::Losses;
use super::schedule::Schedule;
use super::trainable::{Lora, ParamGroup, Trainable};
use crate::error::{Error, Result};

/// A small fine-tune that gives a cut and folded model back what it lost, as a `FoldGPT` ends (arXiv 2407.00928): on
/// the text, and where [`losses`](Self::losses) say so on the teacher's logits and its last hidden states.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Heal {
    /// How long it takes; 200 steps by default. It is decided before the first step: the learning rate follows it, and a
    /// state goes on under the same budget alone.
    pub budget: Budget,
    /// Windows in each step; 4 by default.
    pub batch: usize,
    /// Windows that are computed at once, 1 by default: more need more memory, and give the same but for rounding.
    pub micro_batch: usize,
    /// What is trained, and how fast; by default norms, scales and low-rank adapters, each at its
    /// [usual learning rate](Trainable::learning_rate).
    pub groups: Vec<ParamGroup>,
    /// What is minimised; by default what [`Losses`] are by default.
    pub losses: Losses,
    /// The optimiser; by default what [`AdamW`] is by default.
    pub adamw: AdamW,
    /// How learning rates go up and down; by default what [`Schedule`] is by default.
    pub schedule: Schedule,
    /// The gradient of all that is trained is made no longer than this, 1 by default; of any length where there is none.
    pub max_grad_norm: Option<f64>,
    /// Seed of the order of windows and of first values; 0 by default.
    pub seed: u64,
    /// Steps between measurements on the held-out windows, 25 by default; the first and the last are always measured.
    pub evaluate_every: usize,
    /// Stops after this many measurements on held-out windows without a lowest loss; never where absent, as by default.
    pub patience: Option<usize>,
    /// Steps between states, 20 by default; a run that is cancelled saves what is done.
    pub save_every: usize,
    /// Where the state is kept, and gone on from where it exists and fits: options, text, model and teacher have to be
    /// the same. Of a model, its architecture and the first values of every tensor are compared. One run at a time has
    /// it: nothing locks it. Nowhere by default.
    #[serde(skip)]
    pub state_file: Option<PathBuf>,
    /// Where every step is logged, as JSON Lines of [`Record`](super::Record). A log that is there goes on with the
    /// state, or is begun anew without one; a file that is no log is refused. Nowhere by default.
    #[serde(skip)]
    pub log_file: Option<PathBuf>,
}

/// How long a healing takes. The learning rate's schedule stretches over it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Budget {
    /// This many optimiser steps.
    Steps(usize),
    /// As many steps as read this many predicted tokens, rounded up.
    Tokens(usize),
    /// Steps until this many minutes are over, those of interrupted runs up to their last state included: the last step,
    /// and the measurement after it, end beyond them. The one budget under which a result depends on the speed of the
    /// machine.
    Minutes(f64),
}

impl Default for Heal {
    fn default() -> Self {
        Self {
            budget: Budget::Steps(200),
            batch: 4,
            micro_batch: 1,
            groups: vec![
                Trainable::Norms.into(),
                Trainable::Scales.into(),
                Trainable::Lora(Lora::default()).into(),
            ],
            losses: Losses::default(),
            adamw: AdamW::default(),
            schedule: Schedule::default(),
            max_grad_norm: Some(1.0),
            seed: 0,
            evaluate_every: 25,
            patience: None,
            save_every: 20,
            state_file: None,
            log_file: None,
        }
    }
}

impl Heal {
    /// Fails for options outside of their range.
    pub(crate) fn check(&self) -> Result<()> {
        let counts = [
            ("batch", self.batch),
            ("micro_batch", self.micro_batch),
            ("evaluate_every", self.evaluate_every),
            ("save_every", self.save_every),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(Error::argument(name, 0, "at least 1"));
        }
        match self.budget {
            Budget::Steps(0) => return Err(Error::argument("budget in steps", 0, "at least 1")),
            Budget::Tokens(0) => return Err(Error::argument("budget in tokens", 0, "at least 1")),
            Budget::Minutes(minutes) if !(minutes.is_finite() && minutes > 0.0) => {
                return Err(Error::argument("budget in minutes", minutes, "a positive number"));
            }
            _ => {}
        }
        if self.patience == Some(0) {
            return Err(Error::argument("patience", 0, "at least 1"));
        }
        if let Some(limit) = self.max_grad_norm.filter(|limit| limit.is_nan() || *limit <= 0.0) {
            return Err(Error::argument("max_grad_norm", limit, "a positive number"));
        }
        self.groups.iter().try_for_each(ParamGroup::check)?;
        self.adamw.check()?;
        self.schedule.check()
    }

    /// The options that a result depends on: how often states are saved decides nothing.
    pub(crate) fn deciding(&self) -> Self {
        Self { save_every: 1, ..self.clone() }
    }

    /// The steps that the budget allows, where it does not depend on time, for windows of `seq_len` tokens.
    pub(crate) fn steps(&self, seq_len: usize) -> Option<usize> {
        match self.budget {
            Budget::Steps(steps) => Some(steps),
            Budget::Tokens(tokens) => Some(tokens.div_ceil(self.batch.saturating_mul(seq_len - 1))),
            Budget::Minutes(_) => None,
        }
    }
}
