//! Windows taken through all blocks of a model, wherever these come from.
//!
//! Of a model in memory one window after the other goes through all blocks; of one that is read from disk all windows go
//! through one block before the next, so that each block is read once. What is computed of a window is the same.

use std::ops::Range;

use candle_core::Tensor;

use crate::data::Windows;
use crate::error::Result;
use crate::model::{BlockSource, Decoder, Pass, States};
use crate::progress::{self, Observer};

/// Hears of every block: the window, the block's input and its output, `(1, seq, hidden)` each.
pub(crate) type Step<'a> = &'a mut dyn FnMut(usize, &Tensor, &Tensor) -> Result<()>;

/// The windows in parts that go through the blocks together.
pub(crate) fn groups(source: &dyn BlockSource, windows: &Windows) -> Vec<Range<usize>> {
    let (count, together) = (windows.len(), source.windows_at_once().max(1));
    (0..count).step_by(together).map(|first| first..count.min(first.saturating_add(together))).collect()
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
pub(crate) fn sweep(
    source: &dyn BlockSource,
    windows: &Windows,
    group: &Range<usize>,
    pass: &Pass<'_>,
    step: Step<'_>,
) -> Result<States> {
    let mut states = source.states(group.len());
    embedded(&source.front()?, windows, group.clone(), pass, &mut states)?;
    source.visit(&source.all(), &mut |block| {
        for (slot, window) in group.clone().enumerate() {
            let x = states.take(slot)?;
            let y = block.run(&x, pass)?;
            step(window, &x, &y)?;
            states.put(slot, y)?;
        }
        Ok(())
    })?;
    Ok(states)
}

/// Takes all windows through all blocks as a stage, whose steps are blocks and windows.
pub(super) fn sweep_all(
    source: &dyn BlockSource,
    windows: &Windows,
    stage: &'static str,
    observer: &mut dyn Observer,
    step: Step<'_>,
) -> Result<()> {
    let pass = source.pass_over(windows.seq_len())?;
    let total = (windows.len() * source.architecture().depth()) as u64;
    progress::counted(stage, total, observer, |report| {
        let mut done = 0;
        for group in groups(source, windows) {
            sweep(source, windows, &group, &pass, &mut |window, x, y| {
                step(window, x, y)?;
                done += 1;
                report(done)
            })?;
        }
        Ok(())
    })
}
