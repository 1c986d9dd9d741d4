//! Everything the API says, shared by the daemon and the command. JSON over HTTP.
//!
//! Sizes are bytes, rates bits per second, times RFC 3339 in UTC, durations milliseconds or seconds as
//! the field's name says. Requests with an unknown key are refused; answers may grow keys.

use super::error::ApiError;
pub use super::joining::*;
pub use super::recordings::*;
pub use super::reporting::*;
pub use super::snapshots::*;
use crate::state::{
    Accel, ByteSize, LatencyBound, Mac, MachineSpec, MigrationId, Name, Ownership, RateLimit,
    Timestamp, VolumeUuid,
};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
pub use whimbrel_engine::codec::Policy as Compress;
pub use whimbrel_engine::delta::Policy as Delta;
pub use whimbrel_engine::rounds::Order as RamOrder;
use whimbrel_engine::space::SpaceKind;
use whimbrel_engine::switchover::{Epoch, Phase};
use whimbrel_peer::key_id::KeyId;
use whimbrel_peer::rights::Rights;
use whimbrel_peer::trust::{Peer, PeerAddress, PeerName};
pub use whimbrel_volume::backend::Format;

/// All things of a kind, and what is wrong with those that cannot be shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listed<T> {
    pub items: Vec<T>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<ApiError>,
}

// ---- hosts ----

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostView {
    pub name: PeerName,
    /// Fingerprint of the host's key; what the other host must be told to trust.
    pub key: KeyId,
    /// The address peers reach it at.
    pub listen: String,
    /// The program's version.
    pub version: String,
    pub state_dir: PathBuf,
    /// What the daemon knows; absent while none runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub daemon: Option<DaemonView>,
    pub peers: Vec<PeerView>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DaemonView {
    pub pid: u32,
    pub started: Timestamp,
    pub qemu: PathBuf,
    pub networks: Vec<Name>,
    pub bandwidth: RateLimit,
    pub machines: usize,
    pub volumes: usize,
    /// Migrations that are not over.
    pub migrations: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerView {
    pub name: PeerName,
    pub key: KeyId,
    /// Where it listens, best first.
    pub addresses: Vec<PeerAddress>,
    /// What it may do.
    #[serde(default)]
    pub may: Rights,
    /// Absent when nobody knows: no daemon runs, or it has no reason to be connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkView>,
}

impl PeerView {
    pub fn of(name: PeerName, peer: Peer) -> PeerView {
        PeerView {
            name,
            key: peer.key,
            addresses: peer.addresses,
            may: peer.may,
            link: None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustRequest {
    pub name: PeerName,
    pub key: KeyId,
    pub addresses: Vec<PeerAddress>,
    /// What it may do. Left out: all if it is new, else what it may already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub may: Option<Rights>,
}

/// How this host and a peer are connected.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkView {
    pub connected: bool,
    /// Since when it is as it is.
    pub since: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
    /// How often it was made anew.
    pub reconnects: u64,
    /// While not connected, what for: `peer b refuses the connection; next try in 4 s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
}

// ---- volumes ----

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeView {
    pub name: Name,
    pub uuid: VolumeUuid,
    /// Bytes.
    pub size: u64,
    /// Bytes that take room on this host.
    pub allocated: u64,
    /// How much of it is here, in thousandths; 1000 for a local volume.
    pub resident_permille: u16,
    pub epoch: Epoch,
    pub state: Ownership,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Name>,
    #[serde(default)]
    pub format: Format,
    /// It waits for a volume of its name to arrive.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub awaits: bool,
    /// The NBD URI under which it is exported now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
    pub data: PathBuf,
    pub created: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    pub name: Name,
    /// May be left out for a device: all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    #[serde(default)]
    pub format: Format,
    /// A block device, whose content is adopted as it is; absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<PathBuf>,
    /// It waits for a volume of its name to arrive here, which then takes its place, format and all.
    #[serde(default)]
    pub awaits: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportVolume {
    pub name: Name,
    /// A file the daemon can read; absolute. This, or `uri`, or `snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotVolume>,
    /// The file's; by its name if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ImageFormat>,
    /// The volume's.
    #[serde(default)]
    pub to: Format,
    /// A block device to put it on, whose content is overwritten; absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    Raw,
    Qcow2,
    Vmdk,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportVolume {
    /// A file that does not exist yet; absolute.
    pub file: PathBuf,
    #[serde(default)]
    pub format: Format,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeVolume {
    /// Where clients connect.
    pub address: SocketAddr,
    /// The folder of certificates, made if there is none; absolute. Without, no TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<PathBuf>,
    /// Content may leave this computer without TLS.
    #[serde(default)]
    pub plain_text: bool,
    /// Clients may write.
    #[serde(default)]
    pub writable: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloneVolume {
    /// The new volume's.
    pub name: Name,
    /// The new volume's; as the old one's (raw, if that is a device) if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeVolume {
    pub size: ByteSize,
    /// The end may be cut off, with whatever is there.
    #[serde(default)]
    pub shrink: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckVolume {
    /// Put right what is safe to put right.
    #[serde(default)]
    pub repair: bool,
}

/// What a check found out, in words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    pub what: String,
    pub kind: FindingKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_step: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    /// As it should be.
    Good,
    /// Was wrong and was put right.
    Repaired,
    /// Wrong and harmless as it is.
    Untidy,
    /// The volume cannot be used, or not be trusted.
    Broken,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckView {
    pub volume: Name,
    /// The worst of the findings.
    pub verdict: FindingKind,
    pub findings: Vec<Finding>,
}

/// A part of a volume; sums over it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapCell {
    /// Bytes that hold data here; the rest are holes, or absent.
    pub data: u64,
    /// Bytes that are still only at the source.
    pub absent: u64,
    /// Bytes the guest has written since the volume came here, while it still arrives.
    pub written: u64,
    /// Reads and writes that touched it, recent ones above all.
    pub reads: u64,
    pub writes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MapView {
    pub volume: Name,
    /// Bytes.
    pub size: u64,
    /// Bytes of a cell; the last may be shorter.
    pub cell: u64,
    pub cells: Vec<MapCell>,
    pub total: MapCell,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeatExtent {
    /// Bytes.
    pub offset: u64,
    pub len: u64,
    /// Recent accesses: each counts half after every half-life.
    pub reads: u64,
    pub writes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeatView {
    pub volume: Name,
    pub half_life_s: u64,
    /// Extents that were used at all, and accesses to all of them.
    pub extents_used: usize,
    pub reads: u64,
    pub writes: u64,
    /// The most used, hottest first.
    pub hottest: Vec<HeatExtent>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportProgress {
    /// Bytes gone through, holes included.
    pub done: u64,
    /// Bytes altogether; 0 until known.
    pub total: u64,
}

// ---- machines ----

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineStatus {
    /// Known and not running.
    Defined,
    Running,
    /// It has a process whose guest is stopped.
    Paused,
    /// On its way to this host; the guest does not run here yet.
    Arriving,
    /// It went to a peer; what is left here is the way back.
    Departed,
    /// Its process ended without having been asked to.
    Crashed,
    /// Nobody but the operator may decide whether it runs here.
    NeedsOperator,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineView {
    pub name: Name,
    pub status: MachineStatus,
    pub ownership: Ownership,
    pub epoch: Epoch,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qmp: Option<PathBuf>,
    /// Bytes.
    pub memory: u64,
    pub vcpus: u32,
    /// The concrete type while it runs, else as described.
    pub machine_type: String,
    pub accel: Accel,
    pub disks: Vec<DiskView>,
    pub nics: Vec<NicView>,
    /// While a disk's error keeps its guest paused: which disk, and which error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_because: Option<String>,
    /// Its migration that goes on, else its last one this host knows of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationId>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskView {
    pub volume: Name,
    /// Bytes; absent if the volume cannot be shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NicView {
    pub network: Name,
    pub mac: Option<Mac>,
    /// The host's interface while the machine runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// End the process now instead of asking the guest to shut down.
    #[serde(default)]
    pub force: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdoptRequest {
    pub spec: MachineSpec,
    /// The running QEMU's QMP socket; absolute.
    pub qmp: PathBuf,
}

// ---- migrations ----

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    Outgoing,
    Incoming,
}

/// When the machine switches: before the copy, after it, or in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    Precopy,
    Mirror,
    Postcopy,
    Hybrid,
    Auto,
}

/// How RAM is to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RamMode {
    /// Hybrid where the destination can, else pre-copy.
    #[default]
    Auto,
    /// What the guest only reads goes ahead of the switch, the rest after it.
    Hybrid,
    /// All of it after the switch.
    Postcopy,
    Precopy,
}

/// How disks are to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskMode {
    /// What the guest does not write to goes ahead of the switch, the rest after it.
    Hybrid,
    /// All of it after the switch.
    #[default]
    Postcopy,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    pub machine: Name,
    /// The peer to go to.
    pub to: PeerName,
    #[serde(default)]
    pub bandwidth: RateLimit,
    /// Stay in the copy phase until told to switch.
    #[serde(default)]
    pub hold: bool,
    #[serde(default)]
    pub ram: RamMode,
    #[serde(default)]
    pub disks: DiskMode,
    /// What the guest's requests are to stay within, p99, while disks and link are shared with it; the
    /// configuration's if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_latency: Option<LatencyBound>,
    /// `auto`, `none`, `zstd` or `zstd:LEVEL`.
    #[serde(default)]
    pub compress: Compress,
    /// Whether memory that goes again may go as what changed of it: `on` or `off`.
    #[serde(default)]
    pub delta: Delta,
    /// With pre-copy: in which order pages go.
    #[serde(default)]
    pub ram_order: RamOrder,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThrottleRequest {
    pub bandwidth: RateLimit,
}

/// `POST /v1/machines/NAME/recovery`: the machine is wanted back as it was at the switchover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoverRequest {
    /// The destination, if the operator swears that its guest will never run again. Otherwise it is asked to end it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<PeerName>,
}

/// What is left of a guest on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestHere {
    Runs,
    /// At the source: with its memory as it was at the switchover.
    Paused,
    /// Its QEMU is there and does not answer: it may wait for a page.
    Silent,
    /// No QEMU: its memory is lost, its disks are not.
    Gone,
}

/// Where a machine stands whose move does not go on as it should, and what may be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoveryView {
    pub machine: Name,
    pub migration: MigrationId,
    pub peer: PeerName,
    pub direction: Direction,
    pub phase: Phase,
    pub state: MigrationState,
    pub epoch: Epoch,
    /// The last word of this host's journal, such as `peer-accepted under epoch 5`.
    pub recorded: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recorded_at: Option<Timestamp>,
    pub guest: GuestHere,
    pub link: LinkView,
    /// Bytes that had not arrived at the destination when this host last knew.
    pub absent: u64,
    pub choices: Vec<RecoveryChoice>,
}

/// Something that may be done, by waiting or by a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryChoice {
    pub what: String,
    /// The command; none where nothing is to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    pub gives_up: String,
}

/// How a migration fares, whatever its phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationState {
    Running,
    /// Waits for `switch`; what changes of memory goes on ahead meanwhile.
    Held,
    /// The peer is out of reach; goes on by itself when it is back.
    Waiting,
    Completed,
    /// Given up on request; the machine is at its source as before.
    Cancelled,
    /// Given up after an error; the machine is at its source as before.
    Failed,
    /// The machine is paused and nobody but the operator may decide where it runs.
    NeedsOperator,
}

impl MigrationState {
    /// Whether nothing more happens by itself: there is no point in watching on.
    pub fn is_settled(self) -> bool {
        match self {
            MigrationState::Running | MigrationState::Held | MigrationState::Waiting => false,
            MigrationState::Completed
            | MigrationState::Cancelled
            | MigrationState::Failed
            | MigrationState::NeedsOperator => true,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationView {
    pub id: MigrationId,
    pub machine: Name,
    pub peer: PeerName,
    pub direction: Direction,
    pub strategy: Strategy,
    pub phase: Phase,
    pub state: MigrationState,
    pub started: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Timestamp>,
    /// RAM and disks together, in thousandths. Never goes back.
    pub permille: u16,
    pub spaces: Vec<SpaceProgress>,
    pub sent: SentBytes,
    #[serde(default)]
    pub codecs: CodecUnits,
    #[serde(default)]
    pub compress: Compress,
    #[serde(default)]
    pub delta: Delta,
    #[serde(default)]
    pub deltas: DeltaStats,
    pub bandwidth: RateLimit,
    /// Bits per second over the last seconds.
    pub rate: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta: Option<EtaRange>,
    pub demands: DemandStats,
    /// Bits of content per second, before packing, that push is held to for the sake of the guest's own I/O.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub push_held_to: Option<u64>,
    /// Source STOP to destination RUNNING.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_ms: Option<f64>,
    pub link: LinkView,
    /// What happened that is worth telling, oldest first; bounded by the daemon.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
    /// Once it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<MigrationReport>,
}

/// One space's share. Units of 4 KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceProgress {
    pub name: String,
    pub kind: SpaceKind,
    pub units_total: u64,
    /// Neither hole nor zero: what has to move, as far as known.
    pub units_live: u64,
    /// Whose current content is at the destination.
    pub units_resident: u64,
    /// Sent over the link, each sending counted.
    pub units_sent: u64,
    /// Bytes on the link for this space.
    pub bytes_sent: u64,
}

/// Bytes on the link, by class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SentBytes {
    pub demand: u64,
    pub push: u64,
    pub control: u64,
    /// Of demand and push: what the units in them were before they were written for the link.
    #[serde(default)]
    pub content: u64,
}

impl SentBytes {
    pub fn total(self) -> u64 {
        self.demand + self.push + self.control
    }

    /// Bytes of frames with units over bytes of content in them; absent before there was any.
    pub fn over_content(self) -> Option<f64> {
        let units = (self.demand + self.push) as f64;
        (self.content > 0).then(|| units / self.content as f64)
    }
}

/// Units that were sent, by how they were written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodecUnits {
    pub plain: u64,
    pub zstd: u64,
    /// Zeroes, as what they are.
    pub zero: u64,
}

/// Memory that went again, and what keeping its old content at both ends was good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeltaStats {
    /// Units that had been sent before over the same connection.
    pub again: u64,
    /// Of these, whose old content was still kept.
    pub hits: u64,
    /// Of these, that went as what had changed.
    pub units: u64,
    /// Bytes that these took less than whole units, before anything was packed.
    pub saved: u64,
    /// Bytes of content kept at each end, where it was most.
    pub cache: u64,
}

/// When it will be over, from now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EtaRange {
    pub soonest_s: u64,
    /// Absent: no bound can be given, such as while held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latest_s: Option<u64>,
}

/// How long the guest waited for units it demanded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DemandStats {
    pub count: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

/// What a migration came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    pub total_ms: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_ms: Option<f64>,
    /// What the blackout was made of, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blackout_parts: Vec<TimePart>,
    /// From the guest running at the destination to nothing absent there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_ms: Option<f64>,
    pub units_live: u64,
    pub units_sent: u64,
    /// Units sent more than once, because a broken connection had lost them.
    #[serde(default)]
    pub units_sent_again: u64,
    /// Units sent more than once before the switch, because the guest had written to them.
    #[serde(default)]
    pub units_repeated: u64,
    /// Units sent ahead of the switch and once more after it, because the guest wrote to them in between.
    #[serde(default)]
    pub units_outdated: u64,
    /// Units not sent, because the guest wrote or discarded them at the destination first.
    #[serde(default)]
    pub units_forgotten: u64,
    /// Units that arrived though they were there already.
    #[serde(default)]
    pub late_copies: u64,
    pub sent: SentBytes,
    #[serde(default)]
    pub codecs: CodecUnits,
    #[serde(default)]
    pub deltas: DeltaStats,
    pub demands: DemandStats,
    /// The guest's own requests to its disks at the destination, until all was there.
    #[serde(default)]
    pub guest_io: GuestIo,
    /// Time without a link, altogether.
    pub outage_ms: f64,
    pub reconnects: u64,
    /// Whether every extent's digest was compared and found equal.
    pub verified: bool,
}

/// How a guest's requests to its disks fared while these were on the way. Of requests that waited for the source,
/// the link's least round trip is not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestIo {
    pub requests: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
    /// What the p99 was to stay within.
    pub bound: LatencyBound,
    /// Time for which push was held back to keep to it.
    pub held_ms: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimePart {
    pub name: String,
    pub ms: f64,
}

// ---- streams ----

/// One line of a streamed answer (NDJSON). The last line is `done` or `error`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StreamLine<P, D> {
    Progress(P),
    Done(D),
    Error(ApiError),
}

/// What an import streams.
pub type ImportLine = StreamLine<ImportProgress, VolumeView>;

/// What watching a migration streams. `done` when it is settled.
pub type WatchLine = StreamLine<MigrationView, MigrationView>;
