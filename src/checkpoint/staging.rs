//! A directory that becomes visible under its name only when it is whole.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::file::{parent, sync_directory};

/// The directory that is written into; removed again unless it is committed.
pub(super) struct Staging {
    pub(super) path: PathBuf,
    committed: bool,
}

/// Whether a checkpoint could be saved at `directory`: it does not exist, or it is empty.
///
/// # Errors
/// [`Error::Format`] for what exists already.
pub fn check_destination(directory: &Path) -> Result<()> {
    if directory.is_dir() {
        let mut entries = std::fs::read_dir(directory).map_err(Error::io("read", directory))?;
        if entries.next().is_some() {
            return Err(Error::format(directory, "exists and is not empty, expected a new directory"));
        }
    } else if directory.exists() {
        return Err(Error::format(directory, "exists and is a file, expected a new directory"));
    }
    Ok(())
}

impl Staging {
    /// Makes the directory to write into, beside the one that it will become.
    pub(super) fn beside(directory: &Path) -> Result<Self> {
        check_destination(directory)?;
        let nameless = || Error::format(directory, "is not a name for a directory");
        let name = directory.file_name().ok_or_else(nameless)?.to_string_lossy();
        let parent = parent(directory);
        std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        // Others may be writing beside this one, or may have died doing so.
        let (process, mut attempt) = (std::process::id(), 0u32);
        loop {
            let path = parent.join(format!(".{name}.{process}-{attempt}.partial"));
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path, committed: false }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists && attempt < 10_000 => attempt += 1,
                Err(error) => return Err(Error::io("create", &path)(error)),
            }
        }
    }

    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        let mut file = File::create(&path).map_err(Error::io("create", &path))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io("write", &path))
    }

    pub(super) fn commit(mut self, directory: &Path) -> Result<()> {
        sync_directory(&self.path)?;
        std::fs::rename(&self.path, directory).map_err(Error::io("rename to", directory))?;
        self.committed = true;
        sync_directory(parent(directory))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing to do about a failure here: the reason for the drop is the error that matters.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
