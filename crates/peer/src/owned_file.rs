//! Text files that say whom to trust: nobody but their owner may write them, and each change is made
//! under a lock from what the file says at that moment, so that a daemon and a command do not undo each
//! other's.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::durable;
use crate::error::{FileStep, PeerError};

/// The file's text; `None` where there is no file.
pub(crate) fn read(path: &Path) -> Result<Option<String>, PeerError> {
    let read_error = |source| file_error(FileStep::Read, path, source);
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(read_error)?,
    };
    let mode = file.metadata().map_err(read_error)?.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(PeerError::PeersExposed {
            path: path.to_owned(),
            mode,
        });
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(read_error)?;
    Ok(Some(text))
}

/// Replaces the file whole, durably.
pub(crate) fn write(path: &Path, text: &str, mode: u32) -> Result<(), PeerError> {
    durable::replace(path, text.as_bytes(), mode)
        .map_err(|source| file_error(FileStep::Write, path, source))
}

/// Keeps other processes, and other stores on the same file, from changing it until dropped. The
/// lock is on a file of its own, since the file itself is replaced by each change.
pub(crate) fn lock(path: &Path) -> Result<File, PeerError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock_path = PathBuf::from(name);
    let lock_error = |source| file_error(FileStep::Lock, &lock_path, source);
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&lock_path)
        .map_err(lock_error)?;
    file.lock().map_err(lock_error)?;
    Ok(file)
}

fn file_error(step: FileStep, path: &Path, source: io::Error) -> PeerError {
    PeerError::File {
        step,
        path: path.to_owned(),
        source,
    }
}
