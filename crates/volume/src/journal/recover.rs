//! Reading a journal back after anything.
//!
//! Snapshots are tried from the newest down, then every log from that snapshot's generation on is read
//! whole. Which records are believed depends on whose page cache they come from:
//!
//! - logs of this boot: all. The data was written before the record, and the page cache has both.
//! - logs of an earlier boot: those up to what the best barrier *of that same boot* covers. A barrier's
//!   being readable proves that the data it covers was durable before it was written; no order among
//!   the log's own blocks is needed for that. Barriers of another boot prove nothing: what that
//!   recovery did not believe must stay unbelieved.
//!
//! Damage or crash? In a log of this boot, appends came one after another, so nothing valid follows
//! something torn. In an older one, anything after the last sync may be missing, but what a barrier says
//! was durable before it (`settled`) must be there. Everything else that is missing was never promised.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Read;
use std::sync::Arc;

use super::book::{Book, OldSnapshot, Start};
use super::delta::Delta;
use super::record::{Entry, HEADER, LogHeader, RECORD, Sequence, Slot, slots};
use super::snapshot::{BLOCK_UNITS, Block};
use super::store::Store;
use super::{
    BootId, COMPLETE, Change, Fault, Limits, Recovered, RecoveryHow, State, VolumeIdentity,
    damaged, generation, is_tmp, log_name, snapshot_name,
};
use crate::{Operation, VolumeError};

type Result<T> = std::result::Result<T, VolumeError>;

/// A log may not make us read more than this; real ones have some megabytes.
const LOG_LIMIT: u64 = 1 << 30;

struct ReadLog {
    header: LogHeader,
    slots: Vec<(u32, Slot)>,
}

/// Opens the journal and tells what it knows.
pub(super) fn open<S: Store>(
    store: Arc<S>,
    identity: VolumeIdentity,
    limits: Limits,
) -> Result<(Book<S>, Recovered)> {
    for name in store.list()?.iter().filter(|n| is_tmp(n)) {
        store.remove(name)?;
    }
    let (start, recovered) = read(&*store, identity)?;
    let book = Book::resume(store, identity, limits, start)?;
    Ok((book, recovered))
}

/// Tells what the journal knows and changes nothing.
pub(super) fn inspect<S: Store>(store: &S, identity: VolumeIdentity) -> Result<Recovered> {
    read(store, identity).map(|(_, recovered)| recovered)
}

fn read<S: Store>(store: &S, identity: VolumeIdentity) -> Result<(Start, Recovered)> {
    let mut names = store.list()?;
    names.retain(|n| super::is_ours(n) && !is_tmp(n));
    if names.is_empty() {
        return Err(VolumeError::JournalAbsent {
            dir: store.path(""),
        });
    }
    if names.iter().any(|n| n == COMPLETE) {
        return read_complete(store, identity);
    }
    let of_kind = |kind: &str| -> BTreeSet<u64> {
        names
            .iter()
            .filter(|n| n.starts_with(kind))
            .filter_map(|n| generation(n))
            .collect()
    };
    let (snapshots, logs) = (of_kind(super::SNAPSHOT), of_kind(super::LOG));

    // A snapshot, readable or not, had its log; so each log up to the newest name must be there.
    let newest = snapshots.iter().chain(&logs).max().copied().unwrap_or(0);
    let mut first_failure = None;
    for &base in snapshots.iter().rev() {
        match from_base(store, identity, base, newest, &logs) {
            Ok((start, state, how)) => {
                let fell_back = first_failure.is_some();
                if let Some(error) = &first_failure {
                    tracing::warn!(%error, base, "fell back to the journal's previous generation");
                }
                let State {
                    resident,
                    guest_owned,
                    partial,
                } = state;
                let recovered = Recovered {
                    resident,
                    guest_owned,
                    partial,
                    how,
                    fell_back,
                };
                return Ok((start, recovered));
            }
            Err(error @ VolumeError::JournalDamaged { .. }) => {
                first_failure.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    Err(first_failure.unwrap_or_else(|| damaged(&store.path(""), 0, Fault::NoSnapshot)))
}

fn read_complete<S: Store>(store: &S, identity: VolumeIdentity) -> Result<(Start, Recovered)> {
    let path = store.path(COMPLETE);
    let bytes = read_file(store, COMPLETE, HEADER as u64)?;
    let mark = LogHeader::decode(&bytes).map_err(|f| damaged(&path, 0, f))?;
    same_volume(&path, mark.identity, identity)?;
    let units = identity.units();
    let mut state = State::empty(&identity);
    state
        .resident
        .insert(whimbrel_engine::space::Extent::new(0, units));
    let start = Start {
        base: 0,
        next_generation: 1,
        delta: Delta::empty(&identity),
        unsynced: BTreeSet::new(),
        last: Sequence(0),
        logs_behind: 0,
        retired: true,
    };
    let recovered = Recovered {
        resident: state.resident,
        guest_owned: state.guest_owned,
        partial: BTreeMap::new(),
        how: RecoveryHow::Complete,
        fell_back: false,
    };
    Ok((start, recovered))
}

fn from_base<S: Store>(
    store: &S,
    identity: VolumeIdentity,
    base: u64,
    newest: u64,
    generations: &BTreeSet<u64>,
) -> Result<(Start, State, RecoveryHow)> {
    let mut snapshot = OldSnapshot::open(store, base)?;
    same_volume(
        &store.path(&snapshot_name(base)),
        snapshot.identity(),
        identity,
    )?;

    let mut logs = Vec::new();
    for generation in base..=newest {
        if !generations.contains(&generation) {
            // Each log was durable with its name before the next, and before its snapshot.
            return Err(damaged(
                &store.path(&log_name(generation)),
                0,
                Fault::LogMissing,
            ));
        }
        logs.push(read_log(store, identity, generation)?);
    }

    let here = store.boot();
    let covered = covered_by_boot(&logs);
    let mut delta = Delta::empty(&identity);
    let mut last = Sequence(0);
    let mut unsynced = BTreeSet::new();
    let (mut kept, mut dropped) = (0, 0);
    let mut crashed = false;
    let mut closed = false;
    for log in &logs {
        let generation = log.header.generation;
        let same_boot = log.header.boot == here;
        test_for_holes(store, log, same_boot)?;
        if same_boot {
            unsynced.insert(generation);
        } else {
            crashed = true;
        }
        let limit = covered.get(&log.header.boot).copied();
        for &(slot, ref content) in &log.slots {
            let at = Sequence::new(generation, slot);
            match *content {
                Slot::Valid(Entry::Change(change))
                    if same_boot || limit.is_some_and(|l| at <= l) =>
                {
                    delta.apply(change);
                    kept += 1;
                    closed = false;
                    if same_boot {
                        last = last.max(at);
                    }
                }
                Slot::Valid(Entry::Change(Change::Filled(_) | Change::Written(_)))
                | Slot::Valid(Entry::Change(Change::PartlyWritten { .. }))
                | Slot::Torn => {
                    dropped += 1;
                    closed = false;
                }
                Slot::Valid(Entry::Barrier { .. }) => closed = false,
                Slot::Valid(Entry::Closed) => closed = true,
                Slot::Empty | Slot::Nonsense => {}
            }
        }
    }

    let mut state = State::empty(&identity);
    for index in 0..identity.units().div_ceil(BLOCK_UNITS) {
        let mut block: Block = snapshot.take(index)?;
        delta.lay_over(&mut block, &identity);
        state.take(&block);
    }
    let how = if closed {
        RecoveryHow::Clean
    } else if crashed {
        RecoveryHow::HostRestarted { kept, dropped }
    } else {
        RecoveryHow::SameBoot { kept }
    };
    let start = Start {
        base,
        next_generation: newest + 1,
        delta,
        unsynced,
        last,
        logs_behind: logs.len() as u64,
        retired: false,
    };
    Ok((start, state, how))
}

/// The best barrier of each boot.
fn covered_by_boot(logs: &[ReadLog]) -> HashMap<BootId, Sequence> {
    let mut covered = HashMap::new();
    for log in logs {
        for (_, slot) in &log.slots {
            if let Slot::Valid(Entry::Barrier { covers, .. }) = *slot {
                let best = covered.entry(log.header.boot).or_insert(covers);
                *best = covers.max(*best);
            }
        }
    }
    covered
}

/// Tells damage from what a crash may leave.
fn test_for_holes<S: Store>(store: &S, log: &ReadLog, same_boot: bool) -> Result<()> {
    let mut must_be_valid = 0;
    for &(slot, ref content) in &log.slots {
        match *content {
            Slot::Valid(Entry::Barrier { settled, .. }) if !same_boot => {
                must_be_valid = must_be_valid.max(settled);
            }
            Slot::Valid(_) if same_boot => must_be_valid = slot,
            _ => {}
        }
    }
    for &(slot, ref content) in &log.slots {
        let hole = slot < must_be_valid && !matches!(content, Slot::Valid(_));
        if hole || *content == Slot::Nonsense {
            let fault = if hole { Fault::Hole } else { Fault::Nonsense };
            let offset = HEADER as u64 + u64::from(slot) * RECORD as u64;
            return Err(damaged(
                &store.path(&log_name(log.header.generation)),
                offset,
                fault,
            ));
        }
    }
    Ok(())
}

fn read_log<S: Store>(store: &S, identity: VolumeIdentity, generation: u64) -> Result<ReadLog> {
    let name = log_name(generation);
    let path = store.path(&name);
    let bytes = read_file(store, &name, LOG_LIMIT)?;
    let header = LogHeader::decode(&bytes).map_err(|f| damaged(&path, 0, f))?;
    same_volume(&path, header.identity, identity)?;
    if header.generation != generation {
        return Err(damaged(&path, 0, Fault::Nonsense));
    }
    let wanted = HEADER as u64 + u64::from(header.slots) * RECORD as u64;
    if (bytes.len() as u64) < wanted {
        // Made at full length, and durable so, before it got its name.
        return Err(damaged(&path, bytes.len() as u64, Fault::Truncated));
    }
    let slots = slots(&header, &bytes[HEADER..])
        .filter(|(_, s)| *s != Slot::Empty)
        .collect::<Vec<_>>();
    Ok(ReadLog {
        header,
        slots: with_gaps(slots),
    })
}

/// Puts back the empty slots that lie before a used one: they are holes. The empty tail is not kept.
fn with_gaps(used: Vec<(u32, Slot)>) -> Vec<(u32, Slot)> {
    let end = used.last().map_or(0, |(slot, _)| slot + 1);
    let mut all: Vec<(u32, Slot)> = (0..end).map(|slot| (slot, Slot::Empty)).collect();
    for (slot, content) in used {
        all[slot as usize].1 = content;
    }
    all
}

fn read_file<S: Store>(store: &S, name: &str, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    store
        .reader(name)?
        .take(limit)
        .read_to_end(&mut bytes)
        .map_err(|e| {
            VolumeError::io(
                &store.path(name),
                Operation::Read,
                bytes.len() as u64,
                limit,
                e,
            )
        })?;
    Ok(bytes)
}

fn same_volume(
    path: &std::path::Path,
    found: VolumeIdentity,
    wanted: VolumeIdentity,
) -> Result<()> {
    if found == wanted {
        Ok(())
    } else {
        Err(VolumeError::JournalForeign {
            path: path.to_owned(),
            found,
            wanted,
        })
    }
}
