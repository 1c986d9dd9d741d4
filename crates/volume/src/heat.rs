//! Who was read and written, when, and how much: a volume's access log.
//!
//! Two records of the same accesses, both cheap enough to be always on (a few relaxed atomics):
//!
//! - a ring of the latest accesses, 12 bytes each, oldest overwritten: what follow and the predictors read;
//! - per extent of 1 MiB a read and a write counter, 4 MiB per TiB: how hot it is. [`AccessLog::decay`]
//!   halves them; called every half-life, each holds twice the accesses per half-life of a steady load.
//!
//! Traps: a snapshot is not one instant; accesses that arrive meanwhile may be in or not. Two writers a
//! whole ring apart may leave the time of one with the place of the other: both are accesses that happened.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Bytes per heat counter.
pub const HEAT_EXTENT: u64 = 1 << 20;

/// What an access adds to its extents' counters: room below for three halvings. They stop at 65,535.
pub const WEIGHT: u16 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    Read,
    Write,
}

/// One access, in units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Milliseconds, as passed in.
    pub at_ms: u32,
    pub kind: AccessKind,
    pub first_unit: u64,
    /// Units touched; 32,767 stands for that many or more.
    pub units: u16,
}

/// What the log knew when asked.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct HeatSnapshot {
    /// Per extent of 1 MiB: decayed accesses, times eight.
    pub reads: Vec<u16>,
    pub writes: Vec<u16>,
    /// The latest accesses, oldest first.
    pub recent: Vec<Access>,
}

/// The access log of one volume.
pub struct AccessLog {
    reads: Box<[AtomicU16]>,
    writes: Box<[AtomicU16]>,
    ring: Box<[Slot]>,
    /// Accesses ever logged; the ring holds the last of them.
    next: AtomicU64,
}

/// `access`: bit 63 set if used, 62 write, 47..62 units, 0..47 first unit.
#[derive(Default)]
struct Slot {
    access: AtomicU64,
    at_ms: AtomicU32,
}

const USED: u64 = 1 << 63;
const WRITE: u64 = 1 << 62;
const UNITS_AT: u32 = 47;
const UNITS_MAX: u64 = (1 << 15) - 1;

impl AccessLog {
    /// A log for a volume of `size` bytes that remembers the last `ring` accesses (at least one).
    pub fn new(size: u64, ring: usize) -> Self {
        let extents = size.div_ceil(HEAT_EXTENT) as usize;
        let counters = || (0..extents).map(|_| AtomicU16::new(0)).collect();
        AccessLog {
            reads: counters(),
            writes: counters(),
            ring: (0..ring.max(1)).map(|_| Slot::default()).collect(),
            next: AtomicU64::new(0),
        }
    }

    /// Logs an access of `len` bytes at `offset`; one of no bytes, or past the end, is ignored.
    pub fn log(&self, at_ms: u32, kind: AccessKind, offset: u64, len: u64) {
        let touched = whimbrel_engine::space::Extent::touching(offset, len);
        if touched.is_empty() {
            return;
        }
        let counters = match kind {
            AccessKind::Read => &self.reads,
            AccessKind::Write => &self.writes,
        };
        let (first, last) = (offset / HEAT_EXTENT, (offset + len - 1) / HEAT_EXTENT);
        let Some(hit) = counters.get(first as usize..=last as usize) else {
            return;
        };
        for counter in hit {
            // Load and store, not an exchange: a count lost in a race is no loss.
            let heat = counter.load(Ordering::Relaxed).saturating_add(WEIGHT);
            counter.store(heat, Ordering::Relaxed);
        }
        let place = self.next.fetch_add(1, Ordering::Relaxed) % self.ring.len() as u64;
        let slot = &self.ring[place as usize];
        let write = if kind == AccessKind::Write { WRITE } else { 0 };
        let word = USED | write | touched.len.min(UNITS_MAX) << UNITS_AT | touched.start;
        slot.at_ms.store(at_ms, Ordering::Relaxed);
        slot.access.store(word, Ordering::Release);
    }

    /// Sets an extent's counters, as they were kept.
    pub(crate) fn preset(&self, extent: usize, reads: u16, writes: u16) {
        if let (Some(r), Some(w)) = (self.reads.get(extent), self.writes.get(extent)) {
            r.store(reads, Ordering::Relaxed);
            w.store(writes, Ordering::Relaxed);
        }
    }

    /// Accesses logged so far.
    pub fn count(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Halves every counter: to be called once per half-life.
    pub fn decay(&self) {
        for counter in self.reads.iter().chain(&self.writes) {
            let heat = counter.load(Ordering::Relaxed);
            if heat != 0 {
                counter.store(heat / 2, Ordering::Relaxed);
            }
        }
    }

    pub fn snapshot(&self) -> HeatSnapshot {
        let copy =
            |counters: &[AtomicU16]| counters.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        let next = self.next.load(Ordering::Relaxed);
        let len = self.ring.len() as u64;
        let recent = (next.saturating_sub(len)..next)
            .filter_map(|n| self.ring[(n % len) as usize].read())
            .collect();
        HeatSnapshot {
            reads: copy(&self.reads),
            writes: copy(&self.writes),
            recent,
        }
    }
}

impl Slot {
    fn read(&self) -> Option<Access> {
        let word = self.access.load(Ordering::Acquire);
        (word & USED != 0).then(|| Access {
            at_ms: self.at_ms.load(Ordering::Relaxed),
            kind: if word & WRITE != 0 {
                AccessKind::Write
            } else {
                AccessKind::Read
            },
            first_unit: word & ((1 << UNITS_AT) - 1),
            units: (word >> UNITS_AT & UNITS_MAX) as u16,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_latest_in_order() {
        let log = AccessLog::new(1 << 30, 4);
        for n in 0..6 {
            let kind = if n % 2 == 0 {
                AccessKind::Read
            } else {
                AccessKind::Write
            };
            log.log(n, kind, u64::from(n) * 4096, 4097);
        }
        let recent = log.snapshot().recent;
        assert_eq!(recent.len(), 4);
        assert_eq!(
            recent[0],
            Access {
                at_ms: 2,
                kind: AccessKind::Read,
                first_unit: 2,
                units: 2
            }
        );
        assert_eq!(recent[3].kind, AccessKind::Write);
        assert_eq!(recent[3].first_unit, 5);
    }

    #[test]
    fn heat_counts_every_extent_touched_decays_and_does_not_wrap() {
        let log = AccessLog::new(4 << 20, 1);
        log.log(0, AccessKind::Write, (1 << 20) - 1, 2);
        log.log(0, AccessKind::Read, 3 << 20, 1 << 20);
        let heat = log.snapshot();
        assert_eq!(heat.writes, [8, 8, 0, 0]);
        assert_eq!(heat.reads, [0, 0, 0, 8]);
        log.decay();
        assert_eq!(log.snapshot().writes, [4, 4, 0, 0]);
        for _ in 0..20_000 {
            log.log(0, AccessKind::Write, 0, 1);
        }
        assert_eq!(log.snapshot().writes[0], u16::MAX);
    }

    #[test]
    fn accesses_of_nothing_or_past_the_end_are_ignored() {
        let log = AccessLog::new(1 << 20, 4);
        log.log(0, AccessKind::Read, 0, 0);
        log.log(0, AccessKind::Read, 1 << 20, 1);
        assert_eq!(log.snapshot().recent, []);
    }
}
