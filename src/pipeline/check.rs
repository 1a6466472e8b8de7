//! What can be known to be wrong before any work is done.

use super::recipe::{Goal, MixOptions, Recipe, Share, Total};
use crate::checkpoint::Checkpoint;
use crate::data::holds_json_lines;
use crate::error::{Error, Result};
use crate::importance::{Gates, GatesWithCoupling, Method};
use crate::model::{Architecture, Projection};
use crate::plan::{Budget, Groups, Target, fewest};

impl Recipe {
    /// Fails for what contradicts itself, whatever the model.
    pub(super) fn check(&self) -> Result<()> {
        self.check_places()?;
        self.check_windows()?;
        self.check_method()?;
        self.check_target()?;
        self.check_sharing()?;
        if let Some(mix) = &self.mix {
            self.check_mix(mix)?;
        }
        if let Some(heal) = &self.heal {
            heal.check().map_err(|error| Error::recipe("heal", error.to_string()))?;
            refuse(
                heal.seed != 0 && heal.seed != self.seed,
                "heal.seed",
                "the seed is `seed`, for all stages",
            )?;
        }
        if let Some(options) = &self.latency {
            options.check().map_err(|error| in_field("latency", &error))?;
        }
        refuse(self.samples.prompts.iter().any(String::is_empty), "samples.prompts", "one is empty")?;
        let limit = self.max_nll_increase.filter(|limit| !limit.is_finite());
        match limit {
            Some(limit) => Err(Error::recipe("max_nll_increase", format!("is {limit}, expected a number"))),
            None => Ok(()),
        }
    }

    fn check_places(&self) -> Result<()> {
        refuse(self.model.is_empty(), "model", "is missing")?;
        refuse(self.text.as_os_str().is_empty(), "text", "is missing")?;
        let idle = self.text_field.is_some() && !holds_json_lines(&self.text);
        refuse(idle, "text_field", "is for JSON Lines, and the name of `text` does not end in .jsonl")?;
        refuse(self.out.file_name().is_none(), "out", "is missing, or no name for a directory")?;
        let work = self.work_directory();
        refuse(work == self.out, "work", "is the same directory as `out`")?;
        refuse(work.starts_with(&self.out), "work", "is inside of `out`, which has to be new")?;
        refuse(work.exists() && !work.is_dir(), "work", "is a file, expected a directory")
    }

    fn check_windows(&self) -> Result<()> {
        let windows = &self.windows;
        refuse(windows.seq_len < 2, "windows.seq_len", "expected at least 2 tokens")?;
        refuse(windows.calibrate == 0, "windows.calibrate", "is 0, expected at least 1")?;
        refuse(windows.evaluate == 0, "windows.evaluate", "is 0, expected at least 1")?;
        refuse(self.task_items == Some(0), "task_items", "is 0, expected at least 1")?;
        let idle = self.task_items.is_some() && self.tasks.is_empty();
        refuse(idle, "task_items", "there are no `tasks`")
    }

    fn check_method(&self) -> Result<()> {
        let method = self.method;
        let other = |name: &str| format!("the method is {method}, which {name} does not concern");
        refuse(self.gates.is_some() && method != Method::Gates, "gates", &other("gates"))?;
        refuse(self.coupling.is_some() && method != Method::Coupling, "coupling", &other("coupling"))?;
        let told = self.gates.iter().map(|gates| ("gates", gates));
        let mut told = told.chain(self.coupling.iter().map(|coupling| ("coupling.gates", &coupling.gates)));
        told.try_for_each(|(field, gates)| self.check_gates(field, gates))?;
        let coupling = self.coupling.as_ref().map_or(Ok(()), GatesWithCoupling::check);
        coupling.map_err(|error| in_field("coupling", &error))
    }

    fn check_gates(&self, field: &str, gates: &Gates) -> Result<()> {
        let named = |name: &str| format!("{field}.{name}");
        refuse(gates.remove != 0, named("remove"), "how much is removed is `target`")?;
        refuse(!gates.protected.is_empty(), named("protected"), "blocks that stay are `protect`")?;
        let seeded = gates.seed != 0 && gates.seed != self.seed;
        refuse(seeded, named("seed"), "the seed is `seed`, for all stages")?;
        gates.check_options().map_err(|error| in_field(field, &error))
    }

    fn check_target(&self) -> Result<()> {
        let some = self.target.is_some() || self.share.is_some() || self.mix.is_some();
        refuse(!some, "target", "is missing: one of `target`, `share` and `mix` is needed")?;
        match self.target {
            Some(Goal::Rate(rate)) if !(0.0..1.0).contains(&rate) => {
                Err(Error::recipe("target.rate", format!("is {rate}, expected at least 0 and below 1")))
            }
            Some(Goal::NllIncrease(limit)) => {
                let field = "target.nll-increase";
                let sound = limit.is_finite() && limit >= 0.0;
                refuse(!sound, field, &format!("is {limit}, expected a number from 0 on"))?;
                let ordering = Method::names(|method| !method.depends_on_count());
                let reason = format!(
                    "the method {} finds sets of one size and no order of blocks, expected `method` to be one of \
                     {ordering}",
                    self.method
                );
                refuse(self.method.depends_on_count(), field, &reason)?;
                let more = self.share.is_some() || self.mix.is_some();
                refuse(more, field, "is met by removal alone: it goes with neither `share` nor `mix`")
            }
            _ => Ok(()),
        }
    }

    fn check_sharing(&self) -> Result<()> {
        let Some(share) = &self.share else { return Ok(()) };
        refuse(self.mix.is_some(), "share", "contradicts `mix`, which decides what is shared")?;
        share.groups.check().map_err(|error| in_field("share.groups", &error))?;
        check_ranks(share, 1)
    }

    fn check_mix(&self, mix: &MixOptions) -> Result<()> {
        let sound = (0.0..1.0).contains(&mix.residual_share);
        let found = format!("is {}, expected from 0 to below 1", mix.residual_share);
        refuse(!sound, "mix.residual_share", &found)?;
        let halves = self.gates.as_ref().is_some_and(|gates| gates.halves);
        refuse(halves, "gates.halves", "a mix removes whole blocks")?;
        match mix.total {
            Total::Share(share) if !(share > 0.0 && share < 1.0) => {
                Err(Error::recipe("mix.total.share", format!("is {share}, expected above 0 and below 1")))
            }
            _ => Ok(()),
        }
    }

    /// Fails for what this model cannot do, of which at most `remove` blocks will go and at most `left` stay.
    pub(super) fn check_model(&self, arch: &Architecture, remove: usize, left: usize) -> Result<()> {
        let depth = arch.depth();
        let unknown = self.protect.iter().find(|&&index| index >= depth);
        if let Some(&index) = unknown {
            return Err(in_field("protect", &Error::NoSuchBlock { index, depth }));
        }
        let free = self.free(depth);
        let found = format!("{remove} of {depth} blocks should go, and only {free} may");
        refuse(remove > free, "target", &found)?;
        if self.method == Method::Gates && (remove > 0 || self.mix.is_some()) {
            refuse(remove == 0, "target", "is 0 blocks, and the method gates is trained towards at least 1")?;
            let gates =
                Gates { remove, protected: self.protect.clone(), ..self.gates.clone().unwrap_or_default() };
            gates.check_depth(depth).map_err(|error| in_field("gates", &error))?;
        }
        if let Some(limit) = arch.position_limit() {
            let found = format!("is {}, and the model knows {limit} positions", self.windows.seq_len);
            refuse(self.windows.seq_len > limit, "windows.seq_len", &found)?;
        }
        if let Some(share) = &self.share {
            share.groups.check_depth(depth).map_err(|error| in_field("share.groups", &error))?;
            let shapes = Projection::ALL.into_iter().filter_map(|at| arch.projection_shape(at));
            check_ranks(share, shapes.map(|(output, input)| output + input).min().unwrap_or(1))?;
        }
        if let Some(options) = &self.latency {
            options.check_model(arch).map_err(|error| in_field("latency", &error))?;
        }
        let total = arch.parameter_count();
        if let Some(Groups::Budget { budget: Budget::Parameters(0) | Budget::Bytes(0), .. }) =
            self.share.as_ref().map(|share| &share.groups)
        {
            return Err(Error::recipe("share.groups.budget", "is 0, and a model takes more"));
        }
        if let Some(Total::Parameters(most)) = self.mix.map(|mix| mix.total) {
            let found = format!("is {most}, and the model has {total}: there is nothing to do");
            refuse(most >= total, "mix.total.parameters", &found)?;
        }
        if let Some(heal) = &self.heal {
            let groups = heal.groups.iter().try_for_each(|group| group.check_depth(left));
            groups.map_err(|error| in_field("heal.groups", &error))?;
            let teacher = heal.losses.need_teacher().then_some(depth);
            heal.losses.check(left, teacher).map_err(|error| in_field("heal.losses", &error))?;
        }
        Ok(())
    }

    /// How many blocks the method may choose at most.
    pub(super) fn free(&self, depth: usize) -> usize {
        let ends = [0, depth.saturating_sub(1)];
        let kept = |index: &usize| {
            self.protect.contains(index) || (self.method == Method::GreedyPerplexity && ends.contains(index))
        };
        (0..depth).filter(|index| !kept(index)).count().min(depth.saturating_sub(1))
    }

    /// How many blocks a goal removes at most.
    pub(super) fn most_removed(&self, checkpoint: &Checkpoint) -> Result<usize> {
        let arch = checkpoint.architecture();
        let named = |name: &'static str, target: Target| {
            target.blocks(arch).map_err(|error| in_field(&format!("target.{name}"), &error))
        };
        match self.target {
            None if self.mix.is_some() => Ok(((arch.depth() + 5) / 10).min(self.free(arch.depth()))),
            None => Ok(0),
            Some(Goal::Rate(rate)) => named("rate", Target::Rate(rate)),
            Some(Goal::Blocks(count)) => named("blocks", Target::Blocks(count)),
            Some(Goal::Parameters(most)) => named("parameters", Target::Parameters(most)),
            Some(Goal::Bytes(most)) => {
                let (freed, bytes) = checkpoint.freed_bytes(self.expected_format(arch));
                let found = |least| format!("is {most}, expected at least {least}, with one block left");
                fewest(&freed, bytes, most).map_err(|least| Error::recipe("target.bytes", found(least)))
            }
            Some(Goal::NllIncrease(_)) => Ok(self.free(arch.depth())),
        }
    }

    /// How many blocks stay at most, where at most `remove` go.
    pub(super) fn most_left(&self, checkpoint: &Checkpoint, remove: usize) -> usize {
        let arch = checkpoint.architecture();
        // Those that free the most go first.
        let removed = |(mut freed, total): (Vec<u64>, u64), most: u64| {
            freed.reverse();
            fewest(&freed, total, most).unwrap_or(remove)
        };
        let halves = self.gates.as_ref().is_some_and(|gates| gates.halves);
        let least = match self.target {
            _ if self.mix.is_some() || halves => 0,
            // Where no block may go, the goal is not met.
            Some(Goal::NllIncrease(_)) => 1,
            Some(Goal::Parameters(most)) => {
                let freed = arch.freed(|_, shape| shape.iter().product::<usize>() as u64);
                removed((freed, arch.parameter_count() as u64), most as u64)
            }
            Some(Goal::Bytes(most)) => removed(checkpoint.freed_bytes(self.expected_format(arch)), most),
            Some(Goal::Rate(_) | Goal::Blocks(_)) | None => remove,
        };
        arch.depth() - least.min(remove)
    }
}

/// Fails where residuals are asked for that get no rank.
fn check_ranks(share: &Share, unit: usize) -> Result<()> {
    let ranks = share.own.residual.map(|residual| residual.ranks.check(unit));
    ranks.transpose().map_err(|error| in_field("share.own.residual.ranks", &error))?;
    Ok(())
}

fn in_field(field: &str, error: &Error) -> Error {
    Error::recipe(field, error.to_string())
}

fn refuse(wrong: bool, field: impl Into<String>, reason: &str) -> Result<()> {
    if wrong { Err(Error::recipe(field, reason)) } else { Ok(()) }
}
