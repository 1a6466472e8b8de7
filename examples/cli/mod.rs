//! What the examples have in common: flags that mean the same everywhere, and bars for progress.
#![allow(dead_code, unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

pub mod heal;
pub mod quantize;
pub mod work;

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Args, ValueEnum};
use foldgpt::candle::{DType, Device};
use foldgpt::importance::{Importance, Method, MethodOptions};
use foldgpt::pipeline::{Goal, MixOptions, Share, Total};
use foldgpt::plan::{Budget, Donor, Groups, Ranks, Residual, ResidualStart, ScaleStart};
use foldgpt::{
    Bos, Bytes, Checkpoint, Decoder, Format, HubOptions, Observer, Perplexity, Scores, Target, Tokenizer,
    Windows,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

// Which model.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A directory in the Hugging Face layout, a GGUF file, or a hub id (`org/name`, feature `hub`); what private models
    /// need is found in `HF_TOKEN` or where `hf auth login` saves it, since flags are seen by others on the machine
    #[arg(long)]
    pub model: String,
    /// The branch, tag or commit of a hub id; `org/name@revision` says the same
    #[arg(long)]
    pub revision: Option<String>,
    /// How matrices are held in memory; bf16 takes half the room and, on CPUs with AVX-512 bf16, less time
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: DtypeArg,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    F32,
    Bf16,
}

impl std::fmt::Display for DtypeArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl DtypeArg {
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

impl ModelArgs {
    pub fn open(&self) -> Result<Checkpoint> {
        open(&self.model, self.revision.as_deref())
    }

    pub fn load(&self) -> Result<(Checkpoint, Decoder)> {
        let checkpoint = self.open()?;
        let decoder = load(&checkpoint, self.dtype.dtype())?;
        Ok((checkpoint, decoder))
    }
}

/// A model on disk or of the hub, with bars for what is fetched.
pub fn open(model: &str, revision: Option<&str>) -> Result<Checkpoint> {
    let mut bars = Bars::default();
    let Some(revision) = revision else { return Ok(Checkpoint::open_observed(model, &mut bars)?) };
    anyhow::ensure!(!Path::new(model).exists(), "--revision is for a hub id, and {model} is on disk");
    let mut options = HubOptions::from_env()?;
    options.revision = Some(revision.to_owned());
    Ok(Checkpoint::open_hub(model, &options, &mut bars)?)
}

/// A checkpoint's weights on the CPU.
pub fn load(checkpoint: &Checkpoint, dtype: DType) -> Result<Decoder> {
    Ok(checkpoint.decoder_observed(dtype, &Device::Cpu, &mut Bars::default())?)
}

// How a text is cut into windows.
#[derive(Debug, Args)]
pub struct WindowArgs {
    /// Tokens in each window
    #[arg(long, default_value_t = 512)]
    pub seq_len: usize,
    /// Begin each window with the begin-of-text token
    #[arg(long, value_enum, default_value_t = BosArg::Auto)]
    pub bos: BosArg,
}

impl WindowArgs {
    pub fn cut(&self, tokenizer: &Tokenizer, text: &str, limit: Option<usize>) -> Result<Windows> {
        Ok(Windows::from_text(tokenizer, text, self.seq_len, limit, self.bos.into())?)
    }

    /// The windows that calibrate, at most so many, spread over the first 80 % of a text: its beginning alone is about
    /// a few things only. And those that evaluate, the first of the rest.
    pub fn split(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        calibrate: Option<usize>,
        evaluate: Option<usize>,
    ) -> Result<(Windows, Windows)> {
        let (mut calibration, held_out) =
            Windows::split_from_text(tokenizer, text, self.seq_len, evaluate, self.bos.into())?;
        if let Some(count) = calibrate {
            calibration = calibration.spread(count)?;
        }
        Ok((calibration, held_out))
    }
}

impl From<BosArg> for Bos {
    fn from(bos: BosArg) -> Self {
        match bos {
            BosArg::Auto => Self::Auto,
            BosArg::Always => Self::Always,
            BosArg::Never => Self::Never,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum BosArg {
    /// As the tokenizer does it
    Auto,
    Always,
    Never,
}

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
    options.gates.steps = scoring.gate_steps.unwrap_or(options.gates.steps);
    options.coupling.gates.steps = scoring.gate_steps.unwrap_or(options.coupling.gates.steps);
    options.gates_file = scoring.file(&format!("{method}-{remove}-gates.json"))?;
    options.values_file = scoring.file(&format!("{method}-values.jsonl"))?;
    Ok(options)
}

/// Says where two halves of the text rank the blocks differently.
pub fn warn_unstable(scores: &Scores) {
    if let Some(stability) = scores.stability.filter(|_| scores.is_stable() == Some(false)) {
        println!(
            "warning: by {}, the two halves of the text rank the blocks differently (Spearman {stability:.2}, below \
             0.8): use more windows",
            scores.method
        );
    }
}

/// Whether standard output shows colours.
pub fn colours() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
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
        Ok(())
    }

    /// A file in the directory where state is kept, which is made where it is missing.
    fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        let Some(directory) = &self.state else { return Ok(None) };
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        Ok(Some(directory.join(name)))
    }
}

// How much goes.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct TargetArgs {
    /// Remove this share of the blocks, rounded to the nearest number
    #[arg(long)]
    pub remove: Option<f64>,
    /// Remove this many blocks
    #[arg(long)]
    pub remove_blocks: Option<usize>,
    /// Remove as few blocks as leave at most this many parameters
    #[arg(long)]
    pub max_params: Option<usize>,
}

impl TargetArgs {
    pub fn target(&self) -> Option<Target> {
        let rate = self.remove.map(Target::Rate);
        rate.or(self.remove_blocks.map(Target::Blocks)).or(self.max_params.map(Target::Parameters))
    }

    /// The same as a recipe has it.
    pub fn goal(&self) -> Option<Goal> {
        let rate = self.remove.map(Goal::Rate);
        rate.or(self.remove_blocks.map(Goal::Blocks)).or(self.max_params.map(Goal::Parameters))
    }
}

// What is shared by the blocks that stay, and what they keep. Of --budget-params alone the mix decides what they keep.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("tied").args(["group_size", "groups"]))]
#[command(group = ArgGroup::new("shared").args(["group_size", "budget_params"]))]
pub struct SharingArgs {
    /// Tie this many consecutive blocks: they use the same matrices
    #[arg(long)]
    pub group_size: Option<usize>,
    /// Tie the neighbours that cost the least, until the total of --budget-params is met
    #[arg(long, value_enum, requires = "budget_params")]
    pub groups: Option<GroupsArg>,
    /// Whose matrices tied blocks use
    #[arg(long, value_enum, default_value_t = DonorArg::Mean, requires = "shared")]
    pub donor: DonorArg,
    /// Tie the norms of tied blocks too, which are otherwise each block's own
    #[arg(long, requires = "tied")]
    pub no_norms: bool,
    /// Give tied blocks a factor for each output, fitted by least squares
    #[arg(long, requires = "tied")]
    pub scales: bool,
    /// Give tied blocks residuals of this rank
    #[arg(long, requires = "tied")]
    pub rank: Option<usize>,
    /// How residuals start
    #[arg(long, value_enum, default_value_t = StartArg::Whitened, requires = "rank")]
    pub start: StartArg,
    /// Meet this share of the parameters: by removal first (of at most as many blocks as --remove says, else a tenth),
    /// then by tying the cheapest neighbours, what is left over becoming rank
    #[arg(long)]
    pub budget_params: Option<f64>,
    /// With --budget-params, try removing none, half and all of the blocks that may go, each with 0, 5 and 15 % of the
    /// total kept for rank, and take the mix of the lowest loss
    #[arg(long, requires = "budget_params", conflicts_with = "tied")]
    pub search: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GroupsArg {
    Budget,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DonorArg {
    First,
    Mean,
    /// The mean or the block that costs the least loss
    Best,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StartArg {
    /// Truncated SVD of what the shared matrix lacks
    Svd,
    /// The same, whitened by the inputs' second moment
    Whitened,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// Each shared tensor once
    Compact,
    /// A standard directory, every block written out
    Expanded,
}

// How a model is written that was made of another one.
#[derive(Debug, Clone, Copy, Args)]
pub struct FormatArgs {
    /// How a model whose blocks share is written; as --model is where not given
    #[arg(long, value_enum)]
    pub format: Option<FormatArg>,
}

impl FormatArgs {
    /// The format that was asked for, or that of the source, where `adapted` says whether there will be adapters that it
    /// does not have. A model whose blocks share nothing, add nothing and lack nothing is a standard one.
    pub fn of(self, source: &Checkpoint, adapted: bool) -> Format {
        let plain = source.architecture().fold.is_plain() && !adapted;
        let same = if plain { Format::Expanded } else { Format::Compact };
        self.format.map_or(same, Format::from)
    }
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Compact => Self::Compact,
            FormatArg::Expanded => Self::Expanded,
        }
    }
}

impl DonorArg {
    pub fn donor(self) -> Donor {
        match self {
            Self::First => Donor::First,
            Self::Mean => Donor::Mean,
            Self::Best => Donor::Best,
        }
    }
}

impl SharingArgs {
    /// Whether anything is shared by these flags.
    pub fn any(&self) -> bool {
        self.group_size.is_some() || self.budget_params.is_some()
    }

    /// What is shared by --group-size or --groups, of a model of so many parameters.
    pub fn share(&self, parameters: impl FnOnce() -> Result<usize>) -> Result<Option<Share>> {
        let groups = match (self.group_size, self.groups, self.budget_params) {
            (Some(size), _, _) => Groups::of(size),
            (None, Some(GroupsArg::Budget), Some(share)) => {
                anyhow::ensure!(
                    share > 0.0 && share < 1.0,
                    "--budget-params is {share}, expected above 0 and below 1"
                );
                Groups::until(Budget::Parameters((share * parameters()? as f64) as usize))
            }
            _ => return Ok(None),
        };
        let mut share = Share::new(groups);
        share.donor = self.donor.donor();
        share.own.norms = !self.no_norms;
        share.own.scales = self.scales.then_some(ScaleStart::LeastSquares);
        share.own.residual = self.rank.map(|rank| {
            let start = match self.start {
                StartArg::Svd => ResidualStart::Svd,
                StartArg::Whitened => ResidualStart::Whitened,
            };
            Residual { ranks: Ranks::Uniform(rank), start }
        });
        Ok(Some(share))
    }

    /// The total of --budget-params, where removal, sharing and rank meet it together.
    pub fn mix(&self) -> Option<MixOptions> {
        let share = self.budget_params.filter(|_| self.groups.is_none())?;
        let mut mix = MixOptions::new(Total::Share(share));
        (mix.donor, mix.search) = (self.donor.donor(), self.search);
        Some(mix)
    }
}

/// A plain text, or the documents of JSON Lines (`*.jsonl`) in their field `text`.
pub fn read_text(path: &Path) -> Result<String> {
    Ok(foldgpt::data::read_documents(path, "text")?)
}

/// What a number depends on, in one line.
pub fn protocol(windows: &Windows) -> String {
    let tokens = windows.len() * (windows.seq_len() - 1);
    protocol_line(tokens, windows.len(), windows.seq_len(), windows.bos(), windows.text_sha256())
}

/// The same of a result.
pub fn protocol_of(found: &Perplexity) -> String {
    protocol_line(found.tokens, found.windows, found.seq_len, found.bos, &found.text_sha256)
}

fn protocol_line(tokens: usize, windows: usize, seq_len: usize, bos: bool, sha256: &str) -> String {
    let bos = if bos { "with" } else { "without" };
    format!("{tokens} predicted tokens in {windows} windows of {seq_len}, {bos} bos, text sha256 {sha256}")
}

/// The command that this process was run by, as a shell takes it.
pub fn command() -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+,./:@%".contains(c);
    let quoted = |argument: String| {
        if !argument.is_empty() && argument.chars().all(plain) {
            return argument;
        }
        format!("'{}'", argument.replace('\'', r"'\''"))
    };
    let mut arguments = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned());
    // Where the program lies says nothing.
    let program = arguments.next().unwrap_or_default();
    let program = Path::new(&program).file_stem().unwrap_or_default().to_string_lossy().into_owned();
    std::iter::once(program).chain(arguments.map(quoted)).collect::<Vec<_>>().join(" ")
}

/// Fails early for blocks that are to stay and do not exist.
pub fn check_protected(protected: &[usize], depth: usize) -> Result<()> {
    if let Some(index) = protected.iter().find(|&&index| index >= depth) {
        anyhow::bail!("--protect: block {index} does not exist: the model has {depth} blocks");
    }
    Ok(())
}

/// The most memory that this process has had at once, where the system says it.
pub fn peak_memory() -> Option<Bytes> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().parse::<Bytes>().ok().map(|kilobytes| Bytes(kilobytes.0 / 1000 * 1024))
}

/// A bar on standard error for every stage; nothing where standard error is no terminal.
#[derive(Debug, Default)]
pub struct Bars {
    bar: Option<ProgressBar>,
    /// What a healing has measured last.
    measured: Vec<(&'static str, f64)>,
}

impl Observer for Bars {
    fn started(&mut self, stage: &'static str, total: u64) {
        if let Some(outer) = self.bar.take() {
            outer.finish_and_clear();
        }
        let style = ProgressStyle::with_template(match stage {
            "fetch" | "hash" | "save" => "{msg:18} {wide_bar} {bytes}/{total_bytes} {eta} left",
            _ => "{msg:18} {wide_bar} {pos}/{len} {eta} left",
        });
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        self.bar =
            Some(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_message(stage));
        self.measured.clear();
    }

    fn advanced(&mut self, _: &'static str, done: u64, _: u64) -> ControlFlow<()> {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
        ControlFlow::Continue(())
    }

    fn measured(&mut self, stage: &'static str, what: &'static str, value: f64) {
        // The bar knows the time that is left by itself.
        let Some(bar) = self.bar.as_ref().filter(|_| what != "seconds left") else { return };
        match self.measured.iter_mut().find(|(known, _)| *known == what) {
            Some((_, last)) => *last = value,
            None => self.measured.push((what, value)),
        }
        let measured = self.measured.iter().map(|(what, value)| format!(", {what} {value:.3}"));
        bar.set_message(stage.to_string() + &measured.collect::<String>());
    }

    fn finished(&mut self, _: &'static str) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
