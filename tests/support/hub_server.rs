//! A server on this machine that speaks the hub's protocol, and breaks it where it is told to.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

pub const MODEL: &str = "org/tiny";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server has been asked.
#[derive(Debug, Clone)]
pub struct Asked {
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
}

/// What the server does instead of what it should.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Ends the connection after so many bytes of the body.
    Break(usize),
    Status(u16, &'static str),
    /// Sends another body.
    Body(Vec<u8>),
    /// Sends no `content-length`, and at most so many bytes.
    Unannounced(usize),
    /// Sends the whole file whatever part is asked for.
    NoRanges,
    /// Sends `content-range` for another part.
    WrongRange,
    RedirectTo(&'static str),
}

#[derive(Debug, Default)]
pub struct State {
    pub files: BTreeMap<String, Vec<u8>>,
    /// Revisions beside `main` and the commit itself.
    pub revisions: Vec<String>,
    pub commit: String,
    /// The one that is asked for, where one is.
    pub token: Option<String>,
    /// Where the bytes of weights are: another server's address.
    pub cdn: String,
    /// Lists names of files and nothing else, as old servers do.
    pub bare_list: bool,
    /// A piece of a path, what to do there, and how often.
    pub faults: Vec<(&'static str, Fault, usize)>,
    pub asked: Vec<Asked>,
}

pub struct Server {
    pub address: String,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(state: State) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                if !serve(&stream, &shared) {
                    break;
                }
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        Self { address, state, thread: Some(thread) }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What was asked since the last time.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state().asked)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(mut stream) = TcpStream::connect(&self.address) {
            let _ = stream.write_all(b"STOP / HTTP/1.1\r\n\r\n");
        }
        // Where it has panicked, its client has failed too.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The plain files of a directory by name.
pub fn files_of(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().map(Result::unwrap);
    let plain = entries.filter(|entry| entry.file_type().unwrap().is_file());
    plain.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn git_id(bytes: &[u8]) -> String {
    hex(&Sha1::new().chain_update(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize())
}

struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn status(status: u16, word: &str) -> Self {
        Self { status, headers: vec![("x-error-code", word.to_owned())], body: b"no".to_vec() }
    }

    fn redirect(location: String) -> Self {
        Self { status: 302, headers: vec![("location", location)], body: Vec::new() }
    }
}

/// Answers one request; `false` where the server is asked to stop.
fn serve(mut stream: &TcpStream, state: &Mutex<State>) -> bool {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return true };
    if request.starts_with("STOP") {
        return false;
    }
    let mut asked =
        Asked { path: request.split(' ').nth(1).unwrap().to_owned(), range: None, authorization: None };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        match name.to_lowercase().as_str() {
            "range" => asked.range = Some(value.to_owned()),
            "authorization" => asked.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let mut state = state.lock().unwrap();
    state.asked.push(asked.clone());
    let fault = state.faults.iter_mut().find(|(place, _, left)| *left > 0 && asked.path.contains(place));
    let fault = fault.map(|(_, fault, left)| {
        *left -= 1;
        fault.clone()
    });
    let ranges = !matches!(fault, Some(Fault::NoRanges));
    let mut reply = match &fault {
        Some(Fault::Status(status, word)) => Reply::status(*status, word),
        Some(Fault::RedirectTo(place)) => Reply::redirect((*place).to_owned()),
        _ => answer(&state, &asked, ranges),
    };
    drop(state);
    let mut sent = usize::MAX;
    let mut announced = Some(reply.body.len());
    match fault {
        Some(Fault::Break(after)) => sent = after,
        Some(Fault::Unannounced(most)) => (announced, sent) = (None, most),
        Some(Fault::Body(body)) => (announced, reply.body) = (Some(body.len()), body),
        Some(Fault::WrongRange) => {
            let range = reply.headers.iter_mut().find(|(name, _)| *name == "content-range").unwrap();
            "bytes 1-2/3".clone_into(&mut range.1);
        }
        _ => {}
    }
    let mut head = format!("HTTP/1.1 {} x\r\nconnection: close\r\n", reply.status);
    for (name, value) in reply.headers {
        write!(head, "{name}: {value}\r\n").unwrap();
    }
    if let Some(len) = announced {
        write!(head, "content-length: {len}\r\n").unwrap();
    }
    head.push_str("\r\n");
    // Who has heard enough hangs up.
    let body = &reply.body[..sent.min(reply.body.len())];
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    true
}

/// What the hub says.
fn answer(state: &State, asked: &Asked, ranges: bool) -> Reply {
    let path = asked.path.split('?').next().unwrap();
    if let Some(id) = path.strip_prefix("/cdn/") {
        let file = state.files.values().find(|bytes| sha256(bytes) == id);
        return content(file.unwrap(), asked.range.as_deref(), ranges);
    }
    if state.token.as_ref().is_some_and(|token| asked.authorization != Some(format!("Bearer {token}"))) {
        return Reply::status(401, "RepoNotFound");
    }
    if let Some(rest) = path.strip_prefix("/api/models/") {
        let Some(revision) = rest.strip_prefix(MODEL).and_then(|rest| rest.strip_prefix("/revision/")) else {
            return Reply::status(404, "RepoNotFound");
        };
        let revision = revision.replace("%2F", "/");
        let known = [state.commit.as_str(), "main"].contains(&revision.as_str());
        if !known && !state.revisions.contains(&revision) {
            return Reply::status(404, "RevisionNotFound");
        }
        let body = list(state).to_string().into_bytes();
        return Reply { status: 200, headers: Vec::new(), body };
    }
    let plain = format!("/api/resolve-cache/models/{MODEL}/{}/", state.commit);
    if let Some(file) = path.strip_prefix(&plain).and_then(|name| state.files.get(name)) {
        let mut reply = content(file, asked.range.as_deref(), ranges);
        reply.headers.push(("etag", format!("\"{}\"", git_id(file))));
        return reply;
    }
    let resolve = format!("/{MODEL}/resolve/{}/", state.commit);
    let Some((name, file)) = path.strip_prefix(&resolve).and_then(|name| state.files.get_key_value(name))
    else {
        return Reply::status(404, "EntryNotFound");
    };
    let mut reply = Reply::redirect(if is_large(name) {
        format!("{}/cdn/{}?signed=yes", state.cdn, sha256(file))
    } else {
        plain + name
    });
    let id = if is_large(name) { sha256(file) } else { git_id(file) };
    reply.headers.push(("x-linked-etag", format!("\"{id}\"")));
    reply.headers.push(("x-linked-size", file.len().to_string()));
    reply.headers.push(("x-repo-commit", state.commit.clone()));
    reply
}

fn content(file: &[u8], range: Option<&str>, ranges: bool) -> Reply {
    let Some(range) = range.filter(|_| ranges) else {
        return Reply { status: 200, headers: Vec::new(), body: file.to_vec() };
    };
    let (start, end) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(file.len(), |end: usize| end + 1);
    let range = format!("bytes {start}-{}/{}", end - 1, file.len());
    Reply { status: 206, headers: vec![("content-range", range)], body: file[start..end].to_vec() }
}

fn list(state: &State) -> Value {
    let siblings = state.files.iter().map(|(name, bytes)| {
        let mut file = json!({"rfilename": name});
        if !state.bare_list {
            (file["size"], file["blobId"]) = (json!(bytes.len()), json!(git_id(bytes)));
        }
        if is_large(name) && !state.bare_list {
            file["lfs"] = json!({"sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 130});
        }
        file
    });
    json!({"id": MODEL, "sha": state.commit, "siblings": siblings.collect::<Vec<_>>()})
}
