//! How time and memory grow with blocks, tokens, vocabulary and window length, each doubled while the others stay.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo bench --bench growth
//! ```
//!
//! Memory is what was allocated beyond the weights, at its highest, counted by the allocator. Behind each figure
//! stands by how much it grew: 2 is linear. Where the window grows, tokens grow with it, and attention faster.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

mod support;

use foldgpt::importance::{BlockInfluence, Importance};
use foldgpt::model::Unit;
use foldgpt::{Decoder, Windows};
use peak_alloc::PeakAlloc;
use support::{median, random, seconds, smollm2, windows_of, work};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Every figure is the median of so many runs.
const RUNS: usize = 5;

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
    ("healing step on lora", |decoder, windows| work::lora(decoder, windows, 1, Default::default(), None)),
];

/// Work that grows with the pairs of blocks.
const COUPLING: Work = ("exact coupling", |decoder, windows| {
    work::coupling(decoder, windows, &Unit::blocks(decoder.depth()));
});

fn main() {
    let times = |count: usize| move |step: u32| count << step;
    let mut with_coupling = WORKS.to_vec();
    with_coupling.push(COUPLING);
    table("blocks", &with_coupling, |step| Size { blocks: times(SMALL.blocks)(step), ..SMALL });
    table("windows", &WORKS, |step| Size { windows: times(SMALL.windows)(step), ..SMALL });
    table("vocabulary", &WORKS, |step| Size { vocab: times(SMALL.vocab)(step), ..SMALL });
    table("window length", &WORKS, |step| Size { seq_len: times(SMALL.seq_len)(step), ..SMALL });
}

fn table(axis: &str, works: &[Work], size: impl Fn(u32) -> Size) {
    let heads: String = works.iter().map(|(name, _)| format!(" {name}, ms | MB |")).collect();
    println!("\n| {axis} |{heads}\n|---:|{}", "---:|---:|".repeat(works.len()));
    let mut before: Option<Vec<Figures>> = None;
    for step in 0..4 {
        let size = size(step);
        let now: Vec<Figures> = works.iter().map(|(_, work)| measure(size, *work)).collect();
        let cells = now.iter().enumerate().map(|(place, figures)| {
            let smaller = before.as_ref().and_then(|before| before.get(place));
            let by = |value: fn(&Figures) -> f64| {
                smaller.map(|smaller| format!(" ({:.1})", value(figures) / value(smaller))).unwrap_or_default()
            };
            let Figures { milliseconds, megabytes } = figures;
            let (time, memory) = (by(|figures| figures.milliseconds), by(|figures| figures.megabytes));
            format!(" {milliseconds:.1}{time} | {megabytes:.1}{memory} |")
        });
        let value = match axis {
            "blocks" => size.blocks,
            "windows" => size.windows,
            "vocabulary" => size.vocab,
            _ => size.seq_len,
        };
        println!("| {value} |{}", cells.collect::<String>());
        before = Some(now);
    }
}

struct Figures {
    milliseconds: f64,
    megabytes: f64,
}

fn measure(size: Size, work: fn(&Decoder, &Windows)) -> Figures {
    let decoder = random(smollm2(size.blocks, size.vocab));
    let windows = windows_of(size.windows, size.seq_len, size.vocab);
    work(&decoder, &windows); // pools of threads and their buffers are there from now on
    let held = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let times = (0..RUNS).map(|_| 1e3 * seconds(|| work(&decoder, &windows))).collect();
    let megabytes = (ALLOCATOR.peak_usage() - held) as f64 / 1e6;
    Figures { milliseconds: median(times), megabytes }
}
