//! Progress and cancellation of long work.

use std::ops::ControlFlow;

use crate::error::{Error, Result};

/// Watches long work, and may stop it.
///
/// Stages are `load`, `hash`, `save`, `verify`, `perplexity`, `losses`, and for scoring the method's own name, in
/// part with `gates`, `coupling`, `search` and `finalists`.
///
/// Every method has a default that does nothing, so that an implementation says only what it cares about;
/// `()` is the observer that watches nothing.
///
/// ```
/// use foldgpt::Observer;
/// use std::ops::ControlFlow;
///
/// /// Stops whatever runs after ten steps.
/// struct TenSteps;
///
/// impl Observer for TenSteps {
///     fn advanced(&mut self, _stage: &'static str, done: u64, _total: u64) -> ControlFlow<()> {
///         if done >= 10 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
///     }
/// }
/// ```
pub trait Observer {
    /// A stage begins; it will take `total` steps (windows, tokens, blocks: the stage's own unit).
    fn started(&mut self, stage: &'static str, total: u64) {
        let _ = (stage, total);
    }

    /// `done` of `total` steps of the stage are finished. Returning [`ControlFlow::Break`] cancels the work,
    /// which then ends with [`Error::Cancelled`] and leaves nothing half-written.
    fn advanced(&mut self, stage: &'static str, done: u64, total: u64) -> ControlFlow<()> {
        let _ = (stage, done, total);
        ControlFlow::Continue(())
    }

    /// The stage is over: done, failed or cancelled.
    fn finished(&mut self, stage: &'static str) {
        let _ = stage;
    }
}

impl Observer for () {}

/// Runs `step` for `0..total`, telling the observer before, between and after.
pub(crate) fn steps(
    stage: &'static str,
    total: usize,
    observer: &mut dyn Observer,
    mut step: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    observer.started(stage, total as u64);
    let result = (0..total).try_for_each(|index| {
        step(index)?;
        match observer.advanced(stage, index as u64 + 1, total as u64) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled { stage }),
        }
    });
    observer.finished(stage);
    result
}
