//! A training of gates between two steps, and its file.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::statistics;
use crate::error::{Error, Result};
use crate::file;

/// A training of two sets of gates, as it stands between two steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    pub version: u32,
    /// What the state belongs to: options, text and model.
    pub identity: String,
    /// What the gates started from, which other measurements may have found; older versions have none.
    #[serde(default)]
    pub starts: String,
    pub step: usize,
    pub sets: [Adam; 2],
    pub trajectory: Vec<Vec<f64>>,
    pub quiet: usize,
    /// Seconds and block runs spent so far.
    pub seconds: f64,
    pub block_runs: f64,
}

/// Parameters with Adam's moments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Adam {
    pub phi: Vec<f64>,
    pub mean: Vec<f64>,
    pub variance: Vec<f64>,
    pub updates: i32,
}

const STATE_VERSION: u32 = 3;

impl Adam {
    pub(super) fn update(&mut self, gradient: &[f64], open: &[bool], rate: f64) {
        const B1: f64 = 0.9;
        const B2: f64 = 0.99;
        self.updates += 1;
        let (c1, c2) = (1.0 - B1.powi(self.updates), 1.0 - B2.powi(self.updates));
        let moments = self.mean.iter_mut().zip(&mut self.variance);
        for (((phi, (mean, variance)), &gradient), &open) in
            self.phi.iter_mut().zip(moments).zip(gradient).zip(open)
        {
            if open {
                continue;
            }
            *mean = B1 * *mean + (1.0 - B1) * gradient;
            *variance = B2 * *variance + (1.0 - B2) * gradient * gradient;
            *phi -= rate * (*mean / c1) / ((*variance / c2).sqrt() + 1e-8);
        }
    }
}

impl State {
    pub(super) fn new(identity: String, starts: String, phis: [Vec<f64>; 2]) -> Self {
        let sets = phis.map(|phi| {
            let zeros = vec![0.0; phi.len()];
            Adam { phi, mean: zeros.clone(), variance: zeros, updates: 0 }
        });
        Self {
            version: STATE_VERSION,
            identity,
            starts,
            step: 0,
            sets,
            trajectory: Vec::new(),
            quiet: 0,
            seconds: 0.0,
            block_runs: 0.0,
        }
    }

    /// The state in a file, which has to be one of this training, from whatever it started.
    pub(super) fn read(path: &Path, identity: &str, units: usize) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let state: Self = serde_json::from_str(&text)
            .map_err(|error| Error::format(path, format!("is no state of gates: {error}")))?;
        if state.version != STATE_VERSION || state.identity != identity {
            return Err(another(
                path,
                "other options, of another text or another model, or by another version",
            ));
        }
        let lists = state.sets.iter().flat_map(|set| [&set.phi, &set.mean, &set.variance]);
        let whole = lists.chain(&state.trajectory).all(|list| list.len() == units);
        if !whole || state.trajectory.len() != state.step {
            return Err(Error::format(path, format!("is damaged, expected {units} gates at every step")));
        }
        Ok(state)
    }

    /// The same, started from these.
    pub(super) fn from(self, path: &Path, starts: &str) -> Result<Self> {
        if self.starts == starts { Ok(self) } else { Err(another(path, "other scores to start from")) }
    }

    /// The mean gates of the last third of the steps, at least one of each set; of one set or of both.
    pub(super) fn averaged(&self, set: Option<usize>) -> Vec<f64> {
        let steps = self.trajectory.len();
        let from = (steps / 3 * 2).min(steps.saturating_sub(2));
        let late = self.trajectory.iter().enumerate().skip(from);
        let rows: Vec<Vec<f64>> = late
            .filter(|(step, _)| set.is_none_or(|set| step % 2 == set))
            .map(|(_, row)| row.clone())
            .collect();
        statistics::means(&rows)
    }

    /// Writes the state whole: a killed run leaves the last one.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string(self).map_err(|error| Error::format(path, error.to_string()))?;
        file::replace(path, |file| file.write_all(text.as_bytes()).map_err(Error::io("write", path)))
    }
}

fn another(path: &Path, by: &str) -> Error {
    Error::format(
        path,
        format!("is the state of another training of gates, by {by}: delete it, or name another file"),
    )
}
