//! Windows taken through all blocks of a model, wherever these come from.
//!
//! Of a model in memory as many windows as there are cores go through all blocks before the next ones; of one that is read
//! from disk all windows go through one block before the next, so that each block is read once. What is computed of a
//! window is the same.

use std::ops::Range;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::data::Windows;
use crate::error::Result;
use crate::model::{BlockSource, Decoder, Pass, States};
use crate::progress::{self, Observer};

/// What is asked of a block's input and its output, `(1, seq, hidden)` each, where the output was computed.
pub(crate) type Look<'a, T> = &'a (dyn Fn(&Tensor, &Tensor) -> Result<T> + Sync);

/// The windows in parts that go through the blocks together.
pub(crate) fn groups(source: &dyn BlockSource, windows: &Windows) -> Vec<Range<usize>> {
    let (count, together) = (windows.len(), source.windows_at_once().max(side_by_side(source.device())));
    (0..count).step_by(together).map(|first| first..count.min(first.saturating_add(together))).collect()
}

/// How many windows are computed at once: one a core, so that no core waits for another within a block.
pub(crate) fn side_by_side(device: &Device) -> usize {
    if device.is_cpu() { rayon::current_num_threads() } else { 1 }
}

/// What `compute` makes of each, at once.
pub(crate) fn each<T: Sync, R: Send>(
    inputs: &[T],
    compute: impl Fn(&T) -> Result<R> + Sync + Send,
) -> Result<Vec<R>> {
    match inputs {
        [alone] => Ok(vec![compute(alone)?]),
        _ => inputs.par_iter().with_max_len(1).map(compute).collect(),
    }
}

/// The embeddings of a group of windows, by their place in it.
fn embedded(
    front: &Decoder,
    windows: &Windows,
    group: Range<usize>,
    pass: &Pass<'_>,
    states: &mut States,
) -> Result<()> {
    for (slot, window) in group.enumerate() {
        states.put(slot, front.embed(&windows.tensor(window, front.device())?, pass)?)?;
    }
    Ok(())
}

/// Takes a group of windows through all blocks, and gives the states after the last one, by their place in the group.
///
/// `step` is told, window by window of a block, what `look` has found.
pub(crate) fn sweep<T: Send>(
    source: &dyn BlockSource,
    windows: &Windows,
    group: &Range<usize>,
    pass: &Pass<'_>,
    look: Look<'_, T>,
    step: &mut dyn FnMut(usize, T) -> Result<()>,
) -> Result<States> {
    let (mut states, at_once) = (source.states(group.len()), side_by_side(source.device()));
    embedded(&source.front()?, windows, group.clone(), pass, &mut states)?;
    source.visit(&source.all(), &mut |block| {
        for first in (0..group.len()).step_by(at_once) {
            let slots = first..group.len().min(first + at_once);
            let inputs = slots.clone().map(|slot| states.take(slot)).collect::<Result<Vec<_>>>()?;
            let outputs = each(&inputs, |x| {
                let y = block.run(x, pass)?;
                Ok((look(x, &y)?, y))
            })?;
            for (slot, (found, y)) in slots.zip(outputs) {
                step(group.start + slot, found)?;
                states.put(slot, y)?;
            }
        }
        Ok(())
    })?;
    Ok(states)
}

/// Takes all windows through all blocks as a stage, whose steps are blocks and windows.
pub(super) fn sweep_all<T: Send>(
    source: &dyn BlockSource,
    windows: &Windows,
    stage: &'static str,
    observer: &mut dyn Observer,
    look: Look<'_, T>,
    step: &mut dyn FnMut(usize, T),
) -> Result<()> {
    let pass = source.pass_over(windows.seq_len())?;
    let total = (windows.len() * source.architecture().depth()) as u64;
    progress::counted(stage, total, observer, |report| {
        let mut done = 0;
        for group in groups(source, windows) {
            sweep(source, windows, &group, &pass, look, &mut |window, found| {
                step(window, found);
                done += 1;
                report(done)
            })?;
        }
        Ok(())
    })
}
