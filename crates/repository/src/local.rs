//! A folder as a store.
//!
//! An object is written under a name of its own in `tmp`, made durable, and only then gets its name: a reader
//! sees it whole or not at all, also after a power cut. A batch is written first and made durable then, by
//! several threads, so that one commit of the file system's journal serves many files. Everything is for the
//! owner alone: it is guests' disks.
//!
//! The lock is a `flock`, so it ends with its process, however that ends. On network file systems it holds
//! as far as theirs does (NFS: between hosts, too).

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;

use crate::error::RepositoryError;
use crate::hash::Hash;
use crate::store::{Key, Lock, Sharing, Shelf, Store};

type Result<T> = std::result::Result<T, RepositoryError>;

/// Threads that make a batch durable: they wait for the disk, and the journal's commit is one for all.
const SYNCING: usize = 8;

/// What is there beside objects.
const LOCK: &str = "lock";
const TMP: &str = "tmp";

/// Objects as files in a folder.
pub struct LocalStore {
    folder: PathBuf,
    /// Of this process at this host, so that names in `tmp` are nobody else's.
    own: String,
    next: AtomicU64,
}

struct FileLock {
    _file: File,
}

impl Lock for FileLock {}

impl LocalStore {
    /// The folder need not be there; only [`lock`](Store::lock) and what writes make it.
    pub fn new(folder: impl Into<PathBuf>) -> Result<LocalStore> {
        let folder = folder.into();
        let own = crate::repository::random_digits()
            .map_err(RepositoryError::io("read", "/dev/urandom"))?;
        Ok(LocalStore {
            folder,
            own,
            next: AtomicU64::new(0),
        })
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(key.path())
    }

    fn make_folder(&self, path: &Path) -> Result<()> {
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(path);
        made.map_err(RepositoryError::io("made", path))
    }

    /// Writes a file in `tmp`, not yet durable.
    fn draft(&self, object: &[u8]) -> Result<Draft> {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.folder.join(TMP).join(format!("{}-{n}", self.own));
        let mut options = OpenOptions::new();
        let open = options.write(true).create_new(true).mode(0o600);
        let file = match open.open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                self.make_folder(&self.folder.join(TMP))?;
                open.open(&path)
            }
            opened => opened,
        };
        let file = file.map_err(RepositoryError::io("made", &path))?;
        let mut draft = Draft { path, file };
        let written = draft.file.write_all(object);
        written.map_err(RepositoryError::io("written", &draft.path))?;
        Ok(draft)
    }

    /// Gives the draft its name, which may make a folder.
    fn name(&self, draft: &Draft, key: &Key) -> Result<()> {
        let path = self.path(key);
        let named = match fs::rename(&draft.path, &path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                self.make_folder(path.parent().unwrap_or(&self.folder))?;
                fs::rename(&draft.path, &path)
            }
            named => named,
        };
        named.map_err(RepositoryError::io("named", path))
    }

    fn folders_of(&self, shelf: Shelf) -> Vec<PathBuf> {
        let fan = |name: &str| {
            let folder = self.folder.join(name);
            (0..=u8::MAX).map(move |fan| folder.join(format!("{fan:02x}")))
        };
        match shelf {
            Shelf::Extents => fan("extents").collect(),
            Shelf::Leaves => fan("leaves").collect(),
            Shelf::Snapshots => vec![self.folder.join("snapshots")],
        }
    }
}

/// A file that has no name yet; gone when this goes.
struct Draft {
    path: PathBuf,
    file: File,
}

impl Draft {
    fn sync(&self) -> Result<()> {
        let synced = self.file.sync_all();
        synced.map_err(RepositoryError::io("made durable", &self.path))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Not there any more if it was named.
        let _ = fs::remove_file(&self.path);
    }
}

fn sync_all(drafts: &[Draft]) -> Result<()> {
    if let [only] = drafts {
        return only.sync();
    }
    let share = drafts.len().div_ceil(SYNCING).max(1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = drafts
            .chunks(share)
            .map(|drafts| scope.spawn(|| drafts.iter().try_for_each(Draft::sync)))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("a file's sync does not panic"))
    })
}

fn sync_folder(path: &Path) -> Result<()> {
    match File::open(path).and_then(|folder| folder.sync_all()) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        synced => synced.map_err(RepositoryError::io("made durable", path)),
    }
}

impl Store for LocalStore {
    fn place(&self) -> String {
        self.folder.display().to_string()
    }

    fn lock(&self, sharing: Sharing) -> Result<Box<dyn Lock>> {
        let path = self.folder.join(LOCK);
        let file = match File::open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                self.make_folder(&self.folder)?;
                let mut options = OpenOptions::new();
                options.write(true).create(true).truncate(false).mode(0o600);
                options.open(&path)
            }
            opened => opened,
        };
        let file = file.map_err(RepositoryError::io("opened", &path))?;
        let (how, by) = match sharing {
            Sharing::Shared => (
                FlockOperation::NonBlockingLockShared,
                "somebody is removing snapshots",
            ),
            Sharing::Alone => (
                FlockOperation::NonBlockingLockExclusive,
                "a snapshot is being made, restored, verified or removed",
            ),
        };
        match rustix::fs::flock(&file, how) {
            Ok(()) => Ok(Box::new(FileLock { _file: file })),
            Err(Errno::WOULDBLOCK) => Err(RepositoryError::Busy {
                place: self.place(),
                by,
            }),
            Err(e) => Err(RepositoryError::io("locked", path)(e.into())),
        }
    }

    fn is_empty(&self) -> Result<bool> {
        let fail = RepositoryError::io("listed", &self.folder);
        let entries = match fs::read_dir(&self.folder) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(true),
            entries => entries.and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>()),
        };
        // A file system of its own begins with a folder for what its repair finds.
        let ours = [LOCK, TMP, "lost+found"];
        Ok(entries
            .map_err(fail)?
            .iter()
            .all(|entry| ours.iter().any(|ours| entry.file_name() == *ours)))
    }

    fn get(&self, key: &Key, limit: usize) -> Result<Option<Vec<u8>>> {
        let path = self.path(key);
        let file = match File::open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(RepositoryError::io("opened", &path))?,
        };
        let mut bytes = Vec::new();
        let read = file.take(limit as u64 + 1).read_to_end(&mut bytes);
        read.map_err(RepositoryError::io("read", path))?;
        Ok(Some(bytes))
    }

    fn has(&self, key: &Key) -> Result<bool> {
        let path = self.path(key);
        match fs::metadata(&path) {
            Ok(found) => Ok(found.is_file()),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(RepositoryError::io("looked at", path)(e)),
        }
    }

    fn put(&self, objects: &[(Key, Vec<u8>)]) -> Result<()> {
        let drafts: Vec<Draft> = objects
            .iter()
            .map(|(_, object)| self.draft(object))
            .collect::<Result<_>>()?;
        sync_all(&drafts)?;
        drafts
            .iter()
            .zip(objects)
            .try_for_each(|(draft, (key, _))| self.name(draft, key))
    }

    fn put_new(&self, key: &Key, object: &[u8]) -> Result<bool> {
        let draft = self.draft(object)?;
        draft.sync()?;
        let path = self.path(key);
        self.make_folder(path.parent().unwrap_or(&self.folder))?;
        let named =
            match rustix::fs::renameat_with(CWD, &draft.path, CWD, &path, RenameFlags::NOREPLACE) {
                // Not every file system can; a link is as good.
                Err(Errno::INVAL | Errno::NOSYS) => fs::hard_link(&draft.path, &path),
                named => named.map_err(Into::into),
            };
        match named {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(RepositoryError::io("named", path)(e)),
        }
    }

    fn barrier(&self) -> Result<()> {
        for shelf in [Shelf::Extents, Shelf::Leaves, Shelf::Snapshots] {
            for folder in self.folders_of(shelf) {
                sync_folder(&folder)?;
            }
        }
        for folder in ["extents", "leaves", ""] {
            sync_folder(&self.folder.join(folder))?;
        }
        match self.folder.parent() {
            Some(above) => sync_folder(above),
            None => Ok(()),
        }
    }

    fn list(&self, shelf: Shelf) -> Result<Vec<(Key, u64)>> {
        let mut found = Vec::new();
        for folder in self.folders_of(shelf) {
            let entries = match fs::read_dir(&folder) {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                entries => entries.map_err(RepositoryError::io("listed", &folder))?,
            };
            for entry in entries {
                let entry = entry.map_err(RepositoryError::io("listed", &folder))?;
                let name = entry.file_name();
                let Some(key) = name.to_str().and_then(|name| key_of(shelf, name)) else {
                    continue;
                };
                // In the place that it would be looked for; else it is nothing of ours.
                if self.path(&key) != entry.path() {
                    continue;
                }
                match entry.metadata() {
                    Ok(data) if data.is_file() => found.push((key, data.len())),
                    Ok(_) => {}
                    Err(e) if e.kind() == ErrorKind::NotFound => {}
                    Err(e) => return Err(RepositoryError::io("looked at", entry.path())(e)),
                }
            }
        }
        Ok(found)
    }

    fn delete(&self, key: &Key) -> Result<()> {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(RepositoryError::io("removed", path)(e))
            }
            _ => Ok(()),
        }
    }

    fn tidy(&self) -> Result<()> {
        let tmp = self.folder.join(TMP);
        let entries = match fs::read_dir(&tmp) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(RepositoryError::io("listed", &tmp))?,
        };
        for entry in entries {
            let path = entry.map_err(RepositoryError::io("listed", &tmp))?.path();
            fs::remove_file(&path).map_err(RepositoryError::io("removed", path))?;
        }
        Ok(())
    }
}

fn key_of(shelf: Shelf, name: &str) -> Option<Key> {
    match shelf {
        Shelf::Extents => name.parse::<Hash>().ok().map(Key::Extent),
        Shelf::Leaves => name.parse::<Hash>().ok().map(Key::Leaf),
        Shelf::Snapshots => name.parse().ok().map(Key::Snapshot),
    }
}
