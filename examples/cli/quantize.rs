//! The flag of the commands that can run on quantised matrices.

use anyhow::Result;
use clap::{Args, ValueEnum};
use foldgpt::Decoder;
use foldgpt::candle::quantized::GgmlDType;

use super::Bars;

// How matrices are quantised in memory.
#[derive(Debug, Clone, Copy, Args)]
pub struct QuantizeArgs {
    /// Quantise the matrices once they are read: less memory from then on (reading takes more than without), and faster
    /// generation. Rows that do not fill the blocks of `q4_k` (256 numbers) are held in `q8_0`
    #[arg(long, value_enum)]
    pub quantize: Option<QuantizeArg>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantizeArg {
    #[value(name = "q8_0")]
    Q8,
    #[value(name = "q4_k")]
    Q4K,
}

impl QuantizeArgs {
    /// The decoder as the flag asks for it.
    pub fn apply(self, decoder: Decoder) -> Result<Decoder> {
        let dtype = match self.quantize {
            Some(QuantizeArg::Q8) => GgmlDType::Q8_0,
            Some(QuantizeArg::Q4K) => GgmlDType::Q4K,
            None => return Ok(decoder),
        };
        Ok(decoder.quantized(dtype, &mut Bars::default())?)
    }
}
