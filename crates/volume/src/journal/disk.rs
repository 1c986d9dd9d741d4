//! A simulated disk for the crash tests: as kind as a file system has to be, and no kinder.
//!
//! The page cache is what everybody sees. When the host dies, a file keeps what was synced; of every
//! sector written since, any of its versions may be there, or a mixture of two. Names created, renamed
//! and removed since the last sync of the directory may each have happened or not. When the daemon dies,
//! the page cache stays, with whatever part of the running write had got there.

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::BootId;
use super::store::Store;
use crate::{Operation, VolumeError};

type Result<T> = std::result::Result<T, VolumeError>;

const SECTOR: usize = 512;

#[derive(Default)]
struct SimFile {
    cache: Vec<u8>,
    durable: Vec<u8>,
    /// Writes since the last sync, oldest first.
    pending: Vec<(usize, Vec<u8>)>,
}

#[derive(Clone)]
enum NameChange {
    Create(String, u64),
    /// Of this very file, whatever else had the name before.
    Rename(String, String, u64),
    Remove(String),
}

#[derive(Default)]
struct Inner {
    rng: u64,
    boot: u8,
    nonce: u64,
    next_file: u64,
    files: BTreeMap<u64, SimFile>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    name_changes: Vec<NameChange>,
    fuse: Option<u32>,
    dead: bool,
    fail_next_write: bool,
}

pub(super) struct Disk(Mutex<Inner>);

/// How far an operation gets.
enum Luck {
    Done,
    /// Part of it, and then the machine (or just the write) fails.
    Partly,
    Not,
}

impl Inner {
    fn random(&mut self, below: u64) -> u64 {
        // splitmix64
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.rng;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }

    fn luck(&mut self) -> Luck {
        if self.dead {
            return Luck::Not;
        }
        match &mut self.fuse {
            Some(0) => {
                self.fuse = None;
                self.dead = true;
                Luck::Partly
            }
            Some(n) => {
                *n -= 1;
                Luck::Done
            }
            None => Luck::Done,
        }
    }

    fn change(&mut self, change: NameChange) {
        apply(&mut self.names, &change);
        self.name_changes.push(change);
    }
}

fn apply(names: &mut BTreeMap<String, u64>, change: &NameChange) {
    match change {
        NameChange::Create(name, id) => {
            names.insert(name.clone(), *id);
        }
        NameChange::Rename(from, to, id) => {
            names.remove(from);
            names.insert(to.clone(), *id);
        }
        NameChange::Remove(name) => {
            names.remove(name);
        }
    }
}

fn lay(bytes: &mut Vec<u8>, offset: usize, piece: &[u8]) {
    if bytes.len() < offset + piece.len() {
        bytes.resize(offset + piece.len(), 0);
    }
    bytes[offset..offset + piece.len()].copy_from_slice(piece);
}

fn dead(op: Operation) -> VolumeError {
    VolumeError::io(
        Path::new("sim"),
        op,
        0,
        0,
        io::Error::other("the simulated machine died"),
    )
}

impl Disk {
    pub fn new(seed: u64) -> Self {
        Disk(Mutex::new(Inner {
            rng: seed,
            boot: 1,
            ..Inner::default()
        }))
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// The machine dies in the operation after `operations` more.
    pub fn light_fuse(&self, operations: u32) {
        self.inner().fuse = Some(operations);
    }

    /// The next write fails part way, and life goes on.
    pub fn fail_next_write(&self) {
        self.inner().fail_next_write = true;
    }

    pub fn is_dead(&self) -> bool {
        self.inner().dead
    }

    pub fn random(&self, below: u64) -> u64 {
        self.inner().random(below)
    }

    /// The daemon died and starts again.
    pub fn restart_daemon(&self) {
        let mut inner = self.inner();
        inner.dead = false;
        inner.fail_next_write = false;
    }

    /// The host died and starts again: what was not synced is lost in part.
    pub fn restart_host(&self) {
        let mut inner = self.inner();
        let inner = &mut *inner;
        inner.dead = false;
        inner.fail_next_write = false;
        inner.boot += 1;
        let mut names = inner.durable_names.clone();
        for change in std::mem::take(&mut inner.name_changes) {
            if inner.random(2) == 0 {
                apply(&mut names, &change);
            }
        }
        inner.names = names.clone();
        inner.durable_names = names;
        let mut files = std::mem::take(&mut inner.files);
        for file in files.values_mut() {
            // 0: nothing written back, 3: most of it.
            let eagerness = inner.random(4);
            persist(file, inner, eagerness);
            file.cache.clone_from(&file.durable);
            file.pending.clear();
        }
        inner.files = files;
    }

    /// Flips a bit of a durable file.
    pub fn damage(&self, name: &str, offset: usize) {
        let mut inner = self.inner();
        let id = inner.names[name];
        let file = inner.files.get_mut(&id).unwrap();
        file.cache[offset] ^= 1;
        file.durable[offset] ^= 1;
    }
}

/// Writes sectors of the cache back, each up to some version of it.
fn persist(file: &mut SimFile, inner: &mut Inner, eagerness: u64) {
    let mut sectors: BTreeMap<usize, Vec<(usize, Vec<u8>)>> = BTreeMap::new();
    for (offset, bytes) in &file.pending {
        let mut at = 0;
        while at < bytes.len() {
            let absolute = offset + at;
            let len = (SECTOR - absolute % SECTOR).min(bytes.len() - at);
            let piece = (absolute, bytes[at..at + len].to_vec());
            sectors.entry(absolute / SECTOR).or_default().push(piece);
            at += len;
        }
    }
    for versions in sectors.into_values() {
        if inner.random(4) >= eagerness {
            continue;
        }
        let version = inner.random(versions.len() as u64 + 1) as usize;
        for (offset, bytes) in &versions[..version] {
            lay(&mut file.durable, *offset, bytes);
        }
        if inner.random(8) == 0
            && let Some((offset, bytes)) = versions.get(version)
        {
            let torn = inner.random(bytes.len() as u64) as usize;
            lay(&mut file.durable, *offset, &bytes[..torn]);
        }
    }
}

impl Store for Disk {
    fn boot(&self) -> BootId {
        BootId([self.inner().boot; 16])
    }

    fn nonce(&self) -> u64 {
        let mut inner = self.inner();
        inner.nonce += 1;
        inner.nonce
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("sim").join(name)
    }

    fn list(&self) -> Result<Vec<String>> {
        let mut inner = self.inner();
        match inner.luck() {
            Luck::Done => Ok(inner.names.keys().cloned().collect()),
            _ => Err(dead(Operation::List)),
        }
    }

    fn reader(&self, name: &str) -> Result<Box<dyn Read + Send>> {
        let mut inner = self.inner();
        match (inner.luck(), inner.names.get(name)) {
            (Luck::Done, Some(id)) => Ok(Box::new(Cursor::new(inner.files[id].cache.clone()))),
            _ => Err(dead(Operation::Read)),
        }
    }

    fn write(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut inner = self.inner();
        let mut luck = inner.luck();
        if matches!(luck, Luck::Done) && std::mem::take(&mut inner.fail_next_write) {
            luck = Luck::Partly;
        }
        let len = match luck {
            Luck::Done => bytes.len(),
            Luck::Partly => inner.random(bytes.len() as u64) as usize,
            Luck::Not => return Err(dead(Operation::Write)),
        };
        let id = match inner.names.get(name) {
            Some(&id) => id,
            None => {
                let id = inner.next_file;
                inner.next_file += 1;
                inner.files.insert(id, SimFile::default());
                inner.change(NameChange::Create(name.to_owned(), id));
                id
            }
        };
        let file = inner.files.get_mut(&id).unwrap();
        lay(&mut file.cache, offset as usize, &bytes[..len]);
        file.pending.push((offset as usize, bytes[..len].to_vec()));
        match luck {
            Luck::Done => Ok(()),
            _ => Err(dead(Operation::Write)),
        }
    }

    fn sync(&self, name: &str) -> Result<()> {
        let mut inner = self.inner();
        let luck = inner.luck();
        let Some(&id) = inner.names.get(name) else {
            return Err(dead(Operation::Sync));
        };
        let mut file = inner.files.remove(&id).unwrap();
        match luck {
            Luck::Done => {
                file.durable.clone_from(&file.cache);
                file.pending.clear();
            }
            Luck::Partly => persist(&mut file, &mut inner, 2),
            Luck::Not => {}
        }
        inner.files.insert(id, file);
        match luck {
            Luck::Done => Ok(()),
            _ => Err(dead(Operation::Sync)),
        }
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let mut inner = self.inner();
        let luck = inner.luck();
        if matches!(luck, Luck::Done) || matches!(luck, Luck::Partly) && inner.random(2) == 0 {
            let id = inner.names[from];
            inner.change(NameChange::Rename(from.to_owned(), to.to_owned(), id));
        }
        match luck {
            Luck::Done => Ok(()),
            _ => Err(dead(Operation::Rename)),
        }
    }

    fn remove(&self, name: &str) -> Result<()> {
        let mut inner = self.inner();
        let luck = inner.luck();
        if matches!(luck, Luck::Done) || matches!(luck, Luck::Partly) && inner.random(2) == 0 {
            inner.change(NameChange::Remove(name.to_owned()));
        }
        match luck {
            Luck::Done => Ok(()),
            _ => Err(dead(Operation::Remove)),
        }
    }

    fn sync_dir(&self) -> Result<()> {
        let mut inner = self.inner();
        match inner.luck() {
            Luck::Done => {
                inner.durable_names = inner.names.clone();
                inner.name_changes.clear();
                Ok(())
            }
            _ => Err(dead(Operation::Sync)),
        }
    }
    fn release(&self) -> Result<()> {
        Ok(())
    }
}
