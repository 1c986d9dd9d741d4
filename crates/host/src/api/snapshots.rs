//! What the API says of snapshots. Those in a repository are looked at, verified and removed without a daemon.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use whimbrel_repository::{Consistency, SnapshotName};

use super::types::{ImportProgress, StreamLine};
use crate::state::{Name, Timestamp};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// A folder that the daemon can write, made if it is not there; absolute.
    pub repository: PathBuf,
    /// The machine's name and the time if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<SnapshotName>,
}

/// A volume of a snapshot, to be made a volume of a host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotVolume {
    /// Absolute.
    pub repository: PathBuf,
    pub snapshot: SnapshotName,
    /// Need not be said if there is but one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
}

/// A snapshot that was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotView {
    pub name: SnapshotName,
    pub machine: Name,
    pub repository: PathBuf,
    pub taken: Timestamp,
    pub consistency: Consistency,
    /// The snapshot that only what changed since was looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotName>,
    /// For so long the guest's reads and writes waited.
    pub pause_us: u64,
    pub took_ms: u64,
    pub volumes: Vec<SnapshotVolumeView>,
    /// Bytes that the repository has grown by.
    pub stored_bytes: u64,
    /// Bytes of content that were put aside since the guest overwrote them meanwhile.
    pub put_aside_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotVolumeView {
    pub name: String,
    pub size: u64,
    /// Bytes that were looked at, holes included.
    pub looked_at: u64,
    /// Why all of it was looked at, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_because: Option<String>,
}

/// What making a snapshot streams.
pub type SnapshotLine = StreamLine<ImportProgress, SnapshotView>;
