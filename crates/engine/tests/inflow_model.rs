//! The destination's residency against a model that knows every byte.
//!
//! A small disk is moved while a guest reads and writes at random and copies arrive in any order, early,
//! late and repeatedly, with any number of operations in flight at once and any of them failing. The
//! model keeps what the guest was told; the store keeps what I/O really did. At the end every sector must
//! be the guest's last write, or the source's content.

use std::collections::HashMap;

use proptest::prelude::*;
use whimbrel_engine::inflow::{
    Change, FillGrant, FillPlan, Finished, ReadPlan, SpaceIn, Ticket, WriteGrant, WritePlan,
};
use whimbrel_engine::space::{
    Extent, SECTOR, SECTORS_PER_UNIT, SpaceId, SpaceInfo, SpaceKind, UNIT,
};

const UNITS: u64 = 6;
const SECTORS: u64 = UNITS * SECTORS_PER_UNIT - 3;

#[derive(Clone, Debug)]
enum Step {
    Write {
        sector: u64,
        len: u64,
    },
    Read {
        unit: u64,
        len: u64,
    },
    Fill {
        unit: u64,
        len: u64,
    },
    Zero {
        unit: u64,
    },
    /// Let the oldest (or another) operation in flight finish.
    Finish {
        which: usize,
        ok: bool,
    },
    /// The daemon dies and comes back.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..SECTORS, 1..20u64).prop_map(|(sector, len)| Step::Write { sector, len: len.min(SECTORS - sector) }),
        2 => (0..UNITS, 1..4u64).prop_map(|(unit, len)| Step::Read { unit, len: len.min(UNITS - unit) }),
        3 => (0..UNITS, 1..4u64).prop_map(|(unit, len)| Step::Fill { unit, len: len.min(UNITS - unit) }),
        1 => (0..UNITS).prop_map(|unit| Step::Zero { unit }),
        5 => (0..8usize, prop::bool::weighted(0.85)).prop_map(|(which, ok)| Step::Finish { which, ok }),
    ]
}

enum Flight {
    Write {
        grant: WriteGrant,
        sector: u64,
        len: u64,
        value: u32,
    },
    Fill {
        grant: FillGrant,
    },
}

enum Waiting {
    Write { sector: u64, len: u64, value: u32 },
    Fill { unit: u64, len: u64 },
    Read,
}

/// Sectors hold a value: 0 is a hole, `1000 + s` is the source's content of sector `s`.
struct World {
    space: SpaceIn,
    store: Vec<u32>,
    /// What a read of the sector may return now: the last acknowledged write, or the source's content.
    acked: Vec<u32>,
    flights: Vec<Flight>,
    waiting: HashMap<Ticket, Waiting>,
    /// The journal as a restarted daemon would read it.
    journal: Vec<Change>,
    /// Units whose source content is zero.
    zero_units: [bool; UNITS as usize],
    next_value: u32,
}

impl World {
    fn new(zero_units: [bool; UNITS as usize]) -> Self {
        let info = SpaceInfo {
            id: SpaceId(0),
            kind: SpaceKind::Disk,
            name: "d".into(),
            len: SECTORS * SECTOR,
        };
        let source = (0..SECTORS).map(|s| {
            if zero_units[(s / SECTORS_PER_UNIT) as usize] {
                0
            } else {
                1000 + s as u32
            }
        });
        World {
            space: SpaceIn::absent(info),
            store: vec![0; SECTORS as usize],
            acked: source.collect(),
            flights: Vec::new(),
            waiting: HashMap::new(),
            journal: Vec::new(),
            zero_units,
            next_value: 1_000_000,
        }
    }

    fn source(&self, sector: u64) -> u32 {
        if self.zero_units[(sector / SECTORS_PER_UNIT) as usize] {
            0
        } else {
            1000 + sector as u32
        }
    }

    fn overlaps_flight(&self, sector: u64, len: u64) -> bool {
        let hit = |s: u64, l: u64| s < sector + len && sector < s + l;
        self.flights
            .iter()
            .any(|f| matches!(f, Flight::Write { sector: s, len: l, .. } if hit(*s, *l)))
            || self
                .waiting
                .values()
                .any(|w| matches!(w, Waiting::Write { sector: s, len: l, .. } if hit(*s, *l)))
    }

    fn write(&mut self, sector: u64, len: u64, value: u32) {
        match self.space.begin_write(sector * SECTOR, len * SECTOR) {
            WritePlan::Go(grant) => self.flights.push(Flight::Write {
                grant,
                sector,
                len,
                value,
            }),
            WritePlan::Wait(t) => {
                self.waiting
                    .insert(t, Waiting::Write { sector, len, value });
            }
        }
    }

    fn fill(&mut self, unit: u64, len: u64) {
        match self.space.begin_fill(Extent::new(unit, len)) {
            FillPlan::Go(grant) => self.flights.push(Flight::Fill { grant }),
            FillPlan::Wait(t) => {
                self.waiting.insert(t, Waiting::Fill { unit, len });
            }
        }
    }

    fn finish(&mut self, which: usize, ok: bool) {
        if self.flights.is_empty() {
            return;
        }
        let flight = self.flights.remove(which % self.flights.len());
        let done = match flight {
            Flight::Write {
                grant,
                sector,
                len,
                value,
            } => {
                if ok {
                    for s in sector..sector + len {
                        self.store[s as usize] = value;
                    }
                }
                let done = self.space.end_write(grant, ok);
                if ok {
                    self.journal.extend(done.changes.iter().copied());
                    self.space.journalled(&done.changes);
                    for s in sector..sector + len {
                        self.acked[s as usize] = value;
                    }
                }
                done
            }
            Flight::Fill { grant } => {
                for run in &grant.store {
                    for unit in run.iter() {
                        self.store_unit(unit, 0, ok);
                    }
                }
                for &(unit, mask) in &grant.merge {
                    self.store_unit(unit, mask, ok);
                }
                let runs: Vec<Extent> = grant
                    .store
                    .iter()
                    .copied()
                    .chain(grant.merge.iter().map(|m| Extent::unit(m.0)))
                    .collect();
                let done = self.space.end_fill(grant, ok, 0);
                for run in runs.into_iter().filter(|_| !ok) {
                    self.give_up(run);
                }
                // Fills are journalled lazily: model the worst case, never.
                done
            }
        };
        self.wake(done);
    }

    /// Nobody waits for what could not be stored, and it can be demanded anew.
    fn give_up(&mut self, run: Extent) {
        for ticket in self.space.give_up(run) {
            let waited = self.waiting.remove(&ticket);
            assert!(matches!(waited, Some(Waiting::Read)), "who reads it, once");
        }
        let outstanding = self.space.outstanding();
        assert!(outstanding.iter().all(|o| o.clamp_to(run).is_empty()));
    }

    fn store_unit(&mut self, unit: u64, keep: u8, ok: bool) {
        for bit in 0..SECTORS_PER_UNIT {
            let s = unit * SECTORS_PER_UNIT + bit;
            if s < SECTORS && keep >> bit & 1 == 0 && ok {
                self.store[s as usize] = self.source(s);
            }
        }
    }

    fn wake(&mut self, done: Finished) {
        for ticket in done.wake {
            match self
                .waiting
                .remove(&ticket)
                .expect("a ticket is woken once")
            {
                Waiting::Write { sector, len, value } => self.write(sector, len, value),
                Waiting::Fill { unit, len } => self.fill(unit, len),
                Waiting::Read => {}
            }
        }
    }

    fn check_resident(&self) {
        for unit in 0..UNITS {
            if self.space.resident().contains(unit) {
                for s in unit * SECTORS_PER_UNIT..((unit + 1) * SECTORS_PER_UNIT).min(SECTORS) {
                    if !self.overlaps_flight(s, 1) {
                        assert_eq!(
                            self.store[s as usize], self.acked[s as usize],
                            "sector {s} of a resident unit"
                        );
                    }
                }
            }
        }
    }

    /// The daemon dies now and comes back with its journal.
    fn restart(&mut self) {
        let info = self.space.info().clone();
        let mut fresh = whimbrel_engine::set::UnitSet::empty(UNITS);
        let mut partial = std::collections::BTreeMap::new();
        for change in &self.journal {
            match *change {
                Change::Written(run) | Change::Filled(run) => {
                    fresh.insert(run);
                    for unit in run.iter() {
                        partial.remove(&unit);
                    }
                }
                Change::PartlyWritten { unit, mask } if !fresh.contains(unit) => {
                    partial.insert(unit, mask);
                }
                Change::PartlyWritten { .. } => {}
            }
        }
        let mut owned = fresh.clone();
        for &unit in partial.keys() {
            owned.insert(Extent::unit(unit));
        }
        self.space = SpaceIn::recovered(info, fresh, owned, partial);
        // An unfinished write may have changed nothing or anything in its sectors; here: nothing.
        self.flights.clear();
        self.waiting.clear();
    }

    /// The daemon dies and comes back; the source sends all that is not resident.
    fn restart_and_drain(&mut self) {
        self.restart();
        for unit in 0..UNITS {
            self.fill(unit, 1);
            self.finish(0, true);
        }
        assert!(self.space.is_complete());
        self.check_resident();
    }
}

fn run(zero_units: [bool; UNITS as usize], steps: Vec<Step>, crash: bool) {
    let mut w = World::new(zero_units);
    for step in steps {
        match step {
            // Overlapping guest writes in flight have no defined order: a guest does not rely on them.
            Step::Write { sector, len } if !w.overlaps_flight(sector, len) => {
                w.next_value += 1;
                let value = w.next_value;
                w.write(sector, len, value);
            }
            Step::Write { .. } => {}
            Step::Read { unit, len } => {
                if let ReadPlan::Wait { ticket, .. } = w.space.read(Extent::new(unit, len), 0) {
                    w.waiting.insert(ticket, Waiting::Read);
                }
            }
            Step::Fill { unit, len } => w.fill(unit, len),
            Step::Zero { unit } if w.zero_units[unit as usize] => {
                let done = w.space.zeroes(Extent::unit(unit), 0);
                w.wake(done);
            }
            Step::Zero { .. } => {}
            Step::Finish { which, ok } => w.finish(which, ok),
            Step::Restart => w.restart(),
        }
        w.check_resident();
    }
    if crash {
        w.restart_and_drain();
        return;
    }
    while !w.flights.is_empty() {
        w.finish(0, true);
    }
    for unit in 0..UNITS {
        w.fill(unit, 1);
        w.finish(0, true);
    }
    assert!(w.space.is_complete());
    assert!(w.waiting.is_empty(), "nobody waits for ever");
    w.check_resident();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn every_sector_is_the_guests_last_write_or_the_sources(
        zero in any::<[bool; UNITS as usize]>(), steps in prop::collection::vec(step(), 1..80)) {
        run(zero, steps, false);
    }

    #[test]
    fn a_daemon_that_restarts_again_and_again_loses_no_acknowledged_write(
        zero in any::<[bool; UNITS as usize]>(),
        steps in prop::collection::vec(prop_oneof![12 => step(), 1 => Just(Step::Restart)], 1..80)) {
        run(zero, steps, true);
    }

    #[test]
    fn a_restarted_daemon_loses_no_acknowledged_write(
        zero in any::<[bool; UNITS as usize]>(), steps in prop::collection::vec(step(), 1..80)) {
        run(zero, steps, true);
    }
}

#[test]
fn the_write_that_completes_a_unit_after_a_restart_has_a_record() {
    let info = SpaceInfo {
        id: SpaceId(0),
        kind: SpaceKind::Disk,
        name: "d".into(),
        len: UNIT,
    };
    let none = whimbrel_engine::set::UnitSet::empty(1);
    let mut owned = none.clone();
    owned.insert(Extent::unit(0));
    let partial = std::collections::BTreeMap::from([(0, 0b0000_1111)]);
    let mut space = SpaceIn::recovered(info, none, owned, partial);
    let WritePlan::Go(grant) = space.begin_write(UNIT / 2, UNIT / 2) else {
        panic!("nothing is busy")
    };
    let done = space.end_write(grant, true);
    assert_eq!(done.changes, vec![Change::Written(Extent::unit(0))]);
}

#[test]
fn last_unit_may_be_short() {
    let info = SpaceInfo {
        id: SpaceId(0),
        kind: SpaceKind::Disk,
        name: "d".into(),
        len: UNIT + 512,
    };
    let mut space = SpaceIn::absent(info);
    let WritePlan::Go(grant) = space.begin_write(UNIT, 512) else {
        panic!("nothing is busy")
    };
    let done = space.end_write(grant, true);
    assert_eq!(done.changes, vec![Change::Written(Extent::unit(1))]);
    assert!(space.resident().contains(1));
}

#[test]
fn a_unit_is_demanded_once() {
    let info = SpaceInfo {
        id: SpaceId(0),
        kind: SpaceKind::Disk,
        name: "d".into(),
        len: 8 * UNIT,
    };
    let mut space = SpaceIn::absent(info);
    let ReadPlan::Wait { demands, .. } = space.read(Extent::new(1, 3), 0) else {
        panic!("absent")
    };
    assert_eq!(demands, vec![Extent::new(1, 3)]);
    let ReadPlan::Wait { demands, .. } = space.read(Extent::new(2, 4), 0) else {
        panic!("absent")
    };
    assert_eq!(demands, vec![Extent::new(4, 2)]);
}
