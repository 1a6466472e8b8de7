//! Progress and cancellation of long work.

use std::ops::ControlFlow;

use crate::error::{Error, Result};

/// Watches long work, and may stop it.
///
/// Stages are `fetch` (from the hub, in bytes), `load`, `quantize`, `hash`, `save`, `verify`, `perplexity`, `task`,
/// `latency`, `samples`, `losses`, for folding `fold`, `donors`, `ties`, `ranks`, `starts` and `output error`, for healing `heal`
/// and `teacher`, and for scoring the method's own name, in part with `gates`, `coupling`, `coupling by gradients`,
/// `singles`, `search`, `finalists` and `final states`. The pipeline's own stages are `compress: ` and their name, with
/// those of the work inside of them: stages can be nested.
///
/// Every stage is a span of `tracing` too, at the level of info, called `stage`, with its `name` and the `total` of its
/// steps; what is decided on the way is an event at the level of debug.
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

    /// The stage has measured something on its way: `loss`, `held-out loss` and `seconds left` of a healing.
    fn measured(&mut self, stage: &'static str, what: &'static str, value: f64) {
        let _ = (stage, what, value);
    }

    /// The stage is over: done, failed or cancelled.
    fn finished(&mut self, stage: &'static str) {
        let _ = stage;
    }
}

impl Observer for () {}

/// Runs `work` as a stage and in a span: the observer hears of its beginning, and of its end whatever becomes of it.
pub(crate) fn stage<T>(
    stage: &'static str,
    total: u64,
    observer: &mut dyn Observer,
    work: impl FnOnce(&mut dyn Observer) -> Result<T>,
) -> Result<T> {
    // The name of a span belongs to its place in the code; that of the stage is a field.
    let _span = tracing::info_span!("stage", name = stage, total).entered();
    observer.started(stage, total);
    let result = work(observer);
    observer.finished(stage);
    result
}

/// Tells the observer how far a stage is, and fails where it asks to stop.
pub(crate) fn advance(stage: &'static str, done: u64, total: u64, observer: &mut dyn Observer) -> Result<()> {
    match observer.advanced(stage, done, total) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled { stage }),
    }
}

/// Runs `step` for `0..total`, telling the observer before, between and after.
pub(crate) fn steps(
    name: &'static str,
    total: usize,
    observer: &mut dyn Observer,
    mut step: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    stage(name, total as u64, observer, |observer| {
        (0..total).try_for_each(|index| {
            step(index)?;
            advance(name, index as u64 + 1, total as u64, observer)
        })
    })
}

/// Runs `work` as a stage whose steps `work` counts itself: it hands the number done to what it is given.
pub(crate) fn counted<T>(
    name: &'static str,
    total: u64,
    observer: &mut dyn Observer,
    work: impl FnOnce(&mut dyn FnMut(u64) -> Result<()>) -> Result<T>,
) -> Result<T> {
    stage(name, total, observer, |observer| work(&mut |done| advance(name, done, total, observer)))
}
