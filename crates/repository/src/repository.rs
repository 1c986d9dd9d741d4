//! A repository, opened.

use std::io::Read;
use std::path::Path;

use crate::error::RepositoryError;
use crate::hash::Hash;
use crate::local::LocalStore;
use crate::manifest::{MAX_MANIFEST, Manifest, SnapshotName};
use crate::object;
use crate::store::{Key, Lock, Sharing, Shelf, Store};
use crate::tree::{EXTENT, Leaf};

type Result<T> = std::result::Result<T, RepositoryError>;

/// First words of the object that says that this is a repository; its identity follows.
const FORMAT: &str = "whimbrel-repository 1 ";

/// Longest marker, bytes.
const MAX_MARKER: usize = 256;

/// Longest extent or leaf as it is stored, bytes.
const MAX_OBJECT: usize = EXTENT as usize + 1;

/// An open repository.
pub struct Repository {
    pub(crate) store: Box<dyn Store>,
    id: String,
}

impl Repository {
    /// Opens a repository.
    ///
    /// # Errors
    /// [`RepositoryError::NotARepository`], or [`RepositoryError::Unknown`] if it is of another version.
    pub fn open(store: impl Store + 'static) -> Result<Repository> {
        let store: Box<dyn Store> = Box::new(store);
        match store.get(&Key::Marker, MAX_MARKER)? {
            Some(marker) => Ok(Repository {
                id: id_of(&marker, store.as_ref())?,
                store,
            }),
            None => Err(RepositoryError::NotARepository {
                place: store.place(),
            }),
        }
    }

    /// Opens a repository, and makes one where there is nothing at all.
    pub fn open_or_create(store: impl Store + 'static) -> Result<Repository> {
        if store.has(&Key::Marker)? {
            return Repository::open(store);
        }
        if !store.is_empty()? {
            return Err(RepositoryError::Foreign {
                place: store.place(),
            });
        }
        let id = random_digits().map_err(RepositoryError::io("read", "/dev/urandom"))?;
        // If somebody else was quicker, it is theirs.
        store.put_new(&Key::Marker, format!("{FORMAT}{id}\n").as_bytes())?;
        store.barrier()?;
        Repository::open(store)
    }

    /// The repository in a folder of this host.
    pub fn at(folder: &Path) -> Result<Repository> {
        Repository::open(LocalStore::new(folder)?)
    }

    /// The repository in a folder of this host, made if there is nothing.
    pub fn at_or_create(folder: &Path) -> Result<Repository> {
        Repository::open_or_create(LocalStore::new(folder)?)
    }

    /// Which repository this is, wherever it lies; 32 digits.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn place(&self) -> String {
        self.store.place()
    }

    /// Keeps what is there from being removed, for as long as this lives.
    pub(crate) fn share(&self) -> Result<Box<dyn Lock>> {
        self.store.lock(Sharing::Shared)
    }

    /// The names of all snapshots, in order.
    pub fn names(&self) -> Result<Vec<SnapshotName>> {
        let found = self.store.list(Shelf::Snapshots)?;
        let mut names: Vec<_> = found
            .into_iter()
            .filter_map(|(key, _)| match key {
                Key::Snapshot(name) => Some(name),
                Key::Marker | Key::Extent(_) | Key::Leaf(_) => None,
            })
            .collect();
        names.sort();
        Ok(names)
    }

    /// A snapshot's manifest.
    pub fn manifest(&self, name: &SnapshotName) -> Result<Manifest> {
        let key = Key::Snapshot(name.clone());
        let Some(bytes) = self.store.get(&key, MAX_MANIFEST)? else {
            return Err(RepositoryError::NoSnapshot {
                name: name.clone(),
                place: self.place(),
            });
        };
        let fault = match Manifest::from_bytes(&bytes) {
            Ok(manifest) if manifest.name == *name => return Ok(manifest),
            Ok(other) => crate::manifest::ManifestFault::Name(other.name),
            Err(fault) => fault,
        };
        Err(RepositoryError::Manifest {
            name: name.clone(),
            fault,
        })
    }

    /// A leaf of so many extents.
    pub(crate) fn leaf(&self, hash: &Hash, extents: u64) -> Result<Leaf> {
        let bytes = self.object(Key::Leaf(*hash), hash, extents as usize * 32)?;
        Ok(Leaf::from_bytes(&bytes))
    }

    /// An extent of so many bytes.
    pub(crate) fn extent(&self, hash: &Hash, len: usize) -> Result<Vec<u8>> {
        self.object(Key::Extent(*hash), hash, len)
    }

    fn object(&self, key: Key, hash: &Hash, len: usize) -> Result<Vec<u8>> {
        let packed = self.store.get(&key, MAX_OBJECT)?;
        let Some(packed) = packed else {
            return Err(RepositoryError::Missing { key });
        };
        object::unpack(&packed, len, hash).map_err(|fault| RepositoryError::Damaged { key, fault })
    }
}

fn id_of(marker: &[u8], store: &dyn Store) -> Result<String> {
    let text = String::from_utf8_lossy(marker);
    let id = text.trim_end().strip_prefix(FORMAT);
    match id.filter(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())) {
        Some(id) => Ok(id.to_string()),
        None => Err(RepositoryError::Unknown {
            place: store.place(),
            found: text.lines().next().unwrap_or("").chars().take(80).collect(),
            known: FORMAT.trim_end(),
        }),
    }
}

/// 128 random bits in hexadecimal.
pub(crate) fn random_digits() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}
