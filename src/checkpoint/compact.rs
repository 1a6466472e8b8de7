//! The section of `config.json` that makes a checkpoint compact, as docs/format.md specifies it.

use serde_json::{Map, Value, json};

use super::safetensors::{COMPACT, STANDARD};
use crate::error::{Error, Result};
use crate::model::{Architecture, FoldMap, FoldedBlock};

/// The version of the format that is written, and the newest that is read.
pub const FORMAT_VERSION: u64 = 1;

/// The field of `config.json` that holds the section.
pub(super) const SECTION: &str = "foldgpt";

/// The stem of the files of weights that belong to a config.
pub(super) fn stem(config: &Value) -> Result<&'static str> {
    Ok(if section(config)?.is_some() { COMPACT } else { STANDARD })
}

/// The section, where the config has one, of a version that is known.
fn section(config: &Value) -> Result<Option<&Map<String, Value>>> {
    let Some(section) = config.get(SECTION) else { return Ok(None) };
    let fields = section.as_object().ok_or_else(|| Error::config(SECTION, "expected a json object"))?;
    let refuse = |reason: String| Err(Error::config("foldgpt.version", reason));
    match fields.get("version").map(|version| (version, version.as_u64())) {
        Some((_, Some(1..=FORMAT_VERSION))) => Ok(Some(fields)),
        Some((_, Some(version))) => {
            refuse(format!("{version} is not known, the newest that can be read is {FORMAT_VERSION}"))
        }
        Some((value, None)) => {
            refuse(format!("{value} is no version, expected an integer of at most {FORMAT_VERSION}"))
        }
        None => refuse("missing, expected an integer".into()),
    }
}

/// What blocks share, by the config of a compact checkpoint; nothing where the checkpoint is a standard one.
pub(super) fn fold_map(config: &Value, arch: &Architecture) -> Result<FoldMap> {
    let Some(section) = section(config)? else { return Ok(FoldMap::default()) };
    let refuse = |reason: String| Error::config("foldgpt.blocks", reason);
    let blocks = section.get("blocks").cloned().unwrap_or_default();
    let blocks: Vec<FoldedBlock> =
        serde_json::from_value(blocks).map_err(|error| refuse(error.to_string()))?;
    if blocks.len() != arch.depth() {
        return Err(refuse(format!("{} entries for a model of {} blocks", blocks.len(), arch.depth())));
    }
    let map = FoldMap::new(blocks);
    map.check(arch).map_err(|error| match error {
        Error::Plan(reason) => refuse(reason),
        other => other,
    })?;
    Ok(map)
}

/// The section for a decoder of this architecture.
pub(super) fn to_section(arch: &Architecture) -> Result<Value> {
    let blocks: Vec<FoldedBlock> = (0..arch.depth()).map(|depth| arch.fold.block(depth)).collect();
    let blocks = serde_json::to_value(blocks).map_err(|error| Error::Plan(error.to_string()))?;
    Ok(json!({ "version": FORMAT_VERSION, "blocks": blocks }))
}
