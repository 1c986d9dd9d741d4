//! Reading a volume of a snapshot.

use std::sync::{Arc, Mutex};

use crate::error::RepositoryError;
use crate::manifest::{Manifest, SnapshotName};
use crate::repository::Repository;
use crate::store::Lock;
use crate::tree::{LEAF_EXTENTS, Leaf, VolumeTree};

type Result<T> = std::result::Result<T, RepositoryError>;

/// A volume as it was. While this lives, nothing is removed from the repository.
pub struct VolumeReader {
    repository: Arc<Repository>,
    _lock: Box<dyn Lock>,
    tree: VolumeTree,
    /// The leaf that was looked at last: whoever reads, reads neighbours.
    leaf: Mutex<Option<(u64, Arc<Leaf>)>>,
}

impl VolumeReader {
    /// Opens a volume of a snapshot; which one need not be said if there is but one.
    pub fn open(
        repository: Arc<Repository>,
        name: &SnapshotName,
        volume: Option<&str>,
    ) -> Result<(VolumeReader, Manifest)> {
        let lock = repository.share()?;
        let manifest = repository.manifest(name)?;
        let tree = match (volume, manifest.volumes.as_slice()) {
            (None, [only]) => only.clone(),
            (wanted, volumes) => {
                let wanted = wanted.unwrap_or("");
                let found = manifest.volume(wanted);
                found.cloned().ok_or_else(|| RepositoryError::NoVolume {
                    name: name.clone(),
                    volume: wanted.to_string(),
                    volumes: volumes.iter().map(|v| v.name.clone()).collect(),
                })?
            }
        };
        let reader = VolumeReader {
            repository,
            _lock: lock,
            tree,
            leaf: Mutex::new(None),
        };
        Ok((reader, manifest))
    }

    pub fn tree(&self) -> &VolumeTree {
        &self.tree
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.tree.size
    }

    /// The stretch of neighbouring extents from this one on, up to the end of its leaf at most, that all have
    /// content or all have none: how many, and which.
    pub fn run(&self, extent: u64) -> Result<(u64, bool)> {
        let number = extent / LEAF_EXTENTS;
        let within = (extent % LEAF_EXTENTS) as usize;
        let Some(leaf) = self.leaf(number)? else {
            return Ok((self.tree.extents_of_leaf(number) - within as u64, false));
        };
        let rest = &leaf.0[within..];
        let data = rest[0].is_some();
        let run = rest.iter().take_while(|hash| hash.is_some() == data);
        Ok((run.count() as u64, data))
    }

    /// An extent's content; none if it is all zero.
    pub fn extent(&self, extent: u64) -> Result<Option<Vec<u8>>> {
        let leaf = self.leaf(extent / LEAF_EXTENTS)?;
        let hash = leaf.and_then(|leaf| leaf.0[(extent % LEAF_EXTENTS) as usize]);
        let Some(hash) = hash else {
            return Ok(None);
        };
        let len = self.tree.len_of(extent);
        self.repository.extent(&hash, len).map(Some)
    }

    fn leaf(&self, number: u64) -> Result<Option<Arc<Leaf>>> {
        let Some(hash) = self.tree.leaves[number as usize] else {
            return Ok(None);
        };
        let mut kept = self.leaf.lock().expect("no holder of this lock panics");
        match &*kept {
            Some((known, leaf)) if *known == number => Ok(Some(leaf.clone())),
            _ => {
                let extents = self.tree.extents_of_leaf(number);
                let leaf = Arc::new(self.repository.leaf(&hash, extents)?);
                *kept = Some((number, leaf.clone()));
                Ok(Some(leaf))
            }
        }
    }
}
