//! The `config.json` that Hugging Face's transformers would have beside the weights of a GGUF file.

use std::f64::consts::TAU;

use serde_json::{Map, Value, json};

use super::GgufFile;
use super::metadata::{FromValue, Metadata};
use super::names::Architecture;
use crate::error::{Error, Result};

/// Builds the config of the file's architecture.
pub(super) fn config(file: &GgufFile) -> Result<Value> {
    let source = Source { file, metadata: file.metadata(), architecture: file.architecture() };
    let mut config =
        if file.architecture() == Architecture::Gpt2 { gpt2(&source)? } else { rotary(&source)? };
    extend(&mut config, source.shared()?);
    Ok(Value::Object(config))
}

/// A file, and its metadata under the architecture's prefix.
struct Source<'a> {
    file: &'a GgufFile,
    metadata: Metadata<'a>,
    architecture: Architecture,
}

impl<'a> Source<'a> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.key())
    }

    fn get<T: FromValue<'a>>(&self, key: &str) -> Result<Option<T>> {
        self.metadata.get(&self.key(key))
    }

    fn require<T: FromValue<'a>>(&self, key: &str) -> Result<T> {
        self.metadata.require(&self.key(key))
    }

    /// A size, which must not be 0.
    fn size(&self, key: &str) -> Result<usize> {
        match self.require(key)? {
            0 => Err(Error::config(self.key(key), "is 0, expected at least 1")),
            size => Ok(size),
        }
    }

    /// Whether block 0 has that tensor.
    fn has(&self, part: &str) -> bool {
        self.file.stored_shape(&format!("blk.0.{part}")).is_some()
    }

    /// The rows of a tensor, `None` where there is no such tensor.
    fn rows(&self, stored: &str) -> Option<usize> {
        self.file.stored_shape(stored)?.first().copied()
    }

    /// The attention window, `None` where it is absent or 0, which says that there is none.
    fn window(&self) -> Result<Option<usize>> {
        Ok(self.get::<usize>("attention.sliding_window")?.filter(|&window| window > 0))
    }

    /// The fields that every architecture has under one name.
    fn shared(&self) -> Result<Value> {
        let vocabulary = self
            .rows("token_embd.weight")
            .ok_or_else(|| Error::tensor(self.file.path(), "token_embd.weight", "missing"))?;
        let token = |key: &str| self.metadata.get::<usize>(&format!("tokenizer.ggml.{key}"));
        Ok(json!({
            "vocab_size": vocabulary,
            "tie_word_embeddings": self.file.stored_shape("output.weight").is_none(),
            "bos_token_id": token("bos_token_id")?,
            "eos_token_id": token("eos_token_id")?,
            "pad_token_id": token("padding_token_id")?,
            "torch_dtype": "bfloat16",
            "use_cache": true,
        }))
    }
}

/// GPT-2's own fields.
fn gpt2(source: &Source<'_>) -> Result<Map<String, Value>> {
    Ok(object(json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": source.size("embedding_length")?,
        "n_layer": source.size("block_count")?,
        "n_head": source.size("attention.head_count")?,
        "n_positions": source.size("context_length")?,
        "n_inner": source.get::<usize>("feed_forward_length")?,
        "layer_norm_epsilon": source.require::<f64>("attention.layer_norm_epsilon")?,
        "activation_function": "gelu_new",
        "scale_attn_weights": true,
        "scale_attn_by_inverse_layer_idx": false,
    })))
}

/// The fields of every architecture with rotary positions, and then the family's own.
fn rotary(source: &Source<'_>) -> Result<Map<String, Value>> {
    let hidden = source.size("embedding_length")?;
    let heads = source.size("attention.head_count")?;
    let head_dim = match source.get("attention.key_length")? {
        Some(length) => length,
        None => source.rows("blk.0.attn_q.weight").unwrap_or(hidden) / heads,
    };
    let theta = source.get("rope.freq_base")?.unwrap_or(10_000.0);
    let mut config = object(json!({
        "hidden_size": hidden,
        "intermediate_size": source.size("feed_forward_length")?,
        "num_hidden_layers": source.size("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": source.get::<usize>("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": source.size("context_length")?,
        "rms_norm_eps": source.require::<f64>("attention.layer_norm_rms_epsilon")?,
        "rope_theta": theta,
        "rope_scaling": rope_scaling(source, head_dim, theta)?,
        "attention_dropout": 0.0,
    }));
    if let Some(rotated) = source.get::<usize>("rope.dimension_count")?
        && rotated != head_dim
        && source.architecture != Architecture::Phi3
    {
        let reason = format!("is {rotated}, expected the head's {head_dim} dimensions");
        return Err(Error::config(source.key("rope.dimension_count"), reason));
    }
    let family = match source.architecture {
        Architecture::Llama => llama(source)?,
        Architecture::Qwen2 | Architecture::Qwen3 => qwen(source)?,
        Architecture::Gemma | Architecture::Gemma2 | Architecture::Gemma3 => gemma(source, head_dim)?,
        Architecture::Phi3 => phi3(source, head_dim)?,
        Architecture::Olmo2 => named("Olmo2ForCausalLM", "olmo2", json!({ "attention_bias": false })),
        // Has no rotary positions; `config` does not come here with it.
        Architecture::Gpt2 => Value::Null,
    };
    extend(&mut config, family);
    Ok(config)
}

/// Llama's fields, or Mistral's where there is an attention window, which Llama does not know.
fn llama(source: &Source<'_>) -> Result<Value> {
    if let Some(window) = source.window()? {
        return Ok(named("MistralForCausalLM", "mistral", json!({ "sliding_window": window })));
    }
    let bias = source.has("attn_q.bias");
    if bias != source.has("attn_output.bias") {
        let reason = "only some of the projections have one, expected all of q, k, v and o or none";
        return Err(Error::config("attention_bias", reason));
    }
    let own = json!({ "attention_bias": bias, "mlp_bias": source.has("ffn_up.bias") });
    Ok(named("LlamaForCausalLM", "llama", own))
}

/// Qwen 2's and Qwen 3's fields.
fn qwen(source: &Source<'_>) -> Result<Value> {
    let own = json!({
        "use_sliding_window": false,
        "sliding_window": null,
        "layer_types": layer_types(source, |_| false)?,
    });
    Ok(if source.architecture == Architecture::Qwen2 {
        named("Qwen2ForCausalLM", "qwen2", own)
    } else {
        let mut own = object(own);
        own.insert("attention_bias".to_owned(), source.has("attn_q.bias").into());
        named("Qwen3ForCausalLM", "qwen3", Value::Object(own))
    })
}

/// The fields of the three Gemmas.
fn gemma(source: &Source<'_>, head_dim: usize) -> Result<Value> {
    let mut own = object(json!({
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": false,
    }));
    if source.architecture == Architecture::Gemma {
        return Ok(named("GemmaForCausalLM", "gemma", Value::Object(own)));
    }
    // GGUF has no field for it: like llama.cpp, know the two 27B models, which scale by their mean head
    // width, by their depth.
    let depth = source.size("block_count")?;
    let largest = if source.architecture == Architecture::Gemma2 { 46 } else { 62 };
    let scalar = if depth == largest {
        source.size("embedding_length")? / source.size("attention.head_count")?
    } else {
        head_dim
    };
    extend(
        &mut own,
        json!({
            "query_pre_attn_scalar": scalar,
            "sliding_window": source.size("attention.sliding_window")?,
            "attn_logit_softcapping": source.get::<f64>("attn_logit_softcapping")?,
            "final_logit_softcapping": source.get::<f64>("final_logit_softcapping")?,
        }),
    );
    if source.architecture == Architecture::Gemma2 {
        let types = layer_types(source, |block| block.is_multiple_of(2))?;
        own.insert("layer_types".to_owned(), types);
        return Ok(named("Gemma2ForCausalLM", "gemma2", Value::Object(own)));
    }
    let local = source.get("rope.freq_base_swa")?.unwrap_or(10_000.0);
    own.insert("rope_local_base_freq".to_owned(), json!(local));
    own.insert("layer_types".to_owned(), gemma3_layer_types(source)?);
    Ok(named("Gemma3ForCausalLM", "gemma3_text", Value::Object(own)))
}

/// Gemma 3's kinds of attention: a flag or a period from the metadata, and otherwise every sixth block full.
fn gemma3_layer_types(source: &Source<'_>) -> Result<Value> {
    const KEY: &str = "attention.sliding_window_pattern";
    if let Ok(Some(flags)) = source.get::<Vec<bool>>(KEY) {
        let depth = source.size("block_count")?;
        if flags.len() != depth {
            let reason = format!("has {} elements, expected one for each of {depth} blocks", flags.len());
            return Err(Error::config(source.key(KEY), reason));
        }
        return layer_types(source, |block| flags.get(block).copied().unwrap_or_default());
    }
    let period = if source.get::<usize>(KEY)?.is_some() { source.size(KEY)? } else { 6 };
    layer_types(source, |block| !(block + 1).is_multiple_of(period))
}

/// Phi-3's fields.
fn phi3(source: &Source<'_>, head_dim: usize) -> Result<Value> {
    let rotated = source.get("rope.dimension_count")?.unwrap_or(head_dim);
    let context = source.size("context_length")?;
    let trained = source.get("rope.scaling.original_context_length")?.unwrap_or(context);
    let own = json!({
        "attention_bias": false,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "partial_rotary_factor": rotated as f64 / head_dim.max(1) as f64,
        "original_max_position_embeddings": trained,
        "sliding_window": source.window()?,
    });
    Ok(named("Phi3ForCausalLM", "phi3", own))
}

/// What `rope_scaling` says: Llama 3's or Phi-3's tables where the file has them, and otherwise its metadata.
fn rope_scaling(source: &Source<'_>, head_dim: usize, theta: f64) -> Result<Value> {
    const LONG: &str = "rope_factors_long.weight";
    const SHORT: &str = "rope_factors_short.weight";
    let rotated = source.get("rope.dimension_count")?.unwrap_or(head_dim);
    if let Some(factors) = rope_table(source, "rope_freqs.weight", head_dim / 2)? {
        return llama3_scaling(source, &factors, theta);
    }
    match (rope_table(source, LONG, rotated / 2)?, rope_table(source, SHORT, rotated / 2)?) {
        (Some(long), Some(short)) => {
            return Ok(json!({ "type": "longrope", "long_factor": long, "short_factor": short }));
        }
        (None, None) => {}
        (long, _) => {
            let (there, missing) = if long.is_some() { (LONG, SHORT) } else { (SHORT, LONG) };
            let reason = format!("missing, expected beside `{there}`");
            return Err(Error::tensor(source.file.path(), missing, reason));
        }
    }
    let factor = match source.get::<f64>("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => source.get("rope.scale_linear")?,
    };
    let trained = source.get::<usize>("rope.scaling.original_context_length")?;
    match (source.get("rope.scaling.type")?, factor) {
        (Some("none"), _) | (None, None) => Ok(Value::Null),
        (Some("linear") | None, Some(factor)) => Ok(json!({ "rope_type": "linear", "factor": factor })),
        (Some("yarn"), Some(factor)) => Ok(json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained,
        })),
        (Some(kind), factor) => {
            let reason = format!("`{kind}` with factor {factor:?}, expected linear or yarn with a factor");
            Err(Error::config(source.key("rope.scaling.type"), reason))
        }
    }
}

/// One of `RoPE`'s tables, `None` where there is none; its shape is checked before its numbers are read.
fn rope_table(source: &Source<'_>, stored: &str, length: usize) -> Result<Option<Vec<f32>>> {
    match source.file.stored_shape(stored) {
        Some(shape) if shape != [length] => {
            let reason = format!("shape {shape:?}, expected [{length}], one for each pair of dimensions");
            Err(Error::tensor(source.file.path(), stored, reason))
        }
        _ => source.file.stored_values(stored),
    }
}

/// Llama 3's scaling, recovered from the divisors of the frequencies that the file stores in its place.
fn llama3_scaling(source: &Source<'_>, factors: &[f32], theta: f64) -> Result<Value> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    let trained = source.get("rope.scaling.original_context_length")?.unwrap_or(8192_usize);
    let factor = factors.iter().copied().fold(1.0_f32, f32::max);
    let count = factors.len() as f64;
    for (index, &stored) in factors.iter().enumerate() {
        let wavelength = TAU * theta.powf(index as f64 / count);
        let turns = trained as f64 / wavelength;
        let smooth = ((turns - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
        let computed = 1.0 / ((1.0 - smooth) / f64::from(factor) + smooth);
        let close = (computed - f64::from(stored)).abs() <= 1e-3 * computed;
        if !close {
            let reason =
                format!("value {index} is {stored}, expected {computed} of Llama 3's scaling by {factor}");
            return Err(Error::tensor(source.file.path(), "rope_freqs.weight", reason));
        }
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": trained,
    }))
}

/// One kind of attention for each block.
fn layer_types(source: &Source<'_>, sliding: impl Fn(usize) -> bool) -> Result<Value> {
    let depth = source.size("block_count")?;
    // A file has a tensor for every block; this keeps a hostile count from becoming a list of that length.
    if source.rows(&format!("blk.{}.attn_norm.weight", depth - 1)).is_none() {
        let reason = format!("is {depth}, but block {} has no tensors", depth - 1);
        return Err(Error::config(source.key("block_count"), reason));
    }
    let kind = |block| if sliding(block) { "sliding_attention" } else { "full_attention" };
    Ok((0..depth).map(kind).collect())
}

/// The class and model type, with a family's own fields.
fn named(class: &str, model_type: &str, own: Value) -> Value {
    let mut config = object(json!({ "architectures": [class], "model_type": model_type }));
    extend(&mut config, own);
    Value::Object(config)
}

/// The fields of a JSON object, none of any other value.
fn object(value: Value) -> Map<String, Value> {
    if let Value::Object(fields) = value { fields } else { Map::new() }
}

/// Adds the fields of a JSON object, replacing those that are there.
fn extend(config: &mut Map<String, Value>, more: Value) {
    config.extend(object(more));
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use candle_core::quantized::gguf_file::Value as Stored;
    use candle_core::{Device, Tensor};

    use super::super::tests::{random, text, written};
    use super::*;

    /// The config of a small file of two heads, with more metadata under the architecture's prefix.
    fn config_of(
        architecture: &str,
        depth: u32,
        more: &[(&str, Stored)],
        tensors: &[(&str, Tensor)],
    ) -> Result<Value> {
        let mut metadata = vec![
            ("embedding_length".to_owned(), Stored::U32(32)),
            ("block_count".to_owned(), Stored::U32(depth)),
            ("context_length".to_owned(), Stored::U32(64)),
            ("feed_forward_length".to_owned(), Stored::U32(80)),
            ("attention.head_count".to_owned(), Stored::U32(2)),
            ("attention.layer_norm_rms_epsilon".to_owned(), Stored::F32(1e-6)),
            ("attention.layer_norm_epsilon".to_owned(), Stored::F32(1e-5)),
        ];
        metadata.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        let mut metadata: Vec<_> =
            metadata.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value)).collect();
        metadata.push(("general.architecture".to_owned(), text(architecture)));
        metadata.push(("tokenizer.ggml.eos_token_id".to_owned(), Stored::U32(7)));
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        let last = format!("blk.{}.attn_norm.weight", depth - 1);
        let mut all = vec![("token_embd.weight", random(&[96, 32]))];
        if architecture != "olmo2" {
            all.push((last.as_str(), random(&[32])));
        }
        all.extend(tensors.iter().cloned());
        let directory = tempfile::tempdir().unwrap();
        GgufFile::open(&written(directory.path(), &metadata, &all))?.config()
    }

    #[test]
    fn the_shared_fields_are_there() {
        let more = [("attention.head_count_kv", Stored::U32(1)), ("rope.freq_base", Stored::F32(1e5))];
        let config = config_of("llama", 3, &more, &[]).unwrap();
        for (field, expected) in [
            ("architectures", json!(["LlamaForCausalLM"])),
            ("model_type", json!("llama")),
            ("hidden_size", json!(32)),
            ("intermediate_size", json!(80)),
            ("num_hidden_layers", json!(3)),
            ("num_attention_heads", json!(2)),
            ("num_key_value_heads", json!(1)),
            ("head_dim", json!(16)),
            ("vocab_size", json!(96)),
            ("max_position_embeddings", json!(64)),
            ("rms_norm_eps", json!(1e-6)),
            ("rope_theta", json!(1e5)),
            ("rope_scaling", json!(null)),
            ("tie_word_embeddings", json!(true)),
            ("attention_bias", json!(false)),
            ("bos_token_id", json!(null)),
            ("eos_token_id", json!(7)),
            ("torch_dtype", json!("bfloat16")),
        ] {
            assert_eq!(config[field], expected, "{field}");
        }
        let untied = config_of("llama", 1, &[], &[("output.weight", random(&[96, 32]))]).unwrap();
        assert_eq!(untied["tie_word_embeddings"], json!(false));
    }

    #[test]
    fn families_have_their_own_fields() {
        let window = ("attention.sliding_window", Stored::U32(8));
        let mistral = config_of("llama", 1, std::slice::from_ref(&window), &[]).unwrap();
        assert_eq!((&mistral["model_type"], &mistral["sliding_window"]), (&json!("mistral"), &json!(8)));

        let cap = ("final_logit_softcapping", Stored::F32(30.0));
        let gemma2 = config_of("gemma2", 3, &[window.clone(), cap], &[]).unwrap();
        assert_eq!(gemma2["final_logit_softcapping"], json!(30.0));
        assert_eq!(gemma2["query_pre_attn_scalar"], json!(16));
        assert_eq!(gemma2["hidden_activation"], json!("gelu_pytorch_tanh"));
        let (sliding, full) = ("sliding_attention", "full_attention");
        assert_eq!(gemma2["layer_types"], json!([sliding, full, sliding]));

        let gemma3 = config_of("gemma3", 7, std::slice::from_ref(&window), &[]).unwrap();
        assert_eq!(gemma3["model_type"], json!("gemma3_text"));
        assert_eq!(gemma3["rope_local_base_freq"], json!(10_000.0));
        assert_eq!(
            gemma3["layer_types"],
            json!([sliding, sliding, sliding, sliding, sliding, full, sliding])
        );
        let flags = Stored::Array(vec![Stored::Bool(false), Stored::Bool(true)]);
        let pattern = [window.clone(), ("attention.sliding_window_pattern", flags)];
        let flagged = config_of("gemma3", 2, &pattern, &[]).unwrap();
        assert_eq!(flagged["layer_types"], json!([full, sliding]));

        let phi3 = config_of("phi3", 1, &[window, ("rope.dimension_count", Stored::U32(12))], &[]).unwrap();
        assert_eq!((&phi3["partial_rotary_factor"], &phi3["sliding_window"]), (&json!(0.75), &json!(8)));
        let gpt2 = config_of("gpt2", 1, &[], &[]).unwrap();
        assert_eq!((&gpt2["n_embd"], &gpt2["n_inner"]), (&json!(32), &json!(80)));
        assert_eq!(gpt2["layer_norm_epsilon"], json!(1e-5));
        for (key, class) in [("qwen2", "Qwen2"), ("qwen3", "Qwen3"), ("gemma", "Gemma"), ("olmo2", "Olmo2")] {
            let config = config_of(key, 1, &[], &[]).unwrap();
            assert_eq!(config["architectures"], json!([format!("{class}ForCausalLM")]));
        }
    }

    #[test]
    fn llama3_scaling_is_recovered_from_its_factors() {
        // Llama 3.2 1B: 32 frequencies from base 500,000, scaled by 32 beyond 8,192 positions.
        let factors: Vec<f32> = (0..32_i16)
            .map(|index| {
                let wavelength = TAU * 500_000_f64.powf(f64::from(index) / 32.0);
                let turns = 8192.0 / wavelength;
                if turns > 4.0 {
                    1.0
                } else if turns < 1.0 {
                    32.0
                } else {
                    let smooth = (turns - 1.0) / 3.0;
                    (1.0 / ((1.0 - smooth) / 32.0 + smooth)) as f32
                }
            })
            .collect();
        let tensor = |factors: &[f32]| [("rope_freqs.weight", Tensor::new(factors, &Device::Cpu).unwrap())];
        let more = [("rope.freq_base", Stored::F32(500_000.0)), ("attention.key_length", Stored::U32(64))];
        let config = config_of("llama", 1, &more, &tensor(&factors)).unwrap();
        let expected = json!({
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        assert_eq!(config["rope_scaling"], expected);
        let mut other = factors;
        other[16] *= 1.01;
        let error = config_of("llama", 1, &more, &tensor(&other)).unwrap_err();
        assert!(error.to_string().contains("rope_freqs.weight"), "{error}");
    }

    #[test]
    fn tables_of_frequencies_are_whole_or_errors() {
        let table = |name, length: usize| (name, random(&[length]));
        let (freqs, long, short) =
            ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight");
        let both = config_of("phi3", 1, &[], &[table(long, 8), table(short, 8)]).unwrap();
        assert_eq!(both["rope_scaling"]["type"], json!("longrope"));
        assert_eq!(both["rope_scaling"]["short_factor"].as_array().unwrap().len(), 8);
        for (tables, named, reason) in [
            (vec![table(long, 8)], short, "missing"),
            (vec![table(short, 8)], long, "missing"),
            (vec![table(long, 8), table(short, 9)], short, "expected [8]"),
            (vec![table(freqs, 4096)], freqs, "expected [8]"),
            (vec![(freqs, random(&[8, 1]))], freqs, "expected [8]"),
        ] {
            let message = config_of("phi3", 1, &[], &tables).unwrap_err().to_string();
            assert!(message.contains(named) && message.contains(reason), "{message}");
        }
    }

    #[test]
    fn contradictions_are_errors_that_name_the_key() {
        for (architecture, more, expected) in [
            ("llama", ("attention.head_count", Stored::U32(0)), "llama.attention.head_count"),
            ("llama", ("block_count", text("two")), "llama.block_count"),
            ("qwen2", ("block_count", Stored::U32(4_000_000_000)), "qwen2.block_count"),
            ("llama", ("rope.scaling.type", text("su")), "llama.rope.scaling.type"),
            ("llama", ("rope.dimension_count", Stored::U32(8)), "llama.rope.dimension_count"),
        ] {
            let error = config_of(architecture, 1, &[more], &[]).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
