//! What a compression works on, opened and checked, and the hashes of what each stage depends on.

use std::collections::BTreeMap;

use candle_core::{DType, Device};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::recipe::{Goal, Recipe};
use super::run::{LATENCY, REPORT, SAMPLES};
use super::stage::Stage;
use super::work::{Key, Work};
use crate::checkpoint::{Checkpoint, Format, StreamOptions, StreamedDecoder};
use crate::data::{Tokenizer, Windows, hex, read_documents};
use crate::error::{Error, Result};
use crate::eval::Task;
use crate::heal::{Heal, hold_out};
use crate::importance::MethodOptions;
use crate::plan::Plan;
use crate::progress::Observer;

/// All that is known before a model is in memory.
#[derive(Debug)]
pub(super) struct Inputs<'a> {
    pub recipe: &'a Recipe,
    pub checkpoint: Checkpoint,
    pub model_sha256: String,
    pub tokenizer: Tokenizer,
    /// Windows that calibrate, and those that evaluate.
    pub calibration: Windows,
    pub evaluation: Windows,
    /// Windows to heal on, and those that choose the weights that are kept.
    pub healing: Option<(Windows, Windows)>,
    pub tasks: Vec<Task>,
    /// SHA-256 of each task's file, by the task's name.
    pub task_files: BTreeMap<String, String>,
    /// How many blocks the method chooses: what is removed, or at most removed.
    pub remove: usize,
    pub work: Work,
    /// How blocks are read from disk, where the model does not fit in the memory that there may be.
    pub streamed: Option<StreamOptions>,
}

/// The key of every stage's result, each made of those before it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Keys {
    /// Absent where nothing may be removed.
    pub score: Option<Key>,
    pub plan: Key,
    /// Absent where nothing is healed.
    pub heal: Option<Key>,
    /// The dense model's evaluation, that of the folded one before it is healed, that of the result.
    pub dense: Key,
    pub folded: Key,
    pub evaluate: Key,
    /// Absent where no speed is asked for.
    pub latency: Option<Key>,
    pub samples: SampleKeys,
    pub save: Key,
}

impl Keys {
    /// The key of the report: it tells of every stage, of what was asked for, and of the files that tasks are in.
    pub(super) fn report(&self, inputs: &Inputs<'_>) -> Result<Key> {
        Key::of(REPORT, &(inputs.recipe, &inputs.task_files, self))
    }
}

/// The keys of what these models make of the samples' beginnings.
#[derive(Debug, Clone, Serialize)]
pub(super) struct SampleKeys {
    pub dense: Key,
    pub folded: Key,
    pub compressed: Key,
}

impl<'a> Inputs<'a> {
    /// Opens and checks everything that can be checked before there is any work.
    pub(super) fn open(recipe: &'a Recipe, observer: &mut dyn Observer) -> Result<Self> {
        recipe.check()?;
        let checkpoint = Checkpoint::open_observed(&recipe.model, observer)?;
        let arch = checkpoint.architecture();
        let remove = recipe.most_removed(&checkpoint)?;
        recipe.check_model(arch, remove, recipe.most_left(&checkpoint, remove))?;
        let tasks = Task::read_all(&recipe.tasks, recipe.task_items)?;
        let task_files = tasks.iter().zip(&recipe.tasks).map(|(task, path)| {
            let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
            Ok((task.name.clone(), hex(&Sha256::digest(bytes))))
        });
        let task_files = task_files.collect::<Result<_>>()?;
        let text = read_documents(&recipe.text, recipe.text_field.as_deref().unwrap_or("text"))?;
        let cut = &recipe.windows;
        let tokenizer = checkpoint.tokenizer()?;
        let read_by = tokenizer.clone().with_split_special_tokens(cut.split_special_tokens);
        let (first, evaluation) =
            Windows::split_from_text(&read_by, &text, cut.seq_len, Some(cut.evaluate), cut.bos)?;
        let healing = recipe.heal.as_ref().map(|_| hold_out(&first)).transpose();
        let healing = healing.map_err(|error| Error::recipe("heal", error.to_string()))?;
        let calibration = first.spread(cut.calibrate)?;
        let model_sha256 = checkpoint.sha256(observer)?;
        let work = Work(recipe.work_directory());
        let mut inputs = Self {
            recipe,
            checkpoint,
            model_sha256,
            tokenizer,
            calibration,
            evaluation,
            healing,
            tasks,
            task_files,
            remove,
            work,
            streamed: None,
        };
        inputs.streamed = inputs.residence()?;
        Ok(inputs)
    }

    /// The model with its blocks on disk.
    pub(super) fn stream(&self, dtype: DType) -> Result<StreamedDecoder<'_>> {
        let options = self.streamed.clone().unwrap_or_default();
        if let Some(scratch) = &options.scratch {
            std::fs::create_dir_all(scratch).map_err(Error::io("create", scratch))?;
        }
        self.checkpoint.streamed(dtype, &Device::Cpu, options)
    }

    /// Whether anything may be removed.
    pub(super) fn needs_scores(&self) -> bool {
        self.remove > 0 || self.recipe.mix.is_some()
    }

    /// How many blocks stay at most: what is removed is known before any work only where a number is asked for.
    pub(super) fn most_left(&self) -> usize {
        self.recipe.most_left(&self.checkpoint, self.remove)
    }

    /// What the method is told, but for its files.
    pub(super) fn method_options(&self) -> MethodOptions {
        let Recipe { gates, coupling, protect, seed, .. } = self.recipe;
        MethodOptions {
            remove: self.remove,
            protected: protect.clone(),
            seed: *seed,
            gates: gates.clone().unwrap_or_default(),
            coupling: coupling.clone().unwrap_or_default(),
            ..MethodOptions::default()
        }
    }

    /// The healing with the recipe's seed.
    pub(super) fn heal(&self) -> Option<Heal> {
        let heal = self.recipe.heal.clone()?;
        Some(Heal { seed: self.recipe.seed, ..heal })
    }

    /// How what a plan makes is written.
    pub(super) fn format(&self, plan: &Plan) -> Format {
        let shares = plan.sharing().is_some_and(|sharing| !sharing.groups.is_empty());
        self.recipe.format_where(shares || !self.checkpoint.architecture().fold.is_plain())
    }

    /// The same before there is a plan.
    pub(super) fn expected_format(&self) -> Format {
        self.recipe.expected_format(self.checkpoint.architecture())
    }

    /// What tells this model from others.
    pub(super) fn model(&self) -> impl Serialize {
        (self.model_sha256.clone(), self.checkpoint.config().clone())
    }

    pub(super) fn keys(&self) -> Result<Keys> {
        let recipe = self.recipe;
        // Results name the whole text, of which windows are a part.
        let cut = |windows: &Windows| {
            let read = (windows.bos(), windows.split_special_tokens());
            (windows.text_sha256().to_string(), windows.ids_sha256(), read)
        };
        let calibration = cut(&self.calibration);
        let score = self.needs_scores().then(|| {
            let options = recipe.method.relevant(&self.method_options());
            Key::of(Stage::Score.name(), &(self.model(), recipe.dtype, &calibration, recipe.method, options))
        });
        let score = score.transpose()?;
        // How many bytes a plan leaves depends on the format.
        let format = matches!(recipe.target, Some(Goal::Bytes(_))).then_some(self.expected_format());
        let mix = recipe.mix.map(|mix| (mix, self.proportions(&mix)));
        let asked = (recipe.target, format, &recipe.protect, &recipe.share, mix);
        let plan = Key::of(Stage::Plan.name(), &(self.model(), &score, asked, &calibration))?;
        let heal = self.healing.as_ref().zip(self.heal()).map(|((train, choosing), heal)| {
            Key::of(Stage::Heal.name(), &(&plan, heal.deciding(), train.ids_sha256(), choosing.ids_sha256()))
        });
        let heal = heal.transpose()?;
        let items = self.tasks.iter().map(|task| (&task.name, format!("{:?}", task.items)));
        let tokenizer = self.tokenizer.to_json()?;
        let reader = (!self.tasks.is_empty()).then_some(&tokenizer);
        let questions = (cut(&self.evaluation), items.collect::<Vec<_>>(), reader);
        let evaluate = |weights: &Key| Key::of(Stage::Evaluate.name(), &(weights, &questions));
        let weights = heal.as_ref().unwrap_or(&plan);
        // As many as computed belong to what is said of the speed.
        let threads = rayon::current_num_threads();
        let timed = |options| Key::of(LATENCY, &(self.model(), weights, options, threads));
        let beginnings = (self.prompts()?, recipe.samples.tokens, &tokenizer);
        let out = std::path::absolute(&recipe.out).map_err(Error::io("find", &recipe.out))?;
        Ok(Keys {
            dense: Key::of(Stage::Evaluate.name(), &(self.model(), &questions))?,
            folded: evaluate(&plan)?,
            evaluate: evaluate(weights)?,
            latency: recipe.latency.map(timed).transpose()?,
            samples: SampleKeys {
                dense: Key::of(SAMPLES, &(self.model(), &beginnings))?,
                folded: Key::of(SAMPLES, &(&plan, &beginnings))?,
                compressed: Key::of(SAMPLES, &(weights, &beginnings))?,
            },
            save: Key::of(Stage::Save.name(), &(weights, recipe.format, out))?,
            score,
            plan,
            heal,
        })
    }
}
