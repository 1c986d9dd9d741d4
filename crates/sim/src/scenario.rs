//! A run before it runs: sizes, rates, the guest, and what will go wrong when. All of it from one seed.

use whimbrel_engine::switchover::Phase;

use crate::link::{Path, Side};
use crate::rng::Rng;

pub const US: u64 = 1_000;
pub const MS: u64 = 1_000 * US;
pub const SECOND: u64 = 1_000 * MS;

/// Something that goes wrong, or that an operator does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// The daemon dies and is started again.
    Crash {
        side: Side,
        down: u64,
    },
    /// The host loses power: daemon, QEMU, and what was not durable.
    PowerCut {
        side: Side,
        down: u64,
    },
    /// Nothing crosses the link for a while; connections live on.
    Outage {
        len: u64,
    },
    /// All connections break.
    Cut,
    /// Reads and writes of the disks fail for a while.
    DiskErrors {
        side: Side,
        len: u64,
    },
    /// The destination's QEMU dies.
    QemuDies,
    /// The destination cannot make ready.
    Refuse,
    /// The destination's QEMU cannot load the device state.
    LoadFails,
    Cancel,
    /// The operator wants the machine back after the grant; swearing, if that is true, that the destination's
    /// QEMU is gone.
    TakeBack {
        lost: bool,
    },
    /// A message of an older migration comes.
    Stray {
        to: Side,
        which: u8,
    },
}

/// Names for the counters, by [`Mishap::kind`].
pub const KINDS: [&str; 16] = [
    "source daemon dies",
    "destination daemon dies",
    "source loses power",
    "destination loses power",
    "outage",
    "connections cut",
    "source disk errors",
    "destination disk errors",
    "destination QEMU dies",
    "cannot make ready",
    "state not loaded",
    "cancel",
    "stray to source",
    "stray to destination",
    "asked back",
    "taken back from a lost host",
];

impl Mishap {
    pub fn kind(&self) -> usize {
        let of = |side: Side, first| first + side.index();
        match *self {
            Mishap::Crash { side, .. } => of(side, 0),
            Mishap::PowerCut { side, .. } => of(side, 2),
            Mishap::Outage { .. } => 4,
            Mishap::Cut => 5,
            Mishap::DiskErrors { side, .. } => of(side, 6),
            Mishap::QemuDies => 8,
            Mishap::Refuse => 9,
            Mishap::LoadFails => 10,
            Mishap::Cancel => 11,
            Mishap::Stray { to, .. } => of(to, 12),
            Mishap::TakeBack { lost } => 14 + usize::from(lost),
        }
    }
}

/// When it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    At(u64),
    /// So long after the source (the destination) first was in a phase.
    Phase(Side, Phase, u64),
    /// Right after so many steps of a side's driver: between two actions.
    Step(Side, u32),
    /// Right before a task of a side's daemon goes on for that time: between two accesses to a disk.
    Task(Side, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    pub when: When,
    pub what: Mishap,
}

/// A run before it runs.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    /// Sectors of each disk.
    pub disks: Vec<u64>,
    /// Pages.
    pub ram: u64,
    /// Of a hundred units, so many are empty at first.
    pub empty: u64,
    /// RAM that the guest only reads goes ahead of the switch.
    pub ahead: bool,
    /// What the guest does not write to of its disks does.
    pub disks_ahead: bool,
    /// The destination tells of copies that it cannot store, instead of breaking the connection.
    pub tells_unstored: bool,
    /// The destination has an older copy of the disks.
    pub seeded: bool,
    /// What the guest does at once.
    pub threads: u32,
    /// Operations of each.
    pub operations: u32,
    pub think: u64,
    /// The guest's requests crowd in one unit after the other.
    pub crowded: bool,
    /// Of a hundred operations, so many are of memory, and of those of disks so many write.
    pub memory: u64,
    pub writes: u64,
    pub path: Path,
    pub pushes: u8,
    pub frame_units: u64,
    /// Longest time of one disk access, and of making something durable.
    pub access: u64,
    pub durable: u64,
    /// Device state needs so many pages before the guest runs.
    pub early: u64,
    /// The operator holds the switch until then.
    pub hold: u64,
    pub mishaps: Vec<Planned>,
}

impl Scenario {
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed, 1);
        let disks = (0..rng.between(1, 2))
            .map(|_| {
                let units = rng.scaled(4, 160);
                // The last unit may be short.
                units * crate::store::SECTORS - rng.pick(&[0, 0, 3])
            })
            .collect();
        let delay = rng.scaled(50 * US, 150 * MS);
        let mut scenario = Scenario {
            seed,
            disks,
            ram: rng.scaled(4, 128),
            empty: rng.pick(&[0, 20, 60]),
            ahead: rng.percent(60),
            disks_ahead: false,
            tells_unstored: false,
            seeded: false,
            threads: rng.between(1, 6) as u32,
            operations: rng.between(10, 60) as u32,
            think: rng.scaled(50 * US, 60 * MS),
            crowded: rng.percent(25),
            memory: rng.pick(&[20, 50, 80]),
            writes: rng.pick(&[20, 50, 90]),
            path: Path {
                ns_per_byte: rng.scaled(1, 800),
                delay,
                jitter: rng.below(delay),
            },
            pushes: rng.pick(&[1, 1, 2]),
            frame_units: rng.scaled(1, 16),
            access: rng.scaled(20 * US, 8 * MS),
            durable: rng.scaled(100 * US, 20 * MS),
            early: rng.below(4),
            hold: if rng.percent(50) {
                0
            } else if rng.percent(20) {
                // Long enough for pages to be cold that were hot.
                rng.between(4 * SECOND, 12 * SECOND)
            } else {
                rng.scaled(MS, 4 * SECOND)
            },
            mishaps: Vec::new(),
        };
        let count = rng.pick(&[0, 1, 1, 2, 2, 3, 4, 6]);
        for _ in 0..count {
            let when = scenario.when(&mut rng);
            let what = mishap(&mut rng);
            scenario.mishaps.push(Planned { when, what });
        }
        if rng.percent(10) {
            // Both sides of the switchover at once: a window of milliseconds that chance seldom meets.
            let wait = rng.below(scenario.durable);
            scenario.durable = 20 * MS;
            scenario.mishaps.push(Planned {
                when: When::Phase(Side::Destination, Phase::Accept, wait),
                what: Mishap::Crash {
                    side: Side::Source,
                    down: rng.scaled(MS, 8 * MS),
                },
            });
        }
        if rng.percent(12) {
            scenario.hold_among_writes(&mut rng);
        }
        scenario.disks_ahead = rng.percent(50);
        scenario.tells_unstored = rng.percent(75);
        scenario.seeded = rng.percent(30);
        scenario
    }

    /// Pages that are written to now and then while the operator holds the switch go ahead several times, some of
    /// them while a connection breaks.
    fn hold_among_writes(&mut self, rng: &mut Rng) {
        self.ahead = true;
        self.pushes = 1;
        self.ram = rng.between(4, 24);
        self.memory = 90;
        self.writes = 90;
        self.think = rng.scaled(50 * MS, 2 * SECOND);
        self.hold = rng.between(6 * SECOND, 16 * SECOND);
        self.path.delay = rng.between(20 * MS, 200 * MS);
        for _ in 0..rng.below(4) {
            self.mishaps.push(Planned {
                when: When::Phase(Side::Source, Phase::Copy, rng.below(self.hold)),
                what: Mishap::Cut,
            });
        }
    }

    fn when(&self, rng: &mut Rng) -> When {
        let side = rng.pick(&[Side::Source, Side::Destination]);
        match rng.below(10) {
            0..2 => When::At(rng.scaled(MS, 20 * SECOND)),
            2 => When::Step(side, rng.between(1, 40) as u32),
            3 => When::Task(side, rng.scaled(1, 300) as u32),
            _ => {
                let phase = rng.pick(match side {
                    Side::Source => &[
                        Phase::Prepare,
                        Phase::Copy,
                        Phase::Quiesce,
                        Phase::Grant,
                        Phase::Grant,
                        Phase::Drain,
                        Phase::Drain,
                        Phase::Complete,
                        Phase::Rewind,
                    ][..],
                    Side::Destination => &[
                        Phase::Prepare,
                        Phase::Copy,
                        Phase::Accept,
                        Phase::Accept,
                        Phase::Drain,
                        Phase::Drain,
                        Phase::Complete,
                        Phase::Cancel,
                    ][..],
                });
                let longest = rng.pick(&[US, MS, 4 * self.path.delay, SECOND]);
                When::Phase(side, phase, rng.below(longest))
            }
        }
    }
}

fn mishap(rng: &mut Rng) -> Mishap {
    let side = rng.pick(&[Side::Source, Side::Destination]);
    let longest = rng.pick(&[10 * MS, 20 * SECOND, 20 * SECOND]);
    let down = rng.scaled(MS, longest);
    match rng.below(34) {
        0..8 => Mishap::Crash { side, down },
        8..13 => Mishap::PowerCut { side, down },
        13..16 => Mishap::Outage {
            len: rng.scaled(MS, 100 * SECOND),
        },
        16..22 => Mishap::Cut,
        22..24 => Mishap::DiskErrors {
            side,
            len: rng.scaled(MS, 2 * SECOND),
        },
        24 => Mishap::QemuDies,
        25 => Mishap::Refuse,
        26 => Mishap::LoadFails,
        27..29 => Mishap::Cancel,
        32..34 => Mishap::TakeBack {
            lost: rng.percent(50),
        },
        _ => Mishap::Stray {
            to: side,
            which: rng.below(8) as u8,
        },
    }
}
