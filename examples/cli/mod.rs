//! What the examples have in common: flags that mean the same everywhere, and bars for progress.
#![allow(dead_code, unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

pub mod heal;
pub mod interrupt;
pub mod quantize;
pub mod scoring;
pub mod target;
pub mod work;

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Result;
use clap::{Args, ValueEnum};
use foldgpt::candle::{DType, Device};
use foldgpt::{Bos, Bytes, Checkpoint, Decoder, HubOptions, Observer, Perplexity, Tokenizer, Windows};
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
    /// Read special tokens that the text writes out, such as `<unk>`, as any other characters
    #[arg(long)]
    pub split_special_tokens: bool,
}

impl WindowArgs {
    pub fn cut(&self, tokenizer: &Tokenizer, text: &str, limit: Option<usize>) -> Result<Windows> {
        let tokenizer = tokenizer.clone().with_split_special_tokens(self.split_special_tokens);
        let windows = Windows::from_text(&tokenizer, text, self.seq_len, limit, self.bos.into())?;
        warn_of_unknown(windows.has_many_unknown(), windows.split_special_tokens());
        Ok(windows)
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
        let tokenizer = tokenizer.clone().with_split_special_tokens(self.split_special_tokens);
        let (mut calibration, held_out) =
            Windows::split_from_text(&tokenizer, text, self.seq_len, evaluate, self.bos.into())?;
        warn_of_unknown(calibration.has_many_unknown(), calibration.split_special_tokens());
        if let Some(count) = calibrate {
            calibration = calibration.spread(count)?;
        }
        Ok((calibration, held_out))
    }
}

/// Says where unknown tokens may decide the loss, and what can be done.
pub fn warn_of_unknown(many: bool, split_special_tokens: bool) {
    if many && !split_special_tokens {
        eprintln!(
            "warning: one token in a hundred or more is the unknown one, and may decide the loss; where the text writes \
             it out (<unk>), --split-special-tokens reads it as any other characters"
        );
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

/// Whether standard output shows colours.
pub fn colours() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// A plain text, or the documents of JSON Lines (`*.jsonl`) in their field `text`.
pub fn read_text(path: &Path) -> Result<String> {
    Ok(foldgpt::data::read_documents(path, "text")?)
}

/// What a number depends on, in one line.
pub fn protocol(windows: &Windows) -> String {
    let tokens = windows.len() * (windows.seq_len() - 1);
    let read = (windows.bos(), windows.split_special_tokens());
    protocol_line(tokens, windows.len(), windows.seq_len(), read, windows.text_sha256())
}

/// The same of a result.
pub fn protocol_of(found: &Perplexity) -> String {
    let read = (found.bos, found.split_special_tokens);
    protocol_line(found.tokens, found.windows, found.seq_len, read, &found.text_sha256)
}

/// `read` is with BOS or without, and whether special tokens were split.
fn protocol_line(tokens: usize, windows: usize, seq_len: usize, read: (bool, bool), sha256: &str) -> String {
    let bos = if read.0 { "with" } else { "without" };
    let split = if read.1 { ", special tokens split" } else { "" };
    format!(
        "{tokens} predicted tokens in {windows} windows of {seq_len}, {bos} bos{split}, text sha256 {sha256}"
    )
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

/// A bar on standard error for every stage, where that is a terminal; and what Ctrl-C cancels.
#[derive(Debug, Default)]
pub struct Bars {
    bar: Option<ProgressBar>,
    /// What a healing has measured last.
    measured: Vec<(&'static str, f64)>,
}

impl Observer for Bars {
    fn started(&mut self, stage: &'static str, total: u64) {
        interrupt::started();
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
        interrupt::flow()
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
        interrupt::finished();
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
