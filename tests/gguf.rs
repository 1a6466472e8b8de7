//! Every family read from a GGUF file laid out as llama.cpp's converter lays it out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use foldgpt::candle::quantized::gguf_file::{self, Value as Stored};
use foldgpt::candle::quantized::{GgmlDType, QTensor};
use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::importance::PerplexityIncrease;
use foldgpt::{Checkpoint, Decoder, Importance, SaveOptions, StreamOptions};
use serde_json::{Value, json};
use support::{FAMILIES, distance, expected, fixture, input_ids, load};

/// A fixture's `general.architecture`, its norms' names in blocks, and its vocabulary.
struct Family {
    architecture: &'static str,
    norms: &'static [(&'static str, &'static str)],
    vocabulary: Vocabulary,
}

/// `tokenizer.ggml.model`: `llama`, or `gpt2` with this `tokenizer.ggml.pre`.
#[derive(Clone, Copy)]
enum Vocabulary {
    SentencePiece,
    ByteLevel(&'static str),
}

/// Names outside of the blocks, and in blocks, from Hugging Face's to GGUF's.
const OUTER: [(&str, &str); 6] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("transformer.wte", "token_embd"),
    ("transformer.wpe", "position_embd"),
    ("transformer.ln_f", "output_norm"),
];
const PARTS: [(&str, &str); 15] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
];
const PRE: &[(&str, &str)] = &[("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")];
const SANDWICH: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];
const POST: &[(&str, &str)] =
    &[("post_attention_layernorm", "post_attention_norm"), ("post_feedforward_layernorm", "post_ffw_norm")];
const GPT2: &[(&str, &str)] = &[("ln_1", "attn_norm"), ("ln_2", "ffn_norm")];

/// Metadata under the architecture's prefix, and the field that it is taken from where the config has it.
const FIELDS: [(&str, &str); 20] = [
    ("context_length", "max_position_embeddings"),
    ("context_length", "n_positions"),
    ("embedding_length", "hidden_size"),
    ("embedding_length", "n_embd"),
    ("block_count", "num_hidden_layers"),
    ("block_count", "n_layer"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count", "n_head"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.value_length", "head_dim"),
    ("attention.sliding_window", "sliding_window"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    ("rope.freq_base", "rope_theta"),
    ("rope.scaling.original_context_length", "original_max_position_embeddings"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("vocab_size", "vocab_size"),
];

fn family(name: &str) -> Family {
    use Vocabulary::{ByteLevel, SentencePiece};
    let (architecture, norms, vocabulary) = match name {
        "llama" | "mistral" => ("llama", PRE, SentencePiece),
        "llama-tied-rope3" => ("llama", PRE, ByteLevel("llama-bpe")),
        "qwen2" => ("qwen2", PRE, ByteLevel("qwen2")),
        "qwen3" => ("qwen3", PRE, ByteLevel("qwen2")),
        "gemma" => ("gemma", PRE, SentencePiece),
        "gemma2" => ("gemma2", SANDWICH, SentencePiece),
        "gemma3" => ("gemma3", SANDWICH, SentencePiece),
        "phi3" => ("phi3", PRE, SentencePiece),
        "olmo2" => ("olmo2", POST, ByteLevel("dbrx")),
        "gpt2" => ("gpt2", GPT2, ByteLevel("gpt-2")),
        other => panic!("{other} has no layout"),
    };
    Family { architecture, norms, vocabulary }
}

impl Family {
    fn stored_name(&self, name: &str) -> String {
        let (part, kind) = name.rsplit_once('.').unwrap();
        let known = |table: &[(&str, &'static str)], part: &str| {
            table.iter().find(|(known, _)| *known == part).map(|(_, stored)| *stored)
        };
        let block =
            ["model.layers.", "transformer.h."].into_iter().find_map(|stack| part.strip_prefix(stack));
        match block {
            Some(block) => {
                let (index, part) = block.split_once('.').unwrap();
                let stored = known(&PARTS, part).or_else(|| known(self.norms, part));
                format!("blk.{index}.{}.{kind}", stored.unwrap_or_else(|| panic!("{name}")))
            }
            None => format!("{}.{kind}", known(&OUTER, part).unwrap_or_else(|| panic!("{name}"))),
        }
    }

    /// What the converter makes of a tensor's numbers.
    fn stored_tensor(&self, name: &str, tensor: &Tensor, config: &Value) -> Tensor {
        match self.architecture {
            "llama" if name.contains("q_proj") => paired(tensor, size(config, "num_attention_heads")),
            "llama" if name.contains("k_proj") => paired(tensor, size(config, "num_key_value_heads")),
            "gpt2" if tensor.rank() == 2 && name.starts_with("transformer.h.") => {
                tensor.t().unwrap().contiguous().unwrap()
            }
            gemma if gemma.starts_with("gemma") && name.ends_with("norm.weight") => (tensor + 1.0).unwrap(),
            _ => tensor.clone(),
        }
    }

    fn metadata(&self, config: &Value) -> BTreeMap<String, Stored> {
        let fields = FIELDS.iter().filter_map(|(key, field)| Some((*key, number(&config[*field])?)));
        let mut own: BTreeMap<&str, Stored> = fields.collect();
        let head_dim = || match config["head_dim"].as_u64() {
            Some(dim) => dim as u32,
            None => (size(config, "hidden_size") / size(config, "num_attention_heads")) as u32,
        };
        match self.architecture {
            "gpt2" => {
                own.insert("feed_forward_length", Stored::U32(4 * size(config, "n_embd") as u32));
            }
            "llama" => {
                own.insert("rope.dimension_count", Stored::U32(head_dim()));
            }
            "phi3" => {
                own.insert("rope.dimension_count", Stored::U32(head_dim()));
                own.entry("attention.sliding_window").or_insert(Stored::U32(0));
            }
            "gemma" | "gemma2" => {
                own.remove("rope.freq_base");
            }
            // The fixture's blocks do not follow the rule of every sixth one.
            "gemma3" => {
                let types = config["layer_types"].as_array().unwrap().iter();
                let flags = types.map(|kind| Stored::Bool(kind == "sliding_attention")).collect();
                own.insert("attention.sliding_window_pattern", Stored::Array(flags));
            }
            _ => {}
        }
        // The converter itself leaves this out, and takes every model for one of 8,192 positions.
        if let Some(trained) = number(&config["rope_scaling"]["original_max_position_embeddings"]) {
            own.insert("rope.scaling.original_context_length", trained);
        }
        let mut metadata: BTreeMap<_, _> =
            own.into_iter().map(|(key, value)| (format!("{}.{key}", self.architecture), value)).collect();
        metadata.insert("general.architecture".into(), text(self.architecture));
        metadata.insert("general.name".into(), text("fixture"));
        metadata.insert("general.file_type".into(), Stored::U32(0));
        let tokenizer = self.vocabulary.metadata(config);
        metadata.extend(tokenizer.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)));
        metadata
    }

    /// Writes the fixture into `directory`.
    fn write(&self, name: &str, directory: &Path) -> PathBuf {
        let config: Value =
            serde_json::from_str(&std::fs::read_to_string(fixture(name).join("config.json")).unwrap())
                .unwrap();
        let weights = fixture(name).join("model.safetensors");
        let mut tensors = BTreeMap::new();
        for (name, tensor) in foldgpt::candle::safetensors::load(weights, &Device::Cpu).unwrap() {
            tensors.insert(self.stored_name(&name), self.stored_tensor(&name, &tensor, &config));
        }
        if config["rope_scaling"]["rope_type"] == "llama3" {
            tensors.insert("rope_freqs.weight".into(), rope_factors(&config));
        }
        let path = directory.join("model.gguf");
        let metadata = self.metadata(&config);
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), QTensor::quantize(tensor, GgmlDType::F32).unwrap()))
            .collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &metadata, &tensors).unwrap();
        path
    }
}

impl Vocabulary {
    const TEXT: &'static str = "the cat\nthe then";

    fn model(self) -> &'static str {
        match self {
            Self::SentencePiece => "llama",
            Self::ByteLevel(_) => "gpt2",
        }
    }

    /// Tokens with their kinds and scores: special ones, letters, and what merges make of these.
    fn tokens(self) -> Vec<(String, i32, f32)> {
        let special = |text: &str, kind| (text.to_string(), kind, 0.0);
        let normal = |text: &str, score: f32| (text.to_string(), 1, score);
        let mut tokens = vec![special("<pad>", 3), special("<s>", 3), special("</s>", 3)];
        let (space, newline) = match self {
            Self::SentencePiece => ("▁", special("<0x0A>", 6)),
            Self::ByteLevel(_) => ("Ġ", normal("Ċ", 0.0)),
        };
        tokens.extend([special("<unk>", 2), newline, normal(space, -9.0)]);
        tokens.extend(('a'..='z').map(|letter| normal(&letter.to_string(), -9.0)));
        tokens.extend([normal("th", -1.0), normal("the", -2.0), normal(&format!("{space}the"), -3.0)]);
        tokens
    }

    fn metadata(self, config: &Value) -> Vec<(&'static str, Stored)> {
        let mut tokens = self.tokens();
        // Rows of the embedding without a token, as the converter fills them.
        for index in tokens.len()..size(config, "vocab_size") {
            tokens.push((format!("[PAD{index}]"), 5, -1000.0));
        }
        let mut metadata = vec![
            ("model", text(self.model())),
            ("tokens", Stored::Array(tokens.iter().map(|(token, ..)| text(token)).collect())),
            ("token_type", Stored::Array(tokens.iter().map(|token| Stored::I32(token.1)).collect())),
            ("bos_token_id", Stored::U32(1)),
            ("eos_token_id", Stored::U32(2)),
            ("padding_token_id", Stored::U32(0)),
        ];
        match self {
            Self::SentencePiece => {
                let scores = tokens.iter().map(|token| Stored::F32(token.2)).collect();
                metadata.extend([
                    ("pre", text("default")),
                    ("scores", Stored::Array(scores)),
                    ("unknown_token_id", Stored::U32(3)),
                    ("add_bos_token", Stored::Bool(true)),
                    ("add_eos_token", Stored::Bool(false)),
                    ("add_space_prefix", Stored::Bool(false)),
                ]);
            }
            Self::ByteLevel(pre) => {
                let merges = ["t h", "th e", "Ġ the"].map(text).to_vec();
                metadata.extend([("pre", text(pre)), ("merges", Stored::Array(merges))]);
            }
        }
        metadata
    }

    /// The tokens of [`Self::TEXT`].
    fn expected(self) -> Vec<u32> {
        let tokens = self.tokens();
        let texts = match self {
            Self::SentencePiece => ["the", "▁", "c", "a", "t", "<0x0A>", "the", "▁the", "n"],
            Self::ByteLevel(_) => ["the", "Ġ", "c", "a", "t", "Ċ", "the", "Ġthe", "n"],
        };
        let id = |text: &&str| tokens.iter().position(|(token, ..)| token == text).unwrap() as u32;
        texts.iter().map(id).collect()
    }
}

fn text(value: &str) -> Stored {
    Stored::String(value.to_string())
}

fn size(config: &Value, field: &str) -> usize {
    config[field].as_u64().unwrap() as usize
}

fn number(value: &Value) -> Option<Stored> {
    let whole = value.as_u64().map(|number| Stored::U32(number as u32));
    whole.or_else(|| value.as_f64().map(|number| Stored::F32(number as f32)))
}

/// The halves of each head's rows become pairs, as `LlamaModel.permute` has it.
fn paired(tensor: &Tensor, heads: usize) -> Tensor {
    let halves = tensor.reshape((heads, 2, tensor.dims()[0] / heads / 2, ())).unwrap();
    halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape(tensor.dims()).unwrap()
}

/// What `LlamaModel.generate_extra_tensors` divides each frequency by.
fn rope_factors(config: &Value) -> Tensor {
    let (dim, base) = (size(config, "head_dim"), config["rope_theta"].as_f64().unwrap());
    let scaling = |field: &str| config["rope_scaling"][field].as_f64().unwrap();
    let (factor, trained) = (scaling("factor"), scaling("original_max_position_embeddings"));
    let (low, high) = (scaling("low_freq_factor"), scaling("high_freq_factor"));
    let divisor = |index: usize| {
        let wavelength = std::f64::consts::TAU * base.powf((2 * index) as f64 / dim as f64);
        if wavelength < trained / high {
            1.0
        } else if wavelength > trained / low {
            factor
        } else {
            let smooth = (trained / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    let divisors: Vec<f32> = (0..dim / 2).map(|index| divisor(index) as f32).collect();
    Tensor::new(divisors, &Device::Cpu).unwrap()
}

fn open(name: &str, directory: &Path) -> Checkpoint {
    Checkpoint::open(family(name).write(name, directory)).unwrap()
}

fn decoder(checkpoint: &Checkpoint) -> Decoder {
    checkpoint.decoder(DType::F32, &Device::Cpu).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn logits_are_those_of_transformers() {
    for name in FAMILIES {
        let scratch = tempfile::tempdir().unwrap();
        let checkpoint = open(name, scratch.path()).stored_as(DType::F32);
        let decoder = decoder(&checkpoint);
        let off = distance(&decoder.forward(&input_ids(name)).unwrap(), &expected(name)["logits"]);
        assert!(off < 1e-4, "{name}: logits off by {off}");
        assert_eq!(decoder.architecture(), load(name).architecture(), "{name}");
    }
}

#[test]
fn blocks_of_a_file_are_streamed_and_copied_as_they_are_loaded() {
    for name in FAMILIES {
        let scratch = tempfile::tempdir().unwrap();
        let (checkpoint, windows) = (open(name, scratch.path()), support::windows(name));
        let decoder = decoder(&checkpoint);
        let streamed = checkpoint.streamed(DType::F32, &Device::Cpu, StreamOptions::default()).unwrap();
        let method = PerplexityIncrease::default();
        let in_memory = method.score(&decoder, &windows, &mut ()).unwrap();
        let from_disk = method.score_streamed(&streamed, &windows, &mut ()).unwrap();
        assert_eq!(in_memory.importance(), from_disk.importance(), "{name}");

        let (computed, copied) = (scratch.path().join("computed"), scratch.path().join("copied"));
        let (cut, options) = (decoder.with_blocks(&[0, 2]).unwrap(), SaveOptions::default());
        checkpoint.save(&cut, None, &computed, &options, &mut ()).unwrap();
        checkpoint.save_blocks(&[0, 2], None, &copied, &options, &mut ()).unwrap();
        for file in ["model.safetensors", "config.json", "tokenizer.json"] {
            let read = |directory: &Path| std::fs::read(directory.join(file)).unwrap();
            assert!(read(&computed) == read(&copied), "{name}: {file} differs");
        }
    }
}

#[test]
fn a_cut_file_is_saved_as_bf16_and_reloads_bit_for_bit() {
    for name in FAMILIES {
        let scratch = tempfile::tempdir().unwrap();
        let checkpoint = open(name, scratch.path());
        let cut = decoder(&checkpoint).with_blocks(&[0, 2, 3]).unwrap();
        let directory = scratch.path().join("cut");
        let saved = checkpoint.save(&cut, None, &directory, &SaveOptions::default(), &mut ()).unwrap();
        assert_eq!(saved.tensor_bytes, 2 * cut.parameter_count() as u64, "{name}");

        let reloaded = Checkpoint::open(&directory).unwrap();
        let ids = input_ids(name);
        let (found, in_memory) = (decoder(&reloaded).forward(&ids).unwrap(), cut.forward(&ids).unwrap());
        assert_eq!(bits(&found), bits(&in_memory), "{name}");
        let config = reloaded.config();
        assert_eq!(config.get("dtype").or(config.get("torch_dtype")), Some(&json!("bfloat16")), "{name}");

        let tokenizer_config = std::fs::read_to_string(directory.join("tokenizer_config.json")).unwrap();
        let tokenizer_config: Value = serde_json::from_str(&tokenizer_config).unwrap();
        let (bos, eos) = (&tokenizer_config["bos_token"], &tokenizer_config["eos_token"]);
        assert_eq!((bos, eos), (&json!("<s>"), &json!("</s>")), "{name}");
        assert!(directory.join("tokenizer.json").is_file(), "{name}");
        let vocabulary = family(name).vocabulary;
        for tokenizer in [checkpoint.tokenizer().unwrap(), reloaded.tokenizer().unwrap()] {
            let ids = tokenizer.encode(Vocabulary::TEXT).unwrap();
            assert_eq!(ids, vocabulary.expected(), "{name}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), Vocabulary::TEXT, "{name}");
            let begins = matches!(vocabulary, Vocabulary::SentencePiece | Vocabulary::ByteLevel("llama-bpe"));
            assert_eq!((tokenizer.adds_bos(), tokenizer.bos()), (begins, Some(1)), "{name}");
            assert_eq!(tokenizer.eos(), [2], "{name}");
        }
    }
}
