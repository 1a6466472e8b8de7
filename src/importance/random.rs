//! Chance, the floor of every comparison.

use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use serde::Serialize;

use super::{Importance, Scores};
use crate::checkpoint::StreamedDecoder;
use crate::data::Windows;
use crate::error::Result;
use crate::model::Decoder;
use crate::progress::Observer;

/// Scores drawn at random.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Random {
    /// The same seed gives the same scores.
    pub seed: u64,
}

impl Importance for Random {
    fn method(&self) -> &'static str {
        "random"
    }

    fn score(&self, decoder: &Decoder, windows: &Windows, _: &mut dyn Observer) -> Result<Scores> {
        self.draw(decoder.depth(), windows)
    }

    fn score_streamed(
        &self,
        model: &StreamedDecoder<'_>,
        windows: &Windows,
        _: &mut dyn Observer,
    ) -> Result<Scores> {
        self.draw(model.depth(), windows)
    }
}

impl Random {
    fn draw(self, depth: usize, windows: &Windows) -> Result<Scores> {
        let start = Instant::now();
        let mut rng = StdRng::seed_from_u64(self.seed);
        let importance = (0..depth).map(|_| rng.random::<f64>()).collect();
        Ok(Scores::new(self.method(), windows, importance)?.with_options(&self)?.costing(start, 0.0))
    }
}
