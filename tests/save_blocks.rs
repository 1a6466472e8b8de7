//! Checkpoints of some blocks, copied from file to file: what saving a decoder writes, byte for byte.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::model::{Part, Unit};
use foldgpt::{Checkpoint, Decoder, Error, Format, Observer, Plan, SaveOptions, Scores, Target};
use support::{FAMILIES, folded, kinds, load, new_llama, open, windows};

/// Every file of a directory.
fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let read = |path: std::path::PathBuf| {
        (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap())
    };
    entries.map(read).collect()
}

fn options(format: Format, max_shard_bytes: u64) -> SaveOptions {
    let mut options = SaveOptions::from(format);
    options.max_shard_bytes = max_shard_bytes;
    options
}

/// Saves these blocks of a checkpoint both ways, and compares all files.
fn assert_same(checkpoint: &Checkpoint, kept: &[usize], options: &SaveOptions, what: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let (computed, copied) = (scratch.path().join("computed"), scratch.path().join("copied"));
    let cut = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap().with_blocks(kept).unwrap();
    // What was read from a compact checkpoint has its own indices, as copying takes them.
    let by_save = checkpoint.save(&cut, None, &computed, options, &mut ()).unwrap();
    let by_copy = checkpoint.save_blocks(kept, None, &copied, options, &mut ()).unwrap();
    assert_eq!(by_save.tensor_bytes, by_copy.tensor_bytes, "{what} {kept:?}");
    assert_eq!(by_save.weight_files, by_copy.weight_files, "{what} {kept:?}");
    let (computed, copied) = (files(&computed), files(&copied));
    assert_eq!(computed.keys().collect::<Vec<_>>(), copied.keys().collect::<Vec<_>>(), "{what} {kept:?}");
    for (name, bytes) in &computed {
        assert!(bytes == &copied[name], "{what} {kept:?}: {name} differs");
    }
}

#[test]
fn copied_blocks_are_what_saving_them_writes() {
    for family in FAMILIES {
        for kept in [&[0, 1, 2, 3][..], &[0, 2, 3], &[1, 3], &[2], &[2, 0, 2]] {
            for format in [Format::Expanded, Format::Compact] {
                assert_same(&open(family), kept, &options(format, u64::MAX), family);
            }
        }
        assert_same(&open(family), &[0, 3], &options(Format::Expanded, 40_000), family);
        let narrow = open(family).stored_as(DType::BF16);
        assert_same(&narrow, &[1, 2], &options(Format::Expanded, u64::MAX), &format!("{family} as bf16"));
    }
}

/// A random model with tensors in bf16 of nearly three mebibytes, the most that a thread copies at once being one.
fn write_large(directory: &Path) {
    let checkpoint = new_llama(serde_json::json!({
        "hidden_size": 600, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 6, "vocab_size": 2501,
    }));
    let decoder = Decoder::random(checkpoint.architecture().clone(), 7, DType::F32, &Device::Cpu).unwrap();
    checkpoint.save(&decoder, None, directory, &SaveOptions::default(), &mut ()).unwrap();
}

#[test]
fn tensors_that_are_copied_in_pieces_are_whole() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("large");
    write_large(&directory);
    let checkpoint = Checkpoint::open(&directory).unwrap();
    for limit in [u64::MAX, 4_000_000, 1] {
        assert_same(
            &checkpoint,
            &[1],
            &options(Format::Expanded, limit),
            &format!("in files of {limit} bytes"),
        );
    }

    // A number that is not finite is found in whatever piece it lies, and what was written by then is gone.
    let weights = directory.join("model.safetensors");
    let whole = foldgpt::candle::safetensors::load(&weights, &Device::Cpu).unwrap();
    let (name, shape) = ("lm_head.weight", (2501, 600));
    for place in [0, 700_000, 2501 * 600 - 1] {
        let (mut tensors, mut values) = (whole.clone(), vec![0.5f32; 2501 * 600]);
        values[place] = f32::NAN;
        let broken = Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        tensors.insert(name.into(), broken);
        foldgpt::candle::safetensors::save(&tensors, &weights).unwrap();
        let out = scratch.path().join("out");
        let checkpoint = Checkpoint::open(&directory).unwrap();
        let error = checkpoint.save_blocks(&[0], None, &out, &SaveOptions::default(), &mut ()).unwrap_err();
        assert!(matches!(&error, Error::Tensor { tensor, .. } if tensor == name), "{place}: {error}");
        assert_eq!(
            std::fs::read_dir(scratch.path()).unwrap().count(),
            1,
            "{place}: something is left behind"
        );
    }
}

#[test]
fn what_blocks_share_is_copied_with_the_first_that_stays() {
    for family in ["llama", "gpt2", "phi3"] {
        let mut decoders: Vec<_> =
            kinds(family).iter().map(|(name, plan)| (*name, folded(family, plan))).collect();
        let halves = [Unit { block: 1, part: Part::Mlp }, Unit { block: 3, part: Part::Attention }];
        decoders.push(("halves", load(family).without(&halves).unwrap()));
        for (name, decoder) in decoders {
            let scratch = tempfile::tempdir().unwrap();
            let directory = scratch.path().join("compact");
            open(family).save(&decoder, None, &directory, &Format::Compact.into(), &mut ()).unwrap();
            let checkpoint = Checkpoint::open(&directory).unwrap();
            let last = decoder.depth() - 1;
            for kept in [(0..=last).collect(), vec![1, last], vec![last]] {
                let what = format!("{family} {name}");
                assert_same(&checkpoint, &kept, &options(Format::Compact, u64::MAX), &what);
                let cut = checkpoint.architecture().with_blocks(&kept).unwrap();
                let mut folds = (0..cut.depth()).map(|depth| cut.fold.block(depth));
                let computes = folds.any(|block| block.part != Part::Whole || !block.adapters.is_empty());
                if computes {
                    let out = scratch.path().join("refused");
                    let expanded = options(Format::Expanded, u64::MAX);
                    let result = checkpoint.save_blocks(&kept, None, &out, &expanded, &mut ());
                    assert!(matches!(result, Err(Error::Plan(_))), "{what} {kept:?}");
                    assert!(!out.exists());
                } else {
                    assert_same(&checkpoint, &kept, &options(Format::Expanded, u64::MAX), &what);
                }
            }
        }
    }
}

#[test]
fn a_plan_is_written_beside_what_it_describes_alone() {
    let checkpoint = open("qwen3");
    let scores = Scores::new("test", &windows("qwen3"), vec![0.4, 0.1, 0.3, 0.2]).unwrap();
    let plan = Plan::new(checkpoint.architecture(), &scores, Target::Rate(0.5), &[3]).unwrap();
    let plan = plan.for_model(checkpoint.sha256(&mut ()).unwrap());
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    let save = |kept: &[usize], plan: &Plan| {
        checkpoint.save_blocks(kept, Some(plan), &out, &SaveOptions::default(), &mut ())
    };
    assert!(save(&[0, 1], &plan).unwrap_err().to_string().contains("keeps blocks [0, 3]"));
    assert!(save(&[0, 3], &plan.clone().for_model("0000")).unwrap_err().to_string().contains("0000"));
    assert!(!out.exists());
    save(&[0, 3], &plan).unwrap();
    let read = Plan::from_json(&std::fs::read_to_string(out.join("plan.json")).unwrap()).unwrap();
    assert_eq!(read, plan);
}

#[test]
fn what_cannot_be_written_leaves_nothing() {
    struct StopAt(&'static str);
    impl Observer for StopAt {
        fn advanced(&mut self, stage: &'static str, _: u64, _: u64) -> ControlFlow<()> {
            if stage == self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }
    let (checkpoint, scratch) = (open("llama"), tempfile::tempdir().unwrap());
    let (out, plain) = (scratch.path().join("out"), SaveOptions::default());
    for stage in ["save", "verify"] {
        let result = checkpoint.save_blocks(&[0, 1], None, &out, &plain, &mut StopAt(stage));
        assert!(matches!(result, Err(Error::Cancelled { stage: at }) if at == stage), "{stage}");
    }
    let result = checkpoint.save_blocks(&[0, 4], None, &out, &plain, &mut ());
    assert!(matches!(result, Err(Error::NoSuchBlock { index: 4, depth: 4 })));
    assert!(files(scratch.path()).is_empty(), "something is left behind");

    checkpoint.save_blocks(&[0, 1], None, &out, &plain, &mut ()).unwrap();
    assert!(checkpoint.save_blocks(&[0, 1], None, &out, &plain, &mut ()).is_err(), "it exists");

    // A weight that is not finite is refused where it is copied; saving the decoder would refuse it anywhere.
    let broken = support::changed_fixture("llama", |_| {});
    let weights = broken.path().join("model.safetensors");
    let mut tensors = foldgpt::candle::safetensors::load(&weights, &Device::Cpu).unwrap();
    let name = "model.layers.2.mlp.up_proj.weight";
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let tensor = Tensor::full(value, (80, 48), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            tensors.insert(name.into(), tensor);
            foldgpt::candle::safetensors::save(&tensors, &weights).unwrap();
            let checkpoint = Checkpoint::open(broken.path()).unwrap();
            let elsewhere = scratch.path().join("broken");
            let error = checkpoint.save_blocks(&[0, 2], None, &elsewhere, &plain, &mut ()).unwrap_err();
            assert!(matches!(&error, Error::Tensor { tensor, .. } if tensor == name), "{dtype:?}: {error}");
            assert!(!elsewhere.exists());
            checkpoint.save_blocks(&[0, 1], None, &elsewhere, &plain, &mut ()).unwrap();
            std::fs::remove_dir_all(&elsewhere).unwrap();
        }
    }

    // A source that is cut off while it is copied.
    let copy = support::changed_fixture("llama", |_| {});
    let damaged = Checkpoint::open(copy.path()).unwrap();
    let weights = copy.path().join("model.safetensors");
    let length = std::fs::metadata(&weights).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&weights).unwrap().set_len(length / 2).unwrap();
    let elsewhere = scratch.path().join("elsewhere");
    let result = damaged.save_blocks(&[0, 1, 2, 3], None, &elsewhere, &plain, &mut ());
    assert!(matches!(result, Err(Error::Io { .. })));
    assert!(!elsewhere.exists());
}
