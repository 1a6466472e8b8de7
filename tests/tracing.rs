//! Stages as spans, decisions as events.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::fmt::Debug;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use foldgpt::heal::{Budget, Losses};
use foldgpt::importance::Method;
use foldgpt::pipeline::Goal;
use foldgpt::{Compressor, Error, Heal, Observer};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Notes every stage as the path of spans that it is inside of, and the messages of events with the stage they are in.
#[derive(Default)]
struct Notes {
    next: AtomicU64,
    names: Mutex<HashMap<u64, String>>,
    open: Mutex<Vec<String>>,
    stages: Mutex<Vec<String>>,
    events: Mutex<Vec<(String, Level, String)>>,
}

/// One field of a span or event as text.
struct Wanted(&'static str, String);

impl Visit for Wanted {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == self.0 {
            self.1 = format!("{value:?}").trim_matches('"').to_string();
        }
    }
}

struct Noting(Arc<Notes>);

impl Subscriber for Noting {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("foldgpt")
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut name = Wanted("name", String::new());
        span.record(&mut name);
        assert_eq!((span.metadata().name(), *span.metadata().level()), ("stage", Level::INFO));
        let id = 1 + self.0.next.fetch_add(1, Ordering::Relaxed);
        self.0.names.lock().unwrap().insert(id, name.1);
        Id::from_u64(id)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut message = Wanted("message", String::new());
        event.record(&mut message);
        let inside = self.0.open.lock().unwrap().join(" > ");
        self.0.events.lock().unwrap().push((inside, *event.metadata().level(), message.1));
    }

    fn enter(&self, id: &Id) {
        let mut open = self.0.open.lock().unwrap();
        open.push(self.0.names.lock().unwrap()[&id.into_u64()].clone());
        self.0.stages.lock().unwrap().push(open.join(" > "));
    }

    fn exit(&self, id: &Id) {
        let name = self.0.names.lock().unwrap()[&id.into_u64()].clone();
        assert_eq!(self.0.open.lock().unwrap().pop(), Some(name));
    }
}

/// What is noted while `work` runs; every span that was entered is left.
fn noted(work: impl FnOnce()) -> Arc<Notes> {
    let notes = Arc::new(Notes::default());
    tracing::subscriber::with_default(Noting(notes.clone()), work);
    assert_eq!(*notes.open.lock().unwrap(), [] as [String; 0]);
    notes
}

/// Stops at the first step of a stage.
struct Stop(&'static str);

impl Observer for Stop {
    fn advanced(&mut self, stage: &'static str, _: u64, _: u64) -> ControlFlow<()> {
        if stage == self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

fn compressor(directory: &std::path::Path) -> Compressor {
    let text = directory.join("text.txt");
    std::fs::write(&text, "Anna lost her red kite near the old bridge, and Tom was sad.\n".repeat(60))
        .unwrap();
    let mut heal = Heal::default();
    (heal.budget, heal.batch, heal.losses) = (Budget::Steps(1), 1, Losses::tail());
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-stories");
    let mut compressor = Compressor::new(model, text, directory.join("out"))
        .method(Method::BlockInfluence)
        .target(Goal::Blocks(2))
        .heal(heal)
        .max_nll_increase(100.0);
    let windows = &mut compressor.recipe.windows;
    (windows.seq_len, windows.calibrate, windows.evaluate) = (32, 2, 2);
    compressor
}

#[test]
fn the_stages_of_a_compression_are_spans_inside_of_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let compressor = compressor(directory.path());
    let notes = noted(|| {
        compressor.run(&mut ()).unwrap();
    });
    let stages = notes.stages.lock().unwrap().clone();
    let mut rest = stages.iter();
    // In this order, with others between them.
    for expected in [
        "hash",
        "compress: score",
        "compress: score > load",
        "compress: score > block-influence",
        "compress: plan",
        "compress: fold > fold",
        "compress: heal",
        "compress: heal > heal",
        "compress: heal > heal > perplexity",
        "compress: heal > save",
        "compress: heal > verify",
        "compress: evaluate > perplexity",
        "compress: save",
        "compress: save > save",
        "compress: save > verify",
        "compress: save > hash",
    ] {
        assert!(rest.any(|stage| stage == expected), "{expected} is not next in {stages:#?}");
    }
    // The source once, and what was written.
    let hashed: Vec<&String> = stages.iter().filter(|stage| stage.ends_with("hash")).collect();
    assert_eq!(hashed, ["hash", "compress: save > hash"]);
    let events = notes.events.lock().unwrap().clone();
    for (inside, message) in [
        ("compress: plan", "planned"),
        ("compress: heal", "weights of the lowest loss are kept"),
        ("compress: heal", "saved"),
        ("", "lost no more than it may"),
        ("compress: save", "saved"),
    ] {
        let expected = (inside.to_string(), Level::DEBUG, message.to_string());
        assert!(events.contains(&expected), "{expected:?} is not in {events:#?}");
    }

    // What is known is said, and not done again.
    let notes = noted(|| {
        compressor.run(&mut ()).unwrap();
    });
    assert_eq!(*notes.stages.lock().unwrap(), ["hash", "hash"]);
    let known = notes.events.lock().unwrap().iter().filter(|event| event.2.starts_with("known")).count();
    assert!(known >= 5, "{known}");
}

#[test]
fn a_search_says_what_it_decided_and_a_cancelled_one_leaves_its_spans() {
    let directory = tempfile::tempdir().unwrap();
    let mut compressor = compressor(directory.path()).method(Method::Coupling);
    compressor.recipe.heal = None;
    let mut coupling = foldgpt::importance::GatesWithCoupling::default();
    (coupling.gates.steps, coupling.search_windows, coupling.budget_block_runs) = (2, 1, 400.0);
    compressor.recipe.coupling = Some(coupling);
    let notes = noted(|| {
        let error = compressor.run(&mut Stop("search")).unwrap_err();
        assert!(matches!(error, Error::Cancelled { stage: "search" }), "{error}");
    });
    assert_eq!(notes.stages.lock().unwrap().last().unwrap(), "compress: score > search");

    let notes = noted(|| {
        compressor.run(&mut ()).unwrap();
    });
    let stages = notes.stages.lock().unwrap().clone();
    for name in ["coupling", "singles", "gates", "search", "finalists"] {
        assert!(stages.contains(&format!("compress: score > {name}")), "{name}: {stages:#?}");
    }
    let events = notes.events.lock().unwrap().clone();
    for message in ["values are known from earlier runs", "the search is over", "the best set that was found"]
    {
        assert!(
            events.iter().any(|event| event.0 == "compress: score" && event.2 == message),
            "{message}: {events:#?}"
        );
    }
}
