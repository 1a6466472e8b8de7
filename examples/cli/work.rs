//! A directory where a long run keeps what it has found, so that an interrupted one goes on.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A name beyond this is cut and gets a hash of all of it: file systems take 255 bytes.
const LONGEST: usize = 200;

/// Results by name, one JSON file each.
pub struct Work(PathBuf);

impl Work {
    /// The directory of a run, made where it is missing. `protocol` is what all its results depend on; those of
    /// another one are refused.
    pub fn open(directory: &PathBuf, protocol: &[String]) -> Result<Self> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let work = Self(directory.clone());
        let found: Vec<String> = work.kept("protocol", || Ok(protocol.to_vec()))?;
        let differ = found.iter().zip(protocol).find(|(found, expected)| found != expected);
        if let Some((found, expected)) = differ {
            bail!(
                "{} holds results of another run: of {found}, and not of {expected}; take another directory, or delete it",
                directory.display()
            );
        }
        ensure!(found.len() == protocol.len(), "{} is of another version", directory.display());
        Ok(work)
    }

    /// What `make` makes, once.
    pub fn kept<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let path = self.path(name, "json");
        if path.exists() {
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            return serde_json::from_str(&text).with_context(|| format!("{} is no result", path.display()));
        }
        let made = make()?;
        let partial = self.path(name, "partial");
        std::fs::write(&partial, serde_json::to_string_pretty(&made)?)
            .and_then(|()| std::fs::rename(&partial, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(made)
    }

    /// Where something of this name lies.
    pub fn path(&self, name: &str, extension: &str) -> PathBuf {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        let mut plain: String = name.chars().map(plain).collect();
        if plain.len() > LONGEST {
            let mut hash = DefaultHasher::new();
            name.hash(&mut hash);
            plain.truncate(LONGEST);
            plain = format!("{plain}-{:016x}", hash.finish());
        }
        self.0.join(format!("{plain}.{extension}"))
    }
}
