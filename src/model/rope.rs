//! The angles of rotary position embeddings.

use candle_core::{Device, Tensor};

use super::architecture::{RopeScaling, RopeSpec};
use crate::error::Result;

impl RopeSpec {
    /// The angle per position of each rotated pair, `rotary_dim / 2` of them.
    #[must_use]
    pub fn frequencies(&self) -> Vec<f64> {
        (0..self.rotary_dim / 2)
            .map(|pair| self.scaled(self.theta.powf(-2.0 * pair as f64 / self.rotary_dim as f64)))
            .collect()
    }

    fn scaled(&self, frequency: f64) -> f64 {
        match self.scaling {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                // How often the frequency turns within the context of the first training.
                let turns = original_max_position_embeddings as f64 * frequency / std::f64::consts::TAU;
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let kept = kept.clamp(0.0, 1.0);
                kept * frequency + (1.0 - kept) * frequency / factor
            }
        }
    }

    /// Cosines and sines of the positions from `offset` on: two tensors `(seq, rotary_dim / 2)`, f32.
    pub(crate) fn tables(&self, offset: usize, seq: usize, device: &Device) -> Result<(Tensor, Tensor)> {
        let frequencies = self.frequencies();
        let angles: Vec<f64> = (offset..offset + seq)
            .flat_map(|position| frequencies.iter().map(move |frequency| position as f64 * frequency))
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&angle| f(angle) as f32).collect();
            Tensor::from_vec(values, (seq, frequencies.len()), device)
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }
}
