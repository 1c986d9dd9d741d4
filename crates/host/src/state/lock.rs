//! One daemon per state directory.

use super::durable;
use super::error::StateError;
use super::folder::{MACHINES, MIGRATIONS, StateDir, VOLUMES};
use rustix::fs::FlockOperation;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Held by the daemon for as long as it lives. The kernel lets go of it with the process, however that
/// ends, so there is nothing stale to clean up. (The descriptor closes on exec: a QEMU never inherits it.)
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateDir {
    /// Becomes the directory's daemon: takes the lock, or says who has it, and sweeps what a crash left
    /// unfinished.
    pub fn lock(&self) -> Result<StateLock, StateError> {
        let path = self.root().join("lock");
        let mut file = open(&path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                // Only to say who; it may be just being written.
                let _ = (&mut file).take(20).read_to_string(&mut text);
                return Err(StateError::Locked {
                    path,
                    pid: text.trim().parse().ok(),
                });
            }
            Err(e) => return Err(StateError::io("lock", &path)(e.into())),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(StateError::io("write", &path))?;
        durable::sweep(self.root())?;
        for folder in [VOLUMES, MACHINES, MIGRATIONS] {
            durable::sweep(&self.root().join(folder))?;
        }
        Ok(StateLock { _file: file })
    }
}

fn open(path: &Path) -> Result<File, StateError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(StateError::io("open", path))
}
