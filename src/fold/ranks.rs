//! Rank where it helps most: spreading a budget over projections and depths.

use std::collections::BTreeMap;

use super::moments::energy;
use super::starts::{Projected, States, block_of, wide};
use super::{adapted_depths, donors};
use crate::data::Windows;
use crate::error::Result;
use crate::model::{Decoder, Projection};
use crate::plan::{Plan, RankTable, ResidualStart};
use crate::progress::{self, Observer};

/// One more unit of rank of a projection.
struct Unit {
    block: usize,
    projection: Projection,
    /// What it takes off the projection's relative squared error, for each parameter.
    gain: f64,
    parameters: usize,
}

/// Ranks that take at most `budget` parameters: units go in the order of how much of the relative output error they
/// remove for each parameter. Since the units of one projection remove ever less, this is the optimum of the sum up
/// to the last unit (water-filling).
///
/// Errors are those of projections that see what they see in the model before folding.
pub(crate) fn spread_ranks(
    decoder: &Decoder,
    plan: &Plan,
    (budget, start): (usize, ResidualStart),
    windows: &Windows,
    observer: &mut dyn Observer,
) -> Result<RankTable> {
    let cut = decoder.without(&plan.units())?;
    let Some(sharing) = plan.sharing() else { return Ok(RankTable::new()) };
    let tied = donors::tie_all(&cut, plan, sharing)?;
    let depths = adapted_depths(plan, sharing)?;
    let (mut states, mut reached) = (States::new(&cut, windows)?, 0);
    let mut units = Vec::new();
    progress::steps("ranks", depths.len(), observer, |place| {
        let Some(&(depth, block)) = depths.get(place) else { return Ok(()) };
        let original = block_of(&cut, depth)?;
        states.run(&cut, reached..depth)?;
        reached = depth;
        let moments = states.moments(&cut, original)?;
        for projection in Projection::ALL {
            let shared = block_of(&tied, depth)?.weights.tensor(projection)?;
            let (Some(target), Some(shared)) = (original.merged(projection)?, shared) else { continue };
            let moment = Some(moments.of(projection)?);
            let place = format!("block {block} {}", projection.name());
            let projected = Projected { place, target: wide(&target)?, shared: wide(shared)?, moment };
            units.extend(units_of(&projected, (block, projection), plan, start)?);
        }
        Ok(())
    })?;
    // A stable sort: of equals the first depth and projection comes first.
    units.sort_by(|a, b| b.gain.total_cmp(&a.gain));
    Ok(fill(&units, budget))
}

fn units_of(
    projected: &Projected,
    (block, projection): (usize, Projection),
    plan: &Plan,
    start: ResidualStart,
) -> Result<Vec<Unit>> {
    let scale = projected.scale(plan.sharing().and_then(|sharing| sharing.own.scales))?;
    let decomposition = projected.decomposition(&projected.lacking(scale.as_ref())?, start)?;
    let whole = match (start, &projected.moment) {
        (ResidualStart::Whitened, Some(moment)) => energy(&projected.target, moment)?,
        _ => projected.target.sqr()?.sum_all()?.to_scalar::<f64>()?,
    };
    let (output, input) = projected.target.dims2()?;
    let parameters = output + input;
    let gain = |removed: f64| removed / whole.max(f64::MIN_POSITIVE) / parameters as f64;
    Ok(decomposition
        .gains()
        .map(|removed| Unit { block, projection, gain: gain(removed), parameters })
        .collect())
}

/// Takes units in order as long as they fit; a smaller one may fit where a larger one did not, but never before a
/// better one of the same projection.
fn fill(units: &[Unit], budget: usize) -> RankTable {
    let (mut left, mut ranks) = (budget, RankTable::new());
    for unit in units.iter().filter(|unit| unit.gain > 0.0) {
        if unit.parameters <= left {
            left -= unit.parameters;
            let of_block: &mut BTreeMap<Projection, usize> = ranks.entry(unit.block).or_default();
            *of_block.entry(unit.projection).or_default() += 1;
        }
    }
    ranks
}
