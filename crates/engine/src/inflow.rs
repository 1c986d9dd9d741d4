//! The destination's side of a copy: what is resident, who waits, what may be stored.
//!
//! # The idea
//! A unit is *resident* when reading it here gives the guest's last acknowledged write. While it is not,
//! three parties may touch it, and this file says in which order they may:
//!
//! - a guest **read** waits until the unit is resident (and a demand is sent for it, once);
//! - a guest **write** never waits for the link. Whole units become resident by being written. A part of
//!   a unit marks its sectors in a mask, and when the copy arrives only the other sectors are stored;
//! - a **fill** (a copy that arrived) is stored unless the guest was faster, and never over the guest's
//!   own sectors (I2, I7).
//!
//! Writes and fills of one absent unit must not overlap in time: two `pwrite`s on the same bytes have no
//! order. So a unit that is not resident may be *busy*, with any number of writes or with one fill, and
//! whoever comes second waits on a [`Ticket`] for something local and short. Resident units are never
//! busy: once a unit is resident this file is out of the way.
//!
//! The caller does the I/O between `begin_*` and `end_*` and must call `end_*` whatever happens. A failed
//! write of an absent unit leaves it absent: the source's copy, which waited, is stored after all.
//!
//! RAM spaces use `begin_fill`/`end_fill` and [`want`](SpaceIn::want) only: QEMU itself holds a vCPU that
//! needs a page, so nobody waits here.
//!
//! # Bounds
//! Waiters are bounded by the requests the NBD server admits; `wanted` and `busy` by the units those
//! requests and the frames in flight touch; `partial` by the guest's own sub-unit writes (one small map
//! entry each, at most one per absent unit).

use std::collections::{BTreeMap, HashMap};

use crate::set::UnitSet;
use crate::space::{Extent, SECTOR, SECTORS_PER_UNIT, SpaceInfo, UNIT};

/// Something to wait for: the caller keeps a waker under this number and wakes it when the number comes
/// back from an `end_*` call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Whether a read may go ahead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadPlan {
    /// Every unit is resident.
    Ready,
    /// Wait for the ticket, then the units are resident. `demands` are those to ask the peer for now.
    Wait {
        ticket: Ticket,
        demands: Vec<Extent>,
    },
}

/// Whether a guest write (or discard, or zeroing) may go ahead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WritePlan {
    /// Do it, then call [`SpaceIn::end_write`] with this.
    Go(WriteGrant),
    /// A copy is being stored under it: wait for the ticket and ask again.
    Wait(Ticket),
}

/// Leave to write a byte range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteGrant {
    /// Whole units that are not resident and will be by this write.
    whole: Vec<Extent>,
    /// Absent units that are written in part, with the sectors.
    parts: Vec<(u64, u8)>,
    /// All units that the write touches whole or in part.
    touched: Extent,
}

/// A change of residency, to be journalled before the write is acknowledged (the guest's own) or lazily
/// (fills: they can be had again).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A copy from the source is stored.
    Filled(Extent),
    /// The guest wrote all of it.
    Written(Extent),
    /// The guest wrote these 512-byte sectors of an absent unit (bit 0 is the first).
    PartlyWritten { unit: u64, mask: u8 },
}

/// What finished: changes to journal, and tickets to wake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Finished {
    pub changes: Vec<Change>,
    pub wake: Vec<Ticket>,
    /// Units that the source need not send any more.
    pub forget: Vec<Extent>,
    /// For each demanded unit that became resident by this: microseconds since it was demanded.
    pub answered: Vec<u64>,
}

/// What to do with a copy that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FillPlan {
    Go(FillGrant),
    /// The guest is writing one of the units at this moment: wait for the ticket and ask again.
    Wait(Ticket),
}

/// Leave to store a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FillGrant {
    /// Runs to store whole.
    pub store: Vec<Extent>,
    /// Units of which only the sectors *not* in the mask may be stored.
    pub merge: Vec<(u64, u8)>,
    /// Units that were resident already: their copy is thrown away.
    pub late: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Busy {
    Writing(u32),
    Filling,
}

/// The destination's view of one space.
pub struct SpaceIn {
    info: SpaceInfo,
    resident: UnitSet,
    /// Units that a guest write has begun to touch: verification leaves them out.
    guest_owned: UnitSet,
    /// Guest-written units whose residency is in the journal, so that further writes need no record.
    journalled: UnitSet,
    partial: BTreeMap<u64, u8>,
    busy: BTreeMap<u64, Busy>,
    /// When each outstanding demand was made, in the caller's microseconds.
    wanted: BTreeMap<u64, u64>,
    waiters: BTreeMap<u64, Vec<Ticket>>,
    open: HashMap<Ticket, u64>,
    next_ticket: u64,
    late_copies: u64,
}

impl SpaceIn {
    /// Nothing is resident.
    pub fn absent(info: SpaceInfo) -> Self {
        let units = info.units();
        SpaceIn::recovered(
            info,
            UnitSet::empty(units),
            UnitSet::empty(units),
            BTreeMap::new(),
        )
    }

    /// As a journal remembers it.
    pub fn recovered(
        info: SpaceInfo,
        resident: UnitSet,
        guest_owned: UnitSet,
        partial: BTreeMap<u64, u8>,
    ) -> Self {
        // A unit of which some sectors are here has a record of those, not of its residency: the write that
        // completes it, or the one after the copy of its rest was stored, must have a record of its own.
        let mut journalled = guest_owned.clone();
        for &unit in partial.keys() {
            journalled.remove(Extent::unit(unit));
        }
        SpaceIn {
            info,
            resident,
            journalled,
            guest_owned,
            partial,
            busy: BTreeMap::new(),
            wanted: BTreeMap::new(),
            waiters: BTreeMap::new(),
            open: HashMap::new(),
            next_ticket: 0,
            late_copies: 0,
        }
    }

    pub fn info(&self) -> &SpaceInfo {
        &self.info
    }

    pub fn resident(&self) -> &UnitSet {
        &self.resident
    }

    /// Units that the guest has written here, wholly or in part, or is writing.
    pub fn guest_owned(&self) -> &UnitSet {
        &self.guest_owned
    }

    pub fn is_complete(&self) -> bool {
        self.resident.is_full()
    }

    /// Copies of these units turned out to be old ones: they are absent again. Only while nobody reads or
    /// writes them here: RAM of a guest that does not run yet.
    pub fn evict(&mut self, units: &UnitSet) {
        if faulty!(StaleNotEvicted) {
            return;
        }
        self.resident.subtract(units);
    }

    /// Copies of units that were resident already: the peer sent them in vain.
    pub fn late_copies(&self) -> u64 {
        self.late_copies
    }

    /// Outstanding demands, to be repeated after a reconnect.
    pub fn outstanding(&self) -> Vec<Extent> {
        runs_of(self.wanted.keys().copied())
    }

    /// The guest wants to read these units. `now` is the caller's clock in microseconds.
    pub fn read(&mut self, units: Extent, now: u64) -> ReadPlan {
        let missing: Vec<Extent> = self.resident.gaps_within(units).collect();
        if missing.is_empty() {
            return ReadPlan::Ready;
        }
        let ticket = self.ticket();
        let mut count = 0;
        for unit in missing.iter().flat_map(Extent::iter) {
            self.waiters.entry(unit).or_default().push(ticket);
            count += 1;
        }
        self.open.insert(ticket, count);
        let demands = missing
            .into_iter()
            .flat_map(|run| self.want(run, now))
            .collect();
        ReadPlan::Wait { ticket, demands }
    }

    /// Somebody needs these units: those to ask the peer for, being neither resident, nor asked for, nor
    /// being stored at this moment.
    pub fn want(&mut self, units: Extent, now: u64) -> Vec<Extent> {
        let absent: Vec<u64> = self
            .resident
            .gaps_within(units)
            .flat_map(|run| run.iter())
            .filter(|u| self.busy.get(u) != Some(&Busy::Filling) && !self.wanted.contains_key(u))
            .collect();
        for &unit in &absent {
            self.wanted.insert(unit, now);
        }
        runs_of(absent.into_iter())
    }

    /// The guest wants to write bytes. Both ends must be multiples of [`SECTOR`].
    pub fn begin_write(&mut self, offset: u64, len: u64) -> WritePlan {
        let touched = Extent::touching(offset, len);
        let absent: Vec<u64> = self
            .resident
            .gaps_within(touched)
            .flat_map(|run| run.iter())
            .collect();
        if let Some(&unit) = absent
            .iter()
            .find(|u| self.busy.get(u) == Some(&Busy::Filling))
        {
            return WritePlan::Wait(self.wait_for(unit));
        }
        let mut whole = Vec::new();
        let mut parts = Vec::new();
        for unit in absent {
            let mask = self.sectors_of(unit, offset, len);
            if mask == self.full_mask(unit) {
                whole.push(unit);
            } else {
                parts.push((unit, mask));
            }
            match self.busy.entry(unit).or_insert(Busy::Writing(0)) {
                Busy::Writing(n) => *n += 1,
                Busy::Filling => unreachable!("units that are being filled were waited for above"),
            }
        }
        self.guest_owned.insert(touched);
        WritePlan::Go(WriteGrant {
            whole: runs_of(whole.into_iter()),
            parts,
            touched,
        })
    }

    /// The write is over. If it failed, absent units stay absent. Otherwise `changes` must be in the
    /// journal before the write is acknowledged, and be confirmed by [`journalled`](Self::journalled).
    ///
    /// A unit that a fill made resident has a record only lazily; the guest's first write of it must not
    /// be acknowledged on that alone, or a restarted daemon would fetch the unit again, over the write.
    /// Hence a record for every touched unit that has none *confirmed*, even if another write's record of
    /// it is on its way.
    pub fn end_write(&mut self, grant: WriteGrant, ok: bool) -> Finished {
        let mut done = Finished::default();
        let units: Vec<u64> = grant
            .whole
            .iter()
            .flat_map(Extent::iter)
            .chain(grant.parts.iter().map(|p| p.0))
            .collect();
        for unit in &units {
            if let Some(Busy::Writing(n)) = self.busy.get_mut(unit) {
                *n -= 1;
                if *n == 0 {
                    self.busy.remove(unit);
                }
            }
        }
        if ok {
            done.forget = grant.whole.clone();
            for unit in grant.whole.iter().flat_map(Extent::iter) {
                self.become_resident(unit, None, &mut done);
            }
            for &(unit, mask) in &grant.parts {
                if self.resident.contains(unit) {
                    continue;
                }
                let have = self.partial.get(&unit).copied().unwrap_or(0) | mask;
                if have == self.full_mask(unit) {
                    done.forget.push(Extent::unit(unit));
                    self.become_resident(unit, None, &mut done);
                } else {
                    self.partial.insert(unit, have);
                    done.changes
                        .push(Change::PartlyWritten { unit, mask: have });
                }
            }
            let unrecorded: Vec<Extent> = if faulty!(NoRecordOfWrite) {
                grant.whole.clone()
            } else {
                self.journalled
                    .gaps_within(grant.touched)
                    .flat_map(|gap| self.resident.runs_within(gap).collect::<Vec<_>>())
                    .collect()
            };
            done.changes
                .extend(unrecorded.into_iter().map(Change::Written));
        }
        for unit in units {
            self.release_busy_waiters(unit, &mut done);
        }
        done
    }

    /// These changes are in the journal.
    pub fn journalled(&mut self, changes: &[Change]) {
        for change in changes {
            if let Change::Written(run) = change {
                self.journalled.insert(*run);
            }
        }
    }

    /// A copy of these units arrived from the peer.
    pub fn begin_fill(&mut self, units: Extent) -> FillPlan {
        let units = units.clamp_to(Extent::new(0, self.info.units()));
        let absent: Vec<u64> = if faulty!(LateCopyStored) {
            units.iter().collect()
        } else {
            self.resident
                .gaps_within(units)
                .flat_map(|run| run.iter())
                .collect()
        };
        if let Some(&unit) = absent.iter().find(|u| self.busy.contains_key(u)) {
            return FillPlan::Wait(self.wait_for(unit));
        }
        let late = units.len - absent.len() as u64;
        self.late_copies += late;
        let mut merge = Vec::new();
        let mut store = Vec::new();
        for unit in absent {
            self.busy.insert(unit, Busy::Filling);
            if faulty!(ResidentBeforeData) {
                self.resident.insert(Extent::unit(unit));
            }
            match self.partial.get(&unit) {
                Some(_) if faulty!(PartialWriteForgotten) => store.push(unit),
                Some(&mask) => merge.push((unit, mask)),
                None => store.push(unit),
            }
        }
        FillPlan::Go(FillGrant {
            store: runs_of(store.into_iter()),
            merge,
            late,
        })
    }

    /// The copy is stored, or could not be.
    pub fn end_fill(&mut self, grant: FillGrant, ok: bool, now: u64) -> Finished {
        let mut done = Finished::default();
        for run in &grant.store {
            if ok {
                done.changes.push(Change::Filled(*run));
            }
            for unit in run.iter() {
                self.fill_ended(unit, ok, now, &mut done);
            }
        }
        for &(unit, _) in &grant.merge {
            if ok {
                done.changes.push(Change::Filled(Extent::unit(unit)));
            }
            self.fill_ended(unit, ok, now, &mut done);
        }
        done
    }

    fn fill_ended(&mut self, unit: u64, ok: bool, now: u64, done: &mut Finished) {
        self.busy.remove(&unit);
        if ok {
            self.become_resident(unit, Some(now), done);
        }
        self.release_busy_waiters(unit, done);
    }

    /// The peer says that these units are zero, as the fresh store here already reads: they are resident
    /// without anything being stored. Units being filled or written are left to whoever is at it.
    pub fn zeroes(&mut self, units: Extent, now: u64) -> Finished {
        let mut done = Finished::default();
        let absent: Vec<u64> = self
            .resident
            .gaps_within(units)
            .flat_map(|run| run.iter())
            .filter(|u| self.busy.get(u) != Some(&Busy::Filling))
            .collect();
        for &unit in &absent {
            self.become_resident(unit, Some(now), &mut done);
        }
        done.changes = runs_of(absent.into_iter())
            .into_iter()
            .map(Change::Filled)
            .collect();
        done
    }

    /// A copy of these units came and could not be stored: those that are absent are not demanded any more, and nobody
    /// waits for them. The reads that did are the answer: they are to fail.
    pub fn give_up(&mut self, units: Extent) -> Vec<Ticket> {
        let units = units.start..units.end();
        let wanted: Vec<u64> = self.wanted.range(units.clone()).map(|e| *e.0).collect();
        for unit in wanted {
            self.wanted.remove(&unit);
        }
        let waited: Vec<u64> = self.waiters.range(units).map(|e| *e.0).collect();
        let waiters = &mut self.waiters;
        let tickets = waited.into_iter().filter_map(|unit| waiters.remove(&unit));
        // What else they wait for finds them gone.
        let failed = tickets.flatten().filter(|t| self.open.remove(t).is_some());
        failed.collect()
    }

    fn become_resident(&mut self, unit: u64, now: Option<u64>, done: &mut Finished) {
        if self.resident.insert(Extent::unit(unit)) == 0 {
            return;
        }
        self.partial.remove(&unit);
        if let Some(since) = self.wanted.remove(&unit)
            && let Some(now) = now
        {
            done.answered.push(now.saturating_sub(since));
        }
        self.release_waiters(unit, done);
    }

    /// Wakes everybody who waits for the unit, resident now.
    fn release_waiters(&mut self, unit: u64, done: &mut Finished) {
        for ticket in self.waiters.remove(&unit).unwrap_or_default() {
            if let Some(left) = self.open.get_mut(&ticket) {
                *left -= 1;
                if *left == 0 {
                    self.open.remove(&ticket);
                    done.wake.push(ticket);
                }
            }
        }
    }

    /// Wakes writes and fills that waited for the unit to be idle; reads go on waiting for residency.
    fn release_busy_waiters(&mut self, unit: u64, done: &mut Finished) {
        let key = idle_key(unit);
        if !self.busy.contains_key(&unit)
            && let Some(tickets) = self.waiters.remove(&key)
        {
            for ticket in tickets {
                self.open.remove(&ticket);
                done.wake.push(ticket);
            }
        }
    }

    fn wait_for(&mut self, unit: u64) -> Ticket {
        let ticket = self.ticket();
        self.waiters.entry(idle_key(unit)).or_default().push(ticket);
        self.open.insert(ticket, 1);
        ticket
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    /// The sectors of the unit that exist: the last unit of a space may be short.
    fn full_mask(&self, unit: u64) -> u8 {
        let bytes = (self.info.len - unit * UNIT).min(UNIT);
        mask_of(0, bytes.div_ceil(SECTOR))
    }

    fn sectors_of(&self, unit: u64, offset: u64, len: u64) -> u8 {
        let base = unit * UNIT;
        let from = offset.max(base) - base;
        let to = (offset + len).min(base + UNIT) - base;
        mask_of(from / SECTOR, to.div_ceil(SECTOR))
    }
}

/// Idle waits live in the same map as reads, above every unit index a space can have.
fn idle_key(unit: u64) -> u64 {
    unit | 1 << 63
}

/// Bits `from..to`, at most [`SECTORS_PER_UNIT`] of them.
fn mask_of(from: u64, to: u64) -> u8 {
    let to = to.min(SECTORS_PER_UNIT);
    (from..to).fold(0, |mask, bit| mask | 1 << bit)
}

fn runs_of(units: impl Iterator<Item = u64>) -> Vec<Extent> {
    let mut runs: Vec<Extent> = Vec::new();
    for unit in units {
        match runs.last_mut() {
            Some(run) if run.end() == unit => run.len += 1,
            _ => runs.push(Extent::unit(unit)),
        }
    }
    runs
}
