//! The source's side of a copy: what is still to send, and what goes next.
//!
//! # The idea
//! Each unit of each space is in one of four states here:
//!
//! ```text
//!          offer              next_*
//!   empty -------->  pending ---------->  sent
//!                     |   ^                 |
//!          forget     |   |   put_back,     |
//!   gone <------------+   +-- peer_has, ----+
//!                             unstored
//! ```
//!
//! `empty` means that the unit reads as zero and needs no content sent. `pending` and `sent` are disjoint
//! sets; a unit leaves `pending` in the same call that hands it out, under one lock, so demand and push can
//! never both send it (I3, and a RAM unit may be placed only once). A pending unit may be *withheld*: its
//! content is not readable yet (RAM pages that the stopped QEMU is still delivering). A demand for it waits
//! here until [`Outflow::ready`].
//!
//! While a guest runs at the source its RAM changes after it was sent: a unit that is sent and offered once more
//! is *old* at the peer. It is so until it was handed out again, and again if that got lost with a connection:
//! what the peer says it holds does not tell which of two copies it holds.
//!
//! # What the peer may have already
//! A peer that kept an older copy of a disk compares it before anything of it is pushed: until then those units are
//! *unsettled*, and go only if they are demanded. A stretch is compared between [`Outflow::begin_compare`] and
//! [`Outflow::end_compare`]; what is alike counts as sent, unless it was handed out, forgotten or offered anew
//! meanwhile. The order matters: what is read for the comparison is read after the first call.
//!
//! # What goes next
//! Demands first, in the order they came. Then push: units near recent demands, then the units a policy
//! [prefers](Outflow::prefer), then everything in ascending order, RAM spaces before disks, because a
//! guest that misses a RAM page stands still while one that misses a disk block may do other work.
//!
//! # Bounds
//! The demand queue holds each unit at most once (it is filtered by a set), so it is bounded by the size
//! of the spaces; [`NEAR_TRAILS`] bounds the trails around demands, the oldest is dropped.

use std::collections::VecDeque;

use crate::set::UnitSet;
use crate::space::{Extent, SpaceId, SpaceInfo, SpaceKind};

/// How many trails of units near recent demands are kept.
pub const NEAR_TRAILS: usize = 64;

/// How many units past a demand are thought likely to be wanted next.
pub const NEAR_UNITS: u64 = 64;

/// Why a unit travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Somebody waits for it.
    Demand,
    /// It goes because there is room on the link.
    Push,
}

/// Units handed out to be read and sent, all of one space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub space: SpaceId,
    pub class: Class,
    /// Disjoint runs.
    pub runs: Vec<Extent>,
}

impl Batch {
    pub fn units(&self) -> u64 {
        self.runs.iter().map(|r| r.len).sum()
    }
}

/// What became of a demand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DemandOutcome {
    /// Units that have no content: the peer may take them as zero at once.
    pub empty: Vec<Extent>,
    /// Units that were sent before and are on their way.
    pub already_sent: u64,
    /// Units queued now.
    pub queued: u64,
}

/// Units of one space, or of all, by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Units that had content to move, whatever became of them.
    pub live: u64,
    pub pending: u64,
    pub sent: u64,
    /// Live units that the destination no longer wanted: its guest wrote or discarded them first.
    pub forgotten: u64,
    /// Units handed out more than once, because a broken connection lost them.
    pub sent_again: u64,
    /// Units handed out more than once, because their content had changed.
    pub repeated: u64,
    /// Units sent ahead of the switchover whose content changed before it: sent in vain.
    pub outdated: u64,
    /// Units that the peer had already, in an older copy.
    pub alike: u64,
}

struct SpaceOut {
    info: SpaceInfo,
    pending: UnitSet,
    withheld: UnitSet,
    /// Not to be pushed until compared with what the peer has.
    unsettled: UnitSet,
    /// Units that are being compared, and have not been touched since that began.
    comparing: UnitSet,
    sent: UnitSet,
    /// Pending units of which the peer has, or may have, an older copy.
    old: UnitSet,
    /// Sent units that were old, and of which the older copy may still be what the peer has.
    again: UnitSet,
    preferred: UnitSet,
    demanded: UnitSet,
    live: UnitSet,
    forgotten: u64,
    sent_again: u64,
    repeated: u64,
    outdated: u64,
    alike: u64,
    ever_sent: UnitSet,
    cursor: u64,
}

/// The source's side of a copy, over all spaces of a migration.
pub struct Outflow {
    spaces: Vec<SpaceOut>,
    /// Push order over spaces: RAM first.
    push_order: Vec<usize>,
    demands: VecDeque<(SpaceId, Extent)>,
    near: VecDeque<(SpaceId, Extent)>,
}

impl Outflow {
    /// `spaces[i].id` must be `SpaceId(i)`.
    pub fn new(spaces: Vec<SpaceInfo>) -> Self {
        let mut outflow = Outflow {
            spaces: Vec::new(),
            push_order: Vec::new(),
            demands: VecDeque::new(),
            near: VecDeque::new(),
        };
        for info in spaces {
            outflow.add(info);
        }
        outflow
    }

    /// Adds a space, which must be numbered after those there are: RAM blocks become known only when the
    /// source's QEMU names them.
    pub fn add(&mut self, info: SpaceInfo) {
        assert_eq!(
            usize::from(info.id.0),
            self.spaces.len(),
            "spaces are listed by id"
        );
        let none = UnitSet::empty(info.units());
        self.spaces.push(SpaceOut {
            pending: none.clone(),
            withheld: none.clone(),
            unsettled: none.clone(),
            comparing: none.clone(),
            sent: none.clone(),
            old: none.clone(),
            again: none.clone(),
            preferred: none.clone(),
            demanded: none.clone(),
            live: none.clone(),
            ever_sent: none,
            forgotten: 0,
            sent_again: 0,
            repeated: 0,
            outdated: 0,
            alike: 0,
            cursor: 0,
            info,
        });
        let mut order: Vec<usize> = (0..self.spaces.len()).collect();
        order.sort_by_key(|&i| self.spaces[i].info.kind != SpaceKind::Ram);
        self.push_order = order;
    }

    /// The space, if the migration has one of that number: peers name spaces, and peers may be wrong.
    pub fn info(&self, space: SpaceId) -> Option<&SpaceInfo> {
        self.spaces.get(usize::from(space.0)).map(|s| &s.info)
    }

    /// Spaces in order of their id.
    pub fn infos(&self) -> impl Iterator<Item = &SpaceInfo> {
        self.spaces.iter().map(|s| &s.info)
    }

    fn at(&mut self, space: SpaceId) -> &mut SpaceOut {
        &mut self.spaces[usize::from(space.0)]
    }

    /// These units have content that the peer lacks, and it can be read now.
    pub fn offer(&mut self, space: SpaceId, units: Extent) {
        let s = self.at(space);
        let sent: Vec<Extent> = s.sent.runs_within(units).collect();
        for run in sent {
            s.old.insert(run);
            s.again.remove(run);
        }
        s.live.insert(units);
        s.pending.insert(units);
        s.sent.remove(units);
        s.withheld.remove(units);
        s.comparing.remove(units);
    }

    /// These units have content that the peer lacks, but it cannot be read before [`ready`](Self::ready).
    pub fn offer_withheld(&mut self, space: SpaceId, units: Extent) {
        self.offer(space, units);
        self.at(space).withheld.insert(units);
    }

    /// As [`offer`](Self::offer), for a whole set over the space.
    pub fn offer_set(&mut self, space: SpaceId, units: &UnitSet) {
        let s = self.at(space);
        s.old.union_with(&s.sent.intersection(units));
        s.again.subtract(units);
        s.live.union_with(units);
        s.pending.union_with(units);
        s.sent.subtract(units);
        s.withheld.subtract(units);
        s.comparing.subtract(units);
    }

    /// These units have other content than when they were offered, if they were: they are offered anew, and withheld
    /// until somebody decides when they go.
    pub fn changed(&mut self, space: SpaceId, units: &UnitSet) {
        self.offer_set(space, units);
        self.at(space).withheld.union_with(units);
    }

    /// Exactly these of the pending units cannot be read yet; demands for others that waited are queued.
    pub fn set_withheld(&mut self, space: SpaceId, units: &UnitSet) {
        let s = self.at(space);
        let mut freed = s.withheld.clone();
        freed.subtract(units);
        s.withheld = units.clone();
        let woken: Vec<Extent> = freed
            .runs()
            .flat_map(|run| s.demanded.runs_within(run).collect::<Vec<_>>())
            .collect();
        self.demands
            .extend(woken.into_iter().map(|run| (space, run)));
    }

    /// The content of withheld units can be read now; demands that waited for it are queued.
    pub fn ready(&mut self, space: SpaceId, units: Extent) {
        let s = self.at(space);
        s.withheld.remove(units);
        let woken: Vec<Extent> = s.demanded.runs_within(units).collect();
        for run in woken {
            self.demands.push_back((space, run));
        }
    }

    /// The content of these units has changed since they were offered, and the peer has all that was sent. Of
    /// what it has, these and what is old were sent in vain: the answer, which the peer must be told. They and
    /// all that is pending are as if never offered. `units` must have the space's capacity.
    pub fn outdate(&mut self, space: SpaceId, units: &UnitSet) -> UnitSet {
        let s = self.at(space);
        if faulty!(VainNotSentAgain) {
            return UnitSet::empty(units.capacity());
        }
        let mut vain = s.sent.intersection(units);
        vain.union_with(&s.old);
        s.outdated += vain.len();
        s.ever_sent.subtract(&vain);
        let mut gone = s.pending.clone();
        gone.union_with(units);
        s.old = UnitSet::empty(units.capacity());
        s.again = s.old.clone();
        for set in [
            &mut s.sent,
            &mut s.pending,
            &mut s.withheld,
            &mut s.live,
            &mut s.demanded,
        ] {
            set.subtract(&gone);
        }
        vain
    }

    /// Units that were handed out and are with the peer or on their way to it.
    pub fn sent(&self, space: SpaceId) -> &UnitSet {
        &self.spaces[usize::from(space.0)].sent
    }

    /// Units that are still to go.
    pub fn pending(&self, space: SpaceId) -> &UnitSet {
        &self.spaces[usize::from(space.0)].pending
    }

    /// Pending units of which the peer has, or may have, an older copy.
    pub fn old(&self, space: SpaceId) -> &UnitSet {
        &self.spaces[usize::from(space.0)].old
    }

    /// Whether a push would find something in this space.
    pub fn has_pushable(&self, space: SpaceId) -> bool {
        let s = &self.spaces[usize::from(space.0)];
        !s.pushable(Extent::new(0, s.info.units()), 1).is_empty()
    }

    /// These units turned out to be zero: nothing to send.
    pub fn emptied(&mut self, space: SpaceId, units: Extent) {
        let s = self.at(space);
        s.pending.remove(units);
        s.withheld.remove(units);
        s.live.remove(units);
        s.demanded.remove(units);
    }

    /// Push these before others of their space.
    pub fn prefer(&mut self, space: SpaceId, units: Extent) {
        self.at(space).preferred.insert(units);
    }

    /// The peer waits for these units.
    pub fn demand(&mut self, space: SpaceId, units: Extent) -> DemandOutcome {
        let mut outcome = DemandOutcome::default();
        let s = self.at(space);
        let units = units.clamp_to(Extent::new(0, s.info.units()));
        let mut queued = Vec::new();
        let mut unit = units.start;
        while unit < units.end() {
            if s.pending.contains(unit) {
                if s.demanded.insert(Extent::unit(unit)) == 1 {
                    outcome.queued += 1;
                    if !s.withheld.contains(unit) {
                        queued.push(unit);
                    }
                }
            } else if s.live.contains(unit) {
                outcome.already_sent += 1;
            } else {
                push_unit(&mut outcome.empty, unit);
            }
            unit += 1;
        }
        let mut runs = Vec::new();
        for unit in queued {
            push_unit(&mut runs, unit);
        }
        for run in runs {
            self.demands.push_back((space, run));
        }
        if outcome.queued > 0 {
            if self.near.len() == NEAR_TRAILS {
                self.near.pop_back();
            }
            self.near
                .push_front((space, Extent::new(units.end(), NEAR_UNITS)));
        }
        outcome
    }

    /// The next demanded units, at most `max`. What is left of the demand goes behind the others: a page
    /// that a virtual CPU waits for does not wait for a file read ahead.
    pub fn next_demand(&mut self, max: u64) -> Option<Batch> {
        while let Some((space, extent)) = self.demands.pop_front() {
            let s = self.at(space);
            let mut runs: Vec<Extent> = Vec::new();
            let mut left = max;
            let mut rest = None;
            for run in s.demanded.runs_within(extent) {
                if left == 0 {
                    rest = Some(Extent::new(run.start, extent.end() - run.start));
                    break;
                }
                let part = Extent::new(run.start, run.len.min(left));
                left -= part.len;
                runs.push(part);
                if part.len < run.len {
                    rest = Some(Extent::new(part.end(), extent.end() - part.end()));
                    break;
                }
            }
            runs.retain(|r| s.pending.contains_all(*r));
            if let Some(rest) = rest {
                self.demands.push_back((space, rest));
            }
            if !runs.is_empty() {
                return Some(self.take(space, Class::Demand, runs));
            }
        }
        None
    }

    /// The next units to push, at most `max`, all of one space.
    pub fn next_push(&mut self, max: u64) -> Option<Batch> {
        self.next_push_among(max, |_| true)
    }

    /// The same among spaces that may be pushed now; what others have keeps its place.
    pub fn next_push_among(&mut self, max: u64, may: impl Fn(SpaceId) -> bool) -> Option<Batch> {
        let mut at = 0;
        while let Some((space, trail)) = self.near.get(at).copied() {
            if !may(space) {
                at += 1;
                continue;
            }
            let runs = self.at(space).pushable(trail, max);
            if let Some(last) = runs.last() {
                self.near[at].1 = Extent::new(last.end(), trail.end() - last.end());
                return Some(self.take(space, Class::Push, runs));
            }
            self.near.remove(at);
        }
        for preferred in [true, false] {
            for i in self.push_order.clone() {
                let space = self.spaces[i].info.id;
                if !may(space) {
                    continue;
                }
                let runs = if preferred {
                    self.spaces[i].preferred_runs(max)
                } else {
                    self.spaces[i].sequential_runs(max)
                };
                if !runs.is_empty() {
                    return Some(self.take(space, Class::Push, runs));
                }
            }
        }
        None
    }

    fn take(&mut self, space: SpaceId, class: Class, runs: Vec<Extent>) -> Batch {
        let s = self.at(space);
        for &run in &runs {
            if !(faulty!(TwoDrains) && class == Class::Demand) {
                s.pending.remove(run);
            }
            s.comparing.remove(run);
            s.demanded.remove(run);
            s.preferred.remove(run);
            s.sent.insert(run);
            let old: Vec<Extent> = s.old.runs_within(run).collect();
            let mut had = run.len - s.ever_sent.insert(run);
            for part in old {
                s.old.remove(part);
                s.again.insert(part);
                s.repeated += part.len;
                had -= part.len;
            }
            s.sent_again += had;
        }
        Batch { space, class, runs }
    }

    /// A batch that was handed out did not leave this host.
    pub fn put_back(&mut self, batch: &Batch) {
        let s = self.at(batch.space);
        for &run in &batch.runs {
            s.sent.remove(run);
            s.pending.insert(run);
            let again: Vec<Extent> = s.again.runs_within(run).collect();
            for part in again {
                s.again.remove(part);
                s.old.insert(part);
                s.repeated -= part.len;
            }
            for part in s.old.gaps_within(run).collect::<Vec<_>>() {
                s.ever_sent.remove(part);
            }
        }
        if batch.class == Class::Demand {
            for &run in &batch.runs {
                self.at(batch.space).demanded.insert(run);
                self.demands.push_front((batch.space, run));
            }
        }
    }

    /// The destination does not want these any more: its guest wrote or discarded them.
    pub fn forget(&mut self, space: SpaceId, units: Extent) {
        let s = self.at(space);
        s.demanded.remove(units);
        s.withheld.remove(units);
        s.preferred.remove(units);
        s.comparing.remove(units);
        s.forgotten += s.pending.remove(units);
    }

    /// The peer may have a copy of this space already: nothing of it is pushed until it is compared, or
    /// [settled](Self::settle).
    pub fn unsettle(&mut self, space: SpaceId) {
        let s = self.at(space);
        s.unsettled = UnitSet::full(s.info.units());
    }

    /// Nothing more is compared: what is pending may be pushed.
    pub fn settle(&mut self, space: SpaceId) {
        let s = self.at(space);
        s.unsettled = UnitSet::empty(s.info.units());
        s.comparing = s.unsettled.clone();
    }

    pub fn is_unsettled(&self, space: SpaceId) -> bool {
        !self.spaces[usize::from(space.0)].unsettled.is_empty()
    }

    /// Whether units of the space cannot be read yet.
    pub fn is_withheld(&self, space: SpaceId) -> bool {
        !self.spaces[usize::from(space.0)].withheld.is_empty()
    }

    /// These units are about to be compared with what the peer has: those of them that are pending and can be read.
    pub fn begin_compare(&mut self, space: SpaceId, units: Extent) -> Vec<Extent> {
        let s = self.at(space);
        let units = units.clamp_to(Extent::new(0, s.info.units()));
        let runs = s.pushable_of(&s.withheld, units, u64::MAX);
        for &run in &runs {
            s.comparing.insert(run);
        }
        runs
    }

    /// The stretch has been compared, and of it the peer has these units. Those that count are the answer: it takes
    /// them from its own copy, and they are as if sent. Whatever was touched meanwhile does not count.
    pub fn end_compare(&mut self, space: SpaceId, units: Extent, alike: &[Extent]) -> Vec<Extent> {
        let s = self.at(space);
        let units = units.clamp_to(Extent::new(0, s.info.units()));
        let alike = alike
            .iter()
            .flat_map(|&run| s.comparing.runs_within(run.clamp_to(units)));
        let alike: Vec<Extent> = alike.collect();
        for &run in &alike {
            s.pending.remove(run);
            s.demanded.remove(run);
            s.preferred.remove(run);
            s.sent.insert(run);
            s.alike += run.len;
        }
        s.comparing.remove(units);
        s.unsettled.remove(units);
        alike
    }

    /// The peer could not store these, though they were sent: they are pending again. The answer: those that are
    /// empty, of which it has to be told again.
    pub fn unstored(&mut self, space: SpaceId, units: Extent) -> Vec<Extent> {
        let s = self.at(space);
        let units = units.clamp_to(Extent::new(0, s.info.units()));
        for run in s.sent.runs_within(units).collect::<Vec<_>>() {
            s.sent.remove(run);
            s.pending.insert(run);
        }
        s.live.gaps_within(units).collect()
    }

    /// After a reconnect: exactly what the peer holds of a space, no frame being under way. What it does
    /// not hold is pending again, whether it got lost with the connection or was forgotten by a
    /// destination that restarted before it had journalled why. `held` must have the space's capacity.
    pub fn peer_has(&mut self, space: SpaceId, held: &UnitSet) {
        let s = self.at(space);
        if faulty!(OldBitmapAfterReconnect) {
            return;
        }
        s.pending = s.live.clone();
        s.pending.subtract(held);
        s.comparing = UnitSet::empty(held.capacity());
        s.sent = s.live.clone();
        s.sent.subtract(&s.pending);
        s.demanded.subtract(held);
    }

    /// As [`peer_has`](Self::peer_has), for a space whose content still changes at the source: what the
    /// peer holds may be out of date, so what was pending stays so.
    pub fn peer_received(&mut self, space: SpaceId, held: &UnitSet) {
        let s = self.at(space);
        // What went a second time may be what got lost, and what is held the older copy.
        let unknown = if faulty!(OldCopyTakenForNew) {
            UnitSet::empty(held.capacity())
        } else {
            s.sent.intersection(&s.again).intersection(held)
        };
        let mut lost = s.sent.clone();
        lost.subtract(held);
        lost.union_with(&unknown);
        s.old = s.old.intersection(held);
        s.old.union_with(&unknown);
        s.again = UnitSet::empty(held.capacity());
        s.comparing = UnitSet::empty(held.capacity());
        s.sent.subtract(&lost);
        s.pending.union_with(&lost);
    }

    /// Units that are empty in a space: neither live nor waiting to be.
    pub fn empty_runs(&self, space: SpaceId) -> Vec<Extent> {
        let s = &self.spaces[usize::from(space.0)];
        s.live.gaps_within(Extent::new(0, s.info.units())).collect()
    }

    /// Whether anything at all is left to send.
    pub fn is_drained(&self) -> bool {
        self.spaces.iter().all(|s| s.pending.is_empty())
    }

    pub fn tally(&self, space: SpaceId) -> Tally {
        let s = &self.spaces[usize::from(space.0)];
        Tally {
            live: s.live.len(),
            pending: s.pending.len(),
            sent: s.sent.len(),
            forgotten: s.forgotten,
            sent_again: s.sent_again,
            repeated: s.repeated,
            outdated: s.outdated,
            alike: s.alike,
        }
    }
}

impl SpaceOut {
    /// Pending, readable and settled runs inside `extent`, at most `max` units.
    fn pushable(&self, extent: Extent, max: u64) -> Vec<Extent> {
        let extent = extent.clamp_to(Extent::new(0, self.info.units()));
        let withheld = if faulty!(WithheldPushed) {
            &UnitSet::empty(self.info.units())
        } else {
            &self.withheld
        };
        if self.unsettled.is_empty() {
            return self.pushable_of(withheld, extent, max);
        }
        let mut left = max;
        let mut runs = Vec::new();
        for settled in self.unsettled.gaps_within(extent) {
            for run in self.pushable_of(withheld, settled, left) {
                left -= run.len;
                runs.push(run);
            }
            if left == 0 {
                break;
            }
        }
        runs
    }

    /// Pending runs inside `extent` that are not withheld, at most `max` units.
    fn pushable_of(&self, withheld: &UnitSet, extent: Extent, max: u64) -> Vec<Extent> {
        let mut left = max;
        let mut runs = Vec::new();
        if max == 0 {
            return runs;
        }
        for run in self.pending.runs_within(extent) {
            for part in withheld.gaps_within(run) {
                let part = Extent::new(part.start, part.len.min(left));
                if !part.is_empty() {
                    runs.push(part);
                }
                left -= part.len;
                if left == 0 {
                    return runs;
                }
            }
        }
        runs
    }

    fn preferred_runs(&self, max: u64) -> Vec<Extent> {
        let mut left = max;
        let mut runs = Vec::new();
        for run in self.preferred.runs() {
            for part in self.pushable(run, left) {
                left -= part.len;
                runs.push(part);
            }
            if left == 0 {
                break;
            }
        }
        runs
    }

    fn sequential_runs(&mut self, max: u64) -> Vec<Extent> {
        let units = self.info.units();
        let runs = self.pushable(
            Extent::new(self.cursor, units - self.cursor.min(units)),
            max,
        );
        let runs = if runs.is_empty() {
            self.pushable(Extent::new(0, units), max)
        } else {
            runs
        };
        if let Some(last) = runs.last() {
            self.cursor = last.end();
        }
        runs
    }
}

/// Appends a unit to ascending runs.
fn push_unit(runs: &mut Vec<Extent>, unit: u64) {
    match runs.last_mut() {
        Some(run) if run.end() == unit => run.len += 1,
        _ => runs.push(Extent::unit(unit)),
    }
}
