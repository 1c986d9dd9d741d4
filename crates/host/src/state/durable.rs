//! Files that are replaced whole or not at all, whatever happens in between.
//!
//! A write goes to a file of its own beside the target, is fsynced, renamed over the target, and the folder
//! is fsynced. A reader (or a daemon started after a power cut) sees the old content or the new content.
//! A folder with several files is made the same way: filled under a draft name, then renamed. What a crash
//! leaves behind begins with [`DRAFT`], which no name can, and the next daemon sweeps it.

use super::error::StateError;
use rustix::fs::{CWD, RenameFlags};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// How the name of everything unfinished begins.
pub(super) const DRAFT: &str = ".draft-";

/// No record comes near this; a larger file is not one of ours, and is not read into memory.
const MAX_RECORD: u64 = 4 << 20;

/// A path beside `target` that nobody else uses: drafts of one process differ by number, of two by pid.
pub(super) fn draft_beside(target: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!("{DRAFT}{name}-{}-{number}", std::process::id()))
}

/// Replaces the content of `path` durably. `mode` holds whatever the umask.
pub(super) fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), StateError> {
    let draft = draft_beside(path);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&draft)?;
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    })();
    if let Err(source) = written {
        // The draft is swept later if even this fails.
        let _ = fs::remove_file(&draft);
        return Err(StateError::io("write", path)(source));
    }
    sync_folder_of(path)
}

/// Renames a filled draft folder to its name; fails if the name is taken.
pub(super) fn publish(draft: &Path, target: &Path) -> Result<(), StateError> {
    sync(draft)?;
    rustix::fs::renameat_with(CWD, draft, CWD, target, RenameFlags::NOREPLACE)
        .map_err(|e| StateError::io("make", target)(e.into()))?;
    sync_folder_of(target)
}

/// Makes a folder gone in one step, then deletes what was in it.
pub(super) fn discard(folder: &Path) -> Result<(), StateError> {
    let draft = draft_beside(folder);
    fs::rename(folder, &draft).map_err(StateError::io("remove", folder))?;
    sync_folder_of(folder)?;
    fs::remove_dir_all(&draft).map_err(StateError::io("remove", &draft))
}

/// Deletes what unfinished writes left in `folder`. Only while nobody else writes there.
pub(super) fn sweep(folder: &Path) -> Result<(), StateError> {
    for entry in fs::read_dir(folder).map_err(StateError::io("read", folder))? {
        let entry = entry.map_err(StateError::io("read", folder))?;
        if !entry.file_name().to_string_lossy().starts_with(DRAFT) {
            continue;
        }
        let path = entry.path();
        let is_folder = entry.file_type().is_ok_and(|t| t.is_dir());
        let removed = if is_folder {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(StateError::io("remove", &path))?;
    }
    Ok(())
}

/// Makes a folder (mode 0700) durable in its parent; an existing one is left alone.
pub(super) fn folder(path: &Path) -> Result<(), StateError> {
    use std::os::unix::fs::DirBuilderExt;
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => sync_folder_of(path),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(e) => Err(StateError::io("make", path)(e)),
    }
}

/// A record's text. `Ok(None)` if there is no such file.
pub(super) fn read(path: &Path) -> Result<Option<String>, StateError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(StateError::io("read", path)(e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_RECORD + 1)
        .read_to_end(&mut bytes)
        .map_err(StateError::io("read", path))?;
    let damaged = |problem: String| StateError::Damaged {
        path: path.to_path_buf(),
        problem,
    };
    if bytes.len() as u64 > MAX_RECORD {
        return Err(damaged(format!("it is larger than {MAX_RECORD} bytes")));
    }
    String::from_utf8(bytes).map(Some).map_err(|e| {
        damaged(format!(
            "it is not text from byte {} on",
            e.utf8_error().valid_up_to()
        ))
    })
}

pub(super) fn sync(path: &Path) -> Result<(), StateError> {
    File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(StateError::io("fsync", path))
}

pub(super) fn sync_folder_of(path: &Path) -> Result<(), StateError> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync(parent),
        _ => sync(Path::new(".")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn replacing_keeps_the_mode_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        replace(&path, b"one", 0o600).unwrap();
        replace(&path, b"two", 0o600).unwrap();
        assert_eq!(read(&path).unwrap().as_deref(), Some("two"));
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_old_content_and_no_draft() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("taken");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("x"), "").unwrap();
        assert!(matches!(
            replace(&target, b"new", 0o600),
            Err(StateError::Io { .. })
        ));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn publishing_never_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let (draft, target) = (dir.path().join(".draft-x"), dir.path().join("x"));
        fs::create_dir(&draft).unwrap();
        fs::create_dir(&target).unwrap();
        assert!(publish(&draft, &target).is_err());
        assert!(draft.exists());
    }

    #[test]
    fn sweeping_takes_drafts_only() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("keep"), "").unwrap();
        fs::write(dir.path().join(".draft-a"), "").unwrap();
        fs::create_dir_all(dir.path().join(".draft-b/c")).unwrap();
        sweep(dir.path()).unwrap();
        let left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["keep"]);
    }

    #[test]
    fn what_is_not_text_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        fs::write(&path, [b'a', 0xff]).unwrap();
        let error = read(&path).unwrap_err();
        assert!(
            error.to_string().contains("not text from byte 1"),
            "{error}"
        );
    }
}
