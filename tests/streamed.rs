//! Blocks read from disk one at a time: the same scores, bit for bit, and clear errors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::importance::{
    AngularDistance, BlockInfluence, Gates, GatesWithCoupling, GreedyPerplexity, MacroInfluence, Method,
    MethodOptions, PerplexityIncrease, Random, Residence, Taylor,
};
use foldgpt::model::{Part, Unit};
use foldgpt::{
    Bytes, Checkpoint, Error, Format, Importance, Observer, SaveOptions, Scores, StreamOptions, Windows,
    perplexity, perplexity_streamed,
};
use support::{FAMILIES, changed_fixture, folded, kinds, load, open, windows};

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-stories");

fn options(state_bytes: Option<u64>) -> StreamOptions {
    let mut options = StreamOptions::default();
    options.state_bytes = state_bytes;
    options
}

fn gates() -> Gates {
    let mut gates = Gates::default();
    (gates.remove, gates.steps, gates.batch) = (1, 4, 2);
    gates
}

fn methods() -> Vec<Box<dyn Importance>> {
    let (mut halves, mut warm, mut keeping) = (gates(), gates(), gates());
    (halves.halves, keeping.gradient_checkpointing) = (true, false);
    (warm.warm_start, warm.protected) = (Some(vec![0.3, 0.1, 0.4, 0.2]), vec![1]);
    vec![
        Box::new(BlockInfluence::default()),
        Box::new(AngularDistance { remove: 2, protected: vec![] }),
        Box::new(PerplexityIncrease::default()),
        Box::new(gates()),
        Box::new(keeping),
        Box::new(halves),
        Box::new(Random { seed: 3 }),
        Box::new(AngularDistance { remove: 2, protected: vec![1] }),
        Box::new(warm),
    ]
}

/// What does not depend on the clock.
fn timeless(mut scores: Scores) -> Scores {
    scores.seconds = 0.0;
    scores
}

/// Scores with the model in memory, and with its blocks on disk.
fn both(
    checkpoint: &Checkpoint,
    method: &dyn Importance,
    windows: &Windows,
    dtype: DType,
    state_bytes: Option<u64>,
) -> (Scores, Scores) {
    let decoder = checkpoint.decoder(dtype, &Device::Cpu).unwrap();
    let streamed = checkpoint.streamed(dtype, &Device::Cpu, options(state_bytes)).unwrap();
    let in_memory = method.score(&decoder, windows, &mut ()).unwrap();
    let from_disk = method.score_streamed(&streamed, windows, &mut ()).unwrap();
    (timeless(in_memory), timeless(from_disk))
}

#[test]
fn every_method_that_streams_gives_the_same_scores_for_every_family_and_type() {
    for family in FAMILIES {
        let (checkpoint, windows) = (open(family), windows(family));
        for dtype in [DType::F32, DType::BF16] {
            for room in [None, Some(0)] {
                for method in methods() {
                    let (in_memory, from_disk) = both(&checkpoint, &*method, &windows, dtype, room);
                    assert_eq!(in_memory, from_disk, "{family} {dtype:?} {room:?} {}", method.method());
                }
            }
        }
    }
}

#[test]
fn how_many_states_fit_in_memory_changes_nothing() {
    let (checkpoint, windows) = (open("llama"), windows("llama"));
    let state = 24 * 48 * 4;
    for room in [1, state, 3 * state, 100 * state] {
        for method in methods() {
            let (in_memory, from_disk) = both(&checkpoint, &*method, &windows, DType::F32, Some(room));
            assert_eq!(in_memory, from_disk, "{room} {}", method.method());
        }
    }
}

#[test]
fn a_single_window_has_no_stability_either_way() {
    let checkpoint = open("llama");
    let windows = Windows::from_ids(vec![(0..24).collect()]).unwrap();
    for method in methods() {
        let (in_memory, from_disk) = both(&checkpoint, &*method, &windows, DType::F32, None);
        assert_eq!(in_memory, from_disk, "{}", method.method());
        assert_eq!(from_disk.stability, None, "{}", method.method());
    }
}

#[test]
fn options_that_do_not_fit_the_model_are_refused_as_in_memory() {
    let (checkpoint, windows) = (open("llama"), windows("llama"));
    let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    let streamed = checkpoint.streamed(DType::F32, &Device::Cpu, options(None)).unwrap();
    let (mut unknown, mut short, mut too_many) = (gates(), gates(), gates());
    unknown.protected = vec![4];
    short.warm_start = Some(vec![0.1]);
    too_many.remove = 5;
    let wrong: Vec<Box<dyn Importance>> = vec![
        Box::new(AngularDistance { remove: 2, protected: vec![4] }),
        Box::new(AngularDistance { remove: 2, protected: vec![1, 2] }),
        Box::new(AngularDistance { remove: 4, protected: vec![] }),
        Box::new(unknown),
        Box::new(short),
        Box::new(too_many),
    ];
    for method in wrong {
        let in_memory = method.score(&decoder, &windows, &mut ()).unwrap_err();
        let from_disk = method.score_streamed(&streamed, &windows, &mut ()).unwrap_err();
        assert_eq!(in_memory.to_string(), from_disk.to_string());
    }
}

#[test]
fn blocks_that_share_or_lack_halves_are_streamed_as_they_are_held() {
    for family in ["llama", "gpt2", "phi3"] {
        let halves = [Unit { block: 1, part: Part::Mlp }, Unit { block: 3, part: Part::Attention }];
        let mut decoders: Vec<_> =
            kinds(family).iter().map(|(name, plan)| (*name, folded(family, plan))).collect();
        decoders.push(("halves", load(family).without(&halves).unwrap()));
        for (name, decoder) in decoders {
            let scratch = tempfile::tempdir().unwrap();
            let directory = scratch.path().join("compact");
            let compact = SaveOptions::from(Format::Compact);
            open(family).save(&decoder, None, &directory, &compact, &mut ()).unwrap();
            let (checkpoint, windows) = (Checkpoint::open(&directory).unwrap(), windows(family));
            for method in methods().iter().take(4) {
                let (in_memory, from_disk) = both(&checkpoint, &**method, &windows, DType::F32, Some(5_000));
                assert_eq!(in_memory, from_disk, "{family} {name} {}", method.method());
            }
        }
    }
}

#[test]
fn losses_are_those_in_memory_also_of_some_blocks() {
    for family in FAMILIES {
        let (checkpoint, windows) = (open(family), windows(family));
        let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
        let streamed = checkpoint.streamed(DType::F32, &Device::Cpu, options(Some(0))).unwrap();
        for kept in [&[0, 1, 2, 3][..], &[0, 2], &[3, 1], &[2, 0, 2]] {
            let (cut, less) = (decoder.with_blocks(kept).unwrap(), streamed.with_blocks(kept).unwrap());
            assert_eq!(cut.architecture(), less.architecture(), "{family} {kept:?}");
            let (expected, found) =
                (perplexity(&cut, &windows, &mut ()), perplexity_streamed(&less, &windows, &mut ()));
            assert_eq!(expected.unwrap(), found.unwrap(), "{family} {kept:?}");
        }
        let again = streamed.with_blocks(&[3, 1]).unwrap().with_blocks(&[1]).unwrap();
        let one = decoder.with_blocks(&[1]).unwrap();
        let found = perplexity_streamed(&again, &windows, &mut ()).unwrap();
        assert_eq!(found, perplexity(&one, &windows, &mut ()).unwrap(), "{family}");
        assert!(matches!(again.with_blocks(&[1]), Err(Error::NoSuchBlock { index: 1, depth: 1 })));
    }
}

/// Stops a stage once it has come so far, and sees that every stage ends.
struct StopAt {
    done: u64,
    open: Vec<&'static str>,
}

impl Observer for StopAt {
    fn started(&mut self, stage: &'static str, _: u64) {
        self.open.push(stage);
    }

    fn advanced(&mut self, _: &'static str, done: u64, total: u64) -> ControlFlow<()> {
        assert!(done <= total, "{done} of {total}");
        if done >= self.done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn finished(&mut self, stage: &'static str) {
        assert_eq!(self.open.pop(), Some(stage));
    }
}

#[test]
fn a_cancelled_run_ends_at_once_and_closes_its_stages() {
    let (checkpoint, windows) = (open("llama"), windows("llama"));
    let streamed = checkpoint.streamed(DType::F32, &Device::Cpu, options(Some(0))).unwrap();
    for method in methods().into_iter().filter(|method| method.method() != "random") {
        for done in [0, 1, 3] {
            let mut stop = StopAt { done, open: Vec::new() };
            let result = method.score_streamed(&streamed, &windows, &mut stop);
            assert!(matches!(result, Err(Error::Cancelled { .. })), "{} {done}", method.method());
            assert!(stop.open.is_empty(), "{} left {:?} open", method.method(), stop.open);
        }
    }
    let mut stop = StopAt { done: 5, open: Vec::new() };
    let result = perplexity_streamed(&streamed, &windows, &mut stop);
    assert!(matches!(result, Err(Error::Cancelled { stage: "perplexity" })));
}

#[test]
fn gates_go_on_in_memory_where_they_were_interrupted_on_disk() {
    let (checkpoint, windows) = (open("qwen3"), windows("qwen3"));
    let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    let streamed = checkpoint.streamed(DType::F32, &Device::Cpu, options(None)).unwrap();
    let mut plain = gates();
    plain.steps = 24;
    let whole = plain.score(&decoder, &windows, &mut ()).unwrap();
    for disk_first in [true, false] {
        let scratch = tempfile::tempdir().unwrap();
        let mut kept = plain.clone();
        kept.state_file = Some(scratch.path().join("gates.json"));
        let mut stop = StopAt { done: 13, open: Vec::new() };
        let score = |on_disk: bool, observer: &mut dyn Observer| {
            if on_disk {
                kept.score_streamed(&streamed, &windows, observer)
            } else {
                kept.score(&decoder, &windows, observer)
            }
        };
        assert!(matches!(score(disk_first, &mut stop), Err(Error::Cancelled { .. })));
        let resumed = score(!disk_first, &mut ()).unwrap();
        assert_eq!(resumed.importance(), whole.importance());
        assert_eq!(resumed.trajectory, whole.trajectory);
    }
}

#[test]
fn a_shard_that_is_cut_off_while_it_is_read_is_named() {
    let (scratch, windows) = (tempfile::tempdir().unwrap(), windows("llama"));
    let directory = scratch.path().join("sharded");
    let mut sharded = SaveOptions::default();
    sharded.max_shard_bytes = 70_000;
    let saved = open("llama").save(&load("llama"), None, &directory, &sharded, &mut ()).unwrap();
    assert!(saved.weight_files.len() > 3);
    let checkpoint = Checkpoint::open(&directory).unwrap();
    let streamed = checkpoint.streamed(DType::F32, &Device::Cpu, options(None)).unwrap();
    let middle = &saved.weight_files[saved.weight_files.len() / 2];
    let file = std::fs::OpenOptions::new().write(true).open(directory.join(middle)).unwrap();
    file.set_len(1000).unwrap();
    for method in methods().into_iter().filter(|method| method.method() != "random") {
        let error = method.score_streamed(&streamed, &windows, &mut ()).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{}: {error}", method.method());
        assert!(error.to_string().contains(middle.as_str()), "{}: {error}", method.method());
    }
}

#[test]
fn a_weight_that_is_not_finite_is_named() {
    let source = changed_fixture("llama", |_| {});
    let path = source.path().join("model.safetensors");
    let mut tensors = foldgpt::candle::safetensors::load(&path, &Device::Cpu).unwrap();
    let name = "model.layers.2.mlp.up_proj.weight";
    tensors.insert(name.into(), Tensor::full(f32::NAN, (80, 48), &Device::Cpu).unwrap());
    foldgpt::candle::safetensors::save(&tensors, &path).unwrap();
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let streamed = checkpoint.streamed(DType::F32, &Device::Cpu, options(None)).unwrap();
    let error = BlockInfluence::default().score_streamed(&streamed, &windows("llama"), &mut ()).unwrap_err();
    assert!(matches!(&error, Error::Tensor { tensor, .. } if tensor == name), "{error}");
}

#[test]
fn a_scratch_directory_that_does_not_exist_is_named() {
    let checkpoint = open("llama");
    let mut options = options(Some(0));
    options.scratch = Some("/nowhere/at all".into());
    let streamed = checkpoint.streamed(DType::F32, &Device::Cpu, options).unwrap();
    let error = BlockInfluence::default().score_streamed(&streamed, &windows("llama"), &mut ()).unwrap_err();
    assert!(error.to_string().contains("/nowhere/at all"), "{error}");
}

#[test]
fn methods_that_need_the_model_in_memory_say_so() {
    let (checkpoint, windows) = (open("llama"), windows("llama"));
    let streamed = checkpoint.streamed(DType::F32, &Device::Cpu, options(None)).unwrap();
    let others: Vec<Box<dyn Importance>> = vec![
        Box::new(Taylor::default()),
        Box::new(GatesWithCoupling::default()),
        Box::new(GreedyPerplexity::default()),
        Box::new(MacroInfluence::default()),
    ];
    for method in others {
        let error = method.score_streamed(&streamed, &windows, &mut ()).unwrap_err().to_string();
        assert!(error.contains(method.method()) && error.contains("block-influence"), "{error}");
        assert!(!method.method().parse::<Method>().unwrap().streams());
    }
    for method in methods() {
        assert!(method.method().parse::<Method>().unwrap().streams(), "{}", method.method());
    }
    assert!(checkpoint.streamed(DType::U8, &Device::Cpu, StreamOptions::default()).is_err());
}

#[test]
fn what_fits_stays_in_memory_and_what_does_not_is_streamed_or_refused() {
    let checkpoint = Checkpoint::open(Path::new(TINY)).unwrap();
    let windows = Windows::from_ids(vec![(0..64).collect(), (64..128).collect()]).unwrap();
    let mut told = MethodOptions::default();
    told.remove = 2;
    for dtype in [DType::F32, DType::BF16] {
        let residence =
            |method: Method, most: u64| method.residence(&checkpoint, dtype, &windows, &told, Bytes(most));
        let Ok(Residence::Memory { bytes }) = residence(Method::BlockInfluence, u64::MAX) else {
            panic!("there is room for all of it");
        };
        let weights = checkpoint.architecture().parameter_count() * dtype.size_in_bytes();
        assert!(bytes > weights as u64, "{bytes} for {weights} of weights");
        for method in [Method::BlockInfluence, Method::Angular, Method::Perplexity, Method::Gates] {
            let found = residence(method, bytes - 1 - bytes / 16).unwrap();
            assert!(found.to_string().contains("disk"), "{method} {dtype:?}: {found}");
            let Residence::Streamed { bytes: taken, .. } = found else { panic!("{method}: {found}") };
            assert!(taken < bytes, "{method} {dtype:?}: {taken} of {bytes}");
            let Err(Error::Memory { needed, limit, reason, .. }) = residence(method, 1000) else {
                panic!("{method}: nothing fits in 1000 bytes");
            };
            assert_eq!(reason.contains("in bf16 it would take"), dtype == DType::F32, "{reason}");
            assert!(needed <= Bytes(taken) && limit == Bytes(1000), "{method}: {needed}");
            // What is said to be needed is enough.
            assert!(residence(method, needed.0).is_ok(), "{method}");
        }
        for method in [Method::Taylor, Method::Coupling, Method::GreedyPerplexity, Method::MacroInfluence] {
            let error = residence(method, bytes / 2).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, Error::Memory { .. }), "{text}");
            assert!(text.contains(method.name()) && text.contains("angular"), "{text}");
        }
    }
}

#[test]
fn windows_side_by_side_have_the_bits_of_windows_alone() {
    for family in ["llama", "gemma2"] {
        let decoder = load(family);
        // Seven windows: no multiple of the threads.
        let ids: Vec<Vec<u32>> =
            (0..7u32).map(|w| (0..12).map(|i| (w * 31 + i * 7) % 90).collect()).collect();
        let all = Windows::from_ids(ids.clone()).unwrap();
        let alone = |ids: &Vec<u32>| Windows::from_ids(vec![ids.clone()]).unwrap();
        let losses =
            ids.iter().map(|ids| perplexity(&decoder, &alone(ids), &mut ()).unwrap().mean_nll * 11.0);
        let expected = losses.fold(0.0, |sum, loss| sum + loss) / 77.0;
        let scores = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let loss = perplexity(&decoder, &all, &mut ()).unwrap().mean_nll;
                assert!(
                    (loss - expected).abs() < 1e-12,
                    "{family}, {threads} threads: {loss}, expected {expected}"
                );
                (loss.to_bits(), timeless(BlockInfluence::default().score(&decoder, &all, &mut ()).unwrap()))
            })
        };
        let one = scores(1);
        assert_eq!(scores(3), one, "{family}");
        assert_eq!(scores(16), one, "{family}");
    }
}
