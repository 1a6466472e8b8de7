//! Files that are whole or absent.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// Writes a file beside its place, syncs it, and renames it: whoever fails or is killed on the way leaves what was there
/// before, and whoever fails nothing else.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let file = File::create(partial).map_err(Error::io("create", partial))?;
    let placed = fill(file, partial, write)
        .and_then(|()| std::fs::rename(partial, path).map_err(Error::io("rename to", path)));
    if placed.is_err() {
        // Nothing to do about a failure here: the one before is the error that matters.
        let _ = std::fs::remove_file(partial);
    }
    placed?;
    sync_directory(parent(path))
}

/// Waits until the names in a directory are on the disk. Only Unix opens directories as files; elsewhere the rename alone
/// has to do.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(path).and_then(|directory| directory.sync_all()).map_err(Error::io("sync", path))?;
    }
    Ok(())
}

/// The directory that a path lies in.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes a file to the disk, and closes it.
fn fill(file: File, path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let mut file = BufWriter::new(file);
    write(&mut file)?;
    file.flush().and_then(|()| file.get_ref().sync_all()).map_err(Error::io("write", path))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_leaves_what_was_there_and_nothing_else() {
        let scratch = tempfile::tempdir().unwrap();
        let names = || {
            let entries = std::fs::read_dir(scratch.path()).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        let path = scratch.path().join("state");
        let put = |text: &'static str, result: Result<()>| {
            replace(&path, |file| {
                file.write_all(text.as_bytes()).map_err(Error::io("write", &path))?;
                result
            })
        };
        let cancelled = || Err(Error::Cancelled { stage: "heal" });
        assert!(matches!(put("first", cancelled()), Err(Error::Cancelled { .. })));
        assert!(names().is_empty());
        put("first", Ok(())).unwrap();
        assert!(put("second", cancelled()).is_err());
        assert_eq!(
            (names(), std::fs::read_to_string(&path).unwrap()),
            (vec!["state".into()], "first".into())
        );
        // Nor does a place that cannot be taken.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir_all(path.join("full")).unwrap();
        assert!(matches!(put("third", Ok(())), Err(Error::Io { action: "rename to", .. })));
        assert_eq!(names(), ["state"]);
    }
}
