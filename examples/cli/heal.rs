//! Flags of the commands that heal.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use foldgpt::checkpoint::ModelCard;
use foldgpt::heal::{Budget, Heal, HealReport, Lora, Losses, ParamGroup, Trainable};
use foldgpt::model::Projection;
use foldgpt::{Checkpoint, Format, Perplexity};

// Whether a model is healed, what is trained, and what it learns from.
#[derive(Debug, Clone, Args)]
pub struct HealArgs {
    #[command(flatten)]
    pub tuning: TuningArgs,
    /// What of the original model the healed one is held to: its last hidden states and logits (the default), its
    /// logits, nothing, which may be best for a text of a kind that it knows little of
    #[arg(long, value_enum, requires = "budget")]
    pub distill: Option<Distill>,
    /// What is trained; norms, scales and lora by default
    #[arg(long, value_enum, value_delimiter = ',', requires = "budget")]
    pub train: Option<Vec<Train>>,
    /// With --train last-blocks, how many
    #[arg(long, requires = "budget")]
    pub last_blocks: Option<usize>,
    /// Keep LoRA adapters beside their matrices, in the compact format
    #[arg(long, requires = "budget")]
    pub keep_adapters: bool,
    /// Highest learning rate of residuals (3e-4 by default)
    #[arg(long, requires = "budget")]
    pub residual_lr: Option<f64>,
    /// Highest learning rate of whole matrices: those that are shared, of the last blocks, of the head (1e-4 by default)
    #[arg(long, requires = "budget")]
    pub matrix_lr: Option<f64>,
    /// Keep the healing's state in this file, and go on from it where it exists
    #[arg(long, requires = "budget")]
    pub heal_state: Option<PathBuf>,
    /// Log every step to this file, as JSON Lines
    #[arg(long, requires = "budget")]
    pub heal_log: Option<PathBuf>,
}

// How long healing takes, and how it goes.
#[derive(Debug, Clone, Args)]
pub struct TuningArgs {
    /// Heal for this many optimiser steps
    #[arg(long, group = "budget")]
    pub heal_steps: Option<usize>,
    /// Heal on this many tokens
    #[arg(long, group = "budget")]
    pub heal_tokens: Option<usize>,
    /// Heal for this many minutes
    #[arg(long, group = "budget")]
    pub heal_minutes: Option<f64>,
    /// Windows in each step
    #[arg(long, default_value_t = 4, requires = "budget")]
    pub batch: usize,
    /// Windows computed at once
    #[arg(long, default_value_t = 1, requires = "budget")]
    pub micro_batch: usize,
    /// Stop after this many measurements on held-out text without a lowest loss
    #[arg(long, requires = "budget")]
    pub patience: Option<usize>,
    /// The share of the steps over which learning rates rise (0.05 by default)
    #[arg(long, requires = "budget")]
    pub warmup: Option<f64>,
    /// Decoupled weight decay of all that is trained but norms and scales (0 by default)
    #[arg(long, requires = "budget")]
    pub weight_decay: Option<f64>,
    /// Highest learning rate of norms and scales (5e-3 by default)
    #[arg(long, requires = "budget")]
    pub lr: Option<f64>,
    /// Highest learning rate of LoRA adapters (1e-3 by default)
    #[arg(long, requires = "budget")]
    pub lora_lr: Option<f64>,
    /// Rank of the adapters (8 by default)
    #[arg(long, requires = "budget")]
    pub lora_rank: Option<usize>,
    /// Their α: what they add is multiplied by α / rank (16 by default)
    #[arg(long, requires = "budget")]
    pub lora_alpha: Option<f64>,
    /// The linear maps that get adapters, such as `q_proj,v_proj` (all by default)
    #[arg(long, value_delimiter = ',', value_parser = projection, requires = "budget")]
    pub lora_projections: Option<Vec<Projection>>,
    /// Give every depth adapters of its own, where depths share matrices, and not one to those that share
    #[arg(long, requires = "budget")]
    pub lora_per_depth: bool,
    /// Weight of the text's loss (1 by default)
    #[arg(long, requires = "budget")]
    pub ce_weight: Option<f64>,
    /// Weight of the divergence from the teacher's logits (0.5 by default)
    #[arg(long, requires = "budget")]
    pub kl_weight: Option<f64>,
    /// Temperature of that divergence (1 by default)
    #[arg(long, requires = "budget")]
    pub temperature: Option<f64>,
    /// Weight of the distance from the teacher's last hidden states (0.3 by default)
    #[arg(long, requires = "budget")]
    pub tail_weight: Option<f64>,
    /// How many last blocks are held to the teacher's (1 by default)
    #[arg(long, requires = "budget")]
    pub tail_blocks: Option<usize>,
}

fn projection(name: &str) -> std::result::Result<Projection, String> {
    let known = Projection::ALL.into_iter().find(|projection| projection.name() == name);
    known.ok_or_else(|| format!("expected one of {}", Projection::ALL.map(Projection::name).join(", ")))
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
    /// The last blocks, as many as --last-blocks says
    LastBlocks,
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

/// The card of a healed model: what its checkpoint says of it, how it was healed, and what it was worth before and after.
pub fn card(mut card: ModelCard, report: &HealReport, taught: bool, models: [&Perplexity; 2]) -> ModelCard {
    let [before, after] = models;
    if taught {
        card.tags.push("knowledge-distillation".into());
    }
    let teacher = if taught { "held to the original model" } else { "by the text alone" };
    let row = |name: &str, found: &Perplexity| {
        format!("| {name} | {:.4} | {:.2} |\n", found.mean_nll, found.perplexity)
    };
    let _ = write!(
        card.body,
        "\n\n## Healing\n\n{}; {teacher}.\n\n## Results\n\n| | NLL, nats per token | perplexity |\n|---|---:|---:|\n{}{}\n\
         In f32 on {}. The original model, fine-tuned on the same text, gains too: compare with that.",
        summary(report),
        row("before", before),
        row("healed", after),
        super::protocol_of(after)
    );
    card
}

/// Fails for a teacher whose tokens are others than the model's.
pub fn check_tokenizers(model: &Checkpoint, teacher: &Checkpoint) -> Result<()> {
    let [of_model, of_teacher] = [model, teacher].map(Checkpoint::tokenizer);
    let same = of_model?.inner().get_vocab(true) == of_teacher?.inner().get_vocab(true);
    ensure!(same, "the teacher has other tokens than the model: it cannot say what comes next");
    Ok(())
}

impl TuningArgs {
    /// The healing that was asked for, of these groups, or none.
    pub fn heal(&self, seed: u64, distill: Distill, groups: Vec<ParamGroup>) -> Option<Heal> {
        let steps = self.heal_steps.map(Budget::Steps);
        let budget =
            steps.or(self.heal_tokens.map(Budget::Tokens)).or(self.heal_minutes.map(Budget::Minutes))?;
        let mut heal = Heal::default();
        (heal.budget, heal.seed, heal.patience) = (budget, seed, self.patience);
        (heal.batch, heal.micro_batch) = (self.batch, self.micro_batch);
        heal.schedule.warmup = self.warmup.unwrap_or(heal.schedule.warmup);
        heal.losses = self.losses(distill);
        // Norms and scales are near 1, and decay would pull them to 0.
        let decayed = |group: ParamGroup| match group.params {
            Trainable::Norms | Trainable::Scales => group,
            _ => group.with_decay(self.weight_decay.unwrap_or_default()),
        };
        heal.groups = groups.into_iter().map(decayed).collect();
        Some(heal)
    }

    /// The terms that a choice has, with the weights that were asked for.
    fn losses(&self, distill: Distill) -> Losses {
        let mut losses = match distill {
            Distill::Tail => Losses::tail(),
            Distill::Logits => Losses::logits(),
            Distill::None => Losses::default(),
        };
        losses.cross_entropy = self.ce_weight.unwrap_or(losses.cross_entropy);
        if distill != Distill::None {
            losses.divergence = self.kl_weight.unwrap_or(losses.divergence);
            losses.temperature = self.temperature.unwrap_or(losses.temperature);
        }
        if distill == Distill::Tail {
            losses.tail = self.tail_weight.unwrap_or(losses.tail);
            losses.tail_blocks = self.tail_blocks.unwrap_or(losses.tail_blocks);
        }
        losses
    }

    pub fn norms(&self) -> ParamGroup {
        at(Trainable::Norms, self.lr)
    }

    pub fn scales(&self) -> ParamGroup {
        at(Trainable::Scales, self.lr)
    }

    /// Adapters that are merged in the end, or kept.
    pub fn lora(&self, merge: bool) -> ParamGroup {
        let mut lora = Lora::default();
        lora.merge = merge;
        lora.rank = self.lora_rank.unwrap_or(lora.rank);
        lora.alpha = self.lora_alpha.unwrap_or(lora.alpha);
        lora.projections = self.lora_projections.clone().unwrap_or_default();
        lora.shared = !self.lora_per_depth;
        at(Trainable::Lora(lora), self.lora_lr)
    }

    /// Flags that were given and concern adapters, the divergence, and the last hidden states.
    fn concerning(&self) -> [(bool, &'static str, &'static str); 3] {
        let lora = self.lora_lr.is_some() || self.lora_alpha.is_some() || self.lora_per_depth;
        let lora = lora || self.lora_rank.is_some() || self.lora_projections.is_some();
        [
            (lora, "--lora-…", "--train lora"),
            (
                self.kl_weight.is_some() || self.temperature.is_some(),
                "--kl-weight and --temperature",
                "--distill",
            ),
            (self.tail_weight.is_some() || self.tail_blocks.is_some(), "--tail-…", "--distill tail"),
        ]
    }
}

/// A group at a learning rate, or at its usual one.
fn at(params: Trainable, learning_rate: Option<f64>) -> ParamGroup {
    let mut group = ParamGroup::from(params);
    group.learning_rate = learning_rate.unwrap_or(group.learning_rate);
    group
}

impl HealArgs {
    /// The healing that was asked for, or none. Fails for flags that concern nothing of it.
    pub fn heal(&self, seed: u64) -> Result<Option<Heal>> {
        let distill = self.distill.unwrap_or(Distill::Tail);
        let train = self.train.clone().unwrap_or(vec![Train::Norms, Train::Scales, Train::Lora]);
        let any = |of: &[Train]| train.iter().any(|train| of.contains(train));
        let tuned = self.tuning.concerning();
        let concerned = [any(&[Train::Lora]), distill != Distill::None, distill == Distill::Tail];
        for ((given, flags, of), concerned) in tuned.into_iter().zip(concerned) {
            ensure!(!given || concerned, "{flags} are for {of}");
        }
        let vectors = any(&[Train::Norms, Train::Scales]);
        let matrices = any(&[Train::SharedMatrices, Train::LastBlocks, Train::Head]);
        let last = any(&[Train::LastBlocks]);
        ensure!(!self.keep_adapters || any(&[Train::Lora]), "--keep-adapters is for --train lora");
        ensure!(self.tuning.lr.is_none() || vectors, "--lr is for --train norms and scales");
        ensure!(
            self.residual_lr.is_none() || any(&[Train::Residuals]),
            "--residual-lr is for --train residuals"
        );
        ensure!(
            self.matrix_lr.is_none() || matrices,
            "--matrix-lr is for --train shared-matrices, last-blocks and head"
        );
        ensure!(self.last_blocks.is_some() == last, "--last-blocks and --train last-blocks need each other");

        let groups = train.iter().map(|train| self.group(*train)).collect();
        let mut heal = self.tuning.heal(seed, distill, groups);
        if let Some(heal) = &mut heal {
            heal.state_file.clone_from(&self.heal_state);
            heal.log_file.clone_from(&self.heal_log);
        }
        Ok(heal)
    }

    /// Fails for a teacher that is missing, or that nothing is learnt from.
    pub fn check_teacher(losses: &Losses, given: bool) -> Result<()> {
        let needed = losses.need_teacher();
        ensure!(given || !needed, "--teacher is needed, or --distill none");
        ensure!(needed || !given, "--teacher is for --distill tail and logits, with a weight above 0");
        Ok(())
    }

    /// Fails for a format that would merge adapters that are to be kept.
    pub fn check_format(&self, format: Format) -> Result<()> {
        ensure!(!self.keep_adapters || format == Format::Compact, "--keep-adapters needs --format compact");
        Ok(())
    }

    fn group(&self, train: Train) -> ParamGroup {
        match train {
            Train::Norms => self.tuning.norms(),
            Train::Scales => self.tuning.scales(),
            Train::Lora => self.tuning.lora(!self.keep_adapters),
            Train::Residuals => at(Trainable::Residuals, self.residual_lr),
            Train::SharedMatrices => at(Trainable::SharedMatrices, self.matrix_lr),
            Train::LastBlocks => {
                at(Trainable::LastBlocks(self.last_blocks.unwrap_or_default()), self.matrix_lr)
            }
            Train::Head => at(Trainable::Head, self.matrix_lr),
        }
    }
}
