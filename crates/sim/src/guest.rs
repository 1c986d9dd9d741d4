//! The guest: threads that read, write, discard and flush disks and touch memory, and that know what to expect.

use std::collections::BTreeMap;

use crate::destination::QemuState;
use crate::filling::Waiter;
use crate::link::Side;
use crate::memory::SourceState;
use crate::oracle::Oracle;
use crate::scenario::Scenario;
use crate::source::SourceHost;
use crate::store::SECTORS;
use crate::world::{Event, World};

pub type OpId = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Discard,
    Flush,
}

/// A request on a disk.
#[derive(Clone, Debug)]
pub struct Op {
    thread: usize,
    pub kind: Kind,
    pub disk: usize,
    pub sector: u64,
    pub len: u64,
    pub version: u32,
    /// Writes that had been acknowledged when it was made.
    acknowledged: u64,
    /// With a daemon.
    pub submitted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Until its next deed.
    Thinking,
    /// The guest does not run.
    Asleep,
    Disk,
    /// Waits for a page, to write it or to read it.
    Page {
        page: u64,
        write: bool,
    },
    Done,
}

pub struct Guest {
    /// Where it runs.
    pub at: Option<Side>,
    pub dead: bool,
    pub ran_there: bool,
    pub threads: Vec<Thread>,
    left: Vec<u32>,
    pub ops: BTreeMap<OpId, Op>,
    next_op: OpId,
    pub oracles: Vec<Oracle>,
    /// What each page holds.
    pub memory: Vec<u32>,
    acknowledged: u64,
    next_version: u32,
    /// By side: disks to be made durable, and for whom.
    pub flushing: [Vec<(usize, Waiter)>; 2],
}

impl Guest {
    pub fn new(scenario: &Scenario, source: &SourceHost) -> Self {
        let oracle = |store: &crate::store::Store| {
            let content: Vec<u32> = (0..store.sectors()).map(|s| store.read(s)).collect();
            Oracle::new(&content)
        };
        Guest {
            at: Some(Side::Source),
            dead: false,
            ran_there: false,
            threads: vec![Thread::Thinking; scenario.threads as usize],
            left: vec![scenario.operations; scenario.threads as usize],
            ops: BTreeMap::new(),
            next_op: 0,
            oracles: source.stores.iter().map(oracle).collect(),
            memory: source.qemu.memory.clone(),
            acknowledged: 0,
            next_version: 1_000_000,
            flushing: [Vec::new(), Vec::new()],
        }
    }

    pub fn runs_at(&self, side: Side) -> bool {
        self.at == Some(side)
    }

    pub fn disk_of(&self, op: OpId) -> Option<usize> {
        self.ops.get(&op).map(|op| op.disk)
    }

    pub fn disk_requests(&self) -> usize {
        self.ops.len()
    }

    /// A disk was flushed with nothing under way.
    pub fn flushed_all(&mut self, disk: usize) {
        self.oracles[disk].flushed(self.acknowledged);
    }

    fn overlaps(&self, disk: usize, sector: u64, len: u64) -> bool {
        self.ops.values().any(|op| {
            op.disk == disk
                && op.kind != Kind::Flush
                && op.sector < sector + len
                && sector < op.sector + op.len
        })
    }

    fn writes_under_way(&self, disk: usize) -> Vec<(u64, u32)> {
        let writes = self.ops.values().filter(|op| op.disk == disk);
        let writes = writes.filter(|op| matches!(op.kind, Kind::Write | Kind::Discard));
        writes
            .flat_map(|op| (op.sector..op.sector + op.len).map(|s| (s, op.version)))
            .collect()
    }
}

impl World {
    /// A thread does the next thing.
    pub fn think(&mut self, thread: usize) {
        if self.guest.threads[thread] != Thread::Thinking {
            return;
        }
        let runs = match self.guest.at {
            Some(Side::Source) => self.src.qemu.state == SourceState::Running,
            Some(Side::Destination) => self.dst.qemu.state == QemuState::Running,
            None => false,
        };
        if self.guest.dead || self.guest.left[thread] == 0 {
            self.guest.threads[thread] = Thread::Done;
            return;
        }
        // Half of what it does it does after the move, if there is one.
        let moving = self.guest.at == Some(Side::Source)
            && self.src.daemon.session
            && self.src.daemon.over.is_none()
            && !self.src.switch.phase().is_final();
        let rests = moving && self.guest.left[thread] <= self.scenario.operations / 2;
        if !runs || rests {
            self.guest.threads[thread] = Thread::Asleep;
            return;
        }
        self.guest.left[thread] -= 1;
        if self.chances.guest.percent(self.scenario.memory) {
            // Some pages are read only, as programs are.
            let page = self.chances.guest.zipf(self.scenario.ram);
            let write = !page.is_multiple_of(3) && self.chances.guest.percent(50);
            self.touch(thread, page, write);
        } else {
            self.request(thread);
        }
    }

    fn think_again(&mut self, thread: usize) {
        self.guest.threads[thread] = Thread::Thinking;
        let wait = self.chances.guest.below(self.scenario.think + 1);
        self.after(wait, Event::Think(thread));
    }

    fn touch(&mut self, thread: usize, page: u64, write: bool) {
        let at = page as usize;
        self.guest.next_version += 1;
        let version = self.guest.next_version;
        let seen = match self.guest.at {
            Some(Side::Source) => Some(self.src.qemu.memory[at]),
            _ => self.dst.qemu.placed[at],
        };
        let Some(seen) = seen else {
            self.guest.threads[thread] = Thread::Page { page, write };
            self.coverage.deed("pages the guest waited for");
            return self.page_wanted(page);
        };
        if seen != self.guest.memory[at] {
            let expected = self.guest.memory[at];
            self.broken("reads", format!("page {page} holds {seen}, not {expected}"));
        }
        if write {
            self.guest.memory[at] = version;
            match self.guest.at {
                Some(Side::Source) => {
                    self.src.qemu.memory[at] = version;
                    self.src
                        .qemu
                        .dirty
                        .insert(whimbrel_engine::space::Extent::unit(page));
                }
                _ => self.dst.qemu.placed[at] = Some(version),
            }
        }
        self.think_again(thread);
    }

    /// Threads whose page is there go on.
    pub fn wake_page_waiters(&mut self) {
        if self.guest.at != Some(Side::Destination) {
            return;
        }
        for thread in 0..self.guest.threads.len() {
            if let Thread::Page { page, write } = self.guest.threads[thread]
                && self.dst.qemu.placed[page as usize].is_some()
            {
                self.guest.threads[thread] = Thread::Thinking;
                self.touch(thread, page, write);
            }
        }
    }

    fn request(&mut self, thread: usize) {
        let rng = &mut self.chances.guest;
        let disk = rng.below(self.scenario.disks.len() as u64) as usize;
        let sectors = self.scenario.disks[disk];
        let kind = match rng.below(100) {
            n if n < self.scenario.writes => match rng.below(8) {
                0 => Kind::Discard,
                1 => Kind::Flush,
                _ => Kind::Write,
            },
            _ => Kind::Read,
        };
        let hot = rng.zipf(sectors.div_ceil(SECTORS)) * SECTORS;
        let (sector, len) = match (kind, rng.below(3)) {
            (Kind::Flush, _) => (0, 0),
            // Unit after unit, each by several threads at once.
            (Kind::Read | Kind::Write, _) if self.scenario.crowded => {
                let unit = self.guest.next_op / 3 % sectors.div_ceil(SECTORS);
                (unit * SECTORS + rng.below(SECTORS), rng.between(1, 2))
            }
            (Kind::Discard, _) | (_, 0) => (hot, SECTORS * rng.between(1, 3)),
            (_, 1) => (hot + rng.below(SECTORS), rng.between(1, 7)),
            (_, _) => (rng.below(sectors), rng.between(1, 4 * SECTORS)),
        };
        let sector = sector.min(sectors - 1);
        let mut len = len.min(sectors - sector);
        if kind == Kind::Discard {
            len = len / SECTORS * SECTORS;
        }
        if (kind != Kind::Flush && len == 0) || self.guest.overlaps(disk, sector, len) {
            return self.think_again(thread);
        }
        self.guest.next_version += 1;
        self.guest.next_op += 1;
        let op = self.guest.next_op;
        let version = if kind == Kind::Discard {
            0
        } else {
            self.guest.next_version
        };
        let request = Op {
            thread,
            kind,
            disk,
            sector,
            len,
            version,
            acknowledged: self.guest.acknowledged,
            submitted: false,
        };
        self.note(|| format!("guest: request {op}: {request:?}"));
        self.guest.ops.insert(op, request);
        self.guest.threads[thread] = Thread::Disk;
        self.submit(op);
    }

    /// A request is answered: the guest compares what it reads, and counts on what it wrote.
    pub fn acknowledge(&mut self, op: OpId, side: Side) {
        let Some(request) = self.guest.ops.remove(&op) else {
            return;
        };
        if self.guest.dead {
            return;
        }
        let disk = request.disk;
        self.note(|| format!("guest: request {op} is answered"));
        let sectors = request.sector..request.sector + request.len;
        match request.kind {
            Kind::Read => {
                for sector in sectors {
                    let seen = match side {
                        Side::Source => self.src.stores[disk].read(sector),
                        Side::Destination => self.dst.stores[disk].read(sector),
                    };
                    self.check_sector(disk, sector, seen);
                }
            }
            Kind::Write | Kind::Discard => {
                self.guest.acknowledged += 1;
                let count = self.guest.acknowledged;
                for sector in sectors {
                    self.guest.oracles[disk].wrote(sector, request.version, count);
                }
            }
            Kind::Flush => self.guest.oracles[disk].flushed(request.acknowledged),
        }
        self.think_again(request.thread);
        if self.guest.ops.is_empty() {
            self.requests_finished();
        }
    }

    pub fn check_sector(&mut self, disk: usize, sector: u64, seen: u32) {
        let oracle = &mut self.guest.oracles[disk];
        if !oracle.read(sector, seen) {
            let expected = oracle.expected(sector);
            self.broken(
                "reads",
                format!("sector {sector} of disk {disk} holds {seen}, not {expected}"),
            );
        }
    }

    /// The guest runs: its threads go on.
    pub fn wake_guest(&mut self) {
        for thread in 0..self.guest.threads.len() {
            if self.guest.threads[thread] == Thread::Asleep {
                self.think_again(thread);
            }
        }
    }

    /// Requests that no daemon has are made again.
    pub fn submit_all(&mut self) {
        let ops: Vec<OpId> = self.guest.ops.keys().copied().collect();
        for op in ops {
            self.submit(op);
        }
    }

    /// The guest is again what it was at the switchover, if the source's QEMU is there, and its disks are: what
    /// it did since is given up.
    pub fn rewind_guest(&mut self) {
        self.note(|| "the guest is set back to the switchover".into());
        self.coverage.deed("a guest was set back to the switchover");
        let then = Guest::new(&self.scenario, &self.src);
        self.guest.dead = !self.src.qemu.is_there();
        self.guest.ran_there = false;
        self.guest.at = None;
        self.guest.oracles = then.oracles;
        self.guest.memory = then.memory;
        self.guest.ops.clear();
        let idle = if self.guest.dead {
            Thread::Done
        } else {
            Thread::Asleep
        };
        self.guest.threads.fill(idle);
    }

    /// The guest's QEMU has ended; with the whole host, if it lost power.
    pub fn guest_dies(&mut self, power: bool) {
        self.note(|| "the guest is gone".into());
        self.coverage
            .deed("the guest was lost with its host or its QEMU");
        for disk in 0..self.guest.oracles.len() {
            let under_way = self.guest.writes_under_way(disk);
            if power {
                self.guest.oracles[disk].power_cut(under_way.into_iter());
            } else {
                self.guest.oracles[disk].abandoned(under_way.into_iter());
            }
        }
        self.guest.dead = true;
        self.guest.at = None;
        self.guest.threads.fill(Thread::Done);
        // What a daemon has it goes on with; the answers go nowhere.
        self.guest.ops.retain(|_, op| op.submitted && !power);
    }
}
