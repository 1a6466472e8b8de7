//! Checkpoints by their Hugging Face hub id: looked up in the cache, and fetched into it.

use std::path::PathBuf;

use crate::error::{Error, Result};

/// Whether the text has the form of a hub id, `org/name`.
pub(crate) fn is_hub_id(text: &str) -> bool {
    let valid = |part: &str| {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        !part.is_empty()
            && part.len() <= 96
            && part.bytes().all(known)
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
            && !part.contains("..")
            && !part.contains("--")
    };
    text.split_once('/').is_some_and(|(org, name)| valid(org) && valid(name))
}

/// Not without the feature `hub`.
#[cfg(not(feature = "hub"))]
pub(crate) fn fetch(id: &str) -> Result<PathBuf> {
    Err(hub_error(id, "cannot be fetched: build with the feature `hub`, or give the path of a checkpoint"))
}

/// The directory of the cached snapshot of that model, fetched into the cache first where it is not all there.
#[cfg(feature = "hub")]
pub(crate) fn fetch(id: &str) -> Result<PathBuf> {
    remote::fetch(id)
}

fn hub_error(id: &str, reason: impl Into<String>) -> Error {
    Error::Hub { id: id.to_owned(), reason: reason.into() }
}

#[cfg(feature = "hub")]
mod remote {
    use std::fs;
    use std::path::{Path, PathBuf};

    use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
    use hf_hub::{Cache, Repo, RepoType};
    use serde_json::Value;

    use super::super::safetensors::{COMPACT, STANDARD, index, single};
    use super::super::save::COMPANIONS;
    use super::{hub_error, is_hub_id};
    use crate::error::{Error, Result};

    const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
    const STEMS: [&str; 2] = [STANDARD, COMPACT];

    pub(super) fn fetch(id: &str) -> Result<PathBuf> {
        if !is_hub_id(id) {
            return Err(hub_error(id, "is no hub id, expected `org/name`"));
        }
        // Where there is neither, hf-hub panics.
        if std::env::var_os("HF_HOME").is_none() && std::env::home_dir().is_none() {
            return Err(hub_error(id, "there is no home directory for the cache: set HF_HOME"));
        }
        let cache = Cache::from_env();
        if let Some(snapshot) = cached(id, &cache)? {
            return Ok(snapshot);
        }
        let failed = |what: &str, error: &ApiError| unreachable_hub(id, what, error, &cache);
        let api = ApiBuilder::from_env().with_progress(false).build().map_err(|e| failed("the model", &e))?;
        let main = Repo::model(id.to_owned());
        let info = api.repo(main.clone()).info().map_err(|e| failed("the list of files", &e))?;
        // One commit for all files, though the branch may move while they are fetched.
        let commit = Repo::with_revision(id.to_owned(), RepoType::Model, info.sha.clone());
        let remote = api.repo(commit);
        let listed: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let get = |remote: &ApiRepo, name: &str| {
            remote.get(name).map_err(|error| failed(&format!("`{name}`"), &error))
        };

        if let Some(name) = REQUIRED.iter().find(|name| !listed.contains(name)) {
            return Err(hub_error(id, format!("has no `{name}`")));
        }
        // Those that are required come last: a snapshot that has them has the others.
        let optional = COMPANIONS.into_iter().filter(|name| !REQUIRED.contains(name));
        for name in optional.filter(|name| listed.contains(name)).chain(REQUIRED) {
            get(&remote, name)?;
        }
        let has = |name: String| Some(name).filter(|name| listed.contains(&name.as_str()));
        if let Some(weights) = STEMS.iter().find_map(|stem| has(single(stem))) {
            get(&remote, &weights)?;
        } else if let Some(index) = STEMS.iter().find_map(|stem| has(index(stem))) {
            for shard in shards(id, &get(&remote, &index)?)? {
                get(&remote, &shard)?;
            }
        } else {
            return Err(hub_error(
                id,
                format!("has neither `{}` nor `{}`", single(STANDARD), index(STANDARD)),
            ));
        }

        cache
            .repo(main)
            .create_ref(&info.sha)
            .map_err(|error| hub_error(id, format!("cannot write to {}: {error}", cache.path().display())))?;
        cached(id, &cache)?.ok_or_else(|| {
            hub_error(
                id,
                format!("was fetched, but is not complete in the cache at {}", cache.path().display()),
            )
        })
    }

    /// Tells an answer that refuses from no answer at all, which the cache could have made up for.
    fn unreachable_hub(id: &str, what: &str, error: &ApiError, cache: &Cache) -> Error {
        let error = error.to_string();
        let advice = if error.contains("http status: 40") {
            "check the id; a private or gated model needs the token that `hf auth login` saves".to_owned()
        } else {
            let place = cache.path().display();
            format!("the cache at {place} does not hold it: go online, or set HF_HOME to a cache that does")
        };
        hub_error(id, format!("cannot fetch {what} ({error}): {advice}"))
    }

    /// The snapshot of the branch `main` where the cache holds all of it.
    fn cached(id: &str, cache: &Cache) -> Result<Option<PathBuf>> {
        let repo = cache.model(id.to_owned());
        if REQUIRED.iter().any(|name| repo.get(name).is_none()) {
            return Ok(None);
        }
        if STEMS.iter().all(|stem| repo.get(&single(stem)).is_none()) {
            let index = STEMS.iter().find_map(|stem| repo.get(&index(stem)));
            let Some(index) = index else { return Ok(None) };
            if shards(id, &index)?.iter().any(|shard| repo.get(shard).is_none()) {
                return Ok(None);
            }
        }
        Ok(repo.get("config.json").and_then(|config| config.parent().map(Path::to_path_buf)))
    }

    /// The shards that an index names, each once.
    fn shards(id: &str, index: &Path) -> Result<Vec<String>> {
        let bad = |reason: String| hub_error(id, format!("{}: {reason}", index.display()));
        let text = fs::read_to_string(index).map_err(|error| bad(error.to_string()))?;
        let json: Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
            return Err(bad("`weight_map` is missing, expected an object".to_owned()));
        };
        let mut names = Vec::new();
        for (tensor, shard) in map {
            // The name becomes a path in the cache.
            let name =
                shard.as_str().filter(|name| name.ends_with(".safetensors") && !name.contains(['/', '\\']));
            let Some(name) = name else {
                return Err(bad(format!(
                    "`{tensor}` is in {shard}, expected the name of a .safetensors file"
                )));
            };
            names.push(name.to_owned());
        }
        names.sort();
        names.dedup();
        Ok(names)
    }

    #[cfg(test)]
    #[allow(clippy::unwrap_used)]
    mod tests {
        use super::*;

        /// A cache with one model, whose snapshot holds the named files.
        fn cache(root: &Path, files: &[(&str, &str)]) -> Cache {
            let model = root.join("models--org--name");
            fs::create_dir_all(model.join("refs")).unwrap();
            fs::create_dir_all(model.join("snapshots/abc")).unwrap();
            fs::write(model.join("refs/main"), "abc").unwrap();
            for (name, text) in files {
                fs::write(model.join("snapshots/abc").join(name), text).unwrap();
            }
            Cache::new(root.to_path_buf())
        }

        #[test]
        fn a_complete_snapshot_is_found_and_a_partial_one_is_not() {
            let index = index(STANDARD);
            let map =
                r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}"#;
            let mut files = vec![
                ("config.json", "{}"),
                ("tokenizer.json", "{}"),
                (index.as_str(), map),
                ("m-1.safetensors", ""),
            ];
            let root = tempfile::tempdir().unwrap();
            assert_eq!(cached("org/name", &cache(root.path(), &files)).unwrap(), None);
            files.push(("m-2.safetensors", ""));
            let found = cached("org/name", &cache(root.path(), &files)).unwrap().unwrap();
            assert_eq!(found, root.path().join("models--org--name/snapshots/abc"));
            assert_eq!(cached("org/other", &Cache::new(root.path().to_path_buf())).unwrap(), None);
        }

        #[test]
        fn a_shard_outside_of_the_snapshot_is_refused() {
            let root = tempfile::tempdir().unwrap();
            let index = root.path().join(index(STANDARD));
            fs::write(&index, r#"{"weight_map": {"a": "../m.safetensors"}}"#).unwrap();
            assert!(shards("org/name", &index).unwrap_err().to_string().contains("../m.safetensors"));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["org/name", "HuggingFaceTB/SmolLM2-135M", "a/b_c.d"] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in
            ["name", "/name", "org/", "a/b/c", "./model", "../model", "a/..", "a b/c", "org/na--me", "~/m"]
        {
            assert!(!is_hub_id(path), "{path}");
        }
    }

    #[cfg(not(feature = "hub"))]
    #[test]
    fn fetching_asks_for_the_feature() {
        assert!(fetch("org/name").unwrap_err().to_string().contains("feature `hub`"));
    }
}
