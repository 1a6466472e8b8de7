//! Folded models on disk, compact and expanded: what is written reads back as the same model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::Path;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::model::{Architecture, BlockParam, Param, Part, Projection, Unit};
use foldgpt::plan::{Budget, Donor, Groups, Ranks, ResidualStart, ScaleStart};
use foldgpt::{Account, Bos, Checkpoint, Decoder, Format, Held, Plan, SaveOptions, Windows, fold, fold_on};
use serde_json::{Value, json};
use support::{FAMILIES, changed_fixture, distance, folded, input_ids, kinds, load, open, windows};

fn save(
    checkpoint: &Checkpoint,
    decoder: &Decoder,
    plan: Option<&Plan>,
    format: Format,
    directory: &Path,
) -> foldgpt::Result<foldgpt::Saved> {
    checkpoint.save(decoder, plan, directory, &SaveOptions::from(format), &mut ())
}

fn reload(directory: &Path) -> Decoder {
    Checkpoint::open(directory).unwrap().decoder(DType::F32, &Device::Cpu).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn every_kind_of_group_reads_back_bit_for_bit_and_no_larger_than_it_is() {
    for family in FAMILIES {
        for (name, plan) in kinds(family) {
            let scratch = tempfile::tempdir().unwrap();
            let directory = scratch.path().join("compact");
            let decoder = folded(family, &plan);
            let saved = save(&open(family), &decoder, Some(&plan), Format::Compact, &directory).unwrap();
            assert_eq!(saved.tensor_bytes, 4 * decoder.parameter_count() as u64, "{family} {name}");
            assert_eq!(saved.weight_files, ["foldgpt.safetensors"]);
            let file = directory.join("foldgpt.safetensors");
            assert_eq!(saved.file_bytes, std::fs::metadata(&file).unwrap().len());
            let tensors = foldgpt::candle::safetensors::load(&file, &Device::Cpu).unwrap().len() as u64;
            let header = saved.file_bytes - saved.tensor_bytes;
            assert!(header <= 160 * tensors, "{family} {name}: {header} bytes of header, {tensors} tensors");
            let reloaded = reload(&directory);
            assert_eq!(reloaded.architecture(), decoder.architecture(), "{family} {name}");
            let ids = input_ids(family);
            assert_eq!(
                bits(&reloaded.forward(&ids).unwrap()),
                bits(&decoder.forward(&ids).unwrap()),
                "{family} {name}"
            );
            // Again from the compact checkpoint, as it is and cut.
            let checkpoint = Checkpoint::open(&directory).unwrap();
            let again = scratch.path().join("again");
            let once_more = save(&checkpoint, &reloaded, None, Format::Compact, &again).unwrap();
            assert_eq!(once_more.tensor_bytes, saved.tensor_bytes);
            let cut = reloaded.with_blocks(&[1]).unwrap();
            let cut_directory = scratch.path().join("cut");
            save(&checkpoint, &cut, None, Format::Compact, &cut_directory).unwrap();
            assert_eq!(
                bits(&reload(&cut_directory).forward(&ids).unwrap()),
                bits(&cut.forward(&ids).unwrap()),
                "{family} {name}"
            );
        }
    }
}

#[test]
fn the_expanded_format_is_a_standard_one_with_the_same_logits() {
    for family in FAMILIES {
        for (name, plan) in kinds(family) {
            let scratch = tempfile::tempdir().unwrap();
            let directory = scratch.path().join("expanded");
            let decoder = folded(family, &plan);
            let saved = save(&open(family), &decoder, Some(&plan), Format::Expanded, &directory).unwrap();
            assert_eq!(saved.weight_files, ["model.safetensors"]);
            let config: Value =
                serde_json::from_str(&std::fs::read_to_string(directory.join("config.json")).unwrap())
                    .unwrap();
            assert_eq!(config.get("foldgpt"), None);
            let reloaded = reload(&directory);
            assert_eq!(reloaded.architecture(), &decoder.architecture().expanded());
            let ids = input_ids(family);
            let off = distance(&reloaded.forward(&ids).unwrap(), &decoder.forward(&ids).unwrap());
            assert!(off < 1e-5, "{family} {name}: off by {off}");
        }
    }
}

#[test]
fn a_block_that_lost_a_half_takes_no_room_in_the_compact_format() {
    for family in FAMILIES {
        let units = [Unit { block: 0, part: Part::Mlp }, Unit { block: 3, part: Part::Attention }];
        let decoder = load(family).without(&units).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("out");
        let saved = save(&open(family), &decoder, None, Format::Compact, &directory).unwrap();
        assert_eq!(saved.tensor_bytes, 4 * decoder.parameter_count() as u64, "{family}");
        let ids = input_ids(family);
        let expected = decoder.forward(&ids).unwrap();
        assert_eq!(bits(&reload(&directory).forward(&ids).unwrap()), bits(&expected), "{family}");
        // From there to what other readers know: what was lost is written as zeros.
        let expanded = scratch.path().join("expanded");
        let checkpoint = Checkpoint::open(&directory).unwrap();
        save(&checkpoint, &reload(&directory), None, Format::Expanded, &expanded).unwrap();
        let whole = reload(&expanded);
        assert!(whole.architecture().fold.is_plain(), "{family}");
        assert!(distance(&whole.forward(&ids).unwrap(), &expected) < 1e-6, "{family}");
    }
}

/// The embedded model, stored in bf16, tied in pairs with everything that a pair can have.
fn stories() -> (Checkpoint, Decoder, Plan, Windows) {
    let checkpoint =
        Checkpoint::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-stories")).unwrap();
    let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    let text = "Anna lost her red kite near the old bridge. Ben found it. ".repeat(60);
    let windows =
        Windows::from_text(&checkpoint.tokenizer().unwrap(), &text, 128, Some(3), Bos::Auto).unwrap();
    let plan = Plan::builder()
        .share(Groups::of(2))
        .donor(Donor::Mean)
        .scales(ScaleStart::LeastSquares)
        .residual(Ranks::Uniform(4), ResidualStart::Whitened)
        .for_model(checkpoint.sha256(&mut ()).unwrap())
        .build(decoder.architecture())
        .unwrap();
    (checkpoint, decoder, plan, windows)
}

#[test]
fn a_file_is_as_large_as_its_parameters_and_so_is_memory() {
    let (checkpoint, decoder, plan, windows) = stories();
    let folded = fold_on(&decoder, &plan, &windows, &mut ()).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("compact");
    let saved = save(&checkpoint, &folded, Some(&plan), Format::Compact, &directory).unwrap();
    let unique = 2 * folded.parameter_count() as u64;
    assert_eq!(saved.tensor_bytes, unique);
    // Names take room too: much beside the smallest of tensors, nothing beside those of a real model.
    let tensors = Checkpoint::open(&directory).unwrap().architecture().params().len() as u64;
    assert!(
        saved.file_bytes <= unique + 160 * tensors,
        "{} for {unique}, {tensors} tensors",
        saved.file_bytes
    );
    let pairs = Plan::builder().share(Groups::of(2)).build(decoder.architecture()).unwrap();
    let pairs = fold(&decoder, &pairs).unwrap();
    let plain = scratch.path().join("plain");
    let saved = save(&checkpoint, &pairs, None, Format::Compact, &plain).unwrap();
    let file = std::fs::metadata(plain.join("foldgpt.safetensors")).unwrap().len();
    assert_eq!(saved.file_bytes, file);
    assert!((file as f64) < 1.01 * 2.0 * pairs.parameter_count() as f64);
    // What was measured in memory is what was written, also for means, scales and residuals in bf16.
    let reloaded = reload(&directory);
    let ids = Tensor::from_vec((1..41u32).collect::<Vec<_>>(), (1, 40), &Device::Cpu).unwrap();
    assert_eq!(bits(&reloaded.forward(&ids).unwrap()), bits(&folded.forward(&ids).unwrap()));
    let narrow = Checkpoint::open(&directory).unwrap();
    let stored = narrow.tensor_bytes();
    let narrow = narrow.decoder(DType::BF16, &Device::Cpu).unwrap();
    let resident: usize =
        narrow.tensors().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum();
    assert!((resident as f64) < 1.05 * stored as f64, "{resident} of {stored}");
    assert!(Checkpoint::open(&directory).unwrap().tokenizer().is_ok());
}

/// A fixture that is stored in bf16 but for its embedding and one norm.
fn mixed(family: &str) -> (tempfile::TempDir, Checkpoint) {
    let source = changed_fixture(family, |_| {});
    let path = source.path().join("model.safetensors");
    let wide = ["embed_tokens", "wte", "layers.1.input_layernorm", "layers.1.post_attention", "h.1.ln_1"];
    let mut tensors = foldgpt::candle::safetensors::load(&path, &Device::Cpu).unwrap();
    for (name, tensor) in &mut tensors {
        if !wide.iter().any(|wide| name.contains(wide)) {
            *tensor = tensor.to_dtype(DType::BF16).unwrap();
        }
    }
    foldgpt::candle::safetensors::save(&tensors, &path).unwrap();
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    (source, checkpoint)
}

#[test]
fn bytes_are_foretold_where_tensors_differ_in_type() {
    for family in ["llama", "phi3", "gpt2", "gemma2", "olmo2"] {
        let (source, checkpoint) = mixed(family);
        let (dense, windows) = (checkpoint.decoder(DType::F32, &Device::Cpu).unwrap(), windows(family));
        let counted = |decoder: &Decoder| Account::counted(decoder, 1).unwrap().stored_bytes;
        assert_eq!(counted(&dense), checkpoint.tensor_bytes(), "{family}");
        let budget = Budget::Bytes(checkpoint.tensor_bytes() - 1);
        let tight = Plan::builder().share(Groups::until(budget)).donor(Donor::Mean);
        let tight = tight.measure(&dense, &windows, &mut ()).unwrap();
        let mut plans = kinds(family);
        plans.push(("budget of bytes", tight));
        for (name, plan) in plans {
            let folded = fold_on(&dense, &plan, &windows, &mut ()).unwrap();
            for format in [Format::Compact, Format::Expanded] {
                let out = source.path().join(format!("{name}, {format:?}"));
                let saved = save(&checkpoint, &folded, Some(&plan), format, &out).unwrap();
                let foretold = checkpoint.stored_bytes(&plan, format).unwrap();
                assert_eq!(foretold, saved.tensor_bytes, "{family} {name} {format:?}");
                assert_eq!(Checkpoint::open(&out).unwrap().tensor_bytes(), foretold);
            }
            let bytes = checkpoint.stored_bytes(&plan, Format::Compact).unwrap();
            let stored = checkpoint.stored_types().of_blocks(&plan.kept());
            let held = Held { stored, resident: DType::F32, context: 1 };
            assert_eq!(Account::planned(folded.architecture(), &held).stored_bytes, bytes, "{family} {name}");
            assert_eq!(counted(&folded), bytes, "{family} {name}");
            assert!(name != "budget of bytes" || bytes < checkpoint.tensor_bytes(), "{family}");
        }
        // What healing has moved is written in f32, and counted so.
        let healed = dense.map(|param, value| match param {
            Param::Block(0, BlockParam::Norm(..)) => Ok((value + 1e-4)?),
            _ => Ok(value.clone()),
        });
        let healed = healed.unwrap();
        let out = source.path().join("healed");
        let saved = save(&checkpoint, &healed, None, Format::Compact, &out).unwrap();
        assert_eq!(counted(&healed), saved.tensor_bytes, "{family}");
        assert!(saved.tensor_bytes > checkpoint.tensor_bytes(), "{family}");
    }
}

#[test]
fn merged_matrices_are_stored_as_precisely_as_they_compute_unless_told_otherwise() {
    let (checkpoint, decoder, plan, windows) = stories();
    let folded = fold_on(&decoder, &plan, &windows, &mut ()).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let ids = Tensor::from_vec((1..41u32).collect::<Vec<_>>(), (1, 40), &Device::Cpu).unwrap();
    let expected = folded.forward(&ids).unwrap();
    let dtype = |directory: &Path| -> Value {
        let text = std::fs::read_to_string(directory.join("config.json")).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["torch_dtype"].clone()
    };
    let wide = scratch.path().join("wide");
    save(&checkpoint, &folded, None, Format::Expanded, &wide).unwrap();
    assert!(distance(&reload(&wide).forward(&ids).unwrap(), &expected) < 1e-4);
    assert_eq!(dtype(&wide), "float32");
    let narrow = scratch.path().join("narrow");
    save(&checkpoint.stored_as(DType::BF16), &folded, None, Format::Expanded, &narrow).unwrap();
    assert!(distance(&reload(&narrow).forward(&ids).unwrap(), &expected) < 0.1);
    assert_eq!(dtype(&narrow), "bfloat16");
}

#[test]
fn a_plan_is_written_only_beside_what_it_makes() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("out");
    let plans = kinds("llama");
    let decoder = folded("llama", &plans[0].1);
    for (name, plan) in &plans[1..] {
        let result = save(&open("llama"), &decoder, Some(plan), Format::Compact, &directory);
        assert!(result.unwrap_err().to_string().starts_with("plan: "), "{name}");
    }
    assert!(!directory.exists());
}

/// The refusal of a compact fixture whose section was changed.
fn refused(change: impl FnOnce(&mut Value)) -> String {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("out");
    let decoder = load("llama");
    let plan = Plan::builder().share(Groups::of(2)).scales(ScaleStart::Ones);
    let plan = plan.residual(Ranks::Uniform(2), ResidualStart::Svd).build(decoder.architecture()).unwrap();
    let folded = fold(&decoder, &plan).unwrap();
    save(&open("llama"), &folded, None, Format::Compact, &directory).unwrap();
    let path = directory.join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config["foldgpt"]);
    std::fs::write(&path, config.to_string()).unwrap();
    match Checkpoint::open(&directory) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn newer_versions_and_contradictions_are_refused_by_name() {
    let error = refused(|section| section["version"] = json!(2));
    assert!(
        error.contains("foldgpt.version")
            && error.contains("2 is not known")
            && error.contains("config.json"),
        "{error}"
    );
    assert!(refused(|section| section["version"] = json!(0)).contains("foldgpt.version"));
    for value in [json!(-1), json!(1.0), json!(2.5), json!("1"), json!(null)] {
        let error = refused(|section| section["version"] = value.clone());
        assert!(error.contains(&format!("`foldgpt.version`: {value} is no version")), "{value}: {error}");
    }
    let missing = refused(|section| drop(section.as_object_mut().unwrap().remove("version")));
    assert!(missing.contains("`foldgpt.version`: missing"), "{missing}");
    let nameless = refused(|section| {
        section["blocks"][2].as_object_mut().unwrap().remove("weights");
    });
    assert!(nameless.contains("foldgpt.blocks") && nameless.contains("weights"), "{nameless}");
    assert!(refused(|section| *section = json!({})).contains("foldgpt.version"));
    assert!(refused(|section| *section = json!([])).contains("foldgpt"));
    let cases: [(&str, Value); 8] = [
        ("weights", json!(3)),
        ("weights", json!(99)),
        ("weights", json!(-1)),
        ("part", json!("mlp")),
        ("own_norms", json!(false)),
        ("novelty", json!(true)),
        ("adapters", json!({ "q_proj": { "rank": 1_000_000_000_000u64 } })),
        ("adapters", json!({ "z_proj": { "rank": 1 } })),
    ];
    for (field, value) in cases {
        let error = refused(|section| section["blocks"][2][field] = value.clone());
        assert!(error.contains("foldgpt.blocks"), "{field} {value}: {error}");
    }
    assert!(refused(|section| section["blocks"] = json!([])).contains("0 entries"));
    let adapted = |adapters: Value| refused(move |section| section["blocks"][1]["adapters"] = adapters);
    for (adapters, expected) in [
        (
            json!({ "q_proj": { "rank": 99 } }),
            "block 1 adapts q_proj by rank 99, expected a scale or a rank up to",
        ),
        (json!({ "q_proj": {} }), "block 1 adapts q_proj by rank 0, expected a scale or a rank up to"),
    ] {
        let error = adapted(adapters);
        assert!(error.contains(expected), "{error}");
    }
    // A tensor too few, a tensor too many.
    assert!(refused(|section| section["blocks"][3]["weights"] = json!(3)).contains("missing"));
    assert!(refused(|section| section["blocks"][3]["adapters"] = json!({})).contains("not expected"));
}

/// The shapes of SmolLM2-135M, from its `config.json`.
fn smollm2() -> Architecture {
    let mut arch = load("llama").architecture().clone();
    (arch.hidden_size, arch.intermediate_size, arch.vocab_size) = (576, 1536, 49_152);
    (arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim) = (9, 3, 64);
    (arch.blocks, arch.tied) = (vec![arch.blocks[0]; 30], true);
    assert_eq!(arch.parameter_count(), 134_515_008);
    arch
}

#[test]
fn headers_are_below_a_hundredth_of_a_real_model_whatever_its_blocks_keep() {
    let arch = smollm2();
    let pairs = || Plan::builder().share(Groups::of(2)).donor(Donor::Mean).scales(ScaleStart::LeastSquares);
    let adapted = |rank| pairs().residual(Ranks::Uniform(rank), ResidualStart::Whitened);
    for (name, builder) in [("scales", pairs()), ("rank 1", adapted(1)), ("rank 8", adapted(8))] {
        let folded = builder.build(&arch).unwrap().architecture(&arch).unwrap();
        let (tensors, bytes) = (folded.params().len(), 2 * folded.parameter_count());
        // What docs/format.md says that a tensor's entry takes at most, and other tests hold it to.
        let share = 160.0 * tensors as f64 / bytes as f64;
        assert!(share < 0.002, "{name}: {share} of {bytes} bytes for {tensors} tensors");
    }
}

#[test]
fn projections_named_in_a_section_are_those_of_the_adapters() {
    let map = serde_json::to_value(Projection::ALL).unwrap();
    assert_eq!(map, json!(Projection::ALL.map(Projection::name)));
}
