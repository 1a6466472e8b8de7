//! Ctrl-C, and a request to terminate: a stage that runs is cancelled, which leaves nothing half-written and keeps what a
//! later run goes on from. The second ends the program at once, and so does the first where no stage runs.

use std::ops::ControlFlow;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static RUNNING: AtomicUsize = AtomicUsize::new(0);
static ASKED: AtomicBool = AtomicBool::new(false);

/// What shells expect of a program that Ctrl-C ended: 128 and the number of the signal.
const STATUS: i32 = 130;

/// A stage begins.
pub fn started() {
    static WATCH: Once = Once::new();
    // Without a handler, Ctrl-C ends the program as ever.
    WATCH.call_once(|| ctrlc::set_handler(asked).unwrap_or_default());
    RUNNING.fetch_add(1, Ordering::SeqCst);
}

/// Whether a stage is to go on.
pub fn flow() -> ControlFlow<()> {
    if ASKED.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// A stage is over.
pub fn finished() {
    RUNNING.fetch_sub(1, Ordering::SeqCst);
}

fn asked() {
    if ASKED.swap(true, Ordering::SeqCst) || RUNNING.load(Ordering::SeqCst) == 0 {
        std::process::exit(STATUS);
    }
    eprintln!("stopping; once more stops at once");
}
