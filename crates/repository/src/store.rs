//! What a repository asks of the place where its objects lie.
//!
//! Little enough for an object store as well as for a folder: whole objects are put, got, listed and
//! deleted. What is asked beyond that, and what everything rests on:
//!
//! - An object appears under its name with its whole content or not at all, and the content is durable when
//!   its name appears. The name itself may be lost in a power cut until the next [`barrier`](Store::barrier).
//! - A deletion may come undone in a power cut until the next barrier.
//! - [`put_new`](Store::put_new) of two callers at once: one of them is told that the name is taken.

use std::fmt;

use crate::error::RepositoryError;
use crate::hash::Hash;
use crate::manifest::SnapshotName;

/// The name of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// What says that this is a repository.
    Marker,
    Extent(Hash),
    Leaf(Hash),
    Snapshot(SnapshotName),
}

impl Key {
    /// Relative to the repository.
    pub fn path(&self) -> String {
        match self {
            Key::Marker => "repository".to_string(),
            Key::Extent(hash) => format!("extents/{:02x}/{hash}", hash.fan()),
            Key::Leaf(hash) => format!("leaves/{:02x}/{hash}", hash.fan()),
            Key::Snapshot(name) => format!("snapshots/{name}"),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path())
    }
}

/// Objects that are listed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shelf {
    Extents,
    Leaves,
    Snapshots,
}

/// Who else may be at work meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Whoever reads or adds.
    Shared,
    /// Whoever deletes.
    Alone,
}

/// Ends when it is dropped, or with the process.
pub trait Lock: Send + Sync {}

/// A place for objects.
pub trait Store: Send + Sync {
    /// Where it is, for people.
    fn place(&self) -> String;

    /// Waits for nobody.
    ///
    /// # Errors
    /// [`RepositoryError::Busy`] if somebody holds a lock that does not go with this one.
    fn lock(&self, sharing: Sharing) -> Result<Box<dyn Lock>, RepositoryError>;

    /// Whether there is nothing at all, so that a repository may be made here.
    fn is_empty(&self) -> Result<bool, RepositoryError>;

    /// The object, if it is there and has at most `limit` bytes; of a longer one the first `limit + 1`.
    fn get(&self, key: &Key, limit: usize) -> Result<Option<Vec<u8>>, RepositoryError>;

    fn has(&self, key: &Key) -> Result<bool, RepositoryError>;

    /// Puts all of them; those that are there already are replaced (by the same).
    fn put(&self, objects: &[(Key, Vec<u8>)]) -> Result<(), RepositoryError>;

    /// Puts an object under a name that nobody has; `false` if somebody does.
    fn put_new(&self, key: &Key, object: &[u8]) -> Result<bool, RepositoryError>;

    /// When it returns, all names that were put or deleted before, by whomever, are durably so.
    fn barrier(&self) -> Result<(), RepositoryError>;

    /// Names and lengths in bytes, in any order. What is not named as an object is left out.
    fn list(&self, shelf: Shelf) -> Result<Vec<(Key, u64)>, RepositoryError>;

    /// Deletes what is there of these.
    fn delete(&self, key: &Key) -> Result<(), RepositoryError>;

    /// Clears away what writers that were killed left; the caller has the repository alone.
    fn tidy(&self) -> Result<(), RepositoryError>;
}
