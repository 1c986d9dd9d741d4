//! A store in memory that can be killed at any step, and whose power can be cut.
//!
//! What a kill leaves is what was done. A power cut moreover loses, of the names put and deleted since the
//! last barrier, whichever it likes: all that [`Store`] allows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::error::RepositoryError;
use crate::store::{Key, Lock, Sharing, Shelf, Store};

type Result<T> = std::result::Result<T, RepositoryError>;
type Objects = BTreeMap<Key, Vec<u8>>;

/// Objects in memory; clones share them.
#[derive(Clone, Default)]
pub struct MemoryStore(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    objects: Objects,
    /// What the last barrier made safe.
    durable: Objects,
    /// Steps until it is killed.
    left: Option<u64>,
    steps: u64,
    shared: usize,
    alone: bool,
}

impl State {
    /// Before each change: an object put or deleted, or a barrier.
    fn step(&mut self) -> Result<()> {
        match &mut self.left {
            Some(0) => return Err(RepositoryError::Crash),
            Some(left) => *left -= 1,
            None => {}
        }
        self.steps += 1;
        Ok(())
    }
}

struct MemoryLock {
    store: MemoryStore,
    sharing: Sharing,
}

impl Lock for MemoryLock {}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        let mut state = self.store.state();
        match self.sharing {
            Sharing::Shared => state.shared -= 1,
            Sharing::Alone => state.alone = false,
        }
    }
}

impl MemoryStore {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no holder of this lock panics")
    }

    /// Fails everything after so many more changes, as if the process were killed there.
    pub fn kill_after(&self, steps: u64) {
        self.state().left = Some(steps);
    }

    /// After a kill: works again. With a power cut, `keep` says which of the changes that no barrier made safe
    /// are still there.
    pub fn revive(&self, power_cut: Option<&mut dyn FnMut() -> bool>) {
        let mut state = self.state();
        state.left = None;
        if let Some(keep) = power_cut {
            let mut after = Objects::new();
            let keys: BTreeSet<_> = state.objects.keys().chain(state.durable.keys()).collect();
            for key in keys {
                let (now, before) = (state.objects.get(key), state.durable.get(key));
                let found = match now == before || keep() {
                    true => now,
                    false => before,
                };
                if let Some(object) = found {
                    after.insert(key.clone(), object.clone());
                }
            }
            state.objects = after.clone();
            state.durable = after;
        }
    }

    /// Changes made so far.
    pub fn steps(&self) -> u64 {
        self.state().steps
    }

    /// All there is.
    pub fn keys(&self) -> BTreeSet<Key> {
        self.state().objects.keys().cloned().collect()
    }

    /// Changes an object behind everybody's back.
    pub fn tamper(&self, key: &Key, change: impl FnOnce(&mut Vec<u8>)) {
        if let Some(object) = self.state().objects.get_mut(key) {
            change(object);
        }
    }

    /// Takes an object away behind everybody's back.
    pub fn lose(&self, key: &Key) {
        self.state().objects.remove(key);
    }
}

impl Store for MemoryStore {
    fn place(&self) -> String {
        "memory".to_string()
    }

    fn lock(&self, sharing: Sharing) -> Result<Box<dyn Lock>> {
        let mut state = self.state();
        let is_free = !state.alone && (sharing == Sharing::Shared || state.shared == 0);
        if !is_free {
            return Err(RepositoryError::Busy {
                place: self.place(),
                by: "somebody else",
            });
        }
        match sharing {
            Sharing::Shared => state.shared += 1,
            Sharing::Alone => state.alone = true,
        }
        let store = self.clone();
        Ok(Box::new(MemoryLock { store, sharing }))
    }

    fn is_empty(&self) -> Result<bool> {
        Ok(self.state().objects.is_empty())
    }

    fn get(&self, key: &Key, limit: usize) -> Result<Option<Vec<u8>>> {
        let state = self.state();
        let found = state.objects.get(key);
        Ok(found.map(|object| object[..object.len().min(limit + 1)].to_vec()))
    }

    fn has(&self, key: &Key) -> Result<bool> {
        Ok(self.state().objects.contains_key(key))
    }

    fn put(&self, objects: &[(Key, Vec<u8>)]) -> Result<()> {
        let mut state = self.state();
        for (key, object) in objects {
            state.step()?;
            state.objects.insert(key.clone(), object.clone());
        }
        Ok(())
    }

    fn put_new(&self, key: &Key, object: &[u8]) -> Result<bool> {
        let mut state = self.state();
        if state.objects.contains_key(key) {
            return Ok(false);
        }
        state.step()?;
        state.objects.insert(key.clone(), object.to_vec());
        Ok(true)
    }

    fn barrier(&self) -> Result<()> {
        let mut state = self.state();
        state.step()?;
        state.durable = state.objects.clone();
        Ok(())
    }

    fn list(&self, shelf: Shelf) -> Result<Vec<(Key, u64)>> {
        let state = self.state();
        let of_shelf = |key: &Key| match key {
            Key::Marker => false,
            Key::Extent(_) => shelf == Shelf::Extents,
            Key::Leaf(_) => shelf == Shelf::Leaves,
            Key::Snapshot(_) => shelf == Shelf::Snapshots,
        };
        let objects = state.objects.iter().filter(|(key, _)| of_shelf(key));
        Ok(objects
            .map(|(key, object)| (key.clone(), object.len() as u64))
            .collect())
    }

    fn delete(&self, key: &Key) -> Result<()> {
        let mut state = self.state();
        state.step()?;
        state.objects.remove(key);
        Ok(())
    }

    fn tidy(&self) -> Result<()> {
        Ok(())
    }
}
