//! Writes a checkpoint of random weights in the shape of a Llama, tensor by tensor: of any size, in little memory. It is
//! worth nothing as a model, and good for measuring what large ones take.
//!
//! ```text
//! cargo run --release --example random_checkpoint -- --out DIR     # the shape of LLaMA-2-7B: 13.5 GB of bf16
//! cargo run --release --example random_checkpoint -- --out DIR --hidden 512 --intermediate 1376 --heads 8 --blocks 12
//! ```
#![allow(clippy::print_stdout)]

mod cli;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use foldgpt::checkpoint::check_destination;
use foldgpt::model::Architecture;
use foldgpt::{Bytes, Checkpoint};
use half::bf16;
use rayon::prelude::*;
use safetensors::{Dtype, View};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Writes a checkpoint of random weights in the shape of a Llama; the defaults are those of LLaMA-2-7B
#[derive(Parser)]
struct Args {
    /// The directory to write, new or empty
    #[arg(long)]
    out: PathBuf,
    /// Width of the residual stream
    #[arg(long, default_value_t = 4096)]
    hidden: usize,
    /// Width of the MLP
    #[arg(long, default_value_t = 11008)]
    intermediate: usize,
    #[arg(long, default_value_t = 32)]
    blocks: usize,
    /// Query heads
    #[arg(long, default_value_t = 32)]
    heads: usize,
    /// Key and value heads; as many as query heads where absent
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Rows of the embedding and of the head, at least as many as the tokenizer has tokens
    #[arg(long, default_value_t = 32000)]
    vocab: usize,
    /// A directory with the tokenizer to copy
    #[arg(long, default_value = "examples/tiny-stories")]
    tokenizer: PathBuf,
    /// Tensors are split into files of at most this many bytes
    #[arg(long, default_value = "5GB")]
    max_shard: Bytes,
    /// The same seed gives the same weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    check_destination(&args.out)?;
    let config = config(&args);
    Architecture::from_config(&config)?;
    let parent = args.out.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    // Gone again if anything fails: what has the name is whole. A directory within, since this one is its owner's alone.
    let scratch = tempfile::Builder::new().prefix(".random").suffix(".partial").tempdir_in(parent)?;
    let partial = scratch.path().join("model");
    std::fs::create_dir(&partial)?;
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let from = args.tokenizer.join(name);
        std::fs::copy(&from, partial.join(name))
            .with_context(|| format!("--tokenizer: cannot copy {}", from.display()))?;
    }
    std::fs::write(partial.join("config.json"), serde_json::to_string_pretty(&config)?)?;
    cli::interrupt::started();
    let written = write(&tensors(&args), args.max_shard.0, &partial);
    cli::interrupt::finished();
    written?;
    let checkpoint = Checkpoint::open(&partial)?;
    std::fs::rename(&partial, &args.out)
        .with_context(|| format!("cannot rename to {}", args.out.display()))?;
    let parameters = checkpoint.architecture().parameter_count();
    println!("{parameters} parameters, {} in {}", Bytes(checkpoint.tensor_bytes()), args.out.display());
    Ok(())
}

/// What transformers' `LlamaForCausalLM` reads.
fn config(args: &Args) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.blocks,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads.unwrap_or(args.heads),
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": false,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    })
}

/// A tensor whose values are made when they are written.
struct Random {
    name: String,
    shape: Vec<usize>,
    seed: u64,
}

fn tensors(args: &Args) -> Vec<Random> {
    let (hidden, inner) = (args.hidden, args.intermediate);
    let keys = hidden / args.heads * args.kv_heads.unwrap_or(args.heads);
    let mut tensors: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), vec![args.vocab, hidden])];
    for block in 0..args.blocks {
        let parts = [
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![keys, hidden]),
            ("self_attn.v_proj", vec![keys, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
        ];
        tensors.extend(
            parts.into_iter().map(|(part, shape)| (format!("model.layers.{block}.{part}.weight"), shape)),
        );
    }
    tensors.push(("model.norm.weight".into(), vec![hidden]));
    tensors.push(("lm_head.weight".into(), vec![args.vocab, hidden]));
    let seeded = tensors.into_iter().zip(args.seed.wrapping_mul(1 << 32)..);
    seeded.map(|((name, shape), seed)| Random { name, shape, seed }).collect()
}

/// Writes the tensors in shards, with an index where there are several.
fn write(tensors: &[Random], limit: u64, directory: &Path) -> Result<()> {
    let mut shards: Vec<Vec<&Random>> = Vec::new();
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.data_len() as u64;
        match shards.last_mut().filter(|_| filled + bytes <= limit) {
            Some(shard) => shard.push(tensor),
            None => {
                shards.push(vec![tensor]);
                filled = 0;
            }
        }
        filled += bytes;
    }
    ensure!(!shards.is_empty(), "there are no tensors");
    let mut map = serde_json::Map::new();
    for (place, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", place + 1),
        };
        let named = shard.iter().map(|tensor| (tensor.name.as_str(), *tensor));
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let path = directory.join(&name);
        let written = safetensors::serialize_to_file(named, Some(metadata), &path);
        written.with_context(|| format!("cannot write {}", path.display()))?;
        ensure!(cli::interrupt::flow().is_continue(), "interrupted, and nothing is left");
        // That writer makes files that only their owner may read.
        let permissions = std::fs::metadata(directory.join("config.json"))?.permissions();
        std::fs::set_permissions(&path, permissions)?;
        map.extend(shard.iter().map(|tensor| (tensor.name.clone(), Value::from(name.as_str()))));
        println!("{name}: {} tensors", shard.len());
    }
    if shards.len() > 1 {
        let total: usize = tensors.iter().map(|tensor| tensor.data_len()).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        std::fs::write(directory.join("model.safetensors.index.json"), serde_json::to_string(&index)?)?;
    }
    Ok(())
}

impl View for &Random {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Nothing once this is interrupted: what is written then is thrown away.
    fn data(&self) -> Cow<'_, [u8]> {
        if cli::interrupt::flow().is_break() {
            return Cow::Borrowed(&[]);
        }
        Cow::Owned(if self.shape.len() == 1 { ones(self.data_len()) } else { self.values() })
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of::<bf16>()
    }
}

impl Random {
    /// Values spread evenly, with a standard deviation of 0.02.
    fn values(&self) -> Vec<u8> {
        const CHUNK: usize = 1 << 20;
        let widest = 0.02 * 3f32.sqrt();
        let mut bytes = vec![0u8; self.shape.iter().product::<usize>() * size_of::<bf16>()];
        bytes.par_chunks_mut(CHUNK).enumerate().for_each(|(index, chunk)| {
            // Never 0, which this generator would not leave.
            let mut state = (self.seed ^ ((index as u64) << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            for pair in chunk.chunks_exact_mut(size_of::<bf16>()) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let unit = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
                pair.copy_from_slice(&bf16::from_f32(unit * widest).to_le_bytes());
            }
        });
        bytes
    }
}

fn ones(bytes: usize) -> Vec<u8> {
    bf16::ONE.to_le_bytes().repeat(bytes / size_of::<bf16>())
}
