//! The whole job: score, plan, fold, heal, evaluate, save, by one recipe.
//!
//! Every stage keeps its result in the working directory, in a file named by the hash of all that the result depends
//! on: the model, the text, the options that matter, and the stage before. A rerun does what is not there, so an
//! interrupted run goes on, and one with another healing begins at the healing. Scoring and healing keep their state
//! there too, and go on in their middle. Nothing is ever removed from it but the state of a healing that is done; the
//! directory may be deleted when the result is.
//!
//! Nothing appears at the destination before the quality gate is passed, and then all of it at once.
//!
//! ```
//! use foldgpt::Compressor;
//! use foldgpt::importance::Method;
//! use foldgpt::pipeline::Goal;
//!
//! let directory = std::env::temp_dir().join(format!("foldgpt-pipeline-{}", std::process::id()));
//! std::fs::create_dir_all(&directory).unwrap();
//! let text = directory.join("text.txt");
//! std::fs::write(&text, "Anna lost her red kite near the old bridge.\n".repeat(200)).unwrap();
//!
//! let mut compressor = Compressor::new("examples/tiny-stories", &text, directory.join("smaller"));
//! compressor = compressor.method(Method::BlockInfluence).target(Goal::Rate(0.1)).max_nll_increase(5.0);
//! compressor.recipe.windows.seq_len = 64;
//! let forecast = compressor.dry_run(&mut ())?;
//! let report = compressor.run(&mut ())?;
//! assert_eq!(forecast.compressed.map(|sizes| sizes.parameters), Some(report.compressed.parameters));
//! assert!(compressor.run(&mut ())?.ran.is_empty()); // all of it is known
//! # std::fs::remove_dir_all(&directory).ok();
//! # Ok::<(), foldgpt::Error>(())
//! ```

mod check;
mod cost;
mod curve;
mod forecast;
mod inputs;
mod memory;
mod planning;
mod recipe;
mod report;
mod run;
mod samples;
mod saving;
mod sizes;
mod stage;
mod work;

pub use curve::HealPoint;
pub use forecast::{DryRun, Forecast};
pub use recipe::{Goal, MixOptions, Precision, Recipe, SampleOptions, Share, Total, WindowOptions};
pub use report::{Measured, Other, Report, Sample, Tried};
pub use sizes::Sizes;
pub use stage::Stage;

use std::path::{Path, PathBuf};

use crate::bytes::Bytes;
use crate::checkpoint::Format;
use crate::error::Result;
use crate::eval::LatencyOptions;
use crate::heal::Heal;
use crate::importance::Method;
use crate::progress::Observer;

/// Compresses a model by a recipe.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
#[must_use = "a compressor does nothing until it is run"]
pub struct Compressor {
    /// All that it is told; the methods set what is set most often.
    pub recipe: Recipe,
    /// The command that runs it, for the report to state.
    pub command: Option<String>,
}

impl From<Recipe> for Compressor {
    fn from(recipe: Recipe) -> Self {
        Self { recipe, command: None }
    }
}

impl Compressor {
    /// Compresses `model` by what `text` says of it, and writes the result to `out`.
    pub fn new(model: impl Into<String>, text: impl Into<PathBuf>, out: impl Into<PathBuf>) -> Self {
        let (model, text, out) = (model.into(), text.into(), out.into());
        Self::from(Recipe { model, text, out, ..Recipe::default() })
    }

    /// Reads its recipe from a TOML or JSON file: [`Recipe::read`].
    ///
    /// # Errors
    /// A file that cannot be read or is no recipe.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Recipe::read(path).map(Self::from)
    }

    /// How much is removed.
    pub fn target(mut self, goal: Goal) -> Self {
        self.recipe.target = Some(goal);
        self
    }

    /// How blocks are scored.
    pub fn method(mut self, method: Method) -> Self {
        self.recipe.method = method;
        self
    }

    /// Blocks that stay.
    pub fn protect(mut self, blocks: &[usize]) -> Self {
        self.recipe.protect = blocks.to_vec();
        self
    }

    /// What the blocks that stay share.
    pub fn share(mut self, share: Share) -> Self {
        self.recipe.share = Some(share);
        self
    }

    /// A total that removal, sharing and rank meet together.
    pub fn mix(mut self, mix: MixOptions) -> Self {
        self.recipe.mix = Some(mix);
        self
    }

    /// How the rest is healed.
    pub fn heal(mut self, heal: Heal) -> Self {
        self.recipe.heal = Some(heal);
        self
    }

    /// The quality gate: nothing is saved whose loss is higher by more than this, in nats per token.
    pub fn max_nll_increase(mut self, limit: f64) -> Self {
        self.recipe.max_nll_increase = Some(limit);
        self
    }

    /// How fast the model is before and after, measured side by side.
    pub fn latency(mut self, options: LatencyOptions) -> Self {
        self.recipe.latency = Some(options);
        self
    }

    /// How the model is written; see [`Recipe::format`] for what it is otherwise.
    pub fn format(mut self, format: Format) -> Self {
        self.recipe.format = Some(format);
        self
    }

    /// The most memory that a run may take, as far as it can be counted: see [`Recipe::max_memory`].
    pub fn max_memory(mut self, limit: Bytes) -> Self {
        self.recipe.max_memory = Some(limit);
        self
    }

    /// Where stages keep their results.
    pub fn work(mut self, directory: impl Into<PathBuf>) -> Self {
        self.recipe.work = Some(directory.into());
        self
    }

    /// Seed of everything drawn.
    pub fn seed(mut self, seed: u64) -> Self {
        self.recipe.seed = seed;
        self
    }

    /// What the models before and after continue, for the report; two windows of the evaluation text where nothing is
    /// given.
    pub fn prompts<S: Into<String>>(mut self, prompts: impl IntoIterator<Item = S>) -> Self {
        self.recipe.samples.prompts = prompts.into_iter().map(Into::into).collect();
        self
    }

    /// Runs every stage whose result is not known yet, and says what came of all.
    ///
    /// The observer hears of each stage that runs as [`Stage::observed`], and of the work inside of it.
    ///
    /// # Errors
    /// [`Error::Recipe`](crate::Error::Recipe) with its field for what contradicts itself or the model, before any
    /// work; a destination that exists, unless this recipe has written it;
    /// [`Error::QualityGate`](crate::Error::QualityGate), with nothing written there; whatever a stage fails with; or a
    /// cancelling observer. What was found until then is kept.
    pub fn run(&self, observer: &mut dyn Observer) -> Result<Report> {
        run::Run::open(self, observer)?.finish(observer)
    }

    /// Says what a run would do: which stages are known, what comes out, how long it takes and how much memory. Reads
    /// the model and runs it on a few tokens; writes nothing.
    ///
    /// # Errors
    /// What [`run`](Self::run) fails with before any work.
    pub fn dry_run(&self, observer: &mut dyn Observer) -> Result<DryRun> {
        forecast::forecast(&self.recipe, observer)
    }
}
