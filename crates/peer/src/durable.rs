//! Small files that are there wholly or not at all, whenever the power goes.
//!
//! Content is written to a new file beside the target, synced, and then given the target's name;
//! the folder is synced last. A file left over by a crash has a name of its own and is never read.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Makes `path` with this content and mode; `AlreadyExists` if it is there, which is left untouched.
pub(crate) fn create(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    publish(path, content, mode, |new| std::fs::hard_link(new, path))
}

/// Makes `path` with this content and mode, in place of what was there.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    publish(path, content, mode, |new| std::fs::rename(new, path))
}

fn publish(
    path: &Path,
    content: &[u8],
    mode: u32,
    give_name: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let new = Unpublished(beside(path)?);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&new.0)?;
    file.write_all(content)?;
    file.sync_all()?;
    give_name(&new.0)?;
    File::open(folder_of(path))?.sync_all()
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

fn beside(path: &Path) -> io::Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut unique = std::ffi::OsString::from(".");
    unique.push(name);
    let serial = NEXT.fetch_add(1, Ordering::Relaxed);
    unique.push(format!(".{}.{serial}.new", std::process::id()));
    // A process of the same number may have died here before.
    let path = folder_of(path).join(unique);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(path),
    }
}

/// The new file under its first name, which goes whatever happened: after a rename it is gone
/// already, after a link the target holds the content.
struct Unpublished(PathBuf);

impl Drop for Unpublished {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn create_never_overwrites_and_replace_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        create(&path, b"one", 0o600).unwrap();
        let error = create(&path, b"two", 0o600).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        replace(&path, b"two", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
