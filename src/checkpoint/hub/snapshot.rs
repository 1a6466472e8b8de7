//! A model's snapshot: which files belong to it, whether the cache holds them all, and fetching those it does not.

use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::super::safetensors::{index, shard_names, single};
use super::super::save::COMPANIONS;
use super::super::{compact, read_config};
use super::client::{Client, Failure, Listing, RemoteFile};
use super::transfer::{Stop, Transfer, wait};
use super::{HubOptions, Wanted, hub_error};
use crate::error::{Error, Result};
use crate::model::Architecture;
use crate::progress::{self, Observer};

const STAGE: &str = "fetch";
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";

/// The directory of the snapshot, fetched first where the cache does not hold all of it.
pub(super) fn fetch(
    wanted: Wanted<'_>,
    options: &HubOptions,
    observer: &mut dyn Observer,
) -> Result<PathBuf> {
    let cached = Cached::new(wanted, options);
    let held = cached.snapshot();
    if options.offline {
        return held.map_err(|missing| {
            let reason = format!("{}, and nothing is fetched offline", cached.lacks(&missing));
            hub_error(wanted.id, reason)
        });
    }
    // A commit never changes.
    if is_commit(wanted.revision)
        && let Ok(directory) = &held
    {
        return Ok(directory.clone());
    }
    let remote = Remote { wanted, options, client: Client::new(options)?, cached };
    let listing = match remote.list(held.is_ok(), observer)? {
        Ok(listing) => listing,
        Err(Failure::Passing(reason)) => {
            return match held {
                Ok(directory) => {
                    tracing::warn!("hub model `{}` is taken from the cache: {reason}", wanted.id);
                    Ok(directory)
                }
                Err(missing) => {
                    let reason = format!("{reason}; {}", remote.cached.lacks(&missing));
                    Err(remote.error(None, Failure::Passing(reason)))
                }
            };
        }
        Err(failure) => return Err(remote.error(None, failure)),
    };
    let directory = remote.cached.repo.pointer_path(&listing.commit);
    if complete(&directory).is_err() {
        remote.fetch(&listing, &directory, observer)?;
    }
    complete(&directory).map_err(|missing| {
        hub_error(wanted.id, format!("was fetched, and yet {}", remote.cached.lacks(&missing)))
    })?;
    // Last, so that a name never stands for half a snapshot; and only if new, for caches that are only read.
    if !is_commit(wanted.revision) && remote.cached.named().as_ref() != Some(&directory) {
        let root = &options.cache_dir;
        remote.cached.repo.create_ref(&listing.commit).map_err(Error::io("write", root))?;
    }
    Ok(directory)
}

/// What the cache holds of a model.
#[derive(Debug)]
struct Cached<'a> {
    wanted: Wanted<'a>,
    root: &'a Path,
    repo: CacheRepo,
}

impl<'a> Cached<'a> {
    fn new(wanted: Wanted<'a>, options: &'a HubOptions) -> Self {
        let (model, revision) = (wanted.model.to_owned(), wanted.revision.to_owned());
        let repo = Cache::new(options.cache_dir.clone());
        let repo = repo.repo(Repo::with_revision(model, RepoType::Model, revision));
        Self { wanted, root: &options.cache_dir, repo }
    }

    /// The directory of the snapshot that the revision stood for last.
    fn named(&self) -> Option<PathBuf> {
        self.repo.get(CONFIG)?.parent().map(Path::to_path_buf)
    }

    /// The directory of the snapshot, or what is missing.
    fn snapshot(&self) -> Result<PathBuf, String> {
        let revision = self.wanted.revision;
        let commit = is_commit(revision).then(|| self.repo.pointer_path(revision));
        let directory = commit.or_else(|| self.named()).ok_or("nothing of it is there")?;
        complete(&directory).map(|()| directory)
    }

    fn lacks(&self, missing: &str) -> String {
        let (revision, place) = (self.wanted.revision, self.root.display());
        format!("the cache at {place} does not hold all of revision `{revision}` ({missing})")
    }
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a snapshot has all that is needed, or what it lacks.
fn complete(directory: &Path) -> Result<(), String> {
    let has = |name: &str| {
        let there = directory.join(name).is_file();
        there.then_some(()).ok_or_else(|| format!("`{name}` is missing"))
    };
    has(CONFIG)?;
    has(TOKENIZER)?;
    let (_, config) = read_config(directory).map_err(|error| error.to_string())?;
    let stem = compact::stem(&config).map_err(|error| error.to_string())?;
    if has(&single(stem)).is_ok() {
        return Ok(());
    }
    let index = directory.join(index(stem));
    if !index.exists() {
        return has(&single(stem));
    }
    let shards = shard_names(&index).map_err(|error| error.to_string())?;
    shards.iter().try_for_each(|shard| has(shard))
}

/// The model on the hub.
struct Remote<'a> {
    wanted: Wanted<'a>,
    options: &'a HubOptions,
    client: Client,
    cached: Cached<'a>,
}

impl Remote<'_> {
    /// The files of the revision, asked for again where nobody answers and the cache cannot answer either.
    fn list(&self, held: bool, observer: &mut dyn Observer) -> Result<Result<Listing, Failure>> {
        let Wanted { model, revision, .. } = self.wanted;
        let retries = if held { 0 } else { self.options.retries };
        // Waiting is watched, though no byte of a file is expected yet.
        progress::stage(STAGE, 0, observer, |observer| {
            let mut failures = 0;
            loop {
                progress::advance(STAGE, 0, 0, observer)?;
                match self.client.list(model, revision) {
                    Err(Failure::Passing(_)) if failures < retries => {
                        wait(failures, &mut || progress::advance(STAGE, 0, 0, observer))?;
                        failures += 1;
                    }
                    answer => return Ok(answer),
                }
            }
        })
    }

    /// Fetches what describes the model, and, if that can be loaded, all the rest.
    fn fetch(&self, listing: &Listing, directory: &Path, observer: &mut dyn Observer) -> Result<()> {
        if let Some(name) = [CONFIG, TOKENIZER].into_iter().find(|name| !listing.has(name)) {
            return Err(hub_error(self.wanted.id, format!("has no `{name}`")));
        }
        self.fetch_files(&[CONFIG], listing, directory, observer)?;
        let (path, config) = read_config(directory)?;
        let stem = compact::stem(&config).and_then(|stem| Architecture::from_config(&config).map(|_| stem));
        let stem = stem.map_err(|error| error.in_config_file(&path))?;

        let (single, index) = (single(stem), index(stem));
        let weights: Vec<String> = if listing.has(&single) {
            vec![single]
        } else if listing.has(&index) {
            self.fetch_files(&[&index], listing, directory, observer)?;
            shard_names(&directory.join(&index))?.into_iter().collect()
        } else {
            return Err(hub_error(self.wanted.id, format!("has neither `{single}` nor `{index}`")));
        };
        if let Some(shard) = weights.iter().find(|shard| !listing.has(shard)) {
            let revision = self.wanted.revision;
            let reason = format!("revision `{revision}` has no `{shard}`, which `{index}` names");
            return Err(hub_error(self.wanted.id, reason));
        }
        // What is required comes last: a snapshot that has it has the others.
        let optional = COMPANIONS.into_iter().filter(|name| *name != TOKENIZER && listing.has(name));
        let weights = weights.iter().map(String::as_str);
        let names: Vec<&str> = optional.chain([TOKENIZER]).chain(weights).collect();
        self.fetch_files(&names, listing, directory, observer)
    }

    fn fetch_files(
        &self,
        names: &[&str],
        listing: &Listing,
        directory: &Path,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let model = self.wanted.model;
        let missing = names.iter().copied().filter(|name| !directory.join(name).is_file());
        let describe = |name| {
            let file = self.client.describe(model, listing, name);
            file.map_err(|failure| self.error(Some(name), failure))
        };
        let files = missing.map(describe).collect::<Result<Vec<RemoteFile>>>()?;
        if files.is_empty() {
            return Ok(());
        }
        let (mut before, total) = (0, files.iter().map(|file| file.size).sum());
        progress::stage(STAGE, total, observer, |observer| {
            for file in &files {
                let transfer = Transfer {
                    client: &self.client,
                    url: self.client.url(model, &listing.commit, &file.name),
                    file,
                    blob: self.cached.repo.blob_path(&file.tag),
                    pointer: directory.join(&file.name),
                    retries: self.options.retries,
                };
                let mut tell = |done: u64| progress::advance(STAGE, before + done, total, observer);
                transfer.run(&mut tell).map_err(|stop| match stop {
                    Stop::Here(error) => error,
                    Stop::Remote(failure) => self.error(Some(&file.name), failure),
                })?;
                before += file.size;
            }
            Ok(())
        })
    }

    /// What a failure means for who asked, and what can be done about it.
    fn error(&self, file: Option<&str>, failure: Failure) -> Error {
        let (id, revision) = (self.wanted.id.to_owned(), self.wanted.revision);
        let hub = &self.options.endpoint;
        let what = match file {
            Some(file) => format!("`{file}` of revision `{revision}`"),
            None => format!("revision `{revision}`"),
        };
        let (status, reason) = match failure {
            Failure::Refused { status: status @ (401 | 403), .. } => {
                let token = if self.options.token.is_some() {
                    "the one given is not enough"
                } else {
                    "none was found"
                };
                let reason = format!(
                    "{hub} refuses {what} ({status}): the model does not exist, or is private or gated and needs a \
                     token; {token} (HF_TOKEN, the file HF_TOKEN_PATH, or what `hf auth login` saved in HF_HOME); the \
                     conditions of a gated model are accepted on its page"
                );
                (Some(status), reason)
            }
            Failure::Refused { status: 404, word } => {
                let reason = match (file, word.as_str()) {
                    (Some(_), _) => format!("{hub} does not have {what} (404)"),
                    (None, "RevisionNotFound") => format!("{hub} has the model, but not {what} (404)"),
                    (None, "RepoNotFound") => {
                        format!("{hub} does not have the model, asked for {what} (404)")
                    }
                    (None, _) => format!("{hub} does not have the model, or not {what} (404)"),
                };
                (Some(404), reason)
            }
            Failure::Refused { status, word } => {
                (Some(status), format!("{hub} refuses {what} ({status} {word})"))
            }
            Failure::Passing(reason) => {
                let kept =
                    file.map_or("", |_| "; what has arrived is kept, and the next attempt goes on from it");
                (None, format!("cannot fetch {what} from {hub}: {reason}{kept}"))
            }
            Failure::Protocol(reason) => {
                (None, format!("{hub} does not answer for {what} as a hub does: {reason}"))
            }
        };
        Error::Hub { id, status, reason }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;

    /// A cache with one model, whose snapshot holds the named files.
    fn cache(root: &Path, files: &[(&str, &str)]) {
        let model = root.join("models--org--name");
        fs::create_dir_all(model.join("refs")).unwrap();
        fs::create_dir_all(model.join("snapshots/abc")).unwrap();
        fs::write(model.join("refs/main"), "abc").unwrap();
        for (name, text) in files {
            fs::write(model.join("snapshots/abc").join(name), text).unwrap();
        }
    }

    fn offline(root: &Path, revision: &str) -> Result<PathBuf> {
        let mut options = HubOptions::new(root);
        options.offline = true;
        fetch(Wanted { id: "org/name", model: "org/name", revision }, &options, &mut ())
    }

    #[test]
    fn a_complete_snapshot_of_the_hub_is_found_and_a_partial_one_is_not() {
        let root = tempfile::tempdir().unwrap();
        let map =
            r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}"#;
        let files = [
            (CONFIG, "{}"),
            (TOKENIZER, "{}"),
            ("model.safetensors.index.json", map),
            ("m-1.safetensors", ""),
            ("m-2.safetensors", ""),
        ];
        for (count, lacks) in [
            (0, "nothing of it is there"),
            (1, "`tokenizer.json` is missing"),
            (2, "`model.safetensors` is missing"),
            (4, "`m-2.safetensors` is missing"),
        ] {
            cache(root.path(), &files[..count]);
            let error = offline(root.path(), "main").unwrap_err().to_string();
            assert!(error.contains(lacks) && error.contains("offline"), "{error}");
        }
        cache(root.path(), &files);
        let found = offline(root.path(), "main").unwrap();
        assert_eq!(found, root.path().join("models--org--name/snapshots/abc"));
        let error = offline(root.path(), "v2").unwrap_err().to_string();
        assert!(error.contains("`v2` (nothing of it is there)"), "{error}");
    }
}
