//! One file into the cache: a part that grows, is checked when it is whole, and only then gets its name.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha1::Sha1;
use sha2::digest::DynDigest;
use sha2::{Digest, Sha256};

use super::client::{Client, Expected, Failure, RemoteFile};
use crate::error::{Error, Result};

/// How often waiting looks up whether it should stop.
const NAP: Duration = Duration::from_millis(100);
const BUFFER: usize = 1 << 18;

/// What ends a transfer early.
#[derive(Debug)]
pub(super) enum Stop {
    /// The server, or the way to it.
    Remote(Failure),
    /// The disk, or the observer.
    Here(Error),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Remote(failure)
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Here(error)
    }
}

/// Told the bytes of a file that are there; fails where the work should stop.
pub(super) type Progress<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

pub(super) struct Transfer<'a> {
    pub(super) client: &'a Client,
    pub(super) url: String,
    pub(super) file: &'a RemoteFile,
    /// Where the bytes go, named by what they are; the part lies beside it, as hf-hub would leave and find it.
    pub(super) blob: PathBuf,
    /// The file's name in the snapshot.
    pub(super) pointer: PathBuf,
    pub(super) retries: u32,
}

impl Transfer<'_> {
    /// Brings the file into the cache, from where an earlier transfer stopped.
    pub(super) fn run(&self, progress: Progress<'_>) -> Result<(), Stop> {
        for path in [&self.blob, &self.pointer] {
            let directory = path.parent().unwrap_or(path);
            std::fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
        }
        let _lock = lock(&self.blob.with_extension("lock"), progress)?;
        // Another process may have fetched it meanwhile, or another revision has the same file.
        let whole = std::fs::metadata(&self.blob).is_ok_and(|blob| blob.len() == self.file.size);
        if !whole {
            let mut part = Part::open(self.blob.with_extension("part"), self.file, progress)?;
            self.fill(&mut part, progress)?;
            part.finish(self.file, &self.blob)?;
        }
        progress(self.file.size)?;
        Ok(link(&self.blob, &self.pointer)?)
    }

    fn fill(&self, part: &mut Part, progress: Progress<'_>) -> Result<(), Stop> {
        let mut failures = 0;
        while part.len < self.file.size {
            let before = part.len;
            let Err(stop) = self.request(part, progress) else { continue };
            if part.len > before {
                failures = 0;
            }
            match stop {
                Stop::Remote(Failure::Passing(_)) if failures < self.retries => {
                    wait(failures, &mut || progress(part.len))?;
                    failures += 1;
                }
                stop => return Err(stop),
            }
        }
        Ok(())
    }

    /// One request for all that is missing.
    fn request(&self, part: &mut Part, progress: Progress<'_>) -> Result<(), Stop> {
        let size = self.file.size;
        let range = (part.len > 0).then(|| format!("bytes={}-", part.len));
        let answer = self.client.get(&self.url, range.as_deref())?;
        let bad = |reason: String| Stop::Remote(Failure::Protocol(reason));
        if answer.response.status() == 206 {
            let found = answer.content_range();
            if found != Some((part.len, size)) {
                let found = found.map_or("nothing".to_owned(), |(start, of)| format!("byte {start} of {of}"));
                return Err(bad(format!("a part from {found}, expected byte {} of {size}", part.len)));
            }
        } else {
            // A server without ranges sends the file from its beginning.
            part.restart(self.file)?;
            if let Some(len) = answer.response.body().content_length().filter(|len| *len != size) {
                return Err(bad(format!("{len} bytes are announced, expected {size}")));
            }
        }
        let mut body = answer.response.into_body().into_reader();
        let mut buffer = vec![0u8; BUFFER];
        progress(part.len)?;
        loop {
            let read = body.read(&mut buffer).map_err(|error| {
                Failure::Passing(format!("broken off after {} of {size} bytes: {error}", part.len))
            })?;
            let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
            if bytes.len() as u64 > size - part.len {
                part.restart(self.file)?;
                return Err(bad(format!("more bytes than the {size} that were expected")));
            }
            part.append(bytes)?;
            progress(part.len)?;
        }
        if part.len < size {
            let reason = format!("broken off after {} of {size} bytes", part.len);
            return Err(Failure::Passing(reason).into());
        }
        Ok(())
    }
}

/// What has arrived of a file.
struct Part {
    path: PathBuf,
    file: File,
    len: u64,
    digest: Option<Box<dyn DynDigest>>,
}

impl Part {
    /// The part that was left, or a new one.
    fn open(path: PathBuf, remote: &RemoteFile, progress: Progress<'_>) -> Result<Self> {
        let options = OpenOptions::new().read(true).append(true).create(true).open(&path);
        let mut part = Self {
            file: options.map_err(Error::io("open", &path))?,
            path,
            len: 0,
            digest: digest(&remote.expected, remote.size),
        };
        let left = part.file.metadata().map_err(Error::io("read", &part.path))?.len();
        if left > remote.size {
            part.restart(remote)?;
            return Ok(part);
        }
        let mut buffer = vec![0u8; BUFFER];
        while part.len < left {
            let read = part.file.read(&mut buffer).map_err(Error::io("read", &part.path))?;
            let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
            if let Some(digest) = &mut part.digest {
                digest.update(bytes);
            }
            part.len += bytes.len() as u64;
            progress(part.len)?;
        }
        Ok(part)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))?;
        if let Some(digest) = &mut self.digest {
            digest.update(bytes);
        }
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self, remote: &RemoteFile) -> Result<()> {
        self.file.set_len(0).map_err(Error::io("write", &self.path))?;
        self.file.seek(SeekFrom::Start(0)).map_err(Error::io("write", &self.path))?;
        (self.len, self.digest) = (0, digest(&remote.expected, remote.size));
        Ok(())
    }

    /// Gives the part the name of what it is, if it is that.
    fn finish(mut self, remote: &RemoteFile, blob: &Path) -> Result<(), Stop> {
        let found = self.digest.take().map(|digest| crate::data::hex(&digest.finalize()));
        if let (Some(found), Expected::Sha256(id) | Expected::GitBlob(id)) = (found, &remote.expected)
            && found != *id
        {
            // Going on from it could never succeed.
            std::fs::remove_file(&self.path).map_err(Error::io("remove", &self.path))?;
            let reason = format!("the bytes hash to {found}, expected {id}; they were thrown away");
            return Err(Failure::Protocol(reason).into());
        }
        self.file.sync_all().map_err(Error::io("sync", &self.path))?;
        drop(self.file);
        Ok(std::fs::rename(&self.path, blob).map_err(Error::io("rename", &self.path))?)
    }
}

fn digest(expected: &Expected, size: u64) -> Option<Box<dyn DynDigest>> {
    match expected {
        Expected::Sha256(_) => Some(Box::new(Sha256::new())),
        Expected::GitBlob(_) => {
            let mut sha1 = Sha1::new();
            Digest::update(&mut sha1, format!("blob {size}\0"));
            Some(Box::new(sha1))
        }
        Expected::Unknown => None,
    }
}

/// Waits the longer, the more often it failed before.
pub(super) fn wait(failures: u32, progress: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    for _ in 0..5 << failures.min(5) {
        progress()?;
        std::thread::sleep(NAP);
    }
    Ok(())
}

/// One process at a time writes a part; the system takes the lock back from one that dies.
fn lock(path: &Path, progress: Progress<'_>) -> Result<File> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                progress(0)?;
                std::thread::sleep(NAP);
            }
            // Some network file systems have no locks; others' writes are then told by the hash.
            Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {
                return Ok(file);
            }
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
        }
    }
}

/// Puts a blob into a snapshot.
fn link(blob: &Path, pointer: &Path) -> Result<()> {
    if pointer.exists() {
        return Ok(());
    }
    // One that leads nowhere would be in the way.
    if pointer.is_symlink() {
        std::fs::remove_file(pointer).map_err(Error::io("remove", pointer))?;
    }
    // Relative, so that the cache can be moved.
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(
        Path::new("../../blobs").join(blob.file_name().unwrap_or_default()),
        pointer,
    );
    // Links need a privilege on Windows.
    #[cfg(not(unix))]
    let linked = std::fs::rename(blob, pointer);
    linked.map_err(Error::io("create", pointer))
}
