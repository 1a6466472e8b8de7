//! Saving: what is written reads back as the same model, whole or not at all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::path::Path;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::{Checkpoint, Decoder, Error, Plan, SaveOptions, Scores, Target, Windows, fold};
use serde_json::{Value, json};
use support::{FAMILIES, changed_fixture, distance, input_ids, load, open};

fn save(checkpoint: &Checkpoint, decoder: &Decoder, directory: &Path) -> foldgpt::Result<foldgpt::Saved> {
    checkpoint.save(decoder, None, directory, &SaveOptions::default(), &mut ())
}

fn reload(directory: &Path) -> Decoder {
    Checkpoint::open(directory).unwrap().decoder(DType::F32, &Device::Cpu).unwrap()
}

fn config(directory: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(directory.join("config.json")).unwrap()).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn every_family_dense_and_cut_reloads_with_the_same_logits() {
    for family in FAMILIES {
        for kept in [&[0, 1, 2, 3][..], &[0, 2, 3], &[1, 3], &[2], &[0, 1]] {
            let scratch = tempfile::tempdir().unwrap();
            let directory = scratch.path().join("cut");
            let cut = load(family).with_blocks(kept).unwrap();
            save(&open(family), &cut, &directory).unwrap();
            let reloaded = reload(&directory);
            assert_eq!(reloaded.architecture(), cut.architecture(), "{family} {kept:?}");
            let ids = input_ids(family);
            assert_eq!(
                bits(&reloaded.forward(&ids).unwrap()),
                bits(&cut.forward(&ids).unwrap()),
                "{family} {kept:?}"
            );
            let field = if family == "gpt2" { "n_layer" } else { "num_hidden_layers" };
            assert_eq!(config(&directory)[field], kept.len(), "{family}");
        }
    }
}

#[test]
fn a_kept_block_keeps_its_own_attention() {
    // Blocks 0 and 2 of gemma2 slide, 1 and 3 do not; block 2 of gemma3 is the one that does not.
    for (family, kept, expected) in [
        ("gemma2", vec![1, 2], vec!["full_attention", "sliding_attention"]),
        ("gemma2", vec![0, 2], vec!["sliding_attention", "sliding_attention"]),
        ("gemma3", vec![2, 3], vec!["full_attention", "sliding_attention"]),
    ] {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("cut");
        save(&open(family), &load(family).with_blocks(&kept).unwrap(), &directory).unwrap();
        assert_eq!(config(&directory)["layer_types"], json!(expected), "{family}");
    }
}

#[test]
fn attention_kinds_survive_where_the_config_only_has_a_pattern() {
    let source = changed_fixture("gemma2", |config| {
        config.as_object_mut().unwrap().remove("layer_types");
    });
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let cut = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap().with_blocks(&[1, 2, 3]).unwrap();
    let directory = source.path().join("cut");
    save(&checkpoint, &cut, &directory).unwrap();
    let expected = json!(["full_attention", "sliding_attention", "full_attention"]);
    assert_eq!(config(&directory)["layer_types"], expected);
}

#[test]
fn per_block_fields_are_cut_with_the_blocks() {
    let source = changed_fixture("qwen2", |config| {
        config["use_sliding_window"] = json!(true);
        config["sliding_window"] = json!(8);
        config["max_window_layers"] = json!(2);
        config["no_rope_layers"] = json!([1, 1, 1, 0]);
        config["eos_token_id"] = json!([1, 2, 3, 4]);
        config["suppress_tokens"] = json!([5, 6, 7, 8]);
        config.as_object_mut().unwrap().remove("layer_types");
    });
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let cut = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap().with_blocks(&[1, 2, 3]).unwrap();
    let directory = source.path().join("cut");
    save(&checkpoint, &cut, &directory).unwrap();
    let written = config(&directory);
    assert_eq!(written["max_window_layers"], 1);
    assert_eq!(written["no_rope_layers"], json!([1, 1, 0]));
    assert_eq!(written["layer_types"], json!(["full_attention", "sliding_attention", "sliding_attention"]));
    assert_eq!(written["eos_token_id"], json!([1, 2, 3, 4]), "not about blocks");
    assert_eq!(written["suppress_tokens"], json!([5, 6, 7, 8]), "not about blocks");
    let ids = input_ids("qwen2");
    assert_eq!(bits(&reload(&directory).forward(&ids).unwrap()), bits(&cut.forward(&ids).unwrap()));
}

#[test]
fn shards_and_index_read_back() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("sharded");
    let (checkpoint, decoder) = (open("llama"), load("llama"));
    let mut options = SaveOptions::default();
    options.max_shard_bytes = 40_000;
    let saved = checkpoint.save(&decoder, None, &directory, &options, &mut ()).unwrap();
    assert!(saved.weight_files.len() > 5);
    assert!(names(&directory).contains("model.safetensors.index.json"));
    for file in &saved.weight_files {
        assert!(std::fs::metadata(directory.join(file)).unwrap().len() < 45_000, "{file}");
    }
    let ids = input_ids("llama");
    assert_eq!(bits(&reload(&directory).forward(&ids).unwrap()), bits(&decoder.forward(&ids).unwrap()));
    // Cut again from the shards: types, names and blocks come from the right places.
    let again = Checkpoint::open(&directory).unwrap();
    let cut = reload(&directory).with_blocks(&[0, 3]).unwrap();
    save(&again, &cut, &scratch.path().join("again")).unwrap();
}

#[test]
fn stored_types_are_kept_and_can_be_changed() {
    let scratch = tempfile::tempdir().unwrap();
    for (dtype, bytes, name) in
        [(DType::BF16, 2, "bfloat16"), (DType::F16, 2, "float16"), (DType::F32, 4, "float32")]
    {
        let checkpoint = open("llama").stored_as(dtype);
        let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
        let directory = scratch.path().join(name);
        let saved = save(&checkpoint, &decoder, &directory).unwrap();
        assert_eq!(saved.tensor_bytes, (decoder.parameter_count() * bytes) as u64);
        assert_eq!(config(&directory)["dtype"], name);
        let ids = input_ids("llama");
        assert_eq!(bits(&reload(&directory).forward(&ids).unwrap()), bits(&decoder.forward(&ids).unwrap()));
        let cut = reload(&directory).with_blocks(&[1]).unwrap();
        let kept =
            save(&Checkpoint::open(&directory).unwrap(), &cut, &scratch.path().join(format!("{name}-cut")));
        assert_eq!(kept.unwrap().tensor_bytes, (cut.parameter_count() * bytes) as u64);
    }
}

#[test]
fn what_exists_is_never_touched() {
    let scratch = tempfile::tempdir().unwrap();
    let (checkpoint, decoder) = (open("llama"), load("llama"));
    let directory = scratch.path().join("taken");
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("thesis.txt"), "years of work").unwrap();
    let error = save(&checkpoint, &decoder, &directory).unwrap_err().to_string();
    assert!(error.contains("taken") && error.contains("not empty"), "{error}");
    assert_eq!(std::fs::read_to_string(directory.join("thesis.txt")).unwrap(), "years of work");
    assert_eq!(names(scratch.path()), BTreeSet::from(["taken".to_string()]));
    // An empty directory may be used.
    let empty = scratch.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    save(&checkpoint, &decoder, &empty).unwrap();
    assert_eq!(reload(&empty).depth(), 4);
}

#[test]
fn a_cancelled_save_leaves_nothing() {
    struct Stop;
    impl foldgpt::Observer for Stop {
        fn advanced(&mut self, _: &'static str, _: u64, _: u64) -> std::ops::ControlFlow<()> {
            std::ops::ControlFlow::Break(())
        }
    }
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("out");
    let (checkpoint, decoder) = (open("llama"), load("llama"));
    let result = checkpoint.save(&decoder, None, &directory, &SaveOptions::default(), &mut Stop);
    assert!(matches!(result, Err(Error::Cancelled { stage: "save" })));
    assert!(names(scratch.path()).is_empty());
}

#[test]
fn a_place_that_cannot_hold_a_directory_is_named_and_left_as_it_is() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("file");
    std::fs::write(&file, "not a directory").unwrap();
    for target in [file.clone(), file.join("out")] {
        let error = save(&open("llama"), &load("llama"), &target).unwrap_err().to_string();
        assert!(error.contains("file"), "{error}");
    }
    assert_eq!(names(scratch.path()), BTreeSet::from(["file".to_string()]));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "not a directory");
}

#[test]
fn a_decoder_of_another_checkpoint_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    assert!(save(&open("llama"), &load("gpt2"), &scratch.path().join("out")).is_err());
    assert!(names(scratch.path()).is_empty());
}

#[test]
fn the_plan_is_written_and_read() {
    let (checkpoint, decoder) = (open("qwen3"), load("qwen3"));
    let windows = Windows::from_ids(vec![vec![1, 2, 3]]).unwrap();
    let scores = Scores::new("test", &windows, vec![0.4, 0.1, 0.3, 0.2]).unwrap();
    let plan = Plan::new(decoder.architecture(), &scores, Target::Rate(0.5), &[3]).unwrap();
    let plan = plan.for_model(checkpoint.sha256(&mut ()).unwrap());
    assert_eq!((plan.removed(), plan.kept()), (&[1, 2][..], vec![0, 3]));
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("out");
    let folded = fold(&decoder, &plan).unwrap();
    let lie = |plan: &Plan| {
        checkpoint
            .save(&folded, Some(plan), &directory, &SaveOptions::default(), &mut ())
            .unwrap_err()
            .to_string()
    };
    assert!(lie(&plan.clone().for_model("0000")).contains("0000"));
    let other = Plan::new(decoder.architecture(), &scores, Target::Blocks(1), &[]).unwrap();
    assert!(lie(&other).contains("keeps blocks [0, 2, 3], the decoder has [0, 3]"));
    assert!(names(scratch.path()).is_empty());
    checkpoint.save(&folded, Some(&plan), &directory, &SaveOptions::default(), &mut ()).unwrap();
    let read = Plan::from_json(&std::fs::read_to_string(directory.join("plan.json")).unwrap()).unwrap();
    assert_eq!(read, plan);
    assert!(fold(&load("llama"), &plan).is_err(), "a plan is for one model");
    let skipped = decoder.forward_skipping(&input_ids("qwen3"), plan.removed()).unwrap();
    assert!(distance(&reload(&directory).forward(&input_ids("qwen3")).unwrap(), &skipped) == 0.0);
}

#[test]
fn folding_copies_no_weight() {
    let decoder = load("llama");
    let folded = decoder.with_blocks(&[0, 2]).unwrap();
    for (kept, original) in folded.blocks().iter().zip([0, 2]) {
        assert!(std::sync::Arc::ptr_eq(&kept.weights, &decoder.blocks()[original].weights));
    }
}

#[test]
fn a_block_that_lost_a_half_is_saved_as_an_exact_equivalent() {
    use foldgpt::model::{Part, Unit};
    for family in FAMILIES {
        let units =
            [Unit { block: 0, part: Part::Mlp }, Unit::whole(2), Unit { block: 3, part: Part::Attention }];
        let cut = load(family).without(&units).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("out");
        save(&open(family), &cut, &directory).unwrap();
        let reloaded = reload(&directory);
        assert_eq!((cut.depth(), reloaded.depth()), (3, 3), "{family}");
        let ids = input_ids(family);
        let (found, expected) = (reloaded.forward(&ids).unwrap(), cut.forward(&ids).unwrap());
        assert!(distance(&found, &expected) < 1e-6, "{family}");
    }
}

#[test]
fn values_that_a_type_cannot_hold_are_refused() {
    let source = changed_fixture("llama", |_| {});
    let path = source.path().join("model.safetensors");
    let mut tensors = foldgpt::candle::safetensors::load(&path, &Device::Cpu).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    let large = Tensor::full(1e6f32, tensors[name].shape(), &Device::Cpu).unwrap();
    tensors.insert(name.into(), large);
    foldgpt::candle::safetensors::save(&tensors, &path).unwrap();
    let open = || Checkpoint::open(source.path()).unwrap();
    assert!(open().decoder(DType::BF16, &Device::Cpu).is_ok());
    for result in [
        open().decoder(DType::F16, &Device::Cpu),
        open().stored_as(DType::F16).decoder(DType::F32, &Device::Cpu),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("F16"), "{error}");
    }
    for result in [
        open().decoder(DType::U8, &Device::Cpu),
        open().stored_as(DType::I64).decoder(DType::F32, &Device::Cpu),
    ] {
        assert!(result.unwrap_err().to_string().contains("dtype"));
    }
}

#[test]
fn a_leftover_of_a_crash_does_not_stand_in_the_way() {
    let scratch = tempfile::tempdir().unwrap();
    let leftover = scratch.path().join(format!(".out.{}-0.partial", std::process::id()));
    std::fs::create_dir(&leftover).unwrap();
    save(&open("llama"), &load("llama"), &scratch.path().join("out")).unwrap();
    assert_eq!(reload(&scratch.path().join("out")).depth(), 4);
    assert!(leftover.exists(), "what others may be writing is not touched");
}
