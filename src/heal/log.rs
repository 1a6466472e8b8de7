//! The log of a healing: JSON Lines.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
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
        /// What the learning rates of all groups were multiplied by.
        rate_factor: f64,
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

/// How every line begins, and so what a line that a killed run has torn off is a part of.
const BEGIN: &str = "{\"step\":";

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
    /// Fails for a file that holds anything but records, and leaves it as it is.
    pub(super) fn open(path: Option<&Path>, step: usize, held_out: usize) -> Result<Self> {
        let Some(path) = path else { return Ok(Self(None)) };
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            text => text.map_err(Error::io("read", path))?,
        };
        let (mut kept, mut evaluations, mut goes_on) = (String::new(), 0, true);
        for line in text.split_inclusive('\n') {
            let record: Record = match serde_json::from_str(line) {
                Ok(record) => record,
                Err(_) if is_torn(line) => break,
                Err(_) => return Err(Error::format(path, "is no log of a healing")),
            };
            let evaluation = matches!(record, Record::HeldOut { .. });
            goes_on &= record.step() <= step && !(evaluation && evaluations == held_out);
            if goes_on {
                evaluations += usize::from(evaluation);
                kept.push_str(line.trim_end());
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

/// Whether this is the beginning of a record that was never written to its end.
fn is_torn(line: &str) -> bool {
    // A file system that lost power may have made the file longer before it wrote to it.
    let written = line.trim_end_matches('\0');
    !line.ends_with('\n') && (written.starts_with(BEGIN) || BEGIN.starts_with(written))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn step(step: usize) -> String {
        format!(
            "{{\"step\":{step},\"tokens\":8,\"loss\":1.5,\"cross_entropy\":1.5,\"divergence\":0.0,\"tail\":0.0,\
             \"gradient_norm\":0.5,\"rate_factor\":1.0,\"seconds\":0.25}}\n"
        )
    }

    #[test]
    fn a_log_goes_on_after_the_last_state_and_its_torn_line_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let held_out = "{\"step\":0,\"held_out\":2.5}\n";
        let whole = [held_out.to_string(), step(1), step(2)].concat();
        for torn in ["", "{", "{\"step\":", "{\"step\":3,\"tok", "{\"step\":3,\0\0", "\0\0\0"] {
            std::fs::write(&path, format!("{whole}{torn}")).unwrap();
            Log::open(Some(&path), 1, 1).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), [held_out.to_string(), step(1)].concat());
        }
        // A whole line whose end alone is missing is a record as any other.
        std::fs::write(&path, whole.trim_end()).unwrap();
        Log::open(Some(&path), 2, 1).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
        Log::open(Some(&path), 0, 0).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_file_that_is_no_log_is_refused_and_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let among = format!("{}notes\n{}", step(1), step(2));
        for text in ["notes", "notes\n", "{\"step\": 1}\n", "{\"step\":1,\n", "\n", &among] {
            for (step, held_out) in [(0, 0), (1, 0), (5, 2)] {
                std::fs::write(&path, text).unwrap();
                let error = Log::open(Some(&path), step, held_out).unwrap_err().to_string();
                assert!(error.contains("is no log of a healing"), "{error}");
                assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
            }
        }
    }
}
