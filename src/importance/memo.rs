//! Values of sets that were measured before, kept in a file, so that an interrupted search goes on where it was.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::{Decoder, Unit};

/// What was measured, by window and set, in memory and in a file of JSON Lines that grows with every window.
#[derive(Debug)]
pub(super) struct Memo {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    known: HashMap<(String, String), Known>,
    last: Instant,
    used: Cost,
}

/// A value, and its share of what an earlier run took for it, until that is counted.
#[derive(Debug, Clone, Copy)]
struct Known {
    value: f64,
    cost: Cost,
}

/// What measuring took.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cost {
    pub seconds: f64,
    pub block_runs: f64,
}

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    version: u32,
    identity: String,
}

/// Every other line: sets on one window.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    window: String,
    values: Vec<(String, f64)>,
    seconds: f64,
    block_runs: f64,
}

const VERSION: u32 = 1;

impl Memo {
    /// Opens or begins a file of values of this kind, of sets of `units` of this decoder; `None` without a path.
    ///
    /// A line that a crash left unfinished is dropped.
    pub(super) fn open(
        path: Option<&Path>,
        kind: &str,
        decoder: &Decoder,
        units: &[Unit],
    ) -> Result<Option<Self>> {
        let Some(path) = path else { return Ok(None) };
        let identity = serde_json::to_string(&(kind, decoder.fingerprint()?, units))
            .map_err(|error| Error::Plan(error.to_string()))?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::io("open", path))?;
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut lines = text.get(..whole).unwrap_or_default().lines();
        let mut known = HashMap::new();
        match lines.next() {
            None => {
                let begun = serde_json::to_string(&Header { version: VERSION, identity: identity.clone() });
                if !begun.is_ok_and(|begun| begun.starts_with(&text)) {
                    return Err(Error::format(path, "holds something else than measured values"));
                }
                file.set_len(0).map_err(Error::io("write", path))?;
                append(&mut file, path, &Header { version: VERSION, identity })?;
            }
            Some(first) => {
                let header: Option<Header> = serde_json::from_str(first).ok();
                if header.is_none_or(|header| header.version != VERSION || header.identity != identity) {
                    return Err(Error::format(
                        path,
                        "holds what was measured of another model or method: delete it, or name another file",
                    ));
                }
                for (index, line) in lines.enumerate() {
                    let line: Line = serde_json::from_str(line)
                        .map_err(|error| Error::format(path, format!("line {}: {error}", index + 2)))?;
                    let share = 1.0 / line.values.len().max(1) as f64;
                    let cost = Cost { seconds: line.seconds * share, block_runs: line.block_runs * share };
                    line.remember(cost, &mut known);
                }
                file.set_len(whole as u64).map_err(Error::io("write", path))?;
            }
        }
        file.seek(SeekFrom::End(0)).map_err(Error::io("read", path))?;
        if !known.is_empty() {
            let (values, path) = (known.len(), path.display());
            tracing::debug!(values, %path, "values are known from earlier runs");
        }
        let state = State { file, known, last: Instant::now(), used: Cost::default() };
        Ok(Some(Self { path: path.to_path_buf(), state: Mutex::new(state) }))
    }

    /// The value of a set on a window, where it is known.
    pub(super) fn value(&self, window: &str, set: &[bool]) -> Option<f64> {
        let mut state = self.state();
        let known = state.known.get_mut(&(window.to_string(), name(set)))?;
        let (value, cost) = (known.value, std::mem::take(&mut known.cost));
        state.used.seconds += cost.seconds;
        state.used.block_runs += cost.block_runs;
        Some(value)
    }

    /// What the values took that were used and came from earlier runs.
    pub(super) fn used(&self) -> Cost {
        self.state().used
    }

    /// Begins to measure: time before this is no part of what the next values took.
    pub(super) fn start_clock(&self) {
        self.state().last = Instant::now();
    }

    /// Keeps values measured on a window, and the time since the clock was started or values last came. What is not
    /// finite is no value: it is measured again.
    pub(super) fn add(&self, window: &str, values: &[(&[bool], f64)], block_runs: f64) -> Result<()> {
        let finite = values.iter().filter(|(_, value)| value.is_finite());
        let values: Vec<(String, f64)> = finite.map(|(set, value)| (name(set), *value)).collect();
        let mut state = self.state();
        let now = Instant::now();
        let seconds = now.duration_since(std::mem::replace(&mut state.last, now)).as_secs_f64();
        let line = Line { window: window.into(), values, seconds, block_runs };
        append(&mut state.file, &self.path, &line)?;
        line.remember(Cost::default(), &mut state.known);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    fn remember(self, cost: Cost, known: &mut HashMap<(String, String), Known>) {
        let entry = |(set, value)| ((self.window.clone(), set), Known { value, cost });
        known.extend(self.values.into_iter().map(entry));
    }
}

fn append(file: &mut File, path: &Path, line: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string(line).map_err(|error| Error::Plan(error.to_string()))?;
    text.push('\n');
    file.write_all(text.as_bytes()).map_err(Error::io("write", path))
}

/// A set by its places: `3,12,13`.
fn name(set: &[bool]) -> String {
    let places = set.iter().enumerate().filter(|(_, removed)| **removed);
    places.map(|(place, _)| place.to_string()).collect::<Vec<_>>().join(",")
}
