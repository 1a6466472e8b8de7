//! Angular distance.

use std::time::Instant;

use candle_core::{IndexOp, Tensor};

use serde::Serialize;

use super::sweep::sweep_all;
use super::{Importance, Scores, check_blocks, check_removal};
use crate::checkpoint::StreamedDecoder;
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::{BlockSource, Decoder};
use crate::ops::Kernels;
use crate::progress::Observer;

/// Angular distance: `arccos cos(x_l, x_{l+n}) / π` at the last token, the mean over windows; the `n` consecutive
/// blocks across which it is smallest are chosen. A block's own score is its distance for n = 1.
///
/// From Gromov et al., 2024, arXiv 2403.17887.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct AngularDistance {
    /// How many consecutive blocks to choose.
    pub remove: usize,
    /// Blocks that stay: spans that hold one are not chosen.
    pub protected: Vec<usize>,
}

impl Importance for AngularDistance {
    fn method(&self) -> &'static str {
        "angular"
    }

    fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores> {
        self.measure(decoder, windows, observer)
    }

    fn score_streamed(
        &self,
        model: &StreamedDecoder<'_>,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Scores> {
        self.measure(model, windows, observer)
    }
}

impl AngularDistance {
    fn measure(
        &self,
        source: &dyn BlockSource,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Scores> {
        let start = Instant::now();
        let depth = source.architecture().depth();
        check_blocks(&self.protected, depth)?;
        check_removal(self.remove, depth.saturating_sub(1))?;
        let allowed =
            |first: &usize| !self.protected.iter().any(|b| (*first..first + self.remove).contains(b));
        if (0..=depth - self.remove).find(allowed).is_none() {
            let expected = format!("so few that {} consecutive blocks may go", self.remove);
            return Err(Error::argument("protected blocks", format!("{:?}", self.protected), expected));
        }
        let last = last_tokens(source, windows, self.method(), observer)?;
        let kernels = source.kernels();
        let (mut single, mut spans) = (Vec::new(), vec![0.0; (depth + 1).saturating_sub(self.remove)]);
        for states in &last {
            let span =
                |n: usize| states.iter().zip(states.iter().skip(n)).map(|(x, y)| distance(kernels, x, y));
            single.push(span(1).collect::<Result<Vec<f64>>>()?);
            for (sum, distance) in spans.iter_mut().zip(span(self.remove)) {
                *sum += distance?;
            }
        }
        let runs = (windows.len() * depth) as f64;
        let mut scores =
            Scores::of_windows(self.method(), windows, &single)?.with_options(self)?.costing(start, runs);
        let spans = spans.iter().enumerate().filter(|(first, _)| allowed(first));
        let nearest = spans.min_by(|a, b| a.1.total_cmp(b.1));
        if let Some((first, _)) = nearest.filter(|_| self.remove > 0) {
            scores.chosen = Some((first..first + self.remove).collect());
        }
        Ok(scores)
    }
}

/// The last token's state before the first block and after every one, `(1, 1, hidden)` each, for every window.
fn last_tokens(
    source: &dyn BlockSource,
    windows: &Windows,
    stage: &'static str,
    observer: &mut dyn Observer,
) -> Result<Vec<Vec<Tensor>>> {
    let mut last: Vec<Vec<Tensor>> = vec![Vec::new(); windows.len()];
    // A copy: otherwise the states of all tokens would be kept alive.
    let of = |x: &Tensor| -> Result<Tensor> { Ok(x.i((.., windows.seq_len() - 1..))?.force_contiguous()?) };
    sweep_all(source, windows, stage, observer, &|x, y| Ok((of(x)?, of(y)?)), &mut |window, (x, y)| {
        if let Some(row) = last.get_mut(window) {
            if row.is_empty() {
                row.push(x);
            }
            row.push(y);
        }
    })?;
    Ok(last)
}

/// The angle of two `(1, 1, hidden)` vectors over π, from 0 to 1.
fn distance(kernels: Kernels, x: &Tensor, y: &Tensor) -> Result<f64> {
    Ok(kernels.mean_cosine(x, y)?.clamp(-1.0, 1.0).acos() / std::f64::consts::PI)
}
