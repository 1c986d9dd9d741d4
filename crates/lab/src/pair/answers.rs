//! What the command answers with `--json`, as far as the laboratory reads it.
//!
//! These are not the daemon's own types, on purpose: what a user's script reads must stay readable, and a
//! field that is renamed shall fail here. Fields nobody reads are left out.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

#[derive(Clone, Debug, Deserialize)]
pub struct HostView {
    pub name: String,
    pub key: String,
    /// Absent while no daemon runs.
    pub daemon: Option<DaemonView>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct DaemonView {
    pub pid: u32,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Listed<T> {
    pub items: Vec<T>,
    #[serde(default)]
    pub damaged: Vec<ErrorAnswer>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct VolumeView {
    pub name: String,
    pub resident_permille: u16,
    pub data: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineStatus {
    Defined,
    Running,
    Paused,
    Arriving,
    Departed,
    Crashed,
    NeedsOperator,
}

#[derive(Clone, Debug, Deserialize)]
pub struct MachineView {
    pub name: String,
    pub status: MachineStatus,
    #[serde(default)]
    pub pid: Option<u32>,
    pub machine_type: String,
    #[serde(default)]
    pub paused_because: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    Prepare,
    Copy,
    Quiesce,
    Grant,
    Accept,
    Run,
    Drain,
    Complete,
    Cancel,
    Rewind,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Prepare => "prepare",
            Phase::Copy => "copy",
            Phase::Quiesce => "quiesce",
            Phase::Grant => "grant",
            Phase::Accept => "accept",
            Phase::Run => "run",
            Phase::Drain => "drain",
            Phase::Complete => "complete",
            Phase::Cancel => "cancel",
            Phase::Rewind => "rewind",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationState {
    Running,
    Held,
    Waiting,
    Completed,
    Cancelled,
    Failed,
    NeedsOperator,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationView {
    pub id: String,
    pub machine: String,
    pub phase: Phase,
    pub state: MigrationState,
    pub permille: u16,
    pub spaces: Vec<SpaceProgress>,
    pub sent: SentBytes,
    /// Bits per second.
    pub rate: u64,
    #[serde(default)]
    pub eta: Option<EtaRange>,
    pub demands: DemandStats,
    #[serde(default)]
    pub blackout_ms: Option<f64>,
    pub link: LinkView,
    #[serde(default)]
    pub messages: Vec<String>,
    #[serde(default)]
    pub error: Option<ErrorAnswer>,
    #[serde(default)]
    pub report: Option<MigrationReport>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpaceKind {
    Disk,
    Ram,
}

/// Units are 4 KiB.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SpaceProgress {
    pub name: String,
    pub kind: SpaceKind,
    pub units_total: u64,
    pub units_live: u64,
    pub units_resident: u64,
    pub units_sent: u64,
    pub bytes_sent: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct SentBytes {
    pub demand: u64,
    pub push: u64,
    pub control: u64,
    /// What demand and push carried, before it was written for the link.
    #[serde(default)]
    pub content: u64,
}

/// Units sent, by how they were written.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct CodecUnits {
    pub plain: u64,
    pub zstd: u64,
    pub zero: u64,
}

/// Memory that went again.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct DeltaStats {
    pub again: u64,
    pub hits: u64,
    pub units: u64,
    pub saved: u64,
    pub cache: u64,
}

impl SentBytes {
    pub fn total(self) -> u64 {
        self.demand + self.push + self.control
    }
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct EtaRange {
    pub soonest_s: u64,
    #[serde(default)]
    pub latest_s: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct DemandStats {
    pub count: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LinkView {
    pub connected: bool,
    #[serde(default)]
    pub rtt_ms: Option<f64>,
    pub reconnects: u64,
    #[serde(default)]
    pub waiting_for: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationReport {
    pub total_ms: f64,
    #[serde(default)]
    pub blackout_ms: Option<f64>,
    #[serde(default)]
    pub blackout_parts: Vec<TimePart>,
    #[serde(default)]
    pub drain_ms: Option<f64>,
    pub units_live: u64,
    pub units_sent: u64,
    #[serde(default)]
    pub units_sent_again: u64,
    #[serde(default)]
    pub units_repeated: u64,
    #[serde(default)]
    pub units_outdated: u64,
    #[serde(default)]
    pub units_forgotten: u64,
    #[serde(default)]
    pub late_copies: u64,
    pub sent: SentBytes,
    #[serde(default)]
    pub codecs: CodecUnits,
    #[serde(default)]
    pub deltas: DeltaStats,
    pub demands: DemandStats,
    #[serde(default)]
    pub guest_io: GuestIo,
    pub outage_ms: f64,
    pub reconnects: u64,
    pub verified: bool,
}

impl MigrationReport {
    /// From QEMU's STOP event at the source to its RESUME at the destination, by the hosts' clocks: one
    /// and the same clock in the laboratory.
    pub fn stop_to_resume_ms(&self) -> Option<f64> {
        let part = |part: &&TimePart| part.name.starts_with("stop-to-resume");
        Some(self.blackout_parts.iter().find(part)?.ms)
    }
}

/// How the guest's own requests to its disks fared at the destination.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GuestIo {
    pub requests: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
    pub bound: String,
    pub held_ms: f64,
}

/// What `report` answers.
#[derive(Clone, Debug, Deserialize)]
pub struct ReportView {
    pub migration: MigrationView,
    pub summary: ReportSummary,
    pub elsewhere: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ReportSummary {
    pub total_ms: u64,
    pub phases: Vec<PhaseSpan>,
    #[serde(default)]
    pub blackout_ms: Option<f64>,
    #[serde(default)]
    pub blackout_parts: Vec<TimePart>,
    pub ram_bytes: u64,
    pub disk_bytes: u64,
    pub demand_bytes: u64,
    pub guest_requests: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct PhaseSpan {
    pub phase: Phase,
    pub ms: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimePart {
    pub name: String,
    pub ms: f64,
}

/// What a failed command writes to its standard error.
#[derive(Clone, Debug, Deserialize)]
pub struct Failure {
    pub error: ErrorAnswer,
    pub exit: i32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorAnswer {
    pub code: String,
    pub what: String,
    #[serde(default, rename = "where")]
    pub place: Option<String>,
    #[serde(default)]
    pub machine_state: Option<String>,
    #[serde(default)]
    pub next_step: Option<String>,
}
