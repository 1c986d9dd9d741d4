//! Disks ahead of the switchover: what of them crosses while the guest still runs at the source.
//!
//! # The idea
//! A guest that switches with its whole disk behind it waits a round trip for each block that it reads, and has
//! its data on two hosts until the last block has crossed. So what it does not write to goes before: first what
//! it reads again and again (the read working set: MLLM), then the rest in order. What it writes to lately stays
//! and follows after the switch, where a write waits for nothing. Each unit goes ahead once at most: one that is
//! written to after it went was sent in vain, is named to the destination, and goes once more after the switch.
//!
//! # Why it ends
//! Nothing that is written to goes back to what may go, and what goes ahead never goes ahead again; so the
//! time is that of one copy, however fast the guest writes. If more than one unit in [`VAIN`] of all content was
//! sent in vain, enough is enough: then the rest goes after the switch, and not more than that is ever sent twice.
//!
//! # Memory
//! Per disk one set of what has content, one of what was written to often before, and [`RECENT`] of what was
//! written to lately: of each only what is mixed is stored, by 128 MiB of disk.
//!
//! Trap: what is known of writes must be known before their requests are answered, and *after* the data is where
//! a copy is read from; a write that is noted only before may be noted, looked at and forgotten while a copy of
//! the old content is being read.

use std::collections::VecDeque;

use crate::outflow::Outflow;
use crate::set::UnitSet;
use crate::space::{Extent, SpaceId};

/// Milliseconds of an epoch.
pub const EPOCH: u64 = 5_000;

/// Epochs after which a unit that was not written to again may go.
pub const RECENT: usize = 6;

/// In vain may go one unit in so many.
pub const VAIN: u64 = 12;

/// A disk, all of it offered and withheld, as its guest has used it until now.
#[derive(Clone, Debug)]
pub struct DiskBefore {
    pub space: SpaceId,
    /// Units that have content.
    pub content: UnitSet,
    /// Units that are read again and again: they go first.
    pub read: Vec<Extent>,
    /// Units near which was written often: they go last, if they turn out to be cold.
    pub written: Vec<Extent>,
}

#[derive(Clone, Debug)]
struct Disk {
    space: SpaceId,
    content: UnitSet,
    suspect: UnitSet,
    /// Written to, by epoch, the present one first.
    recent: VecDeque<UnitSet>,
    /// Went, and was written to after that. It never goes ahead again: the destination may have been told.
    vain: UnitSet,
}

/// Disks on their way ahead.
#[derive(Clone, Debug)]
pub struct DisksAhead {
    disks: Vec<Disk>,
    epoch_ends: u64,
    /// Something changed since it was last decided what may go.
    is_due: bool,
    is_over: bool,
}

impl DisksAhead {
    pub fn begin(
        out: &mut Outflow,
        disks: impl IntoIterator<Item = DiskBefore>,
        now_ms: u64,
    ) -> Self {
        let disks = disks.into_iter().map(|disk| {
            for &run in &disk.read {
                out.prefer(disk.space, run);
            }
            let units = disk.content.capacity();
            let mut suspect = UnitSet::empty(units);
            for &run in &disk.written {
                suspect.insert(run.clamp_to(Extent::new(0, units)));
            }
            Disk {
                space: disk.space,
                recent: VecDeque::from([UnitSet::empty(units)]),
                vain: UnitSet::empty(units),
                content: disk.content,
                suspect,
            }
        });
        DisksAhead {
            disks: disks.collect(),
            epoch_ends: now_ms + EPOCH,
            is_due: true,
            is_over: false,
        }
    }

    /// The guest has written to these units of the `disk`th, discarded or zeroed them.
    pub fn written(&mut self, out: &mut Outflow, disk: usize, units: &UnitSet) {
        let Some(disk) = self.disks.get_mut(disk) else {
            return;
        };
        disk.recent[0].union_with(units);
        if !faulty!(WrittenAfterItWentTakenForNew) {
            out.changed(disk.space, units);
            disk.vain.union_with(out.old(disk.space));
        }
        self.is_due = true;
    }

    /// Decides what may go now; whether everything that should go ahead has been handed out.
    pub fn step(&mut self, out: &mut Outflow, now_ms: u64) -> bool {
        if self.is_over {
            return true;
        }
        if now_ms >= self.epoch_ends {
            self.epoch_ends = now_ms + EPOCH;
            self.is_due = true;
            for disk in &mut self.disks {
                let units = disk.content.capacity();
                disk.recent.push_front(UnitSet::empty(units));
                disk.recent.truncate(RECENT);
            }
        }
        let rest = |out: &Outflow| self.disks.iter().any(|d| out.has_pushable(d.space));
        if !self.is_due && rest(out) {
            return false;
        }
        self.is_due = false;
        if self.is_enough() || !self.let_go(out) {
            self.end(out);
        }
        self.is_over
    }

    /// Whether so much went in vain that the rest had better wait for the switch.
    fn is_enough(&self) -> bool {
        let vain: u64 = self.disks.iter().map(|d| d.vain.len()).sum();
        let all: u64 = self.disks.iter().map(|d| d.content.len()).sum();
        vain * VAIN > all
    }

    /// Lets go what is cold by all that is known, else what is cold of late; whether there is any.
    fn let_go(&self, out: &mut Outflow) -> bool {
        [true, false].into_iter().any(|with_suspects_kept| {
            let mut rest = false;
            for disk in &self.disks {
                let mut may = disk.content.clone();
                for recent in &disk.recent {
                    may.subtract(recent);
                }
                if with_suspects_kept {
                    may.subtract(&disk.suspect);
                }
                may.subtract(&disk.vain);
                let mut kept = UnitSet::full(may.capacity());
                kept.subtract(&may);
                out.set_withheld(disk.space, &kept);
                rest |= out.has_pushable(disk.space);
            }
            rest
        })
    }

    /// Nothing more goes ahead.
    pub fn end(&mut self, out: &mut Outflow) {
        self.is_over = true;
        for disk in &self.disks {
            out.set_withheld(disk.space, &UnitSet::full(disk.content.capacity()));
        }
    }

    /// The guest has stopped, the destination has all that went ahead, and lets no more in. Of each disk what went
    /// in vain, which the destination must be told; all that it has not as it is now is offered, and withheld
    /// until somebody has looked what of it is empty.
    pub fn settle(&mut self, out: &mut Outflow) -> Vec<(SpaceId, UnitSet)> {
        let disks = self.disks.iter().map(|disk| {
            let units = disk.content.capacity();
            let mut vain = out.outdate(disk.space, &UnitSet::empty(units));
            vain.union_with(&disk.vain);
            let mut rest = UnitSet::full(units);
            rest.subtract(out.sent(disk.space));
            out.offer_set(disk.space, &rest);
            out.set_withheld(disk.space, &rest);
            (disk.space, vain)
        });
        disks.collect()
    }

    /// What went in vain so far, by disk. It only grows.
    pub fn vain(&self) -> impl Iterator<Item = (SpaceId, &UnitSet)> {
        self.disks.iter().map(|disk| (disk.space, &disk.vain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outflow::Batch;
    use crate::space::{SpaceInfo, SpaceKind, UNIT};
    use proptest::prelude::*;

    const UNITS: u64 = 240;
    const DISK: SpaceId = SpaceId(0);

    fn outflow() -> Outflow {
        let mut out = Outflow::new(vec![SpaceInfo {
            id: DISK,
            kind: SpaceKind::Disk,
            name: "root".into(),
            len: UNITS * UNIT,
        }]);
        out.offer_withheld(DISK, Extent::new(0, UNITS));
        out
    }

    fn begin(out: &mut Outflow, read: Vec<Extent>, written: Vec<Extent>) -> DisksAhead {
        let mut content = UnitSet::full(UNITS);
        content.remove(Extent::new(200, 40));
        let disk = DiskBefore {
            space: DISK,
            content,
            read,
            written,
        };
        DisksAhead::begin(out, [disk], 0)
    }

    fn of(runs: &[Extent]) -> UnitSet {
        let mut set = UnitSet::empty(UNITS);
        for &run in runs {
            set.insert(run);
        }
        set
    }

    fn pushed(out: &mut Outflow) -> Vec<Batch> {
        std::iter::from_fn(|| out.next_push(64)).collect()
    }

    #[test]
    fn what_is_read_often_goes_first_what_was_written_often_last_and_holes_never() {
        let mut out = outflow();
        let mut ahead = begin(
            &mut out,
            vec![Extent::new(100, 5)],
            vec![Extent::new(0, 10)],
        );
        assert!(!ahead.step(&mut out, 0));
        let first = pushed(&mut out);
        assert_eq!(first[0].runs, [Extent::new(100, 5)]);
        assert_eq!(first[1].runs[0].start, 10);
        assert!(!ahead.step(&mut out, 200));
        let last = pushed(&mut out);
        assert_eq!(last[0].runs, [Extent::new(0, 10)]);
        assert!(ahead.step(&mut out, 400));
        assert_eq!(out.sent(DISK).len(), 200);
        assert_eq!(ahead.settle(&mut out), [(DISK, UnitSet::empty(UNITS))]);
        assert_eq!(out.pending(DISK).runs().next(), Some(Extent::new(200, 40)));
    }

    #[test]
    fn what_is_written_to_lately_waits_and_what_went_before_is_named() {
        let mut out = outflow();
        let mut ahead = begin(&mut out, Vec::new(), Vec::new());
        assert!(!ahead.step(&mut out, 0));
        out.next_push(20);
        ahead.written(&mut out, 0, &of(&[Extent::new(10, 5), Extent::new(50, 5)]));
        assert!(!ahead.step(&mut out, 200));
        pushed(&mut out);
        assert!(ahead.step(&mut out, 400), "it waits for nothing to cool");
        assert!(!out.sent(DISK).contains(50));
        assert_eq!(ahead.settle(&mut out), [(DISK, of(&[Extent::new(10, 5)]))]);
        assert!(out.pending(DISK).contains(10) && out.pending(DISK).contains(50));
    }

    #[test]
    fn it_ends_when_too_much_went_in_vain() {
        let mut out = outflow();
        let mut ahead = begin(&mut out, Vec::new(), Vec::new());
        assert!(!ahead.step(&mut out, 0));
        out.next_push(40);
        ahead.written(&mut out, 0, &of(&[Extent::new(0, 17)]));
        assert!(ahead.step(&mut out, 200));
        assert!(!out.has_pushable(DISK));
    }

    proptest! {
        /// Whatever is written when, and whatever of it got lost: after the stop the peer has the newest content of
        /// each unit that it is not told to forget, and no unit is handed out twice before.
        #[test]
        fn nothing_old_is_kept(deeds in proptest::collection::vec((0..4u8, 0..UNITS, 1..30u64), 1..60)) {
            let mut out = outflow();
            let mut ahead = begin(&mut out, vec![Extent::new(60, 9)], vec![Extent::new(0, 60)]);
            let mut version = vec![0u32; UNITS as usize];
            let mut theirs = vec![None; UNITS as usize];
            let mut now = 0;
            let mut lost = false;
            for (deed, start, len) in deeds {
                now += 100 * len;
                let run = Extent::new(start, len).clamp_to(Extent::new(0, UNITS));
                match deed {
                    0 => {
                        run.iter().for_each(|unit| version[unit as usize] += 1);
                        ahead.written(&mut out, 0, &of(&[run]));
                    }
                    1 => {
                        ahead.step(&mut out, now);
                    }
                    2 => {
                        // The connection broke: of what was handed out, this did not arrive.
                        run.iter().for_each(|unit| theirs[unit as usize] = None);
                        let held: Vec<Extent> = (0..UNITS)
                            .filter(|&unit| theirs[unit as usize].is_some())
                            .map(Extent::unit)
                            .collect();
                        out.peer_received(DISK, &of(&held));
                        lost = true;
                    }
                    _ => {
                        for unit in out.next_push(len).iter().flat_map(|b| &b.runs).flat_map(Extent::iter) {
                            prop_assert!(theirs[unit as usize].is_none() || lost);
                            theirs[unit as usize] = Some(version[unit as usize]);
                        }
                    }
                }
            }
            ahead.end(&mut out);
            let vain = ahead.settle(&mut out).remove(0).1;
            for unit in 0..UNITS {
                let kept = !vain.contains(unit) && theirs[unit as usize].is_some();
                prop_assert_eq!(out.pending(DISK).contains(unit), !kept);
                if kept {
                    prop_assert_eq!(theirs[unit as usize], Some(version[unit as usize]));
                }
            }
        }
    }
}
