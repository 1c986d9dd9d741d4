//! The journal's bookkeeping: what is in which file, step by step, each step one blocking deed.
//!
//! No threads and no futures here, so that the crash tests can stop it between and within any two
//! steps. [`Journal`](super::Journal) runs the steps on the I/O pool, in the orders given in the essay
//! of the parent module.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::delta::Delta;
use super::record::{Entry, HEADER, LogHeader, RECORD, Sequence, encode};
use super::snapshot::{BLOCK_UNITS, Block, SnapshotReader, SnapshotWriter};
use super::store::Store;
use super::{COMPLETE, Change, Limits, VolumeIdentity, log_name, snapshot_name, tmp_name};
use crate::{Operation, VolumeError};

type Result<T> = std::result::Result<T, VolumeError>;

/// Slots kept free for the barrier that makes a full log's changes durable, and for the mark of a
/// close in good order.
const RESERVED: u32 = 2;

/// Snapshots are written in pieces of about this many bytes.
const PIECE: usize = 1 << 20;

/// The log appended to.
struct Log {
    header: LogHeader,
    used: u32,
    /// Slots known to be durable.
    settled: u32,
    /// A write to it failed half way. It is never written to again: what lies beyond a torn record would
    /// else be the remains of the failed write, and recovery takes such for damage.
    broken: Option<VolumeError>,
}

impl Log {
    fn new(header: LogHeader) -> Self {
        Log {
            header,
            used: 0,
            settled: 0,
            broken: None,
        }
    }
}

pub(super) struct Book<S> {
    pub store: Arc<S>,
    pub identity: VolumeIdentity,
    limits: Limits,
    log: Log,
    next_generation: u64,
    /// A fold is making the log of that generation.
    making: bool,
    /// The newest snapshot: the state before log `base`.
    base: u64,
    /// Logs written to in this boot that no sync has covered since they were closed. The log appended
    /// to is not among them: it always needs a sync.
    unsynced: BTreeSet<u64>,
    /// The newest change of this boot, and the newest that a durable barrier covers.
    last: Sequence,
    durable: Sequence,
    /// Changes since the last switch, and those before it that no snapshot has yet, with the generation of
    /// the log switched to.
    delta: Delta,
    frozen: Option<(u64, Arc<Delta>)>,
    /// Logs found at the start.
    pub logs_behind: u64,
    poisoned: Option<VolumeError>,
    /// Complete, or closed: nothing is recorded any more.
    retired: bool,
}

/// What an opened or created journal starts from.
pub(super) struct Start {
    pub base: u64,
    pub next_generation: u64,
    pub delta: Delta,
    pub unsynced: BTreeSet<u64>,
    pub last: Sequence,
    pub logs_behind: u64,
    pub retired: bool,
}

/// A barrier written but not yet durable.
pub(super) struct Sealed {
    covers: Sequence,
    generation: u64,
    settled: u32,
    closed: BTreeSet<u64>,
    /// What must be synced now.
    pub sync: Vec<String>,
}

/// What a fold writes down.
pub(super) struct Fold {
    generation: u64,
    base: u64,
    frozen: Arc<Delta>,
}

impl<S: Store> Book<S> {
    /// Starts a journal in a directory that has none.
    pub fn create(store: Arc<S>, identity: VolumeIdentity, limits: Limits) -> Result<Self> {
        let names = store.list()?;
        if names.iter().any(|n| super::is_ours(n) && !super::is_tmp(n)) {
            return Err(VolumeError::JournalExists {
                dir: store.path(""),
            });
        }
        // The log first: a snapshot without its log would look like damage.
        let log = make_log(&*store, identity, limits, 1)?;
        write_snapshot(&*store, identity, None, &Delta::empty(&identity), 1)?;
        Ok(Book::with_log(
            store,
            identity,
            limits,
            log,
            Start {
                base: 1,
                next_generation: 2,
                delta: Delta::empty(&identity),
                unsynced: BTreeSet::new(),
                last: Sequence(0),
                logs_behind: 0,
                retired: false,
            },
        ))
    }

    /// Goes on from what was recovered, in a new log: no byte of an old log is ever written again, so
    /// nothing that recovery did not believe can come to be believed later.
    pub fn resume(
        store: Arc<S>,
        identity: VolumeIdentity,
        limits: Limits,
        start: Start,
    ) -> Result<Self> {
        let log = if start.retired {
            LogHeader {
                identity,
                boot: store.boot(),
                generation: 0,
                nonce: 0,
                slots: 0,
            }
        } else {
            make_log(&*store, identity, limits, start.next_generation)?
        };
        let start = Start {
            next_generation: start.next_generation + 1,
            ..start
        };
        Ok(Book::with_log(store, identity, limits, log, start))
    }

    fn with_log(
        store: Arc<S>,
        identity: VolumeIdentity,
        limits: Limits,
        header: LogHeader,
        start: Start,
    ) -> Self {
        Book {
            store,
            identity,
            limits,
            log: Log::new(header),
            making: false,
            next_generation: start.next_generation,
            base: start.base,
            unsynced: start.unsynced,
            last: start.last,
            durable: Sequence(0),
            delta: start.delta,
            frozen: None,
            logs_behind: start.logs_behind,
            poisoned: None,
            retired: start.retired,
        }
    }

    pub fn is_retired(&self) -> bool {
        self.retired
    }

    /// Slots used, of those a change may use.
    pub fn fill(&self) -> (u32, u32) {
        (
            self.log.used,
            self.log.header.slots - RESERVED.min(self.log.header.slots),
        )
    }

    /// Appends as many of the changes as there is room for, in one write; returns how many those were.
    /// On an error none counts, and the next append starts a new log.
    pub fn append(&mut self, changes: &[Change]) -> Result<usize> {
        if self.retired {
            return Ok(changes.len());
        }
        self.check()?;
        self.mend()?;
        let (used, usable) = self.fill();
        let mut room = usable.saturating_sub(used);
        let mut bytes = Vec::new();
        let mut fresh = Vec::new();
        let mut taken = 0;
        for &change in changes {
            if !self.knows(change) {
                if room == 0 {
                    break;
                }
                room -= 1;
                let at = self.sequence(fresh.len() as u32);
                bytes.extend_from_slice(&encode(Entry::Change(change), at, self.log.header.nonce));
                fresh.push(change);
            }
            taken += 1;
        }
        if let Some(before) = (fresh.len() as u32).checked_sub(1) {
            let last = self.sequence(before);
            self.write_records(&bytes)?;
            self.last = last;
            for change in fresh {
                self.delta.apply(change);
            }
        }
        Ok(taken)
    }

    fn knows(&self, change: Change) -> bool {
        self.delta.knows(change) || self.frozen.as_ref().is_some_and(|(_, f)| f.knows(change))
    }

    fn sequence(&self, ahead: u32) -> Sequence {
        Sequence::new(self.log.header.generation, self.log.used + ahead)
    }

    fn write_records(&mut self, bytes: &[u8]) -> Result<()> {
        let offset = HEADER as u64 + u64::from(self.log.used) * RECORD as u64;
        let name = log_name(self.log.header.generation);
        if let Err(error) = self.store.write(&name, offset, bytes) {
            self.log.broken = Some(error.clone());
            return Err(error);
        }
        self.log.used += (bytes.len() / RECORD) as u32;
        Ok(())
    }

    /// Puts a new log in place of a broken one.
    fn mend(&mut self) -> Result<()> {
        let Some(broken) = &self.log.broken else {
            return Ok(());
        };
        if self.making {
            // The fold's switch will mend it in a moment.
            return Err(broken.clone());
        }
        let header = make_log(
            &*self.store,
            self.identity,
            self.limits,
            self.next_generation,
        )?;
        self.replace_log(header);
        Ok(())
    }

    fn replace_log(&mut self, header: LogHeader) {
        self.unsynced.insert(self.log.header.generation);
        self.next_generation = header.generation + 1;
        self.log = Log::new(header);
    }

    /// The newest change: a sync of the data that begins after this call covers it.
    pub fn mark(&self) -> Sequence {
        self.last
    }

    /// Writes the barrier for a mark whose data has been synced; `None` if there is nothing new to say.
    pub fn seal(&mut self, covers: Sequence) -> Result<Option<Sealed>> {
        if self.retired {
            return Ok(None);
        }
        self.check()?;
        if covers <= self.durable {
            return Ok(None);
        }
        self.mend()?;
        let entry = Entry::Barrier {
            covers,
            settled: self.log.settled,
        };
        let record = encode(entry, self.sequence(0), self.log.header.nonce);
        self.write_records(&record)?;
        Ok(Some(self.sealed(covers)))
    }

    /// Marks the journal as closed in good order; to be made durable like a barrier.
    pub fn write_closed(&mut self) -> Result<Option<Sealed>> {
        if self.retired || self.log.used == self.log.header.slots {
            return Ok(None);
        }
        self.check()?;
        self.mend()?;
        let record = encode(Entry::Closed, self.sequence(0), self.log.header.nonce);
        self.write_records(&record)?;
        Ok(Some(self.sealed(self.durable)))
    }

    fn sealed(&self, covers: Sequence) -> Sealed {
        let generation = self.log.header.generation;
        Sealed {
            covers,
            generation,
            settled: self.log.used,
            closed: self.unsynced.clone(),
            sync: self
                .unsynced
                .iter()
                .chain([&generation])
                .map(|&g| log_name(g))
                .collect(),
        }
    }

    /// The barrier's logs have been synced.
    pub fn settle(&mut self, sealed: &Sealed) {
        self.durable = self.durable.max(sealed.covers);
        if self.log.header.generation == sealed.generation {
            self.log.settled = self.log.settled.max(sealed.settled);
        }
        // Only those that were closed before the sync began: a log closed since may have grown.
        self.unsynced.retain(|g| !sealed.closed.contains(g));
    }

    /// A sync failed: what the kernel could not write it has forgotten, so no promise of durability may
    /// be made any more.
    pub fn poison(&mut self, first: VolumeError) {
        self.poisoned.get_or_insert(first);
    }

    pub fn check(&self) -> Result<()> {
        match &self.poisoned {
            None => Ok(()),
            Some(first) => Err(VolumeError::JournalPoisoned {
                dir: self.store.path(""),
                first: Box::new(first.clone()),
            }),
        }
    }

    /// First step of a fold: the log to make, with [`make_log`]. The generation is not used up before the
    /// switch: one that could not be made would leave a gap, and a gap is damage.
    pub fn next_log(&mut self) -> (u64, Limits) {
        self.making = true;
        (self.next_generation, self.limits)
    }

    /// The log could not be made.
    pub fn give_up_log(&mut self) {
        self.making = false;
    }

    /// Second step: changes go to the new log from now on. What came before is frozen; it must be made
    /// durable by a barrier before the third step.
    pub fn switch(&mut self, header: LogHeader) -> Fold {
        self.replace_log(header);
        self.making = false;
        debug_assert!(
            self.frozen.is_none(),
            "an unfinished fold is finished first"
        );
        let frozen = Arc::new(std::mem::replace(
            &mut self.delta,
            Delta::empty(&self.identity),
        ));
        self.frozen = Some((header.generation, Arc::clone(&frozen)));
        Fold {
            generation: header.generation,
            base: self.base,
            frozen,
        }
    }

    /// A fold that failed after its switch.
    pub fn unfinished_fold(&self) -> Option<Fold> {
        self.frozen.as_ref().map(|(generation, frozen)| Fold {
            generation: *generation,
            base: self.base,
            frozen: Arc::clone(frozen),
        })
    }

    /// Last step, after [`Fold::write`]; returns the generation before which nothing is needed.
    pub fn folded(&mut self, fold: &Fold) -> u64 {
        let previous = std::mem::replace(&mut self.base, fold.generation);
        self.frozen = None;
        previous
    }

    /// After a close: what is still scheduled does nothing, and others may open the journal.
    pub fn shut(&mut self) -> Result<()> {
        self.retired = true;
        self.store.release()
    }

    /// Everything is resident and durable: replaces the journal by a mark that says so.
    pub fn retire(&mut self) -> Result<()> {
        let mark = LogHeader {
            generation: 0,
            slots: 0,
            ..self.log.header
        };
        put(&*self.store, COMPLETE, |tmp| {
            self.store.write(tmp, 0, &mark.encode())?;
            Ok(())
        })?;
        self.retired = true;
        for name in self.store.list()? {
            if super::is_ours(&name) && name != COMPLETE {
                self.store.remove(&name)?;
            }
        }
        self.store.sync_dir()
    }
}

impl Fold {
    /// Third step, without the book: the old snapshot with the frozen changes laid over it becomes the
    /// new one. Returns the number of resident units.
    pub fn write<S: Store>(&self, store: &S, identity: VolumeIdentity) -> Result<u64> {
        write_snapshot(
            store,
            identity,
            Some(self.base),
            &self.frozen,
            self.generation,
        )
    }
}

/// Removes what recovery no longer needs: everything before `previous`, the generation before the
/// newest. That one stays, in case the newest cannot be read back.
pub(super) fn sweep<S: Store>(store: &S, previous: u64) -> Result<()> {
    for name in store.list()? {
        if super::generation(&name).is_some_and(|g| g < previous) {
            store.remove(&name)?;
        }
    }
    Ok(())
}

/// Makes a log, durable with its name, filled with zeroes to its full length: appends then neither grow
/// the file nor run out of space, and its syncs need no metadata.
pub(super) fn make_log<S: Store>(
    store: &S,
    identity: VolumeIdentity,
    limits: Limits,
    generation: u64,
) -> Result<LogHeader> {
    let header = LogHeader {
        identity,
        boot: store.boot(),
        generation,
        nonce: store.nonce(),
        slots: limits.log_records.max(2 * RESERVED),
    };
    put(store, &log_name(generation), |tmp| {
        let mut bytes = header.encode();
        bytes.resize(HEADER + header.slots as usize * RECORD, 0);
        store.write(tmp, 0, &bytes)
    })?;
    Ok(header)
}

fn write_snapshot<S: Store>(
    store: &S,
    identity: VolumeIdentity,
    base: Option<u64>,
    delta: &Delta,
    generation: u64,
) -> Result<u64> {
    let mut old = base.map(|g| OldSnapshot::open(store, g)).transpose()?;
    put(store, &snapshot_name(generation), |tmp| {
        let (mut writer, mut piece) = SnapshotWriter::new(identity, generation);
        let mut offset = 0;
        for index in 0..identity.units().div_ceil(BLOCK_UNITS) {
            let mut block = match &mut old {
                Some(old) => old.take(index)?,
                None => Block::empty(index),
            };
            delta.lay_over(&mut block, &identity);
            writer.block(&block, &mut piece);
            if piece.len() >= PIECE {
                store.write(tmp, offset, &piece)?;
                offset += piece.len() as u64;
                piece.clear();
            }
        }
        let resident = writer.end(&mut piece);
        store.write(tmp, offset, &piece)?;
        Ok(resident)
    })
}

/// A snapshot read in step with the volume's blocks.
pub(super) struct OldSnapshot {
    path: std::path::PathBuf,
    reader: SnapshotReader<Box<dyn std::io::Read + Send>>,
    next: Option<Block>,
}

impl OldSnapshot {
    pub fn open<S: Store>(store: &S, generation: u64) -> Result<Self> {
        let name = snapshot_name(generation);
        let path = store.path(&name);
        let fail = |e| super::snapshot_error(&path, e);
        let mut reader = SnapshotReader::new(store.reader(&name)?).map_err(fail)?;
        if reader.generation() != generation {
            return Err(super::damaged(&path, 0, super::Fault::Nonsense));
        }
        let next = reader.next_block().map_err(fail)?;
        Ok(OldSnapshot { path, reader, next })
    }

    pub fn identity(&self) -> VolumeIdentity {
        self.reader.identity()
    }

    /// The block of that index; indices must ascend without a gap.
    pub fn take(&mut self, index: u64) -> Result<Block> {
        if self.next.as_ref().is_none_or(|b| b.index != index) {
            return Ok(Block::empty(index));
        }
        let next = self
            .reader
            .next_block()
            .map_err(|e| super::snapshot_error(&self.path, e))?;
        Ok(std::mem::replace(&mut self.next, next).unwrap_or_else(|| Block::empty(index)))
    }
}

/// Writes a file under a temporary name and gives it its own name only when it is durable.
fn put<S: Store, T>(store: &S, name: &str, write: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    let tmp = tmp_name(name);
    let made = write(&tmp).and_then(|value| {
        store.sync(&tmp)?;
        store.rename(&tmp, name)?;
        store.sync_dir()?;
        Ok(value)
    });
    if made.is_err() {
        // Best effort: leaving it only costs space until the next open.
        if let Err(error) = store.remove(&tmp) {
            tracing::debug!(%error, op = %Operation::Remove, "an unfinished journal file stays behind");
        }
    }
    made
}
