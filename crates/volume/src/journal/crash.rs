//! The journal on a disk that fails in every way it may.
//!
//! A schedule stores data, appends records, and takes barriers and folds one step at a time, so that any
//! of them may be cut at any point and by either crash. After each recovery:
//!
//! - sound: no unit or sector is claimed whose data is not there;
//! - complete: after the daemon's death everything acknowledged is known, after the host's everything
//!   flushed is.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use whimbrel_engine::space::Extent;

use super::book::{Book, Fold, Sealed, make_log, sweep};
use super::disk::Disk;
use super::record::{LogHeader, Sequence};
use super::{Change, Fault, Limits, Recovered, VolumeIdentity, recover, snapshot::BLOCK_UNITS};
use crate::VolumeError;

/// Two snapshot blocks, the last unit of three sectors.
const IDENTITY: VolumeIdentity = VolumeIdentity {
    uuid: [1; 16],
    size: (BLOCK_UNITS + 2000) * 4096 + 1536,
    epoch: 1,
};

const LIMITS: Limits = Limits { log_records: 16 };

#[derive(Clone, Debug)]
enum Op {
    /// Data reaches the page cache; its record waits.
    Store(Change),
    /// Everything that waits is recorded in one write, and acknowledged.
    Append,
    /// A barrier's next step.
    Barrier,
    /// A fold's next step.
    Fold,
    Crash {
        host: bool,
    },
    /// A crash within the n-th operation on the journal's files from here.
    CrashIn {
        operations: u32,
        host: bool,
    },
    FailNextWrite,
}

fn change() -> impl Strategy<Value = Change> {
    let units = IDENTITY.units();
    let unit = prop_oneof![
        0..20u64,
        500..530u64,
        BLOCK_UNITS - 10..BLOCK_UNITS + 10,
        units - 5..units
    ];
    let len = prop_oneof![4 => 1u64..4, 1 => Just(512u64), 1 => Just(1100u64)];
    let extent = (unit.clone(), len).prop_map(move |(s, l)| Extent::new(s, l.min(units - s)));
    prop_oneof![
        extent.clone().prop_map(Change::Filled),
        extent.prop_map(Change::Written),
        (unit, 1u8..).prop_map(|(unit, mask)| Change::PartlyWritten {
            unit,
            mask: (mask & IDENTITY.all_sectors(unit)).max(1),
        }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => change().prop_map(Op::Store),
        10 => Just(Op::Append),
        8 => Just(Op::Barrier),
        6 => Just(Op::Fold),
        1 => any::<bool>().prop_map(|host| Op::Crash { host }),
        2 => (0u32..40, any::<bool>()).prop_map(|(operations, host)| Op::CrashIn { operations, host }),
        1 => Just(Op::FailNextWrite),
    ]
}

/// Sectors by unit. Whole volumes are small here.
type Sectors = BTreeMap<u64, u8>;

/// What somebody is sure of.
#[derive(Clone, Default)]
struct Knowledge {
    here: Sectors,
    owned: BTreeSet<u64>,
}

impl Knowledge {
    fn add(&mut self, change: Change) {
        let (extent, mask, owned) = match change {
            Change::Filled(e) => (e, 0xff, false),
            Change::Written(e) => (e, 0xff, true),
            Change::PartlyWritten { unit, mask } => (Extent::unit(unit), mask, true),
        };
        for unit in extent.iter() {
            *self.here.entry(unit).or_default() |= mask & IDENTITY.all_sectors(unit);
            if owned {
                self.owned.insert(unit);
            }
        }
    }

    fn of(recovered: &Recovered) -> Self {
        let mut knowledge = Knowledge {
            here: recovered.partial.clone(),
            ..Self::default()
        };
        for run in recovered.resident.runs() {
            for unit in run.iter() {
                knowledge.here.insert(unit, IDENTITY.all_sectors(unit));
            }
        }
        knowledge.owned = recovered
            .guest_owned
            .runs()
            .flat_map(|r| r.iter())
            .collect();
        knowledge
    }

    fn first_not_in(&self, other: &Knowledge) -> Option<String> {
        let sector = self
            .here
            .iter()
            .find(|&(unit, mask)| mask & !other.here.get(unit).copied().unwrap_or(0) != 0);
        if let Some((unit, mask)) = sector {
            return Some(format!("unit {unit} sectors {mask:#010b}"));
        }
        self.owned
            .difference(&other.owned)
            .next()
            .map(|u| format!("owner of unit {u}"))
    }
}

enum BarrierStep {
    Idle,
    Marked {
        mark: Sequence,
        data: Sectors,
        acked: Knowledge,
    },
    DataSynced {
        mark: Sequence,
        acked: Knowledge,
    },
    Sealed {
        sealed: Sealed,
        acked: Knowledge,
    },
}

enum FoldStep {
    Idle,
    Made(LogHeader),
    Switched(Fold),
    Durable(Fold),
    Written(Fold),
    Done { previous: u64 },
}

struct World {
    disk: Arc<Disk>,
    book: Book<Disk>,
    /// The volume's file: what the page cache has, and what a sync has made durable.
    present: Knowledge,
    durable: Sectors,
    queued: Vec<Change>,
    acked: Knowledge,
    flushed: Knowledge,
    barrier: BarrierStep,
    fold: FoldStep,
    fuse_is_host: bool,
}

impl World {
    fn new(seed: u64) -> World {
        let disk = Arc::new(Disk::new(seed));
        let book = Book::create(Arc::clone(&disk), IDENTITY, LIMITS).unwrap();
        World {
            disk,
            book,
            present: Knowledge::default(),
            durable: Sectors::new(),
            queued: Vec::new(),
            acked: Knowledge::default(),
            flushed: Knowledge::default(),
            barrier: BarrierStep::Idle,
            fold: FoldStep::Idle,
            fuse_is_host: false,
        }
    }

    /// An error is fine if the machine died of it, or a write was made to fail.
    fn step(&mut self, op: &Op) {
        match *op {
            Op::Store(change) => {
                self.present.add(change);
                self.queued.push(change);
            }
            Op::Append => {
                if let Ok(taken) = self.book.append(&self.queued) {
                    for change in self.queued.drain(..taken) {
                        self.acked.add(change);
                    }
                }
            }
            Op::Barrier => self.barrier(),
            Op::Fold => self.fold(),
            Op::Crash { host } => self.crash(host),
            Op::CrashIn { operations, host } => {
                self.fuse_is_host = host;
                self.disk.light_fuse(operations);
            }
            Op::FailNextWrite => self.disk.fail_next_write(),
        }
        if self.disk.is_dead() {
            self.crash(self.fuse_is_host);
        }
    }

    fn barrier(&mut self) {
        self.barrier = match std::mem::replace(&mut self.barrier, BarrierStep::Idle) {
            BarrierStep::Idle => BarrierStep::Marked {
                mark: self.book.mark(),
                data: self.present.here.clone(),
                acked: self.acked.clone(),
            },
            BarrierStep::Marked { mark, data, acked } => {
                for (unit, mask) in data {
                    *self.durable.entry(unit).or_default() |= mask;
                }
                BarrierStep::DataSynced { mark, acked }
            }
            BarrierStep::DataSynced { mark, acked } => match self.book.seal(mark) {
                Ok(Some(sealed)) => BarrierStep::Sealed { sealed, acked },
                Ok(None) => {
                    self.flushed = acked;
                    BarrierStep::Idle
                }
                Err(_) => BarrierStep::Idle,
            },
            BarrierStep::Sealed { sealed, acked } => {
                let mut good = true;
                for name in &sealed.sync {
                    good &= super::store::Store::sync(&*self.disk, name).is_ok();
                }
                if good {
                    self.book.settle(&sealed);
                    self.flushed = acked;
                }
                BarrierStep::Idle
            }
        };
    }

    fn fold(&mut self) {
        let disk = Arc::clone(&self.disk);
        self.fold = match std::mem::replace(&mut self.fold, FoldStep::Idle) {
            FoldStep::Idle => match self.book.unfinished_fold() {
                Some(fold) => FoldStep::Switched(fold),
                None => {
                    let (generation, limits) = self.book.next_log();
                    match make_log(&*disk, IDENTITY, limits, generation) {
                        Ok(header) => FoldStep::Made(header),
                        Err(_) => {
                            self.book.give_up_log();
                            FoldStep::Idle
                        }
                    }
                }
            },
            FoldStep::Made(header) => FoldStep::Switched(self.book.switch(header)),
            FoldStep::Switched(fold) => {
                // A running barrier ends, then a whole one of our own.
                while !matches!(self.barrier, BarrierStep::Idle) {
                    self.barrier();
                }
                let mark = self.book.mark();
                let acked = self.acked.clone();
                self.durable.clone_from(&self.present.here);
                self.barrier = BarrierStep::DataSynced { mark, acked };
                self.barrier();
                let sealed = matches!(self.barrier, BarrierStep::Sealed { .. });
                if sealed {
                    self.barrier();
                }
                if self.book.seal(mark).is_ok_and(|again| again.is_none()) {
                    FoldStep::Durable(fold)
                } else {
                    FoldStep::Idle
                }
            }
            FoldStep::Durable(fold) => match fold.write(&*disk, IDENTITY) {
                Ok(_) => FoldStep::Written(fold),
                Err(_) => FoldStep::Idle,
            },
            FoldStep::Written(fold) => FoldStep::Done {
                previous: self.book.folded(&fold),
            },
            FoldStep::Done { previous } => {
                let _ = sweep(&*disk, previous);
                FoldStep::Idle
            }
        };
    }

    fn crash(&mut self, mut host: bool) {
        self.queued.clear();
        self.barrier = BarrierStep::Idle;
        self.fold = FoldStep::Idle;
        let mut host_died = false;
        loop {
            if host {
                host_died = true;
                self.disk.restart_host();
                // Of the data not synced, any sector may have been written back.
                let eagerness = self.disk.random(4);
                for (&unit, &mask) in &self.present.here {
                    let kept = self.durable.entry(unit).or_default();
                    if self.disk.random(4) < eagerness {
                        *kept |= mask & self.disk.random(256) as u8;
                    }
                }
                self.present.here.clone_from(&self.durable);
            } else {
                self.disk.restart_daemon();
            }
            match recover::open(Arc::clone(&self.disk), IDENTITY, LIMITS) {
                Ok((book, recovered)) => {
                    self.book = book;
                    assert!(!recovered.fell_back, "nothing was damaged");
                    self.judge(&recovered, host_died);
                    return;
                }
                // The fuse burnt down during recovery: once more.
                Err(_) if self.disk.is_dead() => host = self.fuse_is_host,
                Err(error) => panic!("recovery failed: {error}"),
            }
        }
    }

    fn judge(&mut self, recovered: &Recovered, host_died: bool) {
        let known = Knowledge::of(recovered);
        assert_eq!(
            known.first_not_in(&self.present),
            None,
            "claimed, but not there"
        );
        let promised = if host_died {
            &self.flushed
        } else {
            &self.acked
        };
        assert_eq!(
            promised.first_not_in(&known),
            None,
            "promised, but forgotten"
        );
        for unit in recovered.partial.keys() {
            assert!(!recovered.resident.contains(*unit));
        }
        if host_died {
            // What came back from the disk itself is durable.
            self.flushed = known.clone();
        }
        self.acked = known;
    }
}

/// A number of the environment.
fn given<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// `PROPTEST_CASES`, or few enough for every build.
fn config() -> ProptestConfig {
    ProptestConfig::with_cases(given("PROPTEST_CASES").unwrap_or(500))
}

/// As [`config`], or as many as `WHIMBREL_CRASH_SCHEDULES` says; from the seed in `WHIMBREL_CRASH_SEED`, or from
/// one of the clock. Both are printed, so that a run can be had again.
fn many() -> ProptestConfig {
    let few = config();
    let cases = given("WHIMBREL_CRASH_SCHEDULES").unwrap_or(few.cases);
    let clock = || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |time| time.as_nanos() as u64)
    };
    let seed = given("WHIMBREL_CRASH_SEED").unwrap_or_else(clock);
    println!("WHIMBREL_CRASH_SCHEDULES={cases} WHIMBREL_CRASH_SEED={seed}");
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(seed),
        ..few
    }
}

proptest! {
    #![proptest_config(many())]

    #[test]
    fn no_crash_makes_the_journal_lie(seed: u64, ops in proptest::collection::vec(op(), 1..150)) {
        let mut world = World::new(seed);
        for op in &ops {
            world.step(op);
        }
        world.crash(false);
        world.crash(true);
        world.crash(true);
    }

}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn damage_is_told_or_survived_never_believed(
        seed: u64,
        ops in proptest::collection::vec(op(), 1..80),
        host: bool,
        which: prop::sample::Index,
        place: prop::sample::Index,
    ) {
        let mut world = World::new(seed);
        for op in &ops {
            world.step(op);
        }
        world.disk.light_fuse(u32::MAX);
        world.disk.restart_daemon();
        if host {
            world.crash(true);
        }
        let disk = Arc::clone(&world.disk);
        let names = super::store::Store::list(&*disk).unwrap();
        let name = which.get(&names);
        let len = {
            let mut all = Vec::new();
            super::store::Store::reader(&*disk, name).unwrap().read_to_end(&mut all).unwrap();
            all.len()
        };
        disk.damage(name, place.index(len));
        match recover::open(Arc::clone(&disk), IDENTITY, LIMITS) {
            Ok((_, recovered)) => {
                // Unneeded bytes, a tail like one torn in a crash, or an older generation: fine, as long
                // as nothing is claimed that is not there.
                let known = Knowledge::of(&recovered);
                prop_assert_eq!(known.first_not_in(&world.present), None);
            }
            Err(VolumeError::JournalDamaged { .. } | VolumeError::JournalVersion { .. }) => {}
            Err(error) => prop_assert!(false, "{}", error),
        }
    }
}

fn world_with_two_generations() -> World {
    let mut world = World::new(7);
    for start in 0..3 {
        world.step(&Op::Store(Change::Written(Extent::new(start * 10, 5))));
        world.step(&Op::Append);
        for _ in 0..6 {
            world.step(&Op::Fold);
        }
    }
    world
}

fn named(world: &World, kind: &str) -> Vec<String> {
    let mut names = super::store::Store::list(&*world.disk).unwrap();
    names.retain(|n| n.starts_with(kind));
    names
}

#[test]
fn a_damaged_newest_snapshot_is_replaced_by_the_one_before() {
    for host in [false, true] {
        let world = world_with_two_generations();
        let newest = named(&world, super::SNAPSHOT).pop().unwrap();
        world.disk.damage(&newest, 90);
        if host {
            world.disk.restart_host();
        }
        let (_, recovered) = recover::open(Arc::clone(&world.disk), IDENTITY, LIMITS).unwrap();
        assert!(recovered.fell_back);
        assert_eq!(recovered.resident.len(), 15, "host died: {host}");
    }
}

#[test]
fn damage_to_every_snapshot_is_an_error_that_says_where() {
    let world = world_with_two_generations();
    for name in named(&world, super::SNAPSHOT) {
        world.disk.damage(&name, 90);
    }
    let opened = recover::open(Arc::clone(&world.disk), IDENTITY, LIMITS);
    let Err(VolumeError::JournalDamaged {
        offset: 64,
        fault: Fault::Checksum,
        ..
    }) = opened
    else {
        panic!("{:?}", opened.map(|(_, r)| r));
    };
}

#[test]
fn a_flushed_record_damaged_before_a_later_flush_is_an_error_after_a_host_crash() {
    let mut world = World::new(7);
    for start in 0..3 {
        world.step(&Op::Store(Change::Written(Extent::new(start * 10, 5))));
        world.step(&Op::Append);
        for _ in 0..4 {
            world.step(&Op::Barrier);
        }
    }
    world.disk.damage("log-00000001", super::record::HEADER + 8);
    world.disk.restart_host();
    let opened = recover::open(Arc::clone(&world.disk), IDENTITY, LIMITS);
    assert!(matches!(
        opened.map(|(_, r)| r),
        Err(VolumeError::JournalDamaged {
            offset: 4096,
            fault: Fault::Hole,
            ..
        })
    ));
}

#[test]
fn logs_without_a_snapshot_and_a_gap_in_the_logs_are_damage() {
    use super::store::Store;
    let world = world_with_two_generations();
    let logs = named(&world, super::LOG);
    world.disk.remove(&logs[1]).unwrap();
    let opened = recover::open(Arc::clone(&world.disk), IDENTITY, LIMITS);
    assert!(matches!(
        opened.map(|(_, r)| r),
        Err(VolumeError::JournalDamaged {
            fault: Fault::LogMissing,
            ..
        })
    ));
    for name in named(&world, super::SNAPSHOT) {
        world.disk.remove(&name).unwrap();
    }
    let opened = recover::open(Arc::clone(&world.disk), IDENTITY, LIMITS);
    assert!(matches!(
        opened.map(|(_, r)| r),
        Err(VolumeError::JournalDamaged {
            fault: Fault::NoSnapshot,
            ..
        })
    ));
}

#[test]
fn a_record_that_recovery_did_not_believe_is_never_believed_later() {
    let mut world = World::new(7);
    world.step(&Op::Store(Change::Written(Extent::new(0, 5))));
    world.step(&Op::Append);
    // The log happens to be written back, the data not.
    super::store::Store::sync(&*world.disk, "log-00000001").unwrap();
    world.durable.clear();
    world.present.here.clear();
    world.step(&Op::Crash { host: true });
    for start in 0..3 {
        world.step(&Op::Store(Change::Written(Extent::new(100 + start, 1))));
        world.step(&Op::Append);
        for _ in 0..4 {
            world.step(&Op::Barrier);
        }
    }
    world.step(&Op::Crash { host: true });
    assert_eq!(
        world.acked.here.keys().copied().collect::<Vec<_>>(),
        [100, 101, 102]
    );
}
