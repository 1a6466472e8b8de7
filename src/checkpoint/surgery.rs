//! The `config.json` of a decoder that lost blocks.

use serde_json::{Map, Value};

use super::compact;
use super::config::{depth_field, layer_type};
use crate::error::{Error, Result};
use crate::model::Architecture;

/// Whether a list with an entry for each block is about its blocks, and not by chance as long as the model is deep.
fn is_per_block(name: &str) -> bool {
    ["layer", "block", "attention_types"].iter().any(|part| name.contains(part))
}

/// Families whose blocks may attend differently, and say so in `layer_types`.
const MIXED_ATTENTION: [&str; 4] = ["qwen2", "qwen3", "gemma2", "gemma3_text"];

/// `config` for the blocks that `kept` names by their index in it, each keeping its own kind of attention.
pub(super) fn cut(config: &Value, kept: &[usize], arch: &Architecture, dtype: &str) -> Result<Value> {
    let mut fields: Map<String, Value> =
        config.as_object().cloned().ok_or_else(|| Error::config("", "expected a json object of fields"))?;
    let depth_field = depth_field(config);
    let depth = fields.get(depth_field).and_then(Value::as_u64).unwrap_or_default() as usize;
    if let Some(&index) = kept.iter().find(|&&index| index >= depth) {
        return Err(Error::NoSuchBlock { index, depth });
    }
    for (name, value) in &mut fields {
        if let Some(list) = value.as_array_mut().filter(|list| list.len() == depth && is_per_block(name)) {
            *list = kept.iter().filter_map(|&index| list.get(index).cloned()).collect();
        }
    }
    fields.remove(compact::SECTION);
    fields.insert(depth_field.into(), kept.len().into());
    if let Some(first) = fields.get("max_window_layers").and_then(Value::as_u64) {
        let below = kept.iter().filter(|&&index| (index as u64) < first).count();
        fields.insert("max_window_layers".into(), below.into());
    }
    if MIXED_ATTENTION.contains(&arch.model_type.as_str()) {
        let types: Vec<Value> = arch.blocks.iter().map(|block| layer_type(block).into()).collect();
        fields.insert("layer_types".into(), types.into());
    }
    for name in ["dtype", "torch_dtype"] {
        if fields.contains_key(name) {
            fields.insert(name.into(), dtype.into());
        }
    }
    Ok(Value::Object(fields))
}
