//! Checkpoints by their Hugging Face hub id: looked up in the cache, and fetched into it.

#[cfg(feature = "hub")]
mod client;
mod options;
#[cfg(feature = "hub")]
mod snapshot;
#[cfg(feature = "hub")]
mod transfer;

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::progress::Observer;

pub use options::HubOptions;

/// A model on the hub, as it was asked for.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
struct Wanted<'a> {
    /// The id as given, for errors.
    id: &'a str,
    /// `org/name`.
    model: &'a str,
    /// A branch, a tag or a commit.
    revision: &'a str,
}

/// Whether the text has the form of a hub id, `org/name` or `org/name@revision`.
pub(super) fn is_hub_id(text: &str) -> bool {
    parts(text).is_some()
}

/// The model and the revision that an id names. Names of models hold no `@`, so that there is one way to read it.
fn parts(text: &str) -> Option<(&str, Option<&str>)> {
    let (model, revision) = match text.split_once('@') {
        Some((model, revision)) => (model, Some(revision)),
        None => (text, None),
    };
    let (org, name) = model.split_once('/')?;
    (is_name(org) && is_name(name) && revision.is_none_or(is_revision)).then_some((model, revision))
}

fn is_name(part: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !part.is_empty()
        && part.len() <= 96
        && part.bytes().all(known)
        && !part.starts_with(['-', '.'])
        && !part.ends_with(['-', '.'])
        && !part.contains("..")
        && !part.contains("--")
}

/// Whether git would take the text as the name of a branch; it becomes a path in the cache.
fn is_revision(text: &str) -> bool {
    let strange = |c: char| c.is_control() || c.is_whitespace() || "~^:?*[\\\"<>|".contains(c);
    text.len() <= 255
        && !text.contains(strange)
        && !text.contains("..")
        && text
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with('.') && !part.ends_with(['.', ' ']))
}

/// The directory of the snapshot that an id names, fetched into the cache first where it is not all there.
pub(super) fn fetch(id: &str, options: &HubOptions, observer: &mut dyn Observer) -> Result<PathBuf> {
    let Some((model, named)) = parts(id) else {
        return Err(hub_error(id, "is no hub id, expected `org/name` or `org/name@revision`"));
    };
    let revision = match (named, options.revision.as_deref()) {
        (Some(named), Some(other)) if named != other => {
            return Err(hub_error(id, format!("names a revision, and the options another one, `{other}`")));
        }
        (named, other) => named.or(other).unwrap_or("main"),
    };
    if !is_revision(revision) {
        return Err(hub_error(id, format!("`{revision}` is no revision, expected a branch, tag or commit")));
    }
    fetch_wanted(Wanted { id, model, revision }, options, observer)
}

#[cfg(feature = "hub")]
use snapshot::fetch as fetch_wanted;

/// Not without the feature `hub`.
#[cfg(not(feature = "hub"))]
fn fetch_wanted(wanted: Wanted<'_>, _: &HubOptions, _: &mut dyn Observer) -> Result<PathBuf> {
    let reason = "cannot be fetched: build with the feature `hub`, or give the path of a checkpoint";
    Err(hub_error(wanted.id, reason))
}

fn hub_error(id: &str, reason: impl Into<String>) -> Error {
    Error::Hub { id: id.to_owned(), status: None, reason: reason.into() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["org/name", "HuggingFaceTB/SmolLM2-135M", "a/b_c.d", "org/name@main", "org/name@refs/pr/1"]
        {
            assert!(is_hub_id(id), "{id}");
        }
        for path in [
            "name",
            "/name",
            "org/",
            "a/b/c",
            "./model",
            "../model",
            "a/..",
            "a b/c",
            "org/na--me",
            "~/m",
            "org/name@",
            "org/name@../main",
            "org/name@/main",
            "org/name@a b",
            "org@x/name",
        ] {
            assert!(!is_hub_id(path), "{path}");
        }
        assert_eq!(parts("org/name@v1.0"), Some(("org/name", Some("v1.0"))));
    }

    #[test]
    fn two_revisions_that_differ_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let mut options = HubOptions::new(root.path());
        options.revision = Some("b".to_owned());
        let error = fetch("org/name@a", &options, &mut ()).unwrap_err().to_string();
        assert!(error.contains("org/name@a") && error.contains("`b`"), "{error}");
        options.revision = Some("../b".to_owned());
        let error = fetch("org/name", &options, &mut ()).unwrap_err().to_string();
        assert!(error.contains("`../b` is no revision"), "{error}");
    }

    #[cfg(not(feature = "hub"))]
    #[test]
    fn fetching_asks_for_the_feature() {
        let root = tempfile::tempdir().unwrap();
        let error = fetch("org/name", &HubOptions::new(root.path()), &mut ()).unwrap_err();
        assert!(error.to_string().contains("feature `hub`"));
    }
}
