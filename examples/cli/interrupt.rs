//! Ctrl-C, and a request to terminate: a stage that runs is cancelled, which leaves nothing half-written and keeps what a
//! later run goes on from. The second ends the program at once, and so does the first where no stage runs.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

static RUNNING: AtomicUsize = AtomicUsize::new(0);
static SIGNALS: LazyLock<Signals> = LazyLock::new(Signals::watch);

struct Signals {
    /// Whether one has come.
    asked: Arc<AtomicBool>,
    /// Whether the next one ends the program.
    last: Arc<AtomicBool>,
}

impl Signals {
    fn watch() -> Self {
        let signals = Self { asked: Arc::default(), last: Arc::default() };
        for signal in [SIGINT, SIGTERM] {
            let (asked, last) = (signals.asked.clone(), signals.last.clone());
            // In this order: the first sets what makes the second end the program, with what shells expect then. Without
            // them, a signal ends it as ever.
            let _ = flag::register_conditional_shutdown(signal, 128 + signal, last.clone())
                .and_then(|_| flag::register(signal, asked))
                .and_then(|_| flag::register(signal, last));
        }
        signals
    }
}

/// A stage begins.
pub fn started() {
    RUNNING.fetch_add(1, Ordering::SeqCst);
    SIGNALS.last.store(SIGNALS.asked.load(Ordering::SeqCst), Ordering::SeqCst);
}

/// Whether a stage is to go on.
pub fn flow() -> ControlFlow<()> {
    if SIGNALS.asked.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// A stage is over.
pub fn finished() {
    if RUNNING.fetch_sub(1, Ordering::SeqCst) == 1 {
        SIGNALS.last.store(true, Ordering::SeqCst);
    }
}
