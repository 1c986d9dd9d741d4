//! The few file operations a journal is made of, and the directory that does them.
//!
//! They are a trait so that the crash tests can stand a simulated disk in for the directory: one that
//! loses whatever was not synced, in any subset, and tears what was being written.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::FlockOperation;

use super::BootId;
use crate::{Operation, VolumeError};

type Result<T> = std::result::Result<T, VolumeError>;

/// Files in one directory. Everything blocks. A name is new when first written to.
pub(super) trait Store: Send + Sync + 'static {
    /// Tells one life of the page cache from the next.
    fn boot(&self) -> BootId;
    /// A number no log of this volume had before.
    fn nonce(&self) -> u64;
    /// For messages.
    fn path(&self, name: &str) -> PathBuf;
    fn list(&self) -> Result<Vec<String>>;
    fn reader(&self, name: &str) -> Result<Box<dyn Read + Send>>;
    /// Into the page cache; survives the daemon but not the host.
    fn write(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()>;
    /// Makes everything written to the file durable; its name needs [`sync_dir`](Self::sync_dir).
    fn sync(&self, name: &str) -> Result<()>;
    fn rename(&self, from: &str, to: &str) -> Result<()>;
    fn remove(&self, name: &str) -> Result<()>;
    /// Makes creations, renames and removals durable.
    fn sync_dir(&self) -> Result<()>;
    /// Lets others have the directory.
    fn release(&self) -> Result<()>;
}

/// A directory of the file system, held by one process at a time through an advisory lock.
pub(super) struct DirStore {
    dir: PathBuf,
    lock: File,
    boot: BootId,
    /// Files written to; removed or renamed ones leave. At most two logs and a snapshot in the making.
    open: Mutex<HashMap<String, Arc<File>>>,
}

impl DirStore {
    /// Takes the directory, which must exist.
    pub fn open(dir: &Path) -> Result<Self> {
        let fail = |op, e| VolumeError::io(dir, op, 0, 0, e);
        let lock = File::open(dir).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => VolumeError::JournalAbsent {
                dir: dir.to_owned(),
            },
            _ => fail(Operation::Open, e),
        })?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(
            |e| match e {
                rustix::io::Errno::WOULDBLOCK => VolumeError::JournalBusy {
                    dir: dir.to_owned(),
                },
                e => fail(Operation::Lock, e.into()),
            },
        )?;
        Ok(DirStore {
            dir: dir.to_owned(),
            lock,
            boot: kernel_boot()?,
            open: Mutex::default(),
        })
    }

    fn file(&self, name: &str) -> Result<Arc<File>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = open.get(name) {
            return Ok(Arc::clone(file));
        }
        let path = self.path(name);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| VolumeError::io(&path, Operation::Open, 0, 0, e))?;
        let file = Arc::new(file);
        open.insert(name.to_owned(), Arc::clone(&file));
        Ok(file)
    }

    fn forget(&self, name: &str) -> Option<Arc<File>> {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name)
    }
}

/// The running kernel's boot id.
fn kernel_boot() -> Result<BootId> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let fail = |e| VolumeError::io(path, Operation::Read, 0, 0, e);
    let text = std::fs::read_to_string(path).map_err(fail)?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let id = u128::from_str_radix(&digits, 16)
        .map_err(|_| fail(io::Error::from(io::ErrorKind::InvalidData)))?;
    Ok(BootId(id.to_be_bytes()))
}

impl Store for DirStore {
    fn boot(&self) -> BootId {
        self.boot
    }

    fn nonce(&self) -> u64 {
        // The standard library's hash keys are random per process and differ per call.
        RandomState::new().build_hasher().finish()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn list(&self) -> Result<Vec<String>> {
        let fail = |e| VolumeError::io(&self.dir, Operation::List, 0, 0, e);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(fail)? {
            // A name that is not UTF-8 is none of ours.
            names.extend(entry.map_err(fail)?.file_name().into_string());
        }
        Ok(names)
    }

    fn reader(&self, name: &str) -> Result<Box<dyn Read + Send>> {
        let path = self.path(name);
        let file =
            File::open(&path).map_err(|e| VolumeError::io(&path, Operation::Open, 0, 0, e))?;
        Ok(Box::new(io::BufReader::with_capacity(1 << 17, file)))
    }

    fn write(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file(name)?.write_all_at(bytes, offset).map_err(|e| {
            VolumeError::io(
                &self.path(name),
                Operation::Write,
                offset,
                bytes.len() as u64,
                e,
            )
        })
    }

    fn sync(&self, name: &str) -> Result<()> {
        self.file(name)?
            .sync_data()
            .map_err(|e| VolumeError::io(&self.path(name), Operation::Sync, 0, 0, e))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let path = self.path(from);
        std::fs::rename(&path, self.path(to))
            .map_err(|e| VolumeError::io(&path, Operation::Rename, 0, 0, e))?;
        if let Some(file) = self.forget(from) {
            // Only logs are written to under their final name.
            if to.starts_with(super::LOG) {
                self.open
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(to.to_owned(), file);
            }
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.forget(name);
        let path = self.path(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(VolumeError::io(&path, Operation::Remove, 0, 0, e))
            }
            _ => Ok(()),
        }
    }

    fn sync_dir(&self) -> Result<()> {
        self.lock
            .sync_all()
            .map_err(|e| VolumeError::io(&self.dir, Operation::Sync, 0, 0, e))
    }

    fn release(&self) -> Result<()> {
        rustix::fs::flock(&self.lock, FlockOperation::Unlock)
            .map_err(|e| VolumeError::io(&self.dir, Operation::Lock, 0, 0, e.into()))
    }
}
