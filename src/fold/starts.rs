//! What scales and residuals are before any training.

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::low_rank::Decomposition;
use super::moments::{Moments, energies, energy};
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::{Adapter, Block, BlockParam, Decoder, LowRank, Param, Projection};
use crate::plan::{ResidualStart, ScaleStart, Sharing};
use crate::progress::{self, Observer};

/// Gives the blocks of `depths` (each with its index in the original model) their scales and residuals: `tied` is
/// `cut` with its groups tied.
pub(super) fn start(
    cut: &Decoder,
    tied: &Decoder,
    depths: &[(usize, usize)],
    sharing: &Sharing,
    windows: Option<&Windows>,
    observer: &mut dyn Observer,
) -> Result<Decoder> {
    let mut folded = tied.clone();
    let mut states = windows.map(|windows| States::new(tied, windows)).transpose()?;
    let mut reached = 0;
    progress::steps("starts", depths.len(), observer, |place| {
        let Some(&(depth, block)) = depths.get(place) else { return Ok(()) };
        let original = block_of(cut, depth)?;
        let moments = states.as_mut().map(|states| {
            states.run(&folded, reached..depth)?;
            reached = depth;
            states.moments(&folded, original)
        });
        let moments = moments.transpose()?;
        for projection in Projection::ALL {
            let rank = sharing.ranks.get(&block).and_then(|ranks| ranks.get(&projection)).copied();
            let shared = block_of(tied, depth)?.weights.tensor(projection)?;
            let (Some(target), Some(shared)) = (original.merged(projection)?, shared) else { continue };
            let moment = moments.as_ref().map(|moments| moments.of(projection)).transpose()?;
            let place = format!("block {block} {}", projection.name());
            let projected = Projected { place, target: wide(&target)?, shared: wide(shared)?, moment };
            let adapter = projected.adapter(cut, projection, sharing, rank.unwrap_or_default())?;
            folded = folded.with_adapter(depth, projection, adapter)?;
        }
        Ok(())
    })?;
    Ok(folded)
}

pub(super) fn block_of(decoder: &Decoder, depth: usize) -> Result<&Block> {
    decoder.blocks().get(depth).ok_or(Error::NoSuchBlock { index: depth, depth: decoder.depth() })
}

pub(super) fn wide(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?)
}

/// One projection: its name, the matrix it had, the one it shares, and the moment of its inputs, all f64.
pub(super) struct Projected {
    pub place: String,
    pub target: Tensor,
    pub shared: Tensor,
    pub moment: Option<Tensor>,
}

impl Projected {
    fn adapter(
        &self,
        decoder: &Decoder,
        projection: Projection,
        sharing: &Sharing,
        rank: usize,
    ) -> Result<Adapter> {
        // Of the kind that a depth has, whichever it is.
        let rounded = |param: BlockParam, value: &Tensor| decoder.as_stored(Param::Block(0, param), value);
        let scale = self.scale(sharing.own.scales)?;
        let scale = scale.map(|scale| rounded(BlockParam::Scale(projection), &scale)).transpose()?;
        let Some(residual) = sharing.own.residual.filter(|_| rank > 0) else {
            return Ok(Adapter::new(scale, None));
        };
        let lacking = self.lacking(scale.as_ref())?;
        let (a, b) = self.decomposition(&lacking, residual.start)?.truncated(rank)?;
        let a = rounded(BlockParam::LoraA(projection), &a)?;
        let b = rounded(BlockParam::LoraB(projection), &b)?;
        Ok(Adapter::new(scale, Some(LowRank { a, b })))
    }

    /// The factor of each output. The least-squares one is `⟨w, v⟩ / ⟨v, v⟩`, with `w` the original and `v` the
    /// shared row, and the inner product that of the inputs' moment.
    pub(super) fn scale(&self, start: Option<ScaleStart>) -> Result<Option<Tensor>> {
        let outputs = self.target.dim(0)?;
        let ones = || Tensor::ones(outputs, DType::F64, &Device::Cpu);
        match (start, &self.moment) {
            (None, _) => Ok(None),
            (Some(ScaleStart::LeastSquares), Some(moment)) => {
                let with_target = energies(&self.shared, moment, &self.target)?;
                let with_itself = energies(&self.shared, moment, &self.shared)?;
                let fit = |(&a, &b): (&f64, &f64)| if b > 0.0 { a / b } else { 1.0 };
                let factors: Vec<f64> = with_target.iter().zip(&with_itself).map(fit).collect();
                Ok(Some(Tensor::from_vec(factors, outputs, &Device::Cpu)?))
            }
            (Some(_), _) => Ok(Some(ones()?)),
        }
    }

    /// What the shared matrix, scaled, lacks.
    pub(super) fn lacking(&self, scale: Option<&Tensor>) -> Result<Tensor> {
        let has = match scale {
            Some(scale) => self.shared.broadcast_mul(&wide(scale)?.unsqueeze(1)?)?,
            None => self.shared.clone(),
        };
        Ok((&self.target - has)?)
    }

    pub(super) fn decomposition(&self, lacking: &Tensor, start: ResidualStart) -> Result<Decomposition> {
        let moment = self.moment.as_ref().filter(|_| start == ResidualStart::Whitened);
        Decomposition::of(lacking, moment, &self.place)
    }
}

/// The state of every window on its way through a decoder.
pub(super) struct States(pub(super) Vec<Tensor>);

impl States {
    /// What the embedding makes of every window.
    pub(super) fn new(decoder: &Decoder, windows: &Windows) -> Result<Self> {
        let pass = decoder.pass(0, windows.seq_len())?;
        let embed = |window| decoder.embed(&windows.tensor(window, decoder.device())?, &pass);
        Ok(Self((0..windows.len()).map(embed).collect::<Result<_>>()?))
    }

    /// Takes every window through `blocks` of the decoder.
    pub(super) fn run(&mut self, decoder: &Decoder, blocks: std::ops::Range<usize>) -> Result<()> {
        let Some(first) = self.0.first() else { return Ok(()) };
        let pass = decoder.pass(0, first.dim(1)?)?;
        for x in &mut self.0 {
            for index in blocks.clone() {
                *x = decoder.run_block(index, x, &pass)?;
            }
        }
        Ok(())
    }

    /// The moments of what goes into the block's projections where it sees these states.
    pub(super) fn moments(&self, decoder: &Decoder, block: &Block) -> Result<Moments> {
        let mut moments = Moments::default();
        let Some(first) = self.0.first() else { return Ok(moments) };
        let pass = decoder.pass(0, first.dim(1)?)?;
        self.0.iter().try_for_each(|x| moments.add(block, x, &pass))?;
        Ok(moments)
    }
}

/// How far a projection's outputs are from the original ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct OutputError {
    /// The depth.
    pub depth: usize,
    /// The projection.
    pub projection: Projection,
    /// `E‖Ŵx − Wx‖² / E‖Wx‖²` over all tokens, where both see what the original block sees.
    pub relative: f64,
}

/// How far the projections of a folded decoder are from those of `original`, a decoder of the same depth: for every
/// projection that differs, on the states of the original.
///
/// # Errors
/// Decoders of different depths, a failed computation, or a cancelling observer.
pub fn output_errors(
    original: &Decoder,
    folded: &Decoder,
    windows: &Windows,
    observer: &mut dyn Observer,
) -> Result<Vec<OutputError>> {
    if original.depth() != folded.depth() {
        let expected = format!("{} blocks as the original", original.depth());
        return Err(Error::argument("folded depth", folded.depth(), expected));
    }
    let mut states = States::new(original, windows)?;
    let mut errors = Vec::new();
    progress::steps("output error", original.depth(), observer, |depth| {
        let (before, after) = (block_of(original, depth)?, block_of(folded, depth)?);
        let mut moments = None;
        for projection in Projection::ALL {
            let (Some(target), Some(now)) = (before.merged(projection)?, after.merged(projection)?) else {
                continue;
            };
            if target.id() == now.id() {
                continue;
            }
            if moments.is_none() {
                moments = Some(states.moments(original, before)?);
            }
            let Some(moments) = &moments else { continue };
            let (target, moment) = (wide(&target)?, moments.of(projection)?);
            let lost = energy(&(&target - wide(&now)?)?, &moment)?;
            errors.push(OutputError {
                depth,
                projection,
                relative: lost / energy(&target, &moment)?.max(f64::MIN_POSITIVE),
            });
        }
        states.run(original, depth..depth + 1)
    })?;
    Ok(errors)
}
