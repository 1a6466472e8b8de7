//! Requests to the hub: the list of a model's files, and their bytes.
//!
//! Of hf-hub 0.5 only the layout of the cache is used. Its transfers cannot be cancelled, do not look whether what
//! arrived is what was announced (a server without ranges makes it append a whole file to half of one), cannot go on
//! from a file that is complete but not yet renamed, and its question for a file's size sends the token to whatever
//! host the hub redirects to.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use ureq::Agent;
use ureq::http::{HeaderMap, Response, Uri};

use super::HubOptions;
use crate::error::{Error, Result};

const MOST_REDIRECTS: usize = 10;
/// A list of ten thousand files has a few megabytes.
const LARGEST_LIST: u64 = 64 << 20;
const CONNECT: Duration = Duration::from_secs(10);
/// Without any byte for so long, a transfer counts as broken.
const SILENCE: Duration = Duration::from_secs(30);

/// Why a request has no usable answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nobody answered, or the answer may be another one later.
    Passing(String),
    /// The hub has a reason to refuse, with its word for it.
    Refused { status: u16, word: String },
    /// The answer is not what a hub gives.
    Protocol(String),
}

/// The last answer, and the headers of the redirects that led to it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response<ureq::Body>,
    redirects: Vec<HeaderMap>,
}

/// What the bytes of a file must hash to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expected {
    /// Large files: the SHA-256 of their bytes.
    Sha256(String),
    /// Files that git holds: the SHA-1 of a header and their bytes.
    GitBlob(String),
    /// The server does not say.
    Unknown,
}

/// A file on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    pub(super) name: String,
    /// Its length in bytes.
    pub(super) size: u64,
    /// What it is called among the blobs of the cache.
    pub(super) tag: String,
    pub(super) expected: Expected,
}

/// The files of one commit.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    files: BTreeMap<String, Sibling>,
}

#[derive(Debug, Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

/// A file as the hub lists it, all but its name only by newer servers that were asked for blobs.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    size: Option<u64>,
    sha256: Option<String>,
}

impl Listing {
    pub(super) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// The file, where the list says all that has to be known of it.
    fn described(&self, name: &str) -> Option<RemoteFile> {
        let file = self.files.get(name)?;
        let (size, tag, expected) = match &file.lfs {
            Some(lfs) => {
                let sha256 = lfs.sha256.clone().filter(|id| is_hex(id, 64))?;
                (lfs.size.or(file.size)?, sha256.clone(), Expected::Sha256(sha256))
            }
            None => {
                let id = file.blob_id.clone().filter(|id| is_hex(id, 40))?;
                (file.size?, id.clone(), Expected::GitBlob(id))
            }
        };
        Some(RemoteFile { name: name.to_owned(), size, tag, expected })
    }
}

impl Answer {
    /// A header of the answer, or of the first redirect that had it.
    fn header(&self, name: &str) -> Option<&str> {
        let all = self.redirects.iter().chain([self.response.headers()]);
        all.filter_map(|headers| headers.get(name)).find_map(|value| value.to_str().ok())
    }

    /// The first byte and the length of the whole file, of an answer that is a part of it.
    pub(super) fn content_range(&self) -> Option<(u64, u64)> {
        let text = self.response.headers().get("content-range")?.to_str().ok()?;
        let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        let (start, _) = range.split_once('-')?;
        Some((start.parse().ok()?, total.parse().ok()?))
    }
}

/// Not `Debug`: it has the token.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    origin: Uri,
    token: Option<String>,
}

impl Client {
    pub(super) fn new(options: &HubOptions) -> Result<Self> {
        let endpoint = options.endpoint.trim_end_matches('/').to_owned();
        let origin = endpoint.parse::<Uri>().ok().filter(is_http);
        let origin = origin
            .ok_or_else(|| Error::argument("endpoint", &options.endpoint, "an http or https address"))?;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("foldgpt/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self { agent: config.into(), endpoint, origin, token: options.token.clone() })
    }

    /// Where the bytes of a file are.
    pub(super) fn url(&self, model: &str, commit: &str, name: &str) -> String {
        format!("{}/{model}/resolve/{commit}/{}", self.endpoint, escaped(name))
    }

    /// The files of the commit that a revision stands for now.
    pub(super) fn list(&self, model: &str, revision: &str) -> Result<Listing, Failure> {
        let url = format!("{}/api/models/{model}/revision/{}?blobs=true", self.endpoint, escaped(revision));
        let mut answer = self.get(&url, None)?;
        let body = answer.response.body_mut().with_config().limit(LARGEST_LIST).read_to_vec();
        let body = body.map_err(|error| failure(&error))?;
        let info: Info = serde_json::from_slice(&body)
            .map_err(|error| Failure::Protocol(format!("the list of files is not one: {error}")))?;
        // Both become paths in the cache.
        if info.sha.is_empty() || info.sha.len() > 64 || !info.sha.bytes().all(|b| b.is_ascii_alphanumeric())
        {
            return Err(Failure::Protocol(format!("`{}` is no commit", info.sha)));
        }
        let plain =
            |file: &Sibling| !file.rfilename.starts_with('.') && !file.rfilename.contains(['/', '\\']);
        let files = info.siblings.into_iter().filter(plain).map(|file| (file.rfilename.clone(), file));
        Ok(Listing { commit: info.sha, files: files.collect() })
    }

    /// A listed file, asked for by itself where the list has only its name.
    pub(super) fn describe(&self, model: &str, listing: &Listing, name: &str) -> Result<RemoteFile, Failure> {
        if let Some(file) = listing.described(name) {
            return Ok(file);
        }
        let answer = self.get(&self.url(model, &listing.commit, name), Some("bytes=0-0"))?;
        let linked = answer.header("x-linked-etag").map(unquoted);
        let tag = linked.or_else(|| answer.header("etag").map(unquoted));
        let sure = |tag: &&str| !tag.is_empty() && tag.len() <= 128 && tag.bytes().all(is_tag_byte);
        let Some(tag) = tag.filter(sure) else {
            return Err(Failure::Protocol(format!("etag is {tag:?}, expected the name of a blob")));
        };
        let whole = || answer.response.body().content_length().filter(|_| answer.response.status() == 200);
        let size = answer.header("x-linked-size").and_then(|size| size.parse().ok());
        let size = size.or_else(|| answer.content_range().map(|(_, total)| total)).or_else(whole);
        let size = size.ok_or_else(|| Failure::Protocol("no length of the file".to_owned()))?;
        let sha256 = linked.filter(|tag| is_hex(tag, 64));
        let expected = sha256.map_or(Expected::Unknown, |tag| Expected::Sha256(tag.to_owned()));
        Ok(RemoteFile { name: name.to_owned(), size, tag: tag.to_owned(), expected })
    }

    /// The answer behind all redirects, which are followed here so that no other host sees the token.
    pub(super) fn get(&self, url: &str, range: Option<&str>) -> Result<Answer, Failure> {
        let bad = |reason: String| Failure::Protocol(reason);
        let mut uri: Uri = url.parse().map_err(|error| bad(format!("`{url}` is no address: {error}")))?;
        let mut redirects = Vec::new();
        while redirects.len() <= MOST_REDIRECTS {
            let response = self.call(&uri, range)?;
            let status = response.status();
            let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
            if status.is_success() {
                return Ok(Answer { response, redirects });
            }
            if status.is_redirection() {
                let location = header("location").ok_or_else(|| bad("a redirect to nowhere".to_owned()))?;
                uri = target(&uri, location).ok_or_else(|| bad(format!("a redirect to `{location}`")))?;
                redirects.push(response.headers().clone());
                continue;
            }
            if status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429) {
                return Err(Failure::Passing(format!("the answer is {status}")));
            }
            let word = header("x-error-code").unwrap_or_default().to_owned();
            return Err(Failure::Refused { status: status.as_u16(), word });
        }
        Err(bad(format!("more than {MOST_REDIRECTS} redirects")))
    }

    fn call(&self, uri: &Uri, range: Option<&str>) -> Result<Response<ureq::Body>, Failure> {
        // Compressed bytes could not be counted, nor asked for by ranges.
        let mut request = self.agent.get(uri).header("accept-encoding", "identity");
        if let Some(range) = range {
            request = request.header("range", range);
        }
        if let Some(token) = self.token.as_ref().filter(|_| is_same_origin(uri, &self.origin)) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        // No proxy reaches this machine by a name that means itself.
        let local = matches!(uri.host(), Some("localhost" | "127.0.0.1" | "[::1]"));
        let call = if local { request.config().proxy(None).build().call() } else { request.call() };
        call.map_err(|error| failure(&error))
    }
}

fn failure(error: &ureq::Error) -> Failure {
    match error {
        ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::BodyExceedsLimit(_) => {
            Failure::Protocol(error.to_string())
        }
        _ => Failure::Passing(error.to_string()),
    }
}

fn is_http(uri: &Uri) -> bool {
    matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty())
}

fn is_same_origin(a: &Uri, b: &Uri) -> bool {
    (a.scheme(), a.authority()) == (b.scheme(), b.authority())
}

/// Where a redirect leads: to an address, or to a path of the same server; never from TLS to none.
fn target(from: &Uri, location: &str) -> Option<Uri> {
    let to: Uri = location.parse().ok()?;
    if to.authority().is_some() {
        let exposed = from.scheme_str() == Some("https") && to.scheme_str() != Some("https");
        return Some(to).filter(|to| is_http(to) && !exposed);
    }
    let mut parts = from.clone().into_parts();
    parts.path_and_query = to.into_parts().path_and_query;
    Uri::from_parts(parts).ok()
}

fn unquoted(etag: &str) -> &str {
    etag.trim_start_matches("W/").trim_matches('"')
}

fn is_tag_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A text as one segment of a path.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(byte.into());
        } else {
            escaped.push('%');
            escaped.push_str(&crate::data::hex(&[byte]).to_uppercase());
        }
    }
    escaped
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn hub_redirects_stay_on_the_server_or_name_another() {
        let uri = |text: &str| text.parse::<Uri>().unwrap();
        let from = uri("https://hub.co/org/name?a=b");
        assert_eq!(target(&from, "/api/x?y=z").unwrap(), uri("https://hub.co/api/x?y=z"));
        assert_eq!(target(&from, "https://cdn.co/x").unwrap(), uri("https://cdn.co/x"));
        for bad in ["http://cdn.co/x", "ftp://cdn.co/x", "x y", "elsewhere"] {
            assert!(target(&from, bad).is_none(), "{bad}");
        }
        assert!(is_same_origin(&uri("https://hub.co/a"), &uri("https://hub.co")));
        assert!(!is_same_origin(&uri("https://hub.co:444/a"), &uri("https://hub.co")));
        assert!(!is_same_origin(&uri("http://hub.co/a"), &uri("https://hub.co")));
    }

    #[test]
    fn hub_revisions_are_one_segment_of_a_path() {
        assert_eq!(escaped("refs/pr/1 ü"), "refs%2Fpr%2F1%20%C3%BC");
    }
}
