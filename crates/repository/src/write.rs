//! Making a snapshot.
//!
//! Content comes volume by volume, extent by extent, ascending. What is not zero and not there yet is
//! gathered into batches; a leaf is put when the next one begins. The manifest comes last, behind a barrier.
//! Dropped before [`finish`](SnapshotWriter::finish), what was put stays as garbage until the next
//! collection, and the next snapshot finds it and need not put it again.

use std::collections::HashSet;
use std::sync::Arc;

use crate::error::RepositoryError;
use crate::hash::Hash;
use crate::manifest::{Consistency, Manifest, ManifestFault, SnapshotName};
use crate::object::Packer;
use crate::repository::{Repository, random_digits};
use crate::store::{Key, Lock};
use crate::tree::{LEAF_EXTENTS, Leaf, VolumeTree};

type Result<T> = std::result::Result<T, RepositoryError>;

/// A batch is put when it has so many bytes or objects. So much is in memory.
const BATCH_BYTES: usize = 16 << 20;
const BATCH_OBJECTS: usize = 512;

/// What is told of a snapshot beside its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    pub machine: String,
    pub host: String,
    /// RFC 3339, UTC.
    pub taken: String,
    pub consistency: Consistency,
    pub parent: Option<SnapshotName>,
    /// The machine's description, TOML.
    pub description: String,
}

/// What a snapshot took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Extents with content that were not there.
    pub new_extents: u64,
    /// Bytes that were put for them, packed, leaves included.
    pub new_bytes: u64,
    /// Extents with content that were looked at and there already.
    pub known_extents: u64,
    /// Extents looked at that are all zero.
    pub holes: u64,
}

/// A snapshot in the making.
pub struct SnapshotWriter {
    repository: Arc<Repository>,
    _lock: Box<dyn Lock>,
    name: SnapshotName,
    volumes: Vec<VolumeTree>,
    open: Option<Open>,
    batch: Vec<(Key, Vec<u8>)>,
    batch_bytes: usize,
    batch_names: HashSet<Key>,
    packer: Packer,
    written: Written,
}

/// The volume whose content comes now.
struct Open {
    tree: VolumeTree,
    leaf: Option<(u64, Leaf)>,
    /// The lowest extent that may come next.
    next: u64,
}

impl SnapshotWriter {
    /// Begins a snapshot of that name. From now on nothing is removed from the repository.
    pub fn begin(repository: Arc<Repository>, name: SnapshotName) -> Result<SnapshotWriter> {
        let lock = repository.share()?;
        if repository.store.has(&Key::Snapshot(name.clone()))? {
            return Err(RepositoryError::Exists {
                name,
                place: repository.place(),
            });
        }
        Ok(SnapshotWriter {
            repository,
            _lock: lock,
            name,
            volumes: Vec::new(),
            open: None,
            batch: Vec::new(),
            batch_bytes: 0,
            batch_names: HashSet::new(),
            packer: Packer::default(),
            written: Written::default(),
        })
    }

    /// The volume that comes next. Extents that are not put are as in `base`, a volume of this repository and
    /// of the same size; without one they are holes.
    pub fn volume(
        &mut self,
        name: &str,
        uuid: &str,
        size: u64,
        base: Option<&VolumeTree>,
    ) -> Result<()> {
        self.close_volume()?;
        let mut tree = VolumeTree {
            name: name.to_string(),
            uuid: uuid.to_string(),
            size,
            leaves: Vec::new(),
        };
        tree.leaves = match base {
            Some(base) if base.size == size => base.leaves.clone(),
            Some(base) => {
                return Err(RepositoryError::Unfit(ManifestFault::Size {
                    volume: tree.name,
                    size,
                    leaves: base.leaves.len(),
                }));
            }
            None => vec![None; tree.extents().div_ceil(LEAF_EXTENTS) as usize],
        };
        self.open = Some(Open {
            tree,
            leaf: None,
            next: 0,
        });
        Ok(())
    }

    /// An extent's content, whole.
    pub fn put(&mut self, extent: u64, content: &[u8]) -> Result<()> {
        let is_zero = content.iter().all(|byte| *byte == 0);
        let hash = (!is_zero).then(|| Hash::of(content));
        let len = self.place(extent, hash)?;
        assert_eq!(len, content.len(), "an extent comes whole");
        let Some(hash) = hash else {
            self.written.holes += 1;
            return Ok(());
        };
        match self.is_known(&Key::Extent(hash))? {
            true => self.written.known_extents += 1,
            false => {
                self.written.new_extents += 1;
                let packed = self.packer.pack(content);
                self.gather(Key::Extent(hash), packed)?;
            }
        }
        Ok(())
    }

    /// An extent that is all zero.
    pub fn put_hole(&mut self, extent: u64) -> Result<()> {
        self.written.holes += 1;
        self.place(extent, None).map(drop)
    }

    pub fn written(&self) -> Written {
        self.written
    }

    /// Ends the snapshot: it is there, durably, when this returns.
    pub fn finish(mut self, about: About) -> Result<Manifest> {
        self.close_volume()?;
        self.put_batch()?;
        let uuid = random_digits().map_err(RepositoryError::io("read", "/dev/urandom"))?;
        let manifest = Manifest {
            name: self.name.clone(),
            uuid,
            machine: about.machine,
            host: about.host,
            taken: about.taken,
            consistency: about.consistency,
            parent: about.parent,
            description: about.description,
            volumes: std::mem::take(&mut self.volumes),
        };
        let bytes = manifest.to_bytes().map_err(RepositoryError::Unfit)?;
        let store = &self.repository.store;
        // All that it refers to first, be it of this snapshot or what another one put and did not finish.
        store.barrier()?;
        if !store.put_new(&Key::Snapshot(self.name.clone()), &bytes)? {
            return Err(RepositoryError::Exists {
                name: self.name.clone(),
                place: self.repository.place(),
            });
        }
        store.barrier()?;
        Ok(manifest)
    }

    /// Enters the extent's hash in its leaf; how many bytes it has.
    fn place(&mut self, extent: u64, hash: Option<Hash>) -> Result<usize> {
        let number = extent / LEAF_EXTENTS;
        let open = self.open.as_mut();
        let out_of_turn = |open: Option<&Open>| RepositoryError::OutOfTurn {
            volume: open.map_or(String::new(), |open| open.tree.name.clone()),
            extent,
        };
        let Some(open) = open.filter(|open| extent >= open.next && extent < open.tree.extents())
        else {
            return Err(out_of_turn(self.open.as_ref()));
        };
        open.next = extent + 1;
        let len = open.tree.len_of(extent);
        if open.leaf.as_ref().is_none_or(|(now, _)| *now != number) {
            let extents = open.tree.extents_of_leaf(number);
            let leaf = match open.tree.leaves[number as usize] {
                Some(hash) => self.repository.leaf(&hash, extents)?,
                None => Leaf::of_holes(extents),
            };
            let before = open.leaf.replace((number, leaf));
            if let Some((before, leaf)) = before {
                self.close_leaf(before, leaf)?;
            }
        }
        if let Some((_, leaf)) = self.open.as_mut().and_then(|open| open.leaf.as_mut()) {
            leaf.0[(extent % LEAF_EXTENTS) as usize] = hash;
        }
        Ok(len)
    }

    fn close_leaf(&mut self, number: u64, leaf: Leaf) -> Result<()> {
        let hash = match leaf.is_hole() {
            true => None,
            false => {
                let bytes = leaf.to_bytes();
                let hash = Hash::of(&bytes);
                if !self.is_known(&Key::Leaf(hash))? {
                    let packed = self.packer.pack(&bytes);
                    self.gather(Key::Leaf(hash), packed)?;
                }
                Some(hash)
            }
        };
        if let Some(open) = &mut self.open {
            open.tree.leaves[number as usize] = hash;
        }
        Ok(())
    }

    fn close_volume(&mut self) -> Result<()> {
        let leaf = self.open.as_mut().and_then(|open| open.leaf.take());
        if let Some((number, leaf)) = leaf {
            self.close_leaf(number, leaf)?;
        }
        self.volumes.extend(self.open.take().map(|open| open.tree));
        Ok(())
    }

    fn is_known(&self, key: &Key) -> Result<bool> {
        Ok(self.batch_names.contains(key) || self.repository.store.has(key)?)
    }

    fn gather(&mut self, key: Key, object: Vec<u8>) -> Result<()> {
        self.written.new_bytes += object.len() as u64;
        self.batch_bytes += object.len();
        self.batch_names.insert(key.clone());
        self.batch.push((key, object));
        if self.batch_bytes >= BATCH_BYTES || self.batch.len() >= BATCH_OBJECTS {
            self.put_batch()?;
        }
        Ok(())
    }

    fn put_batch(&mut self) -> Result<()> {
        self.repository.store.put(&self.batch)?;
        self.batch.clear();
        self.batch_names.clear();
        self.batch_bytes = 0;
        Ok(())
    }
}
