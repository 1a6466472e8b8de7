//! The methods by name.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{
    AngularDistance, BlockInfluence, Gates, GatesWithCoupling, GreedyPerplexity, Importance, MacroInfluence,
    PerplexityIncrease, Random, Taylor,
};
use crate::error::{Error, Result};

/// How blocks are scored, by the names that command lines and recipes use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Method {
    /// [`GatesWithCoupling`].
    #[default]
    Coupling,
    /// [`Gates`].
    Gates,
    /// [`BlockInfluence`].
    BlockInfluence,
    /// [`AngularDistance`].
    Angular,
    /// [`PerplexityIncrease`].
    Perplexity,
    /// [`GreedyPerplexity`].
    GreedyPerplexity,
    /// [`Taylor`].
    Taylor,
    /// [`MacroInfluence`].
    MacroInfluence,
    /// [`Random`].
    Random,
}

/// What a method is told beside its name; each takes what concerns it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct MethodOptions {
    /// How many blocks to choose.
    pub remove: usize,
    /// Blocks that stay.
    pub protected: Vec<usize>,
    /// Seed of everything drawn.
    pub seed: u64,
    /// How gates are trained alone; number, protected blocks, seed and file are those of this.
    pub gates: Gates,
    /// How gates are trained and sets searched together; as before.
    pub coupling: GatesWithCoupling,
    /// Where a training of gates keeps its state.
    #[serde(skip)]
    pub gates_file: Option<PathBuf>,
    /// Where measured values are kept.
    #[serde(skip)]
    pub values_file: Option<PathBuf>,
}

impl Method {
    /// All methods.
    pub const ALL: [Self; 9] = [
        Self::Coupling,
        Self::Gates,
        Self::BlockInfluence,
        Self::Angular,
        Self::Perplexity,
        Self::GreedyPerplexity,
        Self::Taylor,
        Self::MacroInfluence,
        Self::Random,
    ];

    /// The method's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Coupling => "coupling",
            Self::Gates => "gates",
            Self::BlockInfluence => "block-influence",
            Self::Angular => "angular",
            Self::Perplexity => "perplexity",
            Self::GreedyPerplexity => "greedy-perplexity",
            Self::Taylor => "taylor",
            Self::MacroInfluence => "macro-influence",
            Self::Random => "random",
        }
    }

    /// Whether the method finds a set of one size, so that its scores say little of others.
    #[must_use]
    pub fn depends_on_count(self) -> bool {
        matches!(self, Self::Coupling | Self::Gates | Self::Angular)
    }

    /// Whether the method removes one block after the other, as many as it is told.
    #[must_use]
    pub fn is_greedy(self) -> bool {
        matches!(self, Self::GreedyPerplexity | Self::MacroInfluence)
    }

    /// Whether the method takes so long that it can keep what it has found in files, and go on from there.
    #[must_use]
    pub fn keeps_state(self) -> bool {
        matches!(self, Self::Gates | Self::Coupling) || self.is_greedy()
    }

    /// Whether the method can score a model whose blocks are read from disk one at a time:
    /// [`Importance::score_streamed`].
    #[must_use]
    pub fn streams(self) -> bool {
        matches!(self, Self::Gates | Self::BlockInfluence | Self::Angular | Self::Perplexity | Self::Random)
    }

    /// The names of the methods that can.
    pub(crate) fn streaming() -> String {
        Self::names(Self::streams)
    }

    /// The names of the methods of which this holds.
    pub(crate) fn names(holds: fn(Self) -> bool) -> String {
        Self::ALL.into_iter().filter(|method| holds(*method)).map(Self::name).collect::<Vec<_>>().join(", ")
    }

    /// The method with its options.
    #[must_use]
    pub fn build(self, options: &MethodOptions) -> Box<dyn Importance> {
        let MethodOptions { remove, seed, .. } = *options;
        let (protected, values) = (options.protected.clone(), options.values_file.clone());
        let told = |gates: &Gates| {
            let mut gates = gates.clone();
            (gates.remove, gates.protected, gates.seed) = (remove, options.protected.clone(), seed);
            gates.state_file.clone_from(&options.gates_file);
            gates
        };
        match self {
            Self::Coupling => {
                let gates = told(&options.coupling.gates);
                Box::new(GatesWithCoupling { gates, losses_file: values, ..options.coupling.clone() })
            }
            Self::Gates => Box::new(told(&options.gates)),
            Self::BlockInfluence => Box::new(BlockInfluence),
            Self::Angular => Box::new(AngularDistance { remove, protected }),
            Self::Perplexity => Box::new(PerplexityIncrease),
            Self::GreedyPerplexity => Box::new(GreedyPerplexity { remove, protected, losses_file: values }),
            Self::Taylor => Box::new(Taylor),
            Self::MacroInfluence => Box::new(MacroInfluence { remove, protected, values_file: values }),
            Self::Random => Box::new(Random { seed }),
        }
    }

    /// The options as far as the method's result depends on them, all others as they are by default.
    pub(crate) fn relevant(self, options: &MethodOptions) -> MethodOptions {
        let mut relevant = MethodOptions::default();
        if self.depends_on_count() || self.is_greedy() {
            relevant.remove = options.remove;
            relevant.protected.clone_from(&options.protected);
        }
        match self {
            Self::Coupling => (relevant.seed, relevant.coupling) = (options.seed, options.coupling.clone()),
            Self::Gates => (relevant.seed, relevant.gates) = (options.seed, options.gates.clone()),
            Self::Random => relevant.seed = options.seed,
            _ => {}
        }
        relevant
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let names = Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|method| method.name() == name);
        found.ok_or_else(|| Error::argument("method", name, format!("one of {names}")))
    }
}
