//! Removing snapshots, and what nobody needs any more.
//!
//! The manifests go first, durably; only then what no manifest that stays reaches. So a kill or a power cut
//! at any instant leaves garbage at worst, which the next collection finds. If one that stays cannot be read,
//! nothing but manifests is removed: nobody knows then what it needs.
//!
//! It has the repository alone, so nobody can come to rely on an extent between its being found unneeded and
//! its being gone. Memory: 32 bytes and a little for each extent that is needed, some 200 MiB for a TiB of
//! content.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::error::RepositoryError;
use crate::hash::Hash;
use crate::manifest::SnapshotName;
use crate::repository::Repository;
use crate::store::{Key, Sharing, Shelf};

type Result<T> = std::result::Result<T, RepositoryError>;

/// What a collection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    /// Objects that were removed.
    pub removed: u64,
    /// Bytes that they took.
    pub freed_bytes: u64,
    /// Objects that are needed.
    pub kept: u64,
}

impl Repository {
    /// Removes a snapshot. The second answer is of the collection after it: if that fails, the snapshot is gone
    /// all the same, and what it took is not yet free.
    ///
    /// # Errors
    /// [`RepositoryError::Busy`] while anybody reads or adds; nothing was removed then.
    pub fn remove(&self, name: &SnapshotName) -> Result<Result<Collected>> {
        let _alone = self.store.lock(Sharing::Alone)?;
        let key = Key::Snapshot(name.clone());
        if !self.store.has(&key)? {
            return Err(RepositoryError::NoSnapshot {
                name: name.clone(),
                place: self.place(),
            });
        }
        self.store.delete(&key)?;
        self.store.barrier()?;
        Ok(self.sweep())
    }

    /// Removes what no snapshot needs.
    ///
    /// # Errors
    /// [`RepositoryError::Busy`] while anybody reads or adds, and the fault of a snapshot that cannot be read.
    pub fn collect(&self) -> Result<Collected> {
        let _alone = self.store.lock(Sharing::Alone)?;
        // A removal that was killed may not be durable yet, and what it removed must not come back later.
        self.store.barrier()?;
        self.sweep()
    }

    fn sweep(&self) -> Result<Collected> {
        let (mut leaves, mut extents) = (HashSet::new(), HashSet::new());
        for name in self.names()? {
            for volume in self.manifest(&name)?.volumes {
                for (number, hash) in (0..).zip(&volume.leaves) {
                    let Some(hash) = hash.filter(|hash| leaves.insert(*hash)) else {
                        continue;
                    };
                    let leaf = self.leaf(&hash, volume.extents_of_leaf(number))?;
                    extents.extend(leaf.0.into_iter().flatten());
                }
            }
        }
        let mut collected = Collected::default();
        self.sweep_shelf(Shelf::Leaves, &leaves, &mut collected)?;
        self.sweep_shelf(Shelf::Extents, &extents, &mut collected)?;
        self.store.tidy()?;
        Ok(collected)
    }

    fn sweep_shelf(
        &self,
        shelf: Shelf,
        needed: &HashSet<Hash>,
        collected: &mut Collected,
    ) -> Result<()> {
        for (key, bytes) in self.store.list(shelf)? {
            let is_needed = match &key {
                Key::Leaf(hash) | Key::Extent(hash) => needed.contains(hash),
                Key::Marker | Key::Snapshot(_) => true,
            };
            if is_needed {
                collected.kept += 1;
                continue;
            }
            self.store.delete(&key)?;
            collected.removed += 1;
            collected.freed_bytes += bytes;
        }
        Ok(())
    }
}
