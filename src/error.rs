//! The one error type of the crate.

use std::path::{Path, PathBuf};

use crate::bytes::Bytes;
use crate::ops::Matrix;

/// What went wrong, where, and what was expected instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be read, written, synced or renamed.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `write`, `rename`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's own word.
        cause: std::io::Error,
    },

    /// A file is there, but is not what its name or place says.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what was expected.
        reason: String,
    },

    /// A configuration field that is missing, contradictory, or asks for what the decoder does not compute.
    #[error("{}config field `{field}`: {reason}", in_file(path.as_deref()))]
    Config {
        /// The file, where the configuration came from one.
        path: Option<PathBuf>,
        /// The field's name as in `config.json`; nested fields are joined by dots.
        field: String,
        /// The value found and what would have been accepted.
        reason: String,
    },

    /// A tensor that is missing, superfluous, or has the wrong shape or type.
    #[error("{}: tensor `{tensor}`: {reason}", path.display())]
    Tensor {
        /// The file that holds (or should hold) the tensor.
        path: PathBuf,
        /// The tensor's name in that file.
        tensor: String,
        /// What was found and what was expected.
        reason: String,
    },

    /// A model could not be found or fetched by its hub id.
    #[error("hub model `{id}`: {reason}")]
    Hub {
        /// The id as given, `org/name` or `org/name@revision`.
        id: String,
        /// The status that the hub refused with, such as 401 or 404; none where it did not answer, or nobody asked it.
        status: Option<u16>,
        /// What failed and what can be done about it.
        reason: String,
    },

    /// The tokenizer refused a text, or cannot be built from its file.
    #[error("tokenizer: {0}")]
    Tokenizer(String),

    /// A text that cannot be used: empty, or too short for one window.
    #[error("text: {0}")]
    Text(String),

    /// An argument outside of what the call accepts.
    #[error("{name} is {value}, expected {expected}")]
    Argument {
        /// The argument's name.
        name: &'static str,
        /// The value given.
        value: String,
        /// What is accepted.
        expected: String,
    },

    /// A plan that contradicts itself or the model it is applied to.
    #[error("plan: {0}")]
    Plan(String),

    /// A budget that nothing left to do can meet.
    #[error("budget for {what} is {budget} {unit}, expected at least {least}: {reason}")]
    Budget {
        /// What should meet it.
        what: &'static str,
        /// What it counts: `parameters` or `bytes`.
        unit: &'static str,
        /// The budget.
        budget: usize,
        /// The least that can be reached.
        least: usize,
        /// What was done to reach that.
        reason: &'static str,
    },

    /// More memory than there may be.
    #[error("{what} takes about {needed}, expected at most {limit}: {reason}")]
    Memory {
        /// What takes it.
        what: String,
        /// The least that it takes.
        needed: Bytes,
        /// What it may take.
        limit: Bytes,
        /// Why it cannot be less.
        reason: String,
    },

    /// A recipe that cannot be read, or asks for what contradicts itself or the model.
    #[error("recipe{}: {reason}", of_field(field.as_deref()))]
    Recipe {
        /// The field, nested ones joined by dots; absent for text that is no recipe at all.
        field: Option<String>,
        /// What is wrong with it, and what was expected.
        reason: String,
    },

    /// A compressed model that has lost more than it may.
    #[error(
        "the compressed model has a loss of {compressed:.4} nats per token on the evaluation windows and the dense one \
         {dense:.4}: {:.4} more, where at most {limit} are allowed{}; nothing was saved{}",
        compressed - dense,
        of_target(*targeted),
        of_earlier(saved.as_deref())
    )]
    QualityGate {
        /// Loss of the dense model on the evaluation windows, in nats per token.
        dense: f64,
        /// Loss of the compressed model on the same windows.
        compressed: f64,
        /// The greatest increase that was allowed.
        limit: f64,
        /// Whether the limit is the recipe's target, which was met on the calibration windows, and no gate of its own.
        targeted: bool,
        /// Where an earlier run, whose gate it passed, saved this very model, and it still is.
        saved: Option<PathBuf>,
    },

    /// A report that cannot be read, or a figure that cannot be drawn.
    #[error("report: {0}")]
    Report(String),

    /// A computation gave NaN or an infinity.
    #[error("{what} is not finite ({value})")]
    NotFinite {
        /// What was computed, with its block or window.
        what: String,
        /// The value found.
        value: f64,
    },

    /// A matrix could not be taken apart although all of it is finite.
    #[error("no {factors} of {what}: {reason}")]
    Decomposition {
        /// The factors that were wanted.
        factors: &'static str,
        /// The matrix, with its block and projection.
        what: String,
        /// Why there are none.
        reason: String,
    },

    /// Something that should be differentiated has no gradient: an operation upstream lost it.
    #[error("no gradient reaches {tensor}")]
    NoGradient {
        /// What has no gradient.
        tensor: String,
    },

    /// A matrix that is quantised, where one number for each element is needed: for training, folding or saving.
    #[error(
        "{matrix} is quantised to {dtype}, which serves forward passes alone: take the decoder that was quantised, or \
         make one with `Decoder::to_dtype`"
    )]
    Quantized {
        /// Which matrix.
        matrix: String,
        /// ggml's name for the type that it is held in.
        dtype: String,
    },

    /// A block index beyond the model's depth.
    #[error("block {index} does not exist: the model has {depth} blocks")]
    NoSuchBlock {
        /// The index asked for, counted from 0.
        index: usize,
        /// The number of blocks of the model.
        depth: usize,
    },

    /// The observer asked to stop.
    #[error("cancelled during {stage}")]
    Cancelled {
        /// The stage that was running.
        stage: &'static str,
    },

    /// An operation on tensors failed.
    #[error(transparent)]
    Candle(candle_core::Error),
}

/// `Result` with the crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// For `map_err` on a file operation: `.map_err(Error::io("read", path))`.
    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> Error + 'a {
        move |cause| Error::Io { action, path: path.to_path_buf(), cause }
    }

    pub(crate) fn format(path: &Path, reason: impl Into<String>) -> Error {
        Error::Format { path: path.to_path_buf(), reason: reason.into() }
    }

    pub(crate) fn config(field: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Config { path: None, field: field.into(), reason: reason.into() }
    }

    pub(crate) fn recipe(field: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Recipe { field: Some(field.into()), reason: reason.into() }
    }

    pub(crate) fn quantized(name: impl Into<String>, matrix: &Matrix) -> Error {
        Error::Quantized { matrix: name.into(), dtype: matrix.type_name() }
    }

    /// The same error, knowing the file that the configuration came from.
    pub(crate) fn in_config_file(self, file: &Path) -> Error {
        match self {
            Error::Config { path: None, field, reason } => {
                Error::Config { path: Some(file.to_path_buf()), field, reason }
            }
            other => other,
        }
    }

    pub(crate) fn tensor(path: &Path, tensor: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Tensor { path: path.to_path_buf(), tensor: tensor.into(), reason: reason.into() }
    }

    pub(crate) fn argument(
        name: &'static str,
        value: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Error {
        Error::Argument { name, value: value.to_string(), expected: expected.into() }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Error::Candle(without_backtrace(error))
    }
}

/// The error alone: candle prints its backtrace in the middle of the message.
pub(crate) fn without_backtrace(error: candle_core::Error) -> candle_core::Error {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => without_backtrace(*inner),
        other => other,
    }
}

fn in_file(path: Option<&Path>) -> String {
    path.map(|path| format!("{}: ", path.display())).unwrap_or_default()
}

fn of_field(field: Option<&str>) -> String {
    field.map(|field| format!(" field `{field}`")).unwrap_or_default()
}

fn of_target(targeted: bool) -> &'static str {
    if !targeted {
        return "";
    }
    " by `target.nll-increase`, which holds on the calibration windows alone: expected a lower target, or a \
     `max_nll_increase` for these"
}

fn of_earlier(saved: Option<&Path>) -> String {
    let there = |path: &Path| format!(" now, and {} still holds what an earlier run saved", path.display());
    saved.map(there).unwrap_or_default()
}
