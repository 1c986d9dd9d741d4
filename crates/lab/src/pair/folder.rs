//! The folder of everything a pair of hosts writes.
//!
//! It lies in `/tmp` under a short name, because the daemons' sockets lie deep in it and a unix socket's
//! path has 107 bytes at most. An interrupt leaves it behind (only network and processes are ended then),
//! and it can hold gigabytes: so its name says whose it is, and whoever makes one removes those whose
//! owner is gone.

use super::PairError;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

const PARENT: &str = "/tmp";

/// `wl`, the owner's process id, a dot, a number.
const PREFIX: &str = "wl";

/// Written into a folder that is to stay.
const KEPT: &str = "kept";

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
        std::fs::create_dir(&path).map_err(PairError::io("create", &path))?;
        Ok(Folder { path, keep: false })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn keep(&mut self) {
        self.keep = true;
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
