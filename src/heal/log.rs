//! The log of a healing: JSON Lines.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::losses::Terms;
use crate::error::{Error, Result};
use crate::file;

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Record {
    /// What a step did.
    #[non_exhaustive]
    Step {
        /// Which step, the first being 1.
        step: usize,
        /// Predicted tokens read so far.
        tokens: usize,
        /// The weighted loss.
        loss: f64,
        /// Its terms.
        #[serde(flatten)]
        terms: Terms,
        /// The norm of the gradient of all that is trained, before clipping.
        gradient_norm: f64,
        /// What the learning rates were multiplied by.
        learning_rate: f64,
        /// Seconds of training so far.
        seconds: f64,
    },
    /// The loss on the held-out windows.
    #[non_exhaustive]
    HeldOut {
        /// After how many steps.
        step: usize,
        /// Nats per token.
        held_out: f64,
    },
}

impl Record {
    fn step(&self) -> usize {
        match self {
            Self::Step { step, .. } | Self::HeldOut { step, .. } => *step,
        }
    }
}

/// The records of a log, as far as its lines are whole: a run that was killed may have left half of its last one.
///
/// # Errors
/// A file that cannot be read.
pub fn read_log(path: impl AsRef<Path>) -> Result<Vec<Record>> {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    Ok(text.lines().map_while(|line| serde_json::from_str(line).ok()).collect())
}

/// The file that records are added to.
#[derive(Debug)]
pub(super) struct Log(Option<(PathBuf, File)>);

impl Log {
    /// Goes on with the log of a run that has done `step` steps: what a killed run wrote after its last state goes.
    pub(super) fn open(path: Option<&Path>, step: usize, held_out: usize) -> Result<Self> {
        let Some(path) = path else { return Ok(Self(None)) };
        let mut kept = String::new();
        if path.exists() && (step > 0 || held_out > 0) {
            let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
            let mut evaluations = 0;
            for line in text.lines() {
                let Ok(record) = serde_json::from_str::<Record>(line) else { break };
                let evaluation = matches!(record, Record::HeldOut { .. });
                if record.step() > step || (evaluation && evaluations == held_out) {
                    break;
                }
                evaluations += usize::from(evaluation);
                kept.push_str(line);
                kept.push('\n');
            }
        }
        file::replace(path, |file| file.write_all(kept.as_bytes()).map_err(Error::io("write", path)))?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io("write", path))?;
        Ok(Self(Some((path.to_path_buf(), file))))
    }

    pub(super) fn add(&mut self, record: &Record) -> Result<()> {
        let Some((path, file)) = &mut self.0 else { return Ok(()) };
        let mut line =
            serde_json::to_string(record).map_err(|error| Error::format(path, error.to_string()))?;
        line.push('\n');
        file.write_all(line.as_bytes()).map_err(Error::io("write", path))
    }
}
