//! Flags of the commands that heal.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use foldgpt::heal::{Budget, Heal, HealReport, Lora, Losses, ParamGroup, Trainable};

// How long healing takes, what it trains, and what it learns from.
#[derive(Debug, Clone, Args)]
pub struct HealArgs {
    /// Heal for this many optimiser steps
    #[arg(long, group = "budget")]
    pub heal_steps: Option<usize>,
    /// Heal on this many tokens
    #[arg(long, group = "budget")]
    pub heal_tokens: Option<usize>,
    /// Heal for this many minutes
    #[arg(long, group = "budget")]
    pub heal_minutes: Option<f64>,
    /// What of the original model the healed one is held to: its last hidden states and logits, its logits, nothing
    #[arg(long, value_enum, default_value_t = Distill::Tail)]
    pub distill: Distill,
    /// What is trained
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Train::Norms, Train::Scales, Train::Lora])]
    pub train: Vec<Train>,
    /// Rank of the LoRA adapters
    #[arg(long, default_value_t = 8)]
    pub lora_rank: usize,
    /// Their α: what they add is multiplied by α / rank
    #[arg(long, default_value_t = 16.0)]
    pub lora_alpha: f64,
    /// Give every depth adapters of its own, where depths share matrices, and not one to those that share
    #[arg(long)]
    pub lora_per_depth: bool,
    /// Highest learning rate of the adapters
    #[arg(long, default_value_t = 1e-3)]
    pub lora_lr: f64,
    /// Highest learning rate of norms and scales
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
    /// Windows in each step
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Windows computed at once
    #[arg(long, default_value_t = 1)]
    pub micro_batch: usize,
    /// How many last blocks are held to the teacher's
    #[arg(long, default_value_t = 1)]
    pub tail_blocks: usize,
    /// Stop after this many measurements on held-out text without a lowest loss
    #[arg(long)]
    pub patience: Option<usize>,
    /// Keep the healing's state in this file, and go on from it where it exists
    #[arg(long)]
    pub heal_state: Option<PathBuf>,
    /// Log every step to this file, as JSON Lines
    #[arg(long)]
    pub heal_log: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Distill {
    Tail,
    Logits,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Train {
    /// The norms
    Norms,
    /// A scale of every output of every linear map
    Scales,
    /// Low-rank adapters of every linear map
    Lora,
    /// The low-rank residuals that a folded model has
    Residuals,
    /// The matrices that depths share
    SharedMatrices,
    /// The head
    Head,
}

/// What happened, in a line.
pub fn summary(report: &HealReport) -> String {
    let held_out = report.held_out.iter().map(|(step, loss)| format!("{loss:.4} after {step}"));
    let held_out: Vec<String> = held_out.collect();
    format!(
        "healed for {} steps of {} tokens in {:.0} s, {} numbers trained, those of step {} kept; chosen by nll {}",
        report.steps,
        report.tokens / report.steps.max(1),
        report.seconds,
        report.trained,
        report.kept,
        held_out.join(", ")
    )
}

impl Distill {
    pub fn losses(self, tail_blocks: usize) -> Losses {
        let mut losses = match self {
            Self::Tail => Losses::tail(),
            Self::Logits => Losses::logits(),
            Self::None => Losses::default(),
        };
        losses.tail_blocks = tail_blocks;
        losses
    }
}

impl HealArgs {
    /// The healing that was asked for, or none.
    pub fn heal(&self, seed: u64) -> Option<Heal> {
        let steps = self.heal_steps.map(Budget::Steps);
        let budget =
            steps.or(self.heal_tokens.map(Budget::Tokens)).or(self.heal_minutes.map(Budget::Minutes))?;
        let mut heal = Heal::default();
        (heal.budget, heal.seed, heal.patience) = (budget, seed, self.patience);
        (heal.batch, heal.micro_batch) = (self.batch, self.micro_batch);
        heal.losses = self.distill.losses(self.tail_blocks);
        heal.groups = self.train.iter().map(|train| self.group(*train)).collect();
        heal.state_file.clone_from(&self.heal_state);
        heal.log_file.clone_from(&self.heal_log);
        Some(heal)
    }

    fn group(&self, train: Train) -> ParamGroup {
        let mut lora = Lora::default();
        (lora.rank, lora.alpha, lora.shared) = (self.lora_rank, self.lora_alpha, !self.lora_per_depth);
        match train {
            Train::Norms => ParamGroup::new(Trainable::Norms, self.lr),
            Train::Scales => ParamGroup::new(Trainable::Scales, self.lr),
            Train::Lora => ParamGroup::new(Trainable::Lora(lora), self.lora_lr),
            Train::Residuals => ParamGroup::new(Trainable::Residuals, self.lora_lr),
            // Whole matrices move in every direction at once: a tenth is fast for them.
            Train::SharedMatrices => ParamGroup::new(Trainable::SharedMatrices, self.lora_lr / 10.0),
            Train::Head => ParamGroup::new(Trainable::Head, self.lora_lr / 10.0),
        }
    }
}
