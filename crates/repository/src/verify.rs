//! Is everything there, and what it was?
//!
//! Every manifest, leaf and extent that is needed is read, unpacked and hashed, each once however many
//! snapshots share it. Then it is said which places of which snapshots a damaged one is.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::error::RepositoryError;
use crate::hash::Hash;
use crate::manifest::{Manifest, SnapshotName};
use crate::repository::Repository;
use crate::store::Key;
use crate::tree::{EXTENT, LEAF_EXTENTS, Leaf, Sizes};

type Result<T> = std::result::Result<T, RepositoryError>;

/// So many damaged objects are told of, and so many places of each; beyond, they are only counted.
const MOST_TOLD: usize = 1000;
const MOST_PLACES: usize = 16;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    pub snapshots: u64,
    /// Extents that were read.
    pub extents: u64,
    /// Their content, bytes.
    pub content_bytes: u64,
    /// Objects that are missing or damaged.
    pub damaged: u64,
    /// The first of them.
    pub faults: Vec<Fault>,
}

/// An object that is missing or damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Its place in the repository.
    pub object: String,
    pub what: String,
    /// The snapshots that it is damaged in, all of them.
    pub snapshots: Vec<SnapshotName>,
    /// Where in them; at most sixteen.
    pub places: Vec<Place>,
}

/// A stretch of a volume that cannot be had back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub snapshot: SnapshotName,
    pub volume: String,
    /// Bytes.
    pub offset: u64,
    pub len: u64,
}

/// Objects that are not what they should be, and why.
type Faults = BTreeMap<Key, String>;

impl Repository {
    /// Reads one snapshot or all of them. `progress` is told how many extents of how many were read.
    ///
    /// # Errors
    /// What keeps from looking; damage is an answer and no error.
    pub fn verify(
        &self,
        only: Option<&SnapshotName>,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Verified> {
        let _shared = self.share()?;
        let names = match only {
            Some(name) => vec![name.clone()],
            None => self.names()?,
        };
        let mut found = Verified {
            snapshots: names.len() as u64,
            ..Verified::default()
        };
        let mut faults = Faults::new();
        let mut manifests = Vec::new();
        for name in names {
            match self.manifest(&name) {
                Ok(manifest) => manifests.push(manifest),
                Err(error @ RepositoryError::Manifest { .. }) => {
                    faults.insert(Key::Snapshot(name), error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        let leaves = self.read_leaves(&manifests, &mut faults)?;
        let mut extents = Sizes::new();
        for_each_leaf(&manifests, |manifest, volume, number, hash| {
            let tree = &manifest.volumes[volume];
            let hashes = leaves.get(&hash).map_or(&[][..], |leaf| &leaf.0);
            for (extent, hash) in (number * LEAF_EXTENTS..).zip(hashes) {
                if let Some(hash) = hash {
                    extents.entry(*hash).or_insert(tree.len_of(extent));
                }
            }
        });
        let total = extents.len() as u64;
        for (hash, len) in &extents {
            let read = self.extent(hash, *len);
            if let Some(fault) = fault_of(read.map(drop))? {
                faults.insert(Key::Extent(*hash), fault);
            }
            found.extents += 1;
            found.content_bytes += *len as u64;
            progress(found.extents, total);
        }
        found.damaged = faults.len() as u64;
        found.faults = told(faults, &manifests, &leaves);
        Ok(found)
    }

    fn read_leaves(
        &self,
        manifests: &[Manifest],
        faults: &mut Faults,
    ) -> Result<HashMap<Hash, Leaf>> {
        let mut wanted = HashMap::new();
        for_each_leaf(manifests, |manifest, volume, number, hash| {
            let extents = manifest.volumes[volume].extents_of_leaf(number);
            wanted.entry(hash).or_insert(extents);
        });
        let mut leaves = HashMap::new();
        for (hash, extents) in wanted {
            match self.leaf(&hash, extents) {
                Ok(leaf) => {
                    leaves.insert(hash, leaf);
                }
                Err(error) => {
                    if let Some(fault) = fault_of(Err(error))? {
                        faults.insert(Key::Leaf(hash), fault);
                    }
                }
            }
        }
        Ok(leaves)
    }
}

/// What is wrong with the object; what went wrong otherwise is an error. A file that cannot be read is one
/// that is lost: disks fail in places.
fn fault_of(read: Result<()>) -> Result<Option<String>> {
    match read {
        Ok(()) => Ok(None),
        Err(RepositoryError::Missing { .. }) => Ok(Some("it is missing".to_string())),
        Err(RepositoryError::Damaged { fault, .. }) => Ok(Some(fault.to_string())),
        Err(error @ RepositoryError::Io { action: "read", .. }) => Ok(Some(error.to_string())),
        Err(error) => Err(error),
    }
}

/// With the manifest, the volume's position in it, the leaf's position in that, and its hash.
fn for_each_leaf(manifests: &[Manifest], mut with: impl FnMut(&Manifest, usize, u64, Hash)) {
    for manifest in manifests {
        for (volume, tree) in manifest.volumes.iter().enumerate() {
            for (number, hash) in (0..).zip(&tree.leaves) {
                if let Some(hash) = hash {
                    with(manifest, volume, number, *hash);
                }
            }
        }
    }
}

/// The first faults, with what they are damage to.
fn told(faults: Faults, manifests: &[Manifest], leaves: &HashMap<Hash, Leaf>) -> Vec<Fault> {
    let mut told: BTreeMap<Key, Fault> = faults
        .into_iter()
        .take(MOST_TOLD)
        .map(|(key, what)| {
            let snapshots = match &key {
                Key::Snapshot(name) => vec![name.clone()],
                Key::Marker | Key::Leaf(_) | Key::Extent(_) => Vec::new(),
            };
            let fault = Fault {
                object: key.to_string(),
                what,
                snapshots,
                places: Vec::new(),
            };
            (key, fault)
        })
        .collect();
    if told.is_empty() {
        return Vec::new();
    }
    for_each_leaf(manifests, |manifest, volume, number, hash| {
        let tree = &manifest.volumes[volume];
        let mut damaged = |key: Key, first: u64, extents: u64| {
            let Some(fault) = told.get_mut(&key) else {
                return;
            };
            if fault.snapshots.last() != Some(&manifest.name) {
                fault.snapshots.push(manifest.name.clone());
            }
            if fault.places.len() < MOST_PLACES {
                let offset = first * EXTENT;
                fault.places.push(Place {
                    snapshot: manifest.name.clone(),
                    volume: tree.name.clone(),
                    offset,
                    len: (extents * EXTENT).min(tree.size - offset),
                });
            }
        };
        let first = number * LEAF_EXTENTS;
        match leaves.get(&hash) {
            None => damaged(Key::Leaf(hash), first, tree.extents_of_leaf(number)),
            Some(leaf) => {
                for (extent, hash) in (first..).zip(&leaf.0) {
                    if let Some(hash) = hash {
                        damaged(Key::Extent(*hash), extent, 1);
                    }
                }
            }
        }
    });
    told.into_values().collect()
}
