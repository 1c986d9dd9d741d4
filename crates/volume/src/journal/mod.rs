//! The residency journal: which units of a volume that is being filled are here, through any crash.
//!
//! # Idea
//! While a volume is filled at a migration's destination, each of its units is here, or not yet, or here
//! in some of its sectors because the guest wrote those before the rest came. Forgetting that a unit is
//! here loses a guest's write (the copy from the source would overwrite it); believing that one is here
//! which is not, hands the guest whatever lay in the file. So the journal keeps, in its own directory:
//!
//! ```text
//! snapshot-G   the whole volume's state before log G, in checksummed blocks     (snapshot.rs)
//! log-G        checksummed 32-byte records of changes since                      (record.rs)
//! complete     instead of all those: everything is here and durable
//! ```
//!
//! Knowledge only grows: every change is a union (more units resident, more sectors written), so records
//! may be replayed in any order, any number of times, and each stands for itself.
//!
//! # The three crashes, and the order that survives them
//! *The daemon dies.* The page cache lives on. A guest's write is acknowledged after (1) its data was
//! written, (2) its record was written, neither synced. Both are in the page cache, in that order, so
//! every record found was preceded by its data, and every acknowledged write has its record. That is the
//! same kernel, told by its boot id in the log's header: all valid records are believed.
//!
//! *The host dies.* Each block of each file not synced may be old, new, or part of each. A flush is
//! acknowledged after (1) the newest record's number `n` was taken, (2) the data was synced, (3) a barrier
//! saying "covers `n`" was written, (4) the log was synced. Under another boot id only records that a
//! barrier covers are believed. A barrier that can be read was written after the sync it tells of, so
//! whatever it covers is durable, whether or not step 4 was reached; after step 4 it can be read, and
//! every record before it too. Records written *during* the sync of the data have numbers above `n` and
//! are not covered: their data came too late for it.
//!
//! *A torn write.* A record is believed only if its checksum, seeded with the log's own nonce, is right
//! and its number is its place's. Snapshots and new logs get their names after they were synced.
//!
//! # Traps
//! - A log is never appended to after a restart or a failed write, and barriers speak for their own boot
//!   only. Otherwise a record that recovery did not believe could lie beyond the end, to be covered by a
//!   later barrier.
//! - A failed sync is final: the kernel forgets the pages it could not write, and the next sync succeeds.
//!   The journal then refuses all barriers and changes ([`VolumeError::JournalPoisoned`]).
//! - The boot id stands for the page cache. A disk that is detached and attached again under the same
//!   kernel loses its unsynced pages without a new boot id; barrier and close before detaching.
//! - *For callers:* a unit filled may be recorded late ([`Journal::record_lazily`]): a lost record costs
//!   one more copy. But the guest's first write to a unit must be recorded before it is acknowledged
//!   **even if the unit is resident already**: its `Filled` may not be in the log yet, and a copy fetched
//!   again would overwrite the guest.
//!
//! # Folding
//! When half of the log is used, a new log is made and appends move to it; a barrier makes everything
//! before durable; the old snapshot streamed through the changes since becomes the next one. The
//! generation before stays until the fold after, should the newest snapshot not be readable. If the log
//! fills up before appends can move, callers of [`Journal::record`] wait; if the fold fails (no space),
//! they get its error. Memory: the changes since the last snapshot, at most ~400 bytes a record, twice
//! while folding; no bitmap of the volume.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SECTOR, UNIT};

use crate::VolumeError;

mod book;
mod delta;
mod live;
pub mod record;
mod recover;
pub mod snapshot;
mod store;

#[cfg(test)]
mod crash;
#[cfg(test)]
mod disk;

pub use live::{DataSync, Journal};

const LOG: &str = "log-";
const SNAPSHOT: &str = "snapshot-";
const COMPLETE: &str = "complete";
const TMP: &str = ".tmp";

/// Which volume, and which of its moves, a journal belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VolumeIdentity {
    pub uuid: [u8; 16],
    /// Bytes.
    pub size: u64,
    /// The machine's epoch under which this host fills the volume.
    pub epoch: u64,
}

impl VolumeIdentity {
    /// Number of units, the last possibly partial.
    pub fn units(&self) -> u64 {
        self.size.div_ceil(UNIT)
    }

    /// The mask of the sectors a unit has: all eight, fewer in a short last one.
    pub fn all_sectors(&self, unit: u64) -> u8 {
        let bytes = self
            .size
            .saturating_sub(unit.saturating_mul(UNIT))
            .min(UNIT);
        ((1u16 << bytes.div_ceil(SECTOR)) - 1) as u8
    }
}

impl std::fmt::Display for VolumeIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let uuid = u128::from_be_bytes(self.uuid);
        write!(
            f,
            "volume {uuid:032x} of {} bytes at epoch {}",
            self.size, self.epoch
        )
    }
}

/// The running kernel's boot id: one life of the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BootId(pub [u8; 16]);

/// Something that became true of the volume's file, recorded after its data was written there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The source's content was stored; merged with the guest's sectors if there were any.
    Filled(Extent),
    /// The guest wrote (or discarded, or zeroed) whole units.
    Written(Extent),
    /// The guest wrote these sectors (bit i: sector i) of a unit whose rest is not here.
    PartlyWritten { unit: u64, mask: u8 },
}

/// How much a journal may hold before it folds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Records per log, 32 bytes each; folding begins at half.
    pub log_records: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            log_records: 32_768,
        }
    }
}

/// What a journal knew when it was opened.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Units wholly here.
    pub resident: UnitSet,
    /// Units the guest wrote to, in whole or in part. Empty once [`RecoveryHow::Complete`].
    pub guest_owned: UnitSet,
    /// Units of which only these sectors are here. Disjoint from `resident`.
    pub partial: BTreeMap<u64, u8>,
    pub how: RecoveryHow,
    /// The newest snapshot was damaged; the one before it and the logs since gave the same knowledge.
    pub fell_back: bool,
}

/// What the journal had been through. Numbers are records since the last snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecoveryHow {
    /// Closed in good order.
    Clean,
    /// The daemon died, its page cache did not: nothing is lost.
    SameBoot { kept: u64 },
    /// The host started anew since: what no flush had made durable is not believed.
    HostRestarted { kept: u64, dropped: u64 },
    /// The volume had been declared complete: everything is here.
    Complete,
}

/// Why a journal's file cannot be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("it is not a journal's file")]
    Magic,
    #[error("its checksum is wrong")]
    Checksum,
    #[error("it ends too early")]
    Truncated,
    #[error("it has impossible numbers under a right checksum")]
    Nonsense,
    #[error("it has version {found}, this program knows {known}")]
    Version { found: u32, known: u32 },
    #[error("a record that was durable is unreadable")]
    Hole,
    #[error("the log is missing")]
    LogMissing,
    #[error("there are logs but no snapshot")]
    NoSnapshot,
}

/// The state of a volume while it is put together from blocks.
struct State {
    resident: UnitSet,
    guest_owned: UnitSet,
    partial: BTreeMap<u64, u8>,
}

impl State {
    fn empty(identity: &VolumeIdentity) -> Self {
        State {
            resident: UnitSet::empty(identity.units()),
            guest_owned: UnitSet::empty(identity.units()),
            partial: BTreeMap::new(),
        }
    }

    fn take(&mut self, block: &snapshot::Block) {
        let first = block.index * snapshot::BLOCK_UNITS;
        for (words, set) in [
            (&block.resident, &mut self.resident),
            (&block.owned, &mut self.guest_owned),
        ] {
            for (w, &word) in words.iter().enumerate() {
                let (mut rest, base) = (word, first + w as u64 * 64);
                while rest != 0 {
                    let start = u64::from(rest.trailing_zeros());
                    let len = u64::from((rest >> start).trailing_ones());
                    set.insert(Extent::new(base + start, len));
                    let run = if len == 64 {
                        u64::MAX
                    } else {
                        ((1 << len) - 1) << start
                    };
                    rest &= !run;
                }
            }
        }
        let partial = block.partial.iter();
        self.partial
            .extend(partial.map(|(&unit, &mask)| (first + u64::from(unit), mask)));
    }
}

fn log_name(generation: u64) -> String {
    format!("{LOG}{generation:08x}")
}

fn snapshot_name(generation: u64) -> String {
    format!("{SNAPSHOT}{generation:08x}")
}

fn tmp_name(name: &str) -> String {
    format!("{name}{TMP}")
}

fn is_tmp(name: &str) -> bool {
    name.strip_suffix(TMP).is_some_and(is_ours)
}

fn is_ours(name: &str) -> bool {
    let name = name.strip_suffix(TMP).unwrap_or(name);
    name == COMPLETE || generation(name).is_some()
}

/// The generation in the name of a log or snapshot.
fn generation(name: &str) -> Option<u64> {
    let digits = name
        .strip_prefix(LOG)
        .or_else(|| name.strip_prefix(SNAPSHOT))?;
    let canonical =
        digits.len() == 8 && !digits.contains(|c: char| c.is_ascii_uppercase() || c == '+');
    canonical
        .then(|| u64::from_str_radix(digits, 16).ok())
        .flatten()
}

fn damaged(path: &Path, offset: u64, fault: Fault) -> VolumeError {
    let path = path.to_owned();
    match fault {
        Fault::Version { found, known } => VolumeError::JournalVersion { path, found, known },
        fault => VolumeError::JournalDamaged {
            path,
            offset,
            fault,
        },
    }
}

fn snapshot_error(path: &Path, fault: snapshot::SnapshotFault) -> VolumeError {
    match fault {
        snapshot::SnapshotFault::Read(e) => VolumeError::io(path, crate::Operation::Read, 0, 0, e),
        snapshot::SnapshotFault::Damaged { offset, fault } => damaged(path, offset, fault),
    }
}
