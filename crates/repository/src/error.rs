//! What can go wrong with a repository.

use std::path::PathBuf;

use crate::manifest::{ManifestFault, SnapshotName};
use crate::object::ObjectFault;
use crate::store::Key;

#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    #[error("{} cannot be {action}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{place} is no repository of snapshots")]
    NotARepository { place: String },
    #[error("{place} is not empty and no repository of snapshots, so none is made there")]
    Foreign { place: String },
    #[error("{place} is a repository of another kind: {found:?}; this program knows {known:?}")]
    Unknown {
        place: String,
        found: String,
        known: &'static str,
    },
    #[error("{place} is in use: {by}")]
    Busy { place: String, by: &'static str },
    #[error("there is no snapshot `{name}` in {place}")]
    NoSnapshot { name: SnapshotName, place: String },
    #[error("there is a snapshot `{name}` already in {place}")]
    Exists { name: SnapshotName, place: String },
    #[error("snapshot `{name}` has no volume `{volume}`; it has {}", volumes.join(", "))]
    NoVolume {
        name: SnapshotName,
        volume: String,
        volumes: Vec<String>,
    },
    #[error("the manifest of snapshot `{name}` is damaged: {fault}")]
    Manifest {
        name: SnapshotName,
        fault: ManifestFault,
    },
    #[error("{key} is missing")]
    Missing { key: Key },
    #[error("{key} is damaged: {fault}")]
    Damaged { key: Key, fault: ObjectFault },
    #[error("extent {extent} of volume `{volume}` comes out of turn")]
    OutOfTurn { volume: String, extent: u64 },
    #[error("a snapshot cannot be described so: {0}")]
    Unfit(ManifestFault),
    #[error("a crash was asked for")]
    Crash,
}

impl RepositoryError {
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> RepositoryError {
        let path = path.into();
        move |source| RepositoryError::Io {
            action,
            path,
            source,
        }
    }

    /// Whether there is no room left where the repository lies.
    pub fn is_no_space(&self) -> bool {
        matches!(self, RepositoryError::Io { source, .. }
            if matches!(source.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded))
    }
}
