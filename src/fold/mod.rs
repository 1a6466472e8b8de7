//! A plan applied to a decoder in memory.

mod donors;
mod footprint;
mod low_rank;
mod moments;
mod ranks;
mod starts;
mod ties;

pub(crate) use footprint::FoldFootprint;
pub(crate) use ranks::spread_ranks;
pub use starts::{OutputError, output_errors};
pub(crate) use ties::{Ties, measured_groups};

use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::plan::{Plan, Sharing};
use crate::progress::{self, Observer};

const STAGE: &str = "fold";

/// The decoder that `plan` describes. What stays as it is, is shared with `decoder` and not copied; the matrices of
/// a group exist once.
///
/// New tensors (means, scales, residuals) are rounded to the type in which the model is stored.
///
/// # Errors
/// A plan for another model, or one with starts that need calibration windows: see [`fold_on`].
pub fn fold(decoder: &Decoder, plan: &Plan) -> Result<Decoder> {
    if plan.sharing().is_some_and(|sharing| sharing.own.needs_windows() && !sharing.groups.is_empty()) {
        let instead = "`fold_on` takes them, and not `fold`";
        return Err(Error::Plan(format!("scales and residuals start from calibration windows: {instead}")));
    }
    observed(decoder, plan, None, &mut ())
}

/// As [`fold`], starting scales and residuals on calibration windows: block after block, each seeing what the folded
/// blocks before it make of the text.
///
/// # Errors
/// A plan for another model, a window that does not fit it, or a cancelling observer.
pub fn fold_on(
    decoder: &Decoder,
    plan: &Plan,
    windows: &Windows,
    observer: &mut dyn Observer,
) -> Result<Decoder> {
    observed(decoder, plan, Some(windows), observer)
}

/// Folds as a stage.
fn observed(
    decoder: &Decoder,
    plan: &Plan,
    windows: Option<&Windows>,
    observer: &mut dyn Observer,
) -> Result<Decoder> {
    progress::stage(STAGE, 1, observer, |observer| {
        let folded = apply(decoder, plan, windows, observer)?;
        progress::advance(STAGE, 1, 1, observer)?;
        Ok(folded)
    })
}

fn apply(
    decoder: &Decoder,
    plan: &Plan,
    windows: Option<&Windows>,
    observer: &mut dyn Observer,
) -> Result<Decoder> {
    // Refuses what a plan asks of a model that is not so large.
    plan.architecture(decoder.architecture())?;
    let cut = decoder.without(&plan.units())?;
    let Some(sharing) = plan.sharing() else { return Ok(cut) };
    let tied = donors::tie_all(&cut, plan, sharing)?;
    if !sharing.own.adapts() {
        return Ok(tied);
    }
    let windows = windows.filter(|_| sharing.own.needs_windows());
    starts::start(&cut, &tied, &adapted_depths(plan, sharing)?, sharing, windows, observer)
}

/// The depths of a cut decoder that use matrices of others, with their block in the original model, ascending.
fn adapted_depths(plan: &Plan, sharing: &Sharing) -> Result<Vec<(usize, usize)>> {
    let strangers = sharing.groups.iter().flat_map(crate::plan::Group::strangers);
    let mut depths = strangers.map(|block| Ok((plan.depth_of(block)?, block))).collect::<Result<Vec<_>>>()?;
    depths.sort_unstable();
    Ok(depths)
}
