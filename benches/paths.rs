//! Every hot path on a SmolLM2-shaped random model beside its own bound, in one run, in turns.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo bench --bench paths [-- decode]
//! ```
//!
//! Prints, after criterion's timings, a table of the share of its bound that each path reaches. Bounds: for what computes,
//! the matrix products of a forward pass, by candle's gemm on operands of the same shapes in f32, which our own products
//! can be faster than, as rows of their own say (a gate step and a healing step are three of them: there, again, and
//! back, although less is multiplied: on the way back no block's last product is made again, nor is the head's); for
//! coupling, the blocks and heads that it runs, as they run by themselves; for decoding, the bytes of the weights at the
//! rate at which all threads read memory.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use foldgpt::candle::DType;
use foldgpt::candle::quantized::GgmlDType;
use foldgpt::heal::Losses;
use foldgpt::model::Unit;
use foldgpt::{Account, Decoder, Windows};
use support::bound::{Memory, Products};
use support::work::{self, Decoding};
use support::{TOKENS, architecture, decoder, median, seconds, windows};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Windows and steps of a healing: what it does once, before the first step, is shared by all.
const HEALED: (usize, usize) = (2, 2);

/// Blocks of the model whose coupling is measured.
const SHALLOW: usize = 12;

/// A path, and what it is held to.
struct Path<'a> {
    name: String,
    run: Box<dyn Fn() + 'a>,
    /// Seconds that the bound allows, measured now.
    bound: Box<dyn Fn() -> f64 + 'a>,
    /// The share of the bound that it should reach, where there is one.
    goal: Option<f64>,
    /// Interleaved pairs.
    rounds: usize,
}

impl<'a> Path<'a> {
    fn new(name: impl Into<String>, run: impl Fn() + 'a, bound: impl Fn() -> f64 + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run), bound: Box::new(bound), goal: None, rounds: 7 }
    }

    fn goal(mut self, share: f64) -> Self {
        self.goal = Some(share);
        self
    }

    /// One that takes many seconds: fewer rounds, and none for criterion.
    fn long(mut self) -> Self {
        self.rounds = 3;
        self
    }

    fn is_long(&self) -> bool {
        self.rounds < 7
    }

    /// A line of the table: medians over interleaved pairs, and the least and largest share.
    fn line(&self) -> String {
        (self.run)(); // before it counts
        let pairs: Vec<(f64, f64)> = (0..self.rounds).map(|_| ((self.bound)(), seconds(&self.run))).collect();
        let of = |value: fn(&(f64, f64)) -> f64| median(pairs.iter().map(value).collect());
        let (bound, time, share) =
            (of(|pair| pair.0 * 1e3), of(|pair| pair.1 * 1e3), of(|pair| 100.0 * pair.0 / pair.1));
        let shares = pairs.iter().map(|pair| 100.0 * pair.0 / pair.1);
        let (least, most) = (shares.clone().fold(f64::INFINITY, f64::min), shares.fold(0.0, f64::max));
        let goal = self.goal.map(|goal| format!("{:.0} %", 100.0 * goal)).unwrap_or_default();
        format!("| {} | {time:.1} | {bound:.1} | {share:.0} % ({least:.0}–{most:.0}) | {goal} |", self.name)
    }
}

/// The bound itself by our own kernels.
fn products<'a>(bound: &'a Products, own: &'a [(&str, Products)], depth: usize) -> Vec<Path<'a>> {
    let path = |(name, own): &'a (&str, Products)| {
        let name = format!("products of blocks and head alone, {name}");
        Path::new(name, move || own.own(depth, 1), move || bound.seconds(depth, 1))
    };
    own.iter().map(path).collect()
}

/// The models that are timed.
struct Models {
    wide: Decoder,
    narrow: Decoder,
    quantized: [Decoder; 2],
}

impl Models {
    fn new() -> Self {
        let wide = decoder();
        let narrow = wide.to_dtype(DType::BF16).unwrap();
        let quantized =
            [GgmlDType::Q8_0, GgmlDType::Q4K].map(|dtype| wide.quantized(dtype, &mut ()).unwrap());
        Self { wide, narrow, quantized }
    }
}

fn forward<'a>(models: &'a Models, window: &'a Windows, products: &'a Products) -> Vec<Path<'a>> {
    let depth = models.wide.depth();
    let (_, ids) = work::first(window);
    let hidden = models.wide.hidden(&ids).unwrap().squeeze(0).unwrap();
    let mut paths = Vec::new();
    for (name, decoder) in [("f32", &models.wide), ("bf16", &models.narrow)] {
        let hidden = hidden.clone();
        let blocks = move || work::blocks(decoder, window);
        let with_head = move || {
            blocks();
            work::head(decoder, window, &hidden);
        };
        paths.push(
            Path::new(format!("blocks, {name}"), blocks, move || products.seconds(depth, 0)).goal(0.85),
        );
        paths.push(
            Path::new(format!("with head, {name}"), with_head, move || products.seconds(depth, 1)).goal(0.85),
        );
    }
    paths
}

fn gates<'a>(models: &'a Models, window: &'a Windows, products: &'a Products) -> Vec<Path<'a>> {
    let paths = [("f32", &models.wide), ("bf16", &models.narrow)].map(|(name, decoder)| {
        let bound = move || products.seconds(3 * decoder.depth(), 3);
        Path::new(format!("gate step, {name}"), move || work::gate_step(decoder, window), bound).goal(0.75)
    });
    paths.into()
}

fn healing<'a>(models: &'a Models, windows: &'a Windows, products: &'a Products) -> Vec<Path<'a>> {
    let paths = [("f32", &models.wide), ("bf16", &models.narrow)].map(|(name, decoder)| {
        let steps = HEALED.1;
        let passes = 3 * steps * windows.len();
        let run = move || work::lora(decoder, windows, steps, Losses::default(), None);
        let bound = move || products.seconds(passes * decoder.depth(), passes);
        let name = format!("{steps} healing steps on lora, {} windows, {name}", windows.len());
        Path::new(name, run, bound).goal(0.65).long()
    });
    paths.into()
}

fn coupling<'a>(decoder: &'a Decoder, windows: &'a Windows, units: &'a [Unit]) -> Path<'a> {
    let runs = work::coupling(decoder, windows, units);
    // None off, each off, each pair off.
    let sets = 1 + units.len() * (units.len() + 1) / 2;
    let heads = (sets * windows.len()) as f64;
    let (_, ids) = work::first(windows);
    let hidden = decoder.hidden(&ids).unwrap().squeeze(0).unwrap();
    let bound = move || {
        let block = seconds(|| work::blocks(decoder, windows)) / decoder.depth() as f64;
        runs * block + heads * seconds(|| work::head(decoder, windows, &hidden))
    };
    let name = format!("coupling, {} units, {runs:.0} block runs, {heads:.0} heads", units.len());
    let run = move || {
        black_box(work::coupling(decoder, windows, units));
    };
    Path::new(name, run, bound).goal(0.8).long()
}

fn decoding<'a>(models: &'a Models, memory: &'a Memory) -> Vec<Path<'a>> {
    let [q8, q4] = &models.quantized;
    let paths = [&models.wide, &models.narrow, q8, q4].map(|decoder| {
        // The head is the embedding: every weight is read for every token.
        let bytes = Account::counted(decoder, Decoding::PROMPT).unwrap().resident_bytes;
        let decoding = Decoding::new(decoder);
        let tokens = Decoding::TOKENS;
        let bound = move || tokens as f64 * memory.seconds(bytes);
        let name = format!("decode {tokens} tokens, {}, {} MB", decoder.matrix_types(), bytes / 1_000_000);
        Path::new(name, move || decoding.run(), bound).goal(0.7)
    });
    paths.into()
}

fn paths(c: &mut Criterion) {
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let (models, memory) = (Models::new(), Memory::new());
    let (whole, inner) = (Products::new(&architecture(), TOKENS), Products::new(&architecture(), TOKENS - 1));
    let (one, healed) = (windows(1), windows(HEALED.0));
    // Work grows with the third power of the depth.
    let shallow = models.wide.with_blocks(&(0..SHALLOW).collect::<Vec<_>>()).unwrap();
    let units: Vec<Unit> = Unit::blocks(SHALLOW);

    let own = [("f32", DType::F32), ("bf16", DType::BF16)].map(|(name, dtype)| (name, whole.to_dtype(dtype)));
    let mut all = products(&whole, &own, models.wide.depth());
    all.extend(forward(&models, &one, &whole));
    all.extend(gates(&models, &one, &whole));
    all.extend(healing(&models, &healed, &inner));
    all.push(coupling(&shallow, &one, &units));
    all.extend(decoding(&models, &memory));
    all.retain(|path| wanted.as_ref().is_none_or(|wanted| path.name.contains(wanted.as_str())));

    let mut group = c.benchmark_group("paths");
    group.sample_size(10).measurement_time(Duration::from_secs(10));
    for path in all.iter().filter(|path| !path.is_long()) {
        group.bench_function(path.name.as_str(), |b| b.iter(&path.run));
    }
    group.finish();

    println!("\n{TOKENS} tokens, {} threads, medians of pairs in turns", rayon::current_num_threads());
    println!("| path | ms | bound, ms | share | goal |\n|---|---:|---:|---:|---:|");
    for path in &all {
        println!("{}", path.line());
    }
}

criterion_group!(benches, paths);
criterion_main!(benches);
