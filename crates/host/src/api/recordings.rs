//! What the API says of recordings: traces of what a guest asks of a disk. See [`types`](super::types) for units.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

use super::types::StreamLine;
use crate::state::Name;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordTrace {
    /// The trace to make; absolute, and must not exist.
    pub file: PathBuf,
    /// How long; until it is ended if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_ms: Option<u64>,
}

/// How far a recording is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordingProgress {
    pub requests: u64,
    /// Requests that are not in the trace, since they came faster than it could be written.
    pub lost: u64,
    /// Bytes of the trace.
    pub bytes: u64,
    pub elapsed_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordingEnd {
    /// The time that was asked for is over.
    Time,
    /// It was ended.
    Asked,
    /// The trace is as long as one may be.
    Full,
    /// The machine that has the disk does not run here any more.
    Gone,
    /// Whoever asked for it went away.
    Left,
}

/// A trace that was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordingView {
    pub volume: Name,
    pub file: PathBuf,
    #[serde(flatten)]
    pub came_to: RecordingProgress,
    pub ended: RecordingEnd,
}

/// What a recording streams.
pub type RecordingLine = StreamLine<RecordingProgress, RecordingView>;
