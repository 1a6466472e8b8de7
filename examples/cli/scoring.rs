//! Flags of scoring: which method, and what it is told.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use foldgpt::Scores;
use foldgpt::importance::{Gates, Importance, Method, MethodOptions};

/// Parses the library's methods by name, with what each does in a few words.
pub fn methods() -> impl TypedValueParser<Value = Method> {
    let value = |method: Method| PossibleValue::new(method.name()).help(in_few_words(method));
    PossibleValuesParser::new(Method::ALL.map(value)).try_map(|name| name.parse::<Method>())
}

fn in_few_words(method: Method) -> &'static str {
    match method {
        Method::Coupling => "Learnable gates, pairwise coupling, and a search decided by true losses",
        Method::Gates => "Learnable gates alone",
        Method::BlockInfluence => "1 - cos(input, output) of each block",
        Method::Angular => "Angular distance across consecutive blocks, at the last token",
        Method::Perplexity => "Loss without each block, one shot",
        Method::GreedyPerplexity => "Loss without each block, measured anew after each removal",
        Method::Taylor => "First-order Taylor scores of the weights",
        Method::MacroInfluence => "Change of the last block's output, measured anew after each removal",
        Method::Random => "Chance",
        _ => "",
    }
}

/// A method that is told to choose `remove` blocks outside of `protected`.
pub fn build(
    method: Method,
    remove: usize,
    protected: &[usize],
    seed: u64,
    scoring: &ScoringArgs,
) -> Result<Box<dyn Importance>> {
    Ok(method.build(&options(method, remove, protected, seed, scoring)?))
}

/// What a method is told.
pub fn options(
    method: Method,
    remove: usize,
    protected: &[usize],
    seed: u64,
    scoring: &ScoringArgs,
) -> Result<MethodOptions> {
    scoring.check(method)?;
    let mut options = MethodOptions::default();
    (options.remove, options.protected, options.seed) = (remove, protected.to_vec(), seed);
    options.gates.halves = scoring.halves;
    scoring.train(&mut options.gates);
    scoring.train(&mut options.coupling.gates);
    options.gates_file = scoring.file(&format!("{method}-{remove}-gates.json"))?;
    options.values_file = scoring.file(&format!("{method}-values.jsonl"))?;
    Ok(options)
}

/// Whether these blocks are the ones that the method itself chose; else a plan took them by its scores.
pub fn chose(scores: &Scores, removed: &[usize]) -> bool {
    let sorted = |mut chosen: Vec<usize>| {
        chosen.sort_unstable();
        chosen
    };
    scores.chosen.clone().map(sorted).as_deref() == Some(removed)
}

/// Says where two halves of the text rank the blocks differently.
pub fn warn_unstable(scores: &Scores) {
    if let Some(stability) = scores.stability.filter(|_| scores.is_stable() == Some(false)) {
        eprintln!(
            "warning: by {}, the two halves of the text rank the blocks differently (Spearman {stability:.2}, below \
             0.8): use more windows",
            scores.method
        );
    }
}

// How gates are trained, and where long scoring keeps its state.
#[derive(Debug, Default, Args)]
pub struct ScoringArgs {
    /// Train gates over the attention and the MLP of every block apart; removes halves of blocks (method gates)
    #[arg(long)]
    pub halves: bool,
    /// Training steps of the gates
    #[arg(long)]
    pub gate_steps: Option<usize>,
    /// Keep all activations while gates are trained, instead of computing each block again: faster, for more memory;
    /// of a model in memory
    #[arg(long)]
    pub no_gradient_checkpointing: bool,
    /// Keep what was trained and measured in this directory, and go on from it
    #[arg(long)]
    pub state: Option<PathBuf>,
}

impl ScoringArgs {
    /// Fails for options that do not concern the method.
    pub fn check(&self, method: Method) -> Result<()> {
        let gates = matches!(method, Method::Gates | Method::Coupling);
        anyhow::ensure!(
            !self.halves || method == Method::Gates,
            "--halves is for --method gates, not {method}"
        );
        anyhow::ensure!(
            self.gate_steps.is_none() || gates,
            "--gate-steps is for --method gates or coupling, not {method}"
        );
        anyhow::ensure!(
            !self.no_gradient_checkpointing || gates,
            "--no-gradient-checkpointing is for --method gates or coupling, not {method}"
        );
        Ok(())
    }

    /// How gates are trained.
    pub fn train(&self, gates: &mut Gates) {
        gates.steps = self.gate_steps.unwrap_or(gates.steps);
        gates.gradient_checkpointing = !self.no_gradient_checkpointing;
    }

    /// A file in the directory where state is kept, which is made where it is missing.
    fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        let Some(directory) = &self.state else { return Ok(None) };
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        Ok(Some(directory.join(name)))
    }
}
