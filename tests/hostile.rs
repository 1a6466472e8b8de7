//! Files that are truncated, contradictory or made to harm: a clear error, never a crash.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::Path;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::{Bos, Checkpoint, Generate, Windows};
use proptest::prelude::*;
use serde_json::{Value, json};
use support::{FAMILIES, changed_fixture, fixture, load, open};

fn refusal(directory: &Path) -> String {
    match Checkpoint::open(directory) {
        Ok(_) => panic!("{} was accepted", directory.display()),
        Err(error) => error.to_string(),
    }
}

fn refused_config(family: &str, field: &str, value: Value) -> String {
    refusal(changed_fixture(family, |config| config[field] = value).path())
}

#[test]
fn a_field_that_is_not_supported_is_named() {
    let cases = [
        ("llama", "model_type", json!("mamba"), "`model_type`: `mamba`"),
        ("llama", "hidden_act", json!("xielu"), "`hidden_act`"),
        (
            "llama",
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 2.0}),
            "`rope_scaling.rope_type`: `yarn`",
        ),
        ("phi3", "rope_scaling", json!({"type": "longrope"}), "longrope"),
        ("llama", "rope_scaling", json!({"rope_type": "linear"}), "`rope_scaling.factor`: missing"),
        (
            "llama",
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                "original_max_position_embeddings": 32}),
            "low_freq_factor",
        ),
        ("llama", "quantization_config", json!({"quant_method": "gptq"}), "gptq"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", json!(true), "scale_attn_by_inverse_layer_idx"),
        ("gemma3", "use_bidirectional_attention", json!(true), "use_bidirectional_attention"),
        (
            "qwen3",
            "layer_types",
            json!(["full_attention", "full_attention", "full_attention"]),
            "layer_types",
        ),
        ("gemma2", "layer_types", json!(["full_attention", "chunked", "a", "b"]), "layer_types[1]"),
        ("phi3", "partial_rotary_factor", json!(0.3), "partial_rotary_factor"),
    ];
    for (family, field, value, expected) in cases {
        let error = refused_config(family, field, value);
        assert!(error.contains(expected) && error.contains("config.json"), "{family} {field}: {error}");
    }
}

#[test]
fn a_config_that_contradicts_its_tensors_names_file_tensor_found_and_expected() {
    let error = refused_config("llama", "intermediate_size", json!(96));
    for part in ["model.safetensors", "model.layers.0.mlp.gate_proj.weight", "[80, 48]", "[96, 48]"] {
        assert!(error.contains(part), "{error}");
    }
    let error = refused_config("llama", "num_hidden_layers", json!(5));
    assert!(error.contains("model.layers.4.") && error.contains("missing"), "{error}");
    let error = refused_config("llama", "num_hidden_layers", json!(3));
    assert!(error.contains("model.layers.3.") && error.contains("not expected"), "{error}");
    let error = refused_config("qwen2", "tie_word_embeddings", json!(false));
    assert!(error.contains("lm_head.weight"), "{error}");
}

#[test]
fn sizes_that_no_model_has_are_refused_before_anything_is_allocated() {
    // Numbers that are no sizes, or that nothing is computed from.
    const UNCHECKED: [&str; 4] =
        ["original_max_position_embeddings", "pretraining_tp", "max_window_layers", "query_pre_attn_scalar"];
    for family in FAMILIES {
        let config: Value =
            serde_json::from_str(&std::fs::read_to_string(fixture(family).join("config.json")).unwrap())
                .unwrap();
        for (field, old) in config.as_object().unwrap() {
            if !old.is_u64() || field.ends_with("token_id") || UNCHECKED.contains(&field.as_str()) {
                continue;
            }
            for value in [json!(u64::MAX), json!(-1), json!("many"), json!(1.5), json!(1u64 << 40)] {
                let source = changed_fixture(family, |config| config[field] = value.clone());
                assert!(Checkpoint::open(source.path()).is_err(), "{family} {field} {value}");
            }
        }
    }
}

#[test]
fn a_truncated_file_is_refused_at_every_length() {
    let whole = std::fs::read(fixture("llama").join("model.safetensors")).unwrap();
    let source = changed_fixture("llama", |_| {});
    let path = source.path().join("model.safetensors");
    for len in (0..whole.len()).step_by(whole.len() / 97).chain([1, 7, 8, 9, whole.len() - 1]) {
        std::fs::write(&path, &whole[..len]).unwrap();
        assert!(refusal(source.path()).contains("model.safetensors"));
    }
    let longer = [whole.as_slice(), b"more"].concat();
    std::fs::write(&path, longer).unwrap();
    assert!(refusal(source.path()).contains("model.safetensors"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_header_bytes_never_crash(changes in prop::collection::vec((0usize..4000, any::<u8>()), 1..12)) {
        let mut bytes = std::fs::read(fixture("llama").join("model.safetensors")).unwrap();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        let source = changed_fixture("llama", |_| {});
        std::fs::write(source.path().join("model.safetensors"), bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(source.path()) {
            let _ = checkpoint.decoder(DType::F32, &Device::Cpu);
        }
    }
}

#[test]
fn an_index_cannot_lead_out_of_its_directory() {
    let source = changed_fixture("llama", |_| {});
    std::fs::remove_file(source.path().join("model.safetensors")).unwrap();
    let index = source.path().join("model.safetensors.index.json");
    for file in ["../model.safetensors", "/etc/passwd", "..", ""] {
        std::fs::write(&index, json!({"weight_map": {"lm_head.weight": file}}).to_string()).unwrap();
        assert!(refusal(source.path()).contains("expected a file name"), "{file}");
    }
    std::fs::write(&index, json!({"weight_map": {"lm_head.weight": "absent.safetensors"}}).to_string())
        .unwrap();
    assert!(refusal(source.path()).contains("absent.safetensors"));
    std::fs::write(&index, "{").unwrap();
    assert!(refusal(source.path()).contains("index.json"));
}

#[test]
fn weights_that_are_not_finite_are_named() {
    for bad in [f32::NAN, f32::INFINITY] {
        let source = changed_fixture("llama", |_| {});
        let path = source.path().join("model.safetensors");
        let mut tensors = foldgpt::candle::safetensors::load(&path, &Device::Cpu).unwrap();
        let name = "model.layers.2.mlp.up_proj.weight";
        let mut values = tensors[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values[17] = bad;
        tensors.insert(name.into(), Tensor::from_vec(values, (80, 48), &Device::Cpu).unwrap());
        foldgpt::candle::safetensors::save(&tensors, &path).unwrap();
        let checkpoint = Checkpoint::open(source.path()).unwrap();
        let error = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("NaN or infinite"), "{error}");
    }
}

#[test]
fn places_without_a_model_say_what_is_missing() {
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path()).contains("config.json"));
    assert!(refusal(Path::new("/nowhere/at all")).contains("does not exist"));
    let file = empty.path().join("model.gguf");
    std::fs::write(&file, b"not a gguf file").unwrap();
    assert!(refusal(&file).contains("model.gguf"));
    let error = open("llama").tokenizer().unwrap_err().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("missing"), "{error}");
}

#[test]
fn unusable_input_is_refused() {
    let decoder = load("llama");
    assert!(Windows::from_ids(vec![]).is_err());
    assert!(Windows::from_ids(vec![vec![1]]).is_err());
    assert!(
        Windows::from_ids(vec![vec![1, 2], vec![1]])
            .unwrap_err()
            .to_string()
            .contains("window 1 has 1 tokens")
    );
    let outside = Windows::from_ids(vec![vec![1, 96, 2]]).unwrap();
    let error = foldgpt::perplexity(&decoder, &outside, &mut ()).unwrap_err().to_string();
    assert!(error.contains("96") && error.contains("vocabulary"), "{error}");
    let ids = Tensor::new(&[[1u32, 2000]], &Device::Cpu).unwrap();
    assert!(decoder.forward(&ids).is_err());
    assert!(decoder.forward_skipping(&ids.narrow(1, 0, 1).unwrap(), &[4]).is_err());
    let long = Tensor::zeros((1, 65), DType::U32, &Device::Cpu).unwrap();
    assert!(load("gpt2").forward(&long).unwrap_err().to_string().contains("at most 64 positions"));
}

#[test]
fn text_and_sampling_options_are_checked() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-stories");
    let checkpoint = Checkpoint::open(tiny).unwrap();
    let (tokenizer, decoder) =
        (checkpoint.tokenizer().unwrap(), checkpoint.decoder(DType::F32, &Device::Cpu).unwrap());
    for text in ["", " \n "] {
        assert!(
            Windows::from_text(&tokenizer, text, 64, None, Bos::Auto)
                .unwrap_err()
                .to_string()
                .contains("empty")
        );
    }
    let error = Windows::from_text(&tokenizer, "too short", 64, None, Bos::Auto).unwrap_err().to_string();
    assert!(error.contains("too few") && error.contains("64"), "{error}");
    assert!(Windows::from_text(&tokenizer, "text", 1, None, Bos::Auto).is_err());
    let options = [
        Generate { temperature: f64::NAN, ..Generate::default() },
        Generate { temperature: -1.0, ..Generate::default() },
        Generate { top_k: Some(0), ..Generate::default() },
        Generate { top_p: Some(0.0), ..Generate::default() },
        Generate { top_p: Some(1.5), ..Generate::default() },
    ];
    for options in options {
        assert!(options.run(&decoder, &tokenizer, "One", |_| std::ops::ControlFlow::Continue(())).is_err());
    }
}
