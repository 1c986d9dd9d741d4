//! The folder of everything a pair of hosts writes.
//!
//! It lies in `/tmp` under a short name, because the daemons' sockets lie deep in it and a unix socket's
//! path has 107 bytes at most. It can hold gigabytes, so an interrupt removes it too; and its name says
//! whose it is, so that whoever makes one removes those whose owner was killed.

use super::PairError;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

const PARENT: &str = "/tmp";

/// `wl`, the owner's process id, a dot, a number.
const PREFIX: &str = "wl";

/// Written into a folder that is to stay.
const KEPT: &str = "kept";

/// Folders of this process that are to go when it is interrupted. Bounded by the pairs alive.
static ALIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn alive() -> MutexGuard<'static, Vec<PathBuf>> {
    // A list of paths: whoever panicked holding it left it whole.
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes every folder that is not to be kept, for the way out on an interrupt. Whoever writes there
/// must have been ended. Keeps the lock, so that none is made after.
pub(crate) fn remove_all_for_exit() {
    let alive = alive();
    for path in alive.iter() {
        let _ = std::fs::remove_dir_all(path);
    }
    std::mem::forget(alive);
}

/// Removed when dropped, unless kept.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Folder {
    pub fn new() -> Result<Folder, PairError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        sweep();
        let number = COUNT.fetch_add(1, Relaxed);
        let name = format!("{PREFIX}{}.{number}", std::process::id());
        let path = Path::new(PARENT).join(name);
        let mut alive = alive();
        std::fs::create_dir(&path).map_err(PairError::io("create", &path))?;
        alive.push(path.clone());
        Ok(Folder { path, keep: false })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn keep(&mut self) {
        self.keep = true;
        alive().retain(|path| *path != self.path);
        // Without the mark the next run would remove it.
        if let Err(error) = std::fs::write(self.path.join(KEPT), "") {
            tracing::warn!(%error, "the folder will not be kept beyond the next run");
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "a folder is left behind");
        }
        alive().retain(|path| *path != self.path);
    }
}

fn sweep() {
    let Ok(entries) = std::fs::read_dir(PARENT) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(owner) = name.to_str().and_then(owner) else {
            continue;
        };
        let alive = Path::new("/proc").join(owner.to_string()).exists();
        if !alive && !entry.path().join(KEPT).exists() {
            // Someone else's sweep may have been first.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// The process that made a folder of this name, if it is one of ours.
fn owner(name: &str) -> Option<u32> {
    let (pid, number) = name.strip_prefix(PREFIX)?.split_once('.')?;
    number.parse::<u32>().ok()?;
    pid.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_names_are_ours() {
        assert_eq!(owner("wl17.3"), Some(17));
        for other in ["wl", "wl17", "wlx.3", "w17.3", "wl17.x", "wl17.3.4"] {
            assert_eq!(owner(other), None, "{other}");
        }
    }
}
