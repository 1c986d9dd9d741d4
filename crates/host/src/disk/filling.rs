//! A disk whose content is on the way: the engine's residency, the volume's file and its journal, joined.
//!
//! The way of a guest's read: [`SpaceIn::read`] says whether all units are resident; if not, the missing
//! ones are demanded and the read waits for a ticket, which comes back when the last of them was stored.
//! The way of a write: leave from the engine, the file, the journal (in the page cache), the answer; a
//! flush makes the file durable, then the journal, then answers (I4). The way of a copy: leave from the
//! engine, the file, residency, the journal when it suits.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;
use whimbrel_engine::inflow::{
    Change, FillGrant, FillPlan, Finished, ReadPlan, SpaceIn, WritePlan,
};
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SECTOR, SECTORS_PER_UNIT, SpaceId, UNIT};
use whimbrel_nbd::{Errno, ZeroHow};
use whimbrel_volume::VolumeError;
use whimbrel_volume::backend::Backend;
use whimbrel_volume::digest::digest;
use whimbrel_volume::journal::Journal;
use whimbrel_volume::raw::Zeroes;
use whimbrel_wire::message::MAX_BITMAP_UNITS;

use super::Wants;
use super::behind::Behind;
use super::export::{errno, zeroes_of};
use super::felt::Request;
use crate::wakers::Wakers;

/// Units that are digested at once where there is data: 64 MiB.
const STRETCH: u64 = 16384;

struct Inner {
    space: SpaceIn,
    wakers: Wakers,
    /// What comes is ahead of the switchover: no guest uses it here yet, and no record tells of it, for what of it
    /// is old will be known only at the switchover.
    ahead: bool,
    /// Units of the file that may not read as zeroes though nothing is known to be there: all of it, of a file that
    /// an earlier daemon had; of a fresh one, what was stored, or begun to be, ahead of the switchover.
    trodden: UnitSet,
}

/// A disk whose content is on the way.
pub struct Filling {
    id: SpaceId,
    file: Arc<Backend>,
    journal: Journal,
    wants: Arc<Wants>,
    inner: Mutex<Inner>,
    clock: Instant,
    complete: watch::Sender<bool>,
    behind: Arc<Behind>,
}

/// What the file holds where nothing is known to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Soil {
    /// The file was made for this move a moment ago: zeroes.
    Fresh,
    /// An earlier daemon had it. Writes that no record tells of may have reached it.
    Trodden,
}

/// Records that are made at once of what came ahead.
const RECORDED_AT_ONCE: usize = 1024;

/// Units that a zeroing of a trodden file takes at a time: while it goes on they are busy.
const PATCH: u64 = 16_384;

/// What a stretch of disk looks like, to be compared with the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub stretch: Extent,
    /// Units of the stretch that count, by their index within it.
    pub included: UnitSet,
    pub digest: u128,
}

enum Deed {
    Write(Bytes),
    Zero(ZeroHow),
    Discard,
}

impl Filling {
    /// `clock` is the migration's: latencies are counted from it.
    pub fn new(
        space: SpaceIn,
        soil: Soil,
        file: Arc<Backend>,
        journal: Journal,
        wants: Arc<Wants>,
        clock: Instant,
    ) -> Self {
        let (complete, _) = watch::channel(space.is_complete());
        Filling {
            id: space.info().id,
            behind: Behind::new(file.clone()),
            file,
            journal,
            wants,
            inner: Mutex::new(Inner {
                trodden: match soil {
                    Soil::Fresh => UnitSet::empty(space.info().units()),
                    Soil::Trodden => UnitSet::full(space.info().units()),
                },
                ahead: false,
                space,
                wakers: Wakers::default(),
            }),
            clock,
            complete,
        }
    }

    /// The same disk, whose content comes before the machine is this host's.
    pub fn ahead(self) -> Self {
        self.inner().ahead = true;
        self
    }

    /// The machine is this host's now. Of what came ahead these units are old: they are absent again.
    pub fn take_over(&self, old: &UnitSet) {
        let mut inner = self.inner();
        inner.space.evict(old);
        inner.ahead = false;
        // The sender is told under the same lock by whoever completes the disk.
        self.complete.send_replace(inner.space.is_complete());
    }

    /// Records what came ahead, once the machine is this host's. Lost in a crash before, it is fetched again.
    pub async fn record_ahead(&self) -> Result<(), VolumeError> {
        let held = self.held();
        let mut runs = held.runs().map(|run| to_journal(Change::Filled(run)));
        loop {
            let some: Vec<_> = runs.by_ref().take(RECORDED_AT_ONCE).collect();
            if some.is_empty() {
                return Ok(());
            }
            self.journal.record(some).await?;
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }

    fn now(&self) -> u64 {
        self.clock.elapsed().as_micros() as u64
    }

    pub fn id(&self) -> SpaceId {
        self.id
    }

    /// The volume's name.
    pub fn name(&self) -> String {
        self.inner().space.info().name.clone()
    }

    /// Units of the disk.
    pub fn units(&self) -> u64 {
        self.inner().space.info().units()
    }

    /// Resident units.
    pub fn resident(&self) -> u64 {
        self.inner().space.resident().len()
    }

    /// Copies that came in vain.
    pub fn late_copies(&self) -> u64 {
        self.inner().space.late_copies()
    }

    /// Absent units of an extent.
    pub fn absent(&self, extent: Extent) -> Vec<Extent> {
        let inner = self.inner();
        inner.space.resident().gaps_within(extent).collect()
    }

    /// What is resident, for a peer that reconnects.
    pub fn held(&self) -> UnitSet {
        self.inner().space.resident().clone()
    }

    /// Demands that were made and not answered.
    pub fn outstanding(&self) -> Vec<Extent> {
        self.inner().space.outstanding()
    }

    /// How long a flush would have waited for copies, at most, since this was last asked.
    pub fn backlog(&self) -> Duration {
        self.behind.backlog()
    }

    /// Resolves when every unit is resident.
    pub async fn completed(&self) {
        let mut complete = self.complete.subscribe();
        let _ = complete.wait_for(|&done| done).await;
    }

    /// Makes what is stored durable, and the knowledge of it.
    pub async fn make_durable(&self) -> Result<(), VolumeError> {
        self.journal.barrier().await
    }

    /// Everything is here and verified: the journal has done its work.
    pub async fn retire(&self) -> Result<(), VolumeError> {
        self.make_durable().await?;
        self.journal.complete().await
    }

    fn wake(&self, inner: &mut Inner, done: &Finished) {
        inner.wakers.wake(&done.wake);
        if inner.space.is_complete() {
            self.complete.send_replace(true);
        }
    }

    /// Waits until the byte range is resident, demanding what is not. Fails if it came and could not be stored.
    async fn have(&self, offset: u64, len: u64, request: &Request<'_>) -> Result<(), Errno> {
        let units = Extent::touching(offset, len);
        let wait = {
            let mut inner = self.inner();
            match inner.space.read(units, self.now()) {
                ReadPlan::Ready => return Ok(()),
                ReadPlan::Wait { ticket, demands } => {
                    self.wants.demand(self.id, &demands);
                    inner.wakers.register(ticket)
                }
            }
        };
        // The sender lives as long as the waiting entry; it is dropped unsent only with the whole disk.
        request.fetches();
        wait.await.unwrap_or(Ok(()))
    }

    pub async fn read(&self, offset: u64, len: u32) -> Result<Bytes, Errno> {
        let request = self.wants.felt.request();
        self.have(offset, u64::from(len), &request).await?;
        let read = self.file.read(offset, len as usize).await;
        read.map_err(|e| errno(&e))
    }

    /// Starts to fetch the range and waits for nothing.
    pub fn prefetch(&self, offset: u64, len: u64) {
        let demands = self
            .inner()
            .space
            .want(Extent::touching(offset, len), self.now());
        self.wants.demand(self.id, &demands);
    }

    pub async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), Errno> {
        let len = data.len() as u64;
        self.felt(self.change(offset, len, Deed::Write(data)), fua)
            .await
    }

    pub async fn zero(&self, offset: u64, len: u64, how: ZeroHow) -> Result<(), Errno> {
        self.felt(self.change(offset, len, Deed::Zero(how)), how.fua)
            .await
    }

    /// Discards the whole units of the range: a part of a unit is not worth fetching the rest for.
    pub async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), Errno> {
        let start = offset.div_ceil(UNIT) * UNIT;
        let end = (offset + len) / UNIT * UNIT;
        let discard = async {
            match end.checked_sub(start) {
                None | Some(0) => Ok(()),
                Some(len) => self.change(start, len, Deed::Discard).await,
            }
        };
        self.felt(discard, fua).await
    }

    pub async fn flush(&self) -> Result<(), Errno> {
        self.felt(async { Ok(()) }, true).await
    }

    /// Performs a request that changes the disk, durably if that is asked for, and counts how long it took.
    async fn felt(
        &self,
        request: impl Future<Output = Result<(), Errno>>,
        durably: bool,
    ) -> Result<(), Errno> {
        let _counted = self.wants.felt.request();
        request.await?;
        if durably {
            self.make_durable().await.map_err(|e| errno(&e))?;
        }
        Ok(())
    }

    async fn change(&self, offset: u64, len: u64, what: Deed) -> Result<(), Errno> {
        let grant = loop {
            let wait = {
                let mut inner = self.inner();
                match inner.space.begin_write(offset, len) {
                    WritePlan::Go(grant) => break grant,
                    WritePlan::Wait(ticket) => inner.wakers.register(ticket),
                }
            };
            let _ = wait.await;
        };
        let result = match what {
            Deed::Write(data) => self.file.write(offset, data).await,
            Deed::Zero(how) => self.file.write_zeroes(offset, len, zeroes_of(how)).await,
            Deed::Discard => self.file.discard(offset, len).await,
        };
        let done = {
            let mut inner = self.inner();
            let done = inner.space.end_write(grant, result.is_ok());
            self.wake(&mut inner, &done);
            done
        };
        result.map_err(|e| errno(&e))?;
        if !done.changes.is_empty() {
            self.journal
                .record(done.changes.iter().copied().map(to_journal).collect())
                .await
                .map_err(|e| errno(&e))?;
            self.inner().space.journalled(&done.changes);
        }
        // Only now: a source that forgot what no journal knows would leave the unit nowhere.
        self.wants.forget(self.id, &done.forget);
        Ok(())
    }

    /// Stores a copy that arrived. `bytes` holds whole units.
    pub async fn fill(&self, extent: Extent, bytes: Bytes) -> Result<(), VolumeError> {
        let stored = self.store_copy(extent, bytes).await;
        self.or_unstored(extent, stored)
    }

    /// The source says that these units are zero. A fresh file reads so already where nobody wrote; in any
    /// other they are stored.
    pub async fn zeroes(&self, extent: Extent) -> Result<(), VolumeError> {
        let stored = self.take_zeroes(extent).await;
        self.or_unstored(extent, stored)
    }

    /// What could not be stored the source is told of, which sends it again, later. Whoever waits for it fails, or
    /// waits when the machine goes on: QEMU, which pauses a guest for want of room, first waits for all reads that
    /// have begun. An error that is left is one for the connection: of content that came ahead, and where the
    /// source does not understand.
    fn or_unstored(
        &self,
        extent: Extent,
        stored: Result<(), VolumeError>,
    ) -> Result<(), VolumeError> {
        let Err(error) = stored else { return Ok(()) };
        let mut inner = self.inner();
        if inner.ahead {
            return Err(error);
        }
        let failed = inner.space.give_up(extent);
        if !failed.is_empty() {
            inner.wakers.fail(&failed, errno(&error));
        }
        // Under the same lock: who asks for it from now on asks after this is said.
        if self.wants.unstored(self.id, extent, &error) {
            Ok(())
        } else {
            Err(error)
        }
    }

    async fn store_copy(&self, extent: Extent, bytes: Bytes) -> Result<(), VolumeError> {
        let grant = self.leave_to_fill(extent).await;
        let mut result = Ok(());
        for run in &grant.store {
            result = self.store(*run, 0, &bytes, extent).await;
            if result.is_err() {
                break;
            }
            self.behind.wrote(*run);
        }
        if result.is_ok() {
            for &(unit, mask) in &grant.merge {
                result = self.store(Extent::unit(unit), mask, &bytes, extent).await;
                if result.is_err() {
                    break;
                }
            }
        }
        self.filled(grant, result).await
    }

    /// Waits until the units may be stored; [`filled`](Self::filled) must follow.
    async fn leave_to_fill(&self, extent: Extent) -> FillGrant {
        loop {
            let wait = {
                let mut inner = self.inner();
                match inner.space.begin_fill(extent) {
                    FillPlan::Go(grant) => {
                        if inner.ahead {
                            for &run in &grant.store {
                                inner.trodden.insert(run);
                            }
                        }
                        return grant;
                    }
                    FillPlan::Wait(ticket) => inner.wakers.register(ticket),
                }
            };
            let _ = wait.await;
        }
    }

    async fn filled(
        &self,
        grant: FillGrant,
        result: Result<(), VolumeError>,
    ) -> Result<(), VolumeError> {
        let done = {
            let mut inner = self.inner();
            let mut done = inner.space.end_fill(grant, result.is_ok(), self.now());
            self.wake(&mut inner, &done);
            if inner.ahead {
                done.changes.clear();
            }
            done
        };
        self.after_fill(done).await?;
        result
    }

    /// Stores `run`, a part of the `extent` that `bytes` holds, but for the sectors in `keep`.
    async fn store(
        &self,
        run: Extent,
        keep: u8,
        bytes: &Bytes,
        extent: Extent,
    ) -> Result<(), VolumeError> {
        let base = ((run.start - extent.start) * UNIT) as usize;
        let end = (run.byte_offset() + run.byte_len()).min(self.file.size());
        if keep == 0 {
            let len = (end - run.byte_offset()) as usize;
            return self
                .file
                .write(run.byte_offset(), bytes.slice(base..base + len))
                .await;
        }
        for sector in (0..SECTORS_PER_UNIT).filter(|s| keep >> s & 1 == 0) {
            let at = run.byte_offset() + sector * SECTOR;
            if at < end {
                let from = base + (sector * SECTOR) as usize;
                self.file
                    .write(at, bytes.slice(from..from + SECTOR as usize))
                    .await?;
            }
        }
        Ok(())
    }

    async fn take_zeroes(&self, extent: Extent) -> Result<(), VolumeError> {
        let (trodden, fresh): (Vec<Extent>, Vec<Extent>) = {
            let inner = self.inner();
            let trodden = inner.trodden.runs_within(extent).collect();
            (trodden, inner.trodden.gaps_within(extent).collect())
        };
        for patch in trodden.into_iter().flat_map(|run| run.pieces(PATCH)) {
            self.zero_out(patch).await?;
        }
        for run in fresh {
            let done = {
                let mut inner = self.inner();
                let done = inner.space.zeroes(run, self.now());
                self.wake(&mut inner, &done);
                done
            };
            self.after_fill(done).await?;
        }
        Ok(())
    }

    /// Stores zeroes wherever these units are absent.
    async fn zero_out(&self, patch: Extent) -> Result<(), VolumeError> {
        let absent: Vec<Extent> = self.inner().space.resident().gaps_within(patch).collect();
        for gap in absent {
            let grant = self.leave_to_fill(gap).await;
            let result = self.store_zeroes(&grant).await;
            self.filled(grant, result).await?;
        }
        Ok(())
    }

    async fn store_zeroes(&self, grant: &FillGrant) -> Result<(), VolumeError> {
        let how = Zeroes {
            no_hole: false,
            fast_only: false,
        };
        for run in &grant.store {
            let len = run.byte_len().min(self.file.size() - run.byte_offset());
            self.file.write_zeroes(run.byte_offset(), len, how).await?;
        }
        let zeroes = Bytes::from_static(&[0; UNIT as usize]);
        for &(unit, mask) in &grant.merge {
            let unit = Extent::unit(unit);
            self.store(unit, mask, &zeroes, unit).await?;
        }
        Ok(())
    }

    async fn after_fill(&self, done: Finished) -> Result<(), VolumeError> {
        self.wants.answered(&done.answered);
        // Copies can be had again, so their records may wait; where too many wait already they may not.
        let urgent: Vec<_> = done
            .changes
            .into_iter()
            .map(to_journal)
            .filter(|&change| !self.journal.record_lazily(change))
            .collect();
        if urgent.is_empty() {
            return Ok(());
        }
        self.journal.record(urgent).await
    }

    /// What is to be digested at once, from a unit on; `None` from the end on. Where the file has no data it is
    /// longer, as that is read in no time and each stretch costs a round trip.
    pub async fn stretch(&self, first: u64) -> Result<Option<Extent>, VolumeError> {
        let rest = Extent::new(first, self.units().saturating_sub(first));
        let mut stretch = Extent::new(first, STRETCH).clamp_to(rest);
        let mut more = stretch;
        while !more.is_empty() && self.is_hole(more).await? {
            stretch = Extent::new(first, more.end() - first);
            let most = MAX_BITMAP_UNITS - stretch.len;
            more = Extent::new(stretch.end(), stretch.len.min(most)).clamp_to(rest);
        }
        Ok((!stretch.is_empty()).then_some(stretch))
    }

    async fn is_hole(&self, units: Extent) -> Result<bool, VolumeError> {
        let from = units.byte_offset();
        let len = units.byte_len().min(self.file.size() - from);
        let runs = self.file.data_extents(from, len).await?;
        Ok(runs.iter().all(|run| !run.data))
    }

    /// The digest of what a stretch of disk holds of the source's content, as read back from the file;
    /// `None` if nothing of it does. Units that the guest writes meanwhile are left out and the rest is
    /// read again, a bounded number of times: each round leaves out more.
    pub async fn digest(&self, stretch: Extent) -> Result<Option<Verified>, VolumeError> {
        let mut included = self.unwritten(stretch);
        loop {
            if included.is_empty() {
                return Ok(None);
            }
            let digest = digest(&self.file, stretch, &absolute(stretch, &included))
                .await?
                .hash;
            let after = self.unwritten(stretch);
            if after == included {
                return Ok(Some(Verified {
                    stretch,
                    included,
                    digest,
                }));
            }
            included = after;
        }
    }

    /// Resident units of the stretch that the guest has not written, by index within the stretch.
    fn unwritten(&self, stretch: Extent) -> UnitSet {
        let inner = self.inner();
        let mut set = UnitSet::empty(stretch.len);
        for run in inner.space.resident().runs_within(stretch) {
            set.insert(Extent::new(run.start - stretch.start, run.len));
        }
        for run in inner.space.guest_owned().runs_within(stretch) {
            set.remove(Extent::new(run.start - stretch.start, run.len));
        }
        set
    }

    /// For block status: `(resident, written by the guest)` of a unit, and how many units share that.
    pub fn residency_run(&self, from: u64, limit: u64) -> (bool, bool, u64) {
        let inner = self.inner();
        let resident = inner.space.resident();
        let owned = inner.space.guest_owned();
        let (is_resident, is_owned) = (resident.contains(from), owned.contains(from));
        let ends = [
            if is_resident {
                resident.next_absent(from)
            } else {
                resident.next_present(from)
            },
            if is_owned {
                owned.next_absent(from)
            } else {
                owned.next_present(from)
            },
        ];
        let end = ends
            .into_iter()
            .flatten()
            .fold(limit, |end, next| end.min(next));
        (is_resident, is_owned, end - from)
    }
}

/// A stretch's units by their index within it, as units of the volume.
pub fn absolute(stretch: Extent, included: &UnitSet) -> UnitSet {
    let mut set = UnitSet::empty(stretch.end());
    for run in included.runs() {
        set.insert(Extent::new(stretch.start + run.start, run.len));
    }
    set
}

fn to_journal(change: Change) -> whimbrel_volume::journal::Change {
    use whimbrel_volume::journal::Change as J;
    match change {
        Change::Filled(run) => J::Filled(run),
        Change::Written(run) => J::Written(run),
        Change::PartlyWritten { unit, mask } => J::PartlyWritten { unit, mask },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use whimbrel_engine::space::SpaceInfo;
    use whimbrel_volume::backend::Format;
    use whimbrel_volume::journal::VolumeIdentity;
    use whimbrel_volume::pool::{Pool, PoolSize};
    use whimbrel_volume::raw::Access;
    use whimbrel_wire::message::FEATURE_UNSTORED;

    const UNITS: u64 = 4;

    fn identity() -> VolumeIdentity {
        VolumeIdentity {
            uuid: [1; 16],
            size: UNITS * UNIT,
            epoch: 1,
        }
    }

    fn info() -> SpaceInfo {
        SpaceInfo {
            id: SpaceId(0),
            kind: whimbrel_engine::space::SpaceKind::Disk,
            name: "root".to_string(),
            len: UNITS * UNIT,
        }
    }

    /// A disk of nothing but this byte.
    async fn filling_of(
        folder: &std::path::Path,
        pool: &Pool,
        soil: Soil,
        byte: u8,
        space: SpaceIn,
    ) -> Filling {
        let path = folder.join("disk");
        std::fs::write(&path, vec![byte; (UNITS * UNIT) as usize]).expect("room");
        let file = Backend::open(pool, path, Format::Raw, Access::ReadWrite);
        let file = Arc::new(file.await.expect("a file"));
        let place = folder.join("journal");
        let journal = Journal::create(pool, &place, identity(), file.clone());
        let journal = journal.await.expect("room");
        let wants = Arc::new(Wants::default());
        Filling::new(space, soil, file, journal, wants, Instant::now())
    }

    async fn filling(folder: &std::path::Path, pool: &Pool, soil: Soil, byte: u8) -> Filling {
        filling_of(folder, pool, soil, byte, SpaceIn::absent(info())).await
    }

    /// A file of sevens, taken up again: of the disk unit 0 is here, and of unit 1 the first two sectors.
    async fn trodden(folder: &std::path::Path, pool: &Pool) -> Filling {
        let mut resident = UnitSet::empty(UNITS);
        resident.insert(Extent::unit(0));
        let partial = BTreeMap::from([(1, 0b11)]);
        let space = SpaceIn::recovered(info(), resident, UnitSet::empty(UNITS), partial);
        filling_of(folder, pool, Soil::Trodden, 7, space).await
    }

    #[tokio::test]
    async fn what_came_ahead_and_is_old_is_absent_again_and_reads_as_zeroes_if_it_is_empty() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let pool = Pool::start(PoolSize::default()).expect("threads");
        let disk = filling(folder.path(), &pool, Soil::Fresh, 0).await.ahead();
        let came = Bytes::from(vec![9; (UNITS * UNIT) as usize]);
        disk.fill(Extent::new(0, UNITS), came).await.expect("room");
        let mut old = UnitSet::empty(UNITS);
        old.insert(Extent::new(1, 2));
        disk.take_over(&old);
        assert_eq!(disk.resident(), UNITS - 2);
        disk.record_ahead().await.expect("room");
        let fresh = Bytes::from(vec![8; UNIT as usize]);
        disk.fill(Extent::unit(1), fresh).await.expect("room");
        disk.zeroes(Extent::new(0, UNITS)).await.expect("room");
        let content = disk.read(0, (UNITS * UNIT) as u32).await.expect("resident");
        let firsts: Vec<u8> = content.chunks(UNIT as usize).map(|unit| unit[0]).collect();
        assert_eq!(firsts, [9, 8, 0, 9]);
        assert!(
            content
                .chunks(UNIT as usize)
                .all(|unit| unit.iter().all(|&b| b == unit[0]))
        );
    }

    #[tokio::test]
    async fn no_record_tells_of_what_came_ahead_until_the_machine_is_this_hosts() {
        let pool = Pool::start(PoolSize::default()).expect("threads");
        for (taken_over, expected) in [(false, 0), (true, 2)] {
            let folder = tempfile::tempdir().expect("temporary folder");
            let disk = filling(folder.path(), &pool, Soil::Fresh, 0).await.ahead();
            let came = Bytes::from(vec![9; (2 * UNIT) as usize]);
            disk.fill(Extent::new(0, 2), came).await.expect("room");
            if taken_over {
                disk.take_over(&UnitSet::empty(UNITS));
                disk.record_ahead().await.expect("room");
            }
            disk.make_durable().await.expect("room");
            drop(disk);
            let place = folder.path().join("journal");
            let known = loop {
                // Its thread lets go of the journal a moment later.
                match Journal::inspect(&pool, &place, identity()).await {
                    Err(VolumeError::JournalBusy { .. }) => tokio::task::yield_now().await,
                    known => break known.expect("a journal"),
                }
            };
            assert_eq!(known.resident.len(), expected);
        }
    }

    #[tokio::test]
    async fn who_reads_what_cannot_be_stored_is_told_and_so_is_the_source() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let pool = Pool::start(PoolSize::default()).expect("threads");
        let disk = filling(folder.path(), &pool, Soil::Fresh, 0).await;
        let disk = Filling {
            file: Arc::new(
                Backend::open(
                    &pool,
                    folder.path().join("disk"),
                    Format::Raw,
                    Access::ReadOnly,
                )
                .await
                .expect("a file"),
            ),
            ..disk
        };
        let came = Bytes::from(vec![9; UNIT as usize]);
        // Nobody to be told: the connection has to break.
        assert!(disk.fill(Extent::unit(0), came.clone()).await.is_err());
        disk.wants.link_up(FEATURE_UNSTORED);
        let read = disk.read(0, 2 * UNIT as u32);
        let arrival = async {
            let asked = disk.wants.take().await;
            assert_eq!(asked[&disk.id].demands, [Extent::new(0, 2)]);
            disk.fill(Extent::unit(1), came).await
        };
        let (read, arrived) = tokio::join!(read, arrival);
        assert_eq!(read, Err(Errno::Eio));
        arrived.expect("the source has been told");
        let told = &disk.wants.take().await[&disk.id];
        assert_eq!(told.unstored, [Extent::unit(1)]);
        assert!(told.why.contains("disk"), "{}", told.why);
        assert_eq!(disk.outstanding(), [Extent::unit(0)]);
        assert_eq!(disk.resident(), 0);
    }

    #[tokio::test]
    async fn zeroes_overwrite_what_no_record_tells_of_and_nothing_else() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let pool = Pool::start(PoolSize::default()).expect("threads");
        let disk = trodden(folder.path(), &pool).await;
        disk.zeroes(Extent::new(0, UNITS)).await.expect("room");
        assert_eq!(disk.resident(), UNITS);
        let content = disk.read(0, (UNITS * UNIT) as u32).await.expect("resident");
        let kept = (UNIT + 2 * SECTOR) as usize;
        assert!(content[..kept].iter().all(|&b| b == 7));
        assert!(content[kept..].iter().all(|&b| b == 0));
        assert_eq!(disk.late_copies(), 0);
    }
}
