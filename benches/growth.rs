//! How time and memory grow with blocks, tokens, vocabulary and window length, each doubled while the others stay.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo bench --bench growth [-- vocabulary]
//! ```
//!
//! Memory is what was allocated beyond the weights, at its highest, counted by the allocator. Behind each figure
//! stands by how much it grew: 2 is linear. Where the window grows, tokens grow with it, and attention faster.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Instant;

use foldgpt::heal::Losses;
use foldgpt::importance::{BlockInfluence, Importance};
use foldgpt::model::Unit;
use foldgpt::{Decoder, Windows};
use mimalloc::MiMalloc;
use peakmem_alloc::{PeakMemAlloc, PeakMemAllocTrait};
use support::{median, random, seconds, smollm2, windows_of, work};

#[global_allocator]
static ALLOCATOR: PeakMemAlloc<MiMalloc> = PeakMemAlloc::new(MiMalloc);

/// Every figure is the median of as many runs as take this long together, of at least one.
const SECONDS: f64 = 6.0;

/// What is measured; one of these is doubled.
#[derive(Clone, Copy)]
struct Size {
    blocks: usize,
    windows: usize,
    vocab: usize,
    seq_len: usize,
}

const SMALL: Size = Size { blocks: 4, windows: 1, vocab: 8192, seq_len: 256 };

type Work = (&'static str, fn(&Decoder, &Windows));

/// Work that is linear in everything but attention.
const WORKS: [Work; 4] = [
    ("loss", work::forward),
    ("Block Influence", |decoder, windows| {
        BlockInfluence::default().score(decoder, windows, &mut ()).unwrap();
    }),
    ("gate step", work::gate_step),
    ("healing step on lora", |decoder, windows| work::lora(decoder, windows, 1, Losses::default(), None)),
];

/// Work that grows with the pairs of blocks.
const COUPLING: Work = ("exact coupling", |decoder, windows| {
    work::coupling(decoder, windows, &Unit::blocks(decoder.depth()));
});

fn main() {
    let with_coupling = [&WORKS[..], &[COUPLING]].concat();
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let table = |axis: &str, first, works: &[Work], size: fn(usize) -> Size| {
        if wanted.as_ref().is_none_or(|wanted| axis.contains(wanted.as_str())) {
            table(axis, first, works, size);
        }
    };
    table("blocks", SMALL.blocks, &with_coupling, |blocks| Size { blocks, ..SMALL });
    table("windows", SMALL.windows, &WORKS, |windows| Size { windows, ..SMALL });
    table("vocabulary", SMALL.vocab, &WORKS, |vocab| Size { vocab, ..SMALL });
    table("window length", SMALL.seq_len, &WORKS, |seq_len| Size { seq_len, ..SMALL });
}

/// A row for every doubling of `first`, the value of what grows.
fn table(axis: &str, first: usize, works: &[Work], size: impl Fn(usize) -> Size) {
    let heads: Vec<String> = works.iter().map(|(name, _)| format!(" {name}, ms | MB |")).collect();
    println!("\n| {axis} |{}\n|---:|{}", heads.concat(), "---:|---:|".repeat(works.len()));
    let mut before: Vec<Figures> = Vec::new();
    for value in (0..4).map(|doublings| first << doublings) {
        let now: Vec<Figures> = works.iter().map(|(_, work)| measure(size(value), *work)).collect();
        let cells: Vec<String> =
            now.iter().enumerate().map(|(place, figures)| figures.cells(before.get(place))).collect();
        println!("| {value} |{}", cells.concat());
        before = now;
    }
}

struct Figures {
    milliseconds: f64,
    megabytes: f64,
}

impl Figures {
    /// Both, each with how many times that of `smaller` it is.
    fn cells(&self, smaller: Option<&Self>) -> String {
        let cell = |value: fn(&Self) -> f64| {
            let growth = smaller.map(|smaller| format!(" ({:.1})", value(self) / value(smaller)));
            format!(" {:.1}{} |", value(self), growth.unwrap_or_default())
        };
        cell(|figures| figures.milliseconds) + &cell(|figures| figures.megabytes)
    }
}

fn measure(size: Size, work: fn(&Decoder, &Windows)) -> Figures {
    let decoder = random(smollm2(size.blocks, size.vocab));
    let windows = windows_of(size.windows, size.seq_len, size.vocab);
    work(&decoder, &windows); // pools of threads and their buffers are there from now on
    ALLOCATOR.reset_peak_memory();
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.is_empty() || start.elapsed().as_secs_f64() < SECONDS {
        times.push(1e3 * seconds(|| work(&decoder, &windows)));
    }
    let megabytes = ALLOCATOR.get_peak_memory() as f64 / 1e6;
    Figures { milliseconds: median(times), megabytes }
}
