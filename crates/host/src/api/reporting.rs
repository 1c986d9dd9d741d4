//! What the API says of a migration over time. See [`types`](super::types) for units.

use serde::{Deserialize, Serialize};
use whimbrel_engine::space::SpaceKind;
use whimbrel_engine::switchover::Phase;
pub use whimbrel_engine::timeline::{Counts, Stretch};
use whimbrel_peer::trust::PeerName;

use super::types::{Direction, MigrationState, MigrationView, TimePart};
use crate::state::{MigrationId, Name, Timestamp};

/// A migration of which there is a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReportEntry {
    pub id: MigrationId,
    pub machine: Name,
    pub peer: PeerName,
    pub direction: Direction,
    pub phase: Phase,
    pub state: MigrationState,
    pub started: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Timestamp>,
}

impl From<&MigrationView> for ReportEntry {
    fn from(view: &MigrationView) -> ReportEntry {
        ReportEntry {
            id: view.id.clone(),
            machine: view.machine.clone(),
            peer: view.peer.clone(),
            direction: view.direction,
            phase: view.phase,
            state: view.state,
            started: view.started,
            ended: view.ended,
        }
    }
}

/// Everything this host knows of a migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReportView {
    /// This host's name.
    pub host: String,
    /// As it is, or as it was last. Its own report, at the source of a completed one, tells of the daemon's last
    /// life only.
    pub migration: MigrationView,
    pub summary: Summary,
    pub timeline: TimelineView,
    /// Figures that only the other end knows, or nobody any more, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub elsewhere: Vec<String>,
}

/// What a migration did over time, as this end saw it. Times are milliseconds since `started`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimelineView {
    pub started: Timestamp,
    /// What lies between two stretches' beginnings, mostly.
    pub resolution_ms: u64,
    /// What `resident` and `live` of a stretch are of, in order.
    pub spaces: Vec<TimelineSpace>,
    pub events: Vec<Event>,
    pub stretches: Vec<Stretch>,
    /// Lines of the record that could not be read: the last one, if the host lost power while it was written.
    #[serde(default)]
    pub damaged_lines: usize,
}

/// A disk; or all RAM blocks together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineSpace {
    pub name: String,
    pub kind: SpaceKind,
    pub units_total: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub at_ms: u64,
    pub what: Happened,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Happened {
    /// A phase began.
    Phase(Phase),
    /// The guest was stopped at the source; told by the source.
    Stopped,
    /// The grant was said, by the source; or heard, by the destination.
    Granted,
    /// The guest runs at the destination.
    Ran,
    LinkDown,
    LinkUp,
    /// A restarted daemon went on with it.
    Restarted,
    /// Something was told to people.
    Told(String),
}

/// What follows from the timeline. Times are milliseconds since its start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub total_ms: u64,
    pub phases: Vec<PhaseSpan>,
    /// Absent before the guest ran at the destination, and at the destination: it does not know when it stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_ms: Option<f64>,
    /// What this end knows of the blackout, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blackout_parts: Vec<TimePart>,
    /// When the guest stood still, as far as this end knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stood_still: Option<Span>,
    pub outages: Vec<Span>,
    /// Bytes of frames with content on the link, by class.
    pub ram_bytes: u64,
    pub disk_bytes: u64,
    pub demand_bytes: u64,
    /// The guest's requests to its disks, and how long they took.
    pub guest_requests: u64,
    pub guest_p50_ms: f64,
    pub guest_p99_ms: f64,
    pub guest_max_ms: f64,
    /// Time in which push was held for the sake of the guest, by the migration's own limit, and by the host's.
    pub guard_ms: u64,
    pub limit_ms: u64,
    pub host_ms: u64,
    /// How often a restarted daemon went on with it.
    pub restarts: u64,
}

impl Summary {
    pub fn bytes(&self) -> u64 {
        self.ram_bytes + self.disk_bytes + self.demand_bytes
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    pub from_ms: u64,
    pub ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseSpan {
    pub phase: Phase,
    pub from_ms: u64,
    pub ms: u64,
}
