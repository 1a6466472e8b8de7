//! A plan applied to a decoder in memory.

use crate::error::Result;
use crate::model::Decoder;
use crate::plan::Plan;

/// The decoder that `plan` describes. No weight is copied: what stays is shared with `decoder`.
///
/// # Errors
/// A plan for another model.
pub fn fold(decoder: &Decoder, plan: &Plan) -> Result<Decoder> {
    plan.check_model(decoder.architecture())?;
    decoder.without(&plan.units())
}
