//! Files that are whole or absent.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// Writes a file beside its place, syncs it, and renames it: whoever is killed on the way leaves what was there before.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let mut file = BufWriter::new(File::create(partial).map_err(Error::io("create", partial))?);
    write(&mut file)?;
    let synced = file.flush().and_then(|()| file.get_ref().sync_all());
    synced.map_err(Error::io("write", partial))?;
    std::fs::rename(partial, path).map_err(Error::io("rename to", path))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Only Unix opens directories as files; elsewhere the rename alone has to do.
    if cfg!(unix) {
        File::open(parent).and_then(|directory| directory.sync_all()).map_err(Error::io("sync", parent))?;
    }
    Ok(())
}
