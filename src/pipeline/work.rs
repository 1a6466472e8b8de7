//! The working directory: results by stage and by the hash of what they depend on.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::data::hex;
use crate::error::{Error, Result};
use crate::file;

/// The version of what is kept; another one finds nothing.
const VERSION: u32 = 2;

/// The SHA-256 of all that a stage's result depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key(String);

impl Key {
    /// The key of a result that these inputs decide, with this version of the crate.
    pub(super) fn of(stage: &str, inputs: &impl Serialize) -> Result<Self> {
        let json = serde_json::to_vec(&(VERSION, env!("CARGO_PKG_VERSION"), stage, inputs))
            .map_err(|error| Error::recipe(stage, error.to_string()))?;
        Ok(Self(hex(&Sha256::digest(json))))
    }

    /// The first digits, which name files.
    fn short(&self) -> &str {
        self.0.get(..16).unwrap_or(&self.0)
    }
}

/// A result, and what it came from.
#[derive(Serialize, Deserialize)]
struct Kept<T> {
    inputs_sha256: Key,
    result: T,
}

/// The directory. Nothing in it is ever overwritten by a result of other inputs: each has a name of its own.
#[derive(Debug)]
pub(super) struct Work(pub PathBuf);

impl Work {
    /// The path of something that depends on these inputs.
    pub(super) fn path(&self, name: &str, key: &Key, extension: &str) -> PathBuf {
        self.0.join(format!("{name}-{}{extension}", key.short()))
    }

    /// The same, in a directory that exists.
    pub(super) fn new_path(&self, name: &str, key: &Key, extension: &str) -> Result<PathBuf> {
        std::fs::create_dir_all(&self.0).map_err(Error::io("create", &self.0))?;
        Ok(self.path(name, key, extension))
    }

    /// What is known of a stage with these inputs.
    pub(super) fn known<T: DeserializeOwned>(&self, name: &str, key: &Key) -> Result<Option<T>> {
        let path = self.path(name, key, ".json");
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let kept: Kept<T> = serde_json::from_str(&text)
            .map_err(|error| damaged(&path, &format!("is no result of this stage ({error})")))?;
        if kept.inputs_sha256 == *key {
            tracing::debug!(name, path = %path.display(), "known from an earlier run");
            return Ok(Some(kept.result));
        }
        Err(damaged(&path, "is a result of other inputs than its name says"))
    }

    /// What is known of a stage with any inputs; what another version kept is passed over.
    pub(super) fn results<T: DeserializeOwned>(&self, name: &str) -> Result<Vec<T>> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(&self.0).map_err(Error::io("read", &self.0))? {
            let path = entry.map_err(Error::io("read", &self.0))?.path();
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            if file.starts_with(&format!("{name}-")) && file.ends_with(".json") {
                paths.push(path);
            }
        }
        // The order of a directory is no order.
        paths.sort();
        let read = |path: &PathBuf| std::fs::read_to_string(path).map_err(Error::io("read", path));
        let texts = paths.iter().map(read).collect::<Result<Vec<_>>>()?;
        let kept = texts.iter().filter_map(|text| serde_json::from_str::<Kept<T>>(text).ok());
        Ok(kept.map(|kept| kept.result).collect())
    }

    /// Keeps a result: whole, or not at all.
    pub(super) fn keep<T: Serialize>(&self, name: &str, key: &Key, result: &T) -> Result<()> {
        let path = self.new_path(name, key, ".json")?;
        let unwritten = |error: serde_json::Error| Error::format(&path, error.to_string());
        let json =
            serde_json::to_vec_pretty(&Kept { inputs_sha256: key.clone(), result }).map_err(unwritten)?;
        file::replace(&path, |file| file.write_all(&json).map_err(Error::io("write", &path)))
    }
}

fn damaged(path: &Path, found: &str) -> Error {
    Error::format(path, format!("{found}: delete it, and the stage runs again"))
}
