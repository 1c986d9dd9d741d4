//! Work that takes time: the guest's requests at either host, copies being stored, and making things durable.
//!
//! The order of the steps is that of `crates/host/src/disk/filling.rs`. What a task was writing when its daemon
//! died is written in part.

use whimbrel_engine::inflow::{
    Change, FillGrant, FillPlan, Finished, ReadPlan, Ticket, WriteGrant, WritePlan,
};
use whimbrel_engine::space::{Extent, SECTOR, SpaceId};

use crate::faults::DriverFault;
use crate::guest::{Kind, OpId};
use crate::link::{ConnId, Side};
use crate::message::{Message, Units};
use crate::scenario::When;
use crate::store::{SECTORS, Sync, Unit};
use crate::world::{Event, World};

pub type TaskId = u64;

/// A run of units and its content; zeroes without one.
pub type Piece = (Extent, Option<Vec<Unit>>);

pub struct Task {
    pub side: Side,
    pub work: Work,
}

pub enum Work {
    /// A request on a disk that is whole here.
    Plain {
        op: OpId,
    },
    /// A read of a disk that is being filled waits for units, or reads them.
    Read {
        op: OpId,
    },
    /// A write waits for its units to be idle.
    Wait {
        op: OpId,
    },
    Write {
        op: OpId,
        grant: WriteGrant,
    },
    Record {
        op: OpId,
        done: Finished,
    },
    /// A frame that came early.
    Gate {
        units: Units,
        conn: ConnId,
    },
    Fill(Box<Fill>),
    Flush(Box<Flush>),
}

/// A copy being stored.
pub struct Fill {
    space: SpaceId,
    pieces: Vec<Piece>,
    grant: Option<FillGrant>,
    conn: Option<ConnId>,
    /// Pages that the guest does not run on yet, and which may be replaced.
    again: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FlushStage {
    Append,
    Data,
    Log,
}

/// A disk being made durable.
pub struct Flush {
    disk: usize,
    stage: FlushStage,
    records: usize,
    sync: Sync,
    joined: Vec<Waiter>,
}

/// Who waits for a disk to be durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiter {
    Op(OpId),
    /// The verification of the destination's disk.
    Verify,
}

impl World {
    pub fn task(&mut self, side: Side, work: Work) -> TaskId {
        self.next_task += 1;
        self.tasks.insert(self.next_task, Task { side, work });
        self.next_task
    }

    /// A task that goes on after at most so long.
    fn task_within(&mut self, side: Side, longest: u64, work: Work) {
        let task = self.task(side, work);
        let wait = self.chances.of(side).below(longest + 1);
        self.after(wait, Event::Task(task));
    }

    fn fails(&mut self, side: Side) -> bool {
        self.now < self.errors_until[side.index()] && self.chances.of(side).percent(40)
    }

    /// Hands a request of the guest's to the daemon of the host where it runs.
    pub fn submit(&mut self, op: OpId) {
        let Some(request) = self.guest.ops.get(&op) else {
            return;
        };
        if request.submitted {
            return;
        }
        let (kind, disk, sector, len) = (request.kind, request.disk, request.sector, request.len);
        let Some(side) = self.guest.at else { return };
        let served = match side {
            Side::Source => self.src.driver.up && !self.src.frozen,
            Side::Destination => {
                let daemon = &self.dst.daemon;
                self.dst.driver.up && (daemon.open || !daemon.disks.is_empty())
            }
        };
        if !served {
            return;
        }
        self.guest.ops.get_mut(&op).expect("found above").submitted = true;
        if kind == Kind::Flush {
            return self.flush(side, disk, Waiter::Op(op));
        }
        let access = self.scenario.access;
        if side == Side::Source || self.dst.daemon.open {
            return self.task_within(side, access, Work::Plain { op });
        }
        if kind == Kind::Read {
            let units = Extent::touching(sector * SECTOR, len * SECTOR);
            let now = self.now / 1_000;
            match self.dst.daemon.disks[disk].read(units, now) {
                ReadPlan::Ready => self.task_within(side, access, Work::Read { op }),
                ReadPlan::Wait { ticket, demands } => {
                    self.park(SpaceId(disk as u16), ticket, Work::Read { op });
                    self.demand(SpaceId(disk as u16), demands);
                }
            }
            return;
        }
        self.dst.touched = true;
        self.begin_change(op);
    }

    fn park(&mut self, space: SpaceId, ticket: Ticket, work: Work) {
        let task = self.task(Side::Destination, work);
        self.dst.daemon.parked.insert((space, ticket), task);
    }

    fn begin_change(&mut self, op: OpId) {
        let Some(request) = self.guest.ops.get(&op) else {
            return;
        };
        let (kind, disk, sector, len) = (request.kind, request.disk, request.sector, request.len);
        if kind == Kind::Discard && self.has(DriverFault::DiscardLost) {
            return self.task_within(Side::Destination, self.scenario.access, Work::Plain { op });
        }
        match self.dst.daemon.disks[disk].begin_write(sector * SECTOR, len * SECTOR) {
            WritePlan::Go(grant) => {
                let access = self.scenario.access;
                self.task_within(Side::Destination, access, Work::Write { op, grant });
            }
            WritePlan::Wait(ticket) => self.park(SpaceId(disk as u16), ticket, Work::Wait { op }),
        }
    }

    /// A task goes on.
    pub fn go_on(&mut self, id: TaskId) {
        let Some(Task { side, work }) = self.tasks.remove(&id) else {
            return;
        };
        self.steps_of_tasks[side.index()] += 1;
        let steps = self.steps_of_tasks[side.index()];
        self.arm_for(|when| {
            matches!(when, When::Task(s, n) if s == side && n == steps).then_some(0)
        });
        match work {
            Work::Plain { op } => {
                if self.fails(side) {
                    return self.again(op);
                }
                self.apply(side, op, 100);
                self.acknowledge(op, side);
            }
            Work::Read { op } => {
                if self.fails(side) {
                    return self.again(op);
                }
                self.acknowledge(op, side);
            }
            Work::Wait { op } => self.begin_change(op),
            Work::Write { op, grant } => self.written(op, grant),
            Work::Record { op, done } => self.recorded(op, done),
            Work::Gate { units, conn } => {
                self.tasks.insert(
                    id,
                    Task {
                        side,
                        work: Work::Gate { units, conn },
                    },
                );
            }
            Work::Fill(fill) => self.fill_goes_on(*fill),
            Work::Flush(flush) => self.flush_goes_on(side, *flush),
        }
    }

    /// A request failed: QEMU makes it again.
    fn again(&mut self, op: OpId) {
        if self.guest.dead {
            self.guest.ops.remove(&op);
            return;
        }
        self.coverage
            .deed("a request of the guest failed and was made again");
        if let Some(request) = self.guest.ops.get_mut(&op) {
            request.submitted = false;
            self.after(50_000_000, Event::Again(op));
        }
    }

    /// Writes what a request writes; if not all, then so many of a hundred sectors.
    fn apply(&mut self, side: Side, op: OpId, percent: u64) {
        let Some(request) = self.guest.ops.get(&op) else {
            return;
        };
        if !matches!(request.kind, Kind::Write | Kind::Discard) {
            return;
        }
        let (disk, sectors, version) = (
            request.disk,
            request.sector..request.sector + request.len,
            request.version,
        );
        if side == Side::Source && self.src.frozen {
            self.broken("fence", "the guest writes to a frozen disk");
        }
        if side == Side::Source {
            self.note_change(disk, sectors.start, sectors.end - sectors.start);
        }
        let stores = match side {
            Side::Source => &mut self.src.stores,
            Side::Destination => &mut self.dst.stores,
        };
        for sector in sectors {
            if percent == 100 || self.chances.mishap.percent(percent) {
                stores[disk].write(sector, version);
            }
        }
    }

    fn written(&mut self, op: OpId, grant: WriteGrant) {
        let Some(disk) = self.guest.disk_of(op) else {
            return;
        };
        let ok = !self.fails(Side::Destination);
        self.apply(Side::Destination, op, if ok { 100 } else { 50 });
        let done = self.dst.daemon.disks[disk].end_write(grant, ok);
        let space = SpaceId(disk as u16);
        self.wake(space, &done);
        if !ok {
            return self.again(op);
        }
        if done.changes.is_empty() {
            self.forget(space, done.forget);
            return self.acknowledge(op, Side::Destination);
        }
        let wait = self.scenario.access / 2;
        if self.has(DriverFault::WriteBeforeRecord) {
            self.acknowledge(op, Side::Destination);
        }
        self.task_within(Side::Destination, wait, Work::Record { op, done });
    }

    fn recorded(&mut self, op: OpId, done: Finished) {
        let disk = match self.guest.disk_of(op) {
            Some(disk) => disk,
            None => return,
        };
        self.dst.residency[disk].append(&done.changes);
        self.dst.daemon.disks[disk].journalled(&done.changes);
        self.forget(SpaceId(disk as u16), done.forget);
        self.acknowledge(op, Side::Destination);
    }

    fn wake(&mut self, space: SpaceId, done: &Finished) {
        for &ticket in &done.wake {
            if let Some(task) = self.dst.daemon.parked.remove(&(space, ticket)) {
                let read = self
                    .tasks
                    .get(&task)
                    .is_some_and(|t| matches!(t.work, Work::Read { .. }));
                let longest = if read { self.scenario.access } else { 1_000 };
                let wait = self.chances.destination.below(longest + 1);
                self.after(wait, Event::Task(task));
            }
        }
        self.disk_progress();
    }

    // ---- copies ----

    /// Stores content that came.
    pub fn fill(&mut self, space: SpaceId, mut pieces: Vec<Piece>, conn: Option<ConnId>) {
        pieces.reverse();
        self.fill_piece(Fill {
            space,
            pieces,
            grant: None,
            conn,
            again: space == self.ram_space() && !self.dst.daemon.evicted,
        });
    }

    /// The next piece, or the end.
    fn fill_piece(&mut self, mut fill: Fill) {
        let space = fill.space;
        let now = self.now / 1_000;
        while let Some((run, content)) = fill.pieces.last() {
            let run = *run;
            let is_disk = space != self.ram_space();
            // A file that was made just now reads as zeroes where nobody wrote. One of before a restart may hold
            // what no record tells of.
            let fresh = self.dst.daemon.fresh || self.has(DriverFault::DoubtForgotten);
            let zeroes = is_disk && content.is_none() && fresh && !self.is_trodden(space, run);
            let Some(target) = self.space_in(space) else {
                break;
            };
            if zeroes {
                let done = target.zeroes(run, now);
                fill.pieces.pop();
                self.wake(space, &done);
                self.dst.residency[usize::from(space.0)]
                    .lazy
                    .extend(&done.changes);
                continue;
            }
            if fill.again {
                let content = content.clone();
                self.replace(run, content);
            }
            let Some(target) = self.space_in(space) else {
                break;
            };
            match target.begin_fill(run) {
                FillPlan::Go(grant) => {
                    if grant.late > 0 {
                        self.coverage.deed("copies that came late");
                    }
                    if !grant.merge.is_empty() {
                        self.coverage
                            .deed("copies merged with sectors of the guest's");
                    }
                    if is_disk {
                        self.tread(space, &grant.store);
                    }
                    fill.grant = Some(grant);
                    let access = self.scenario.access;
                    let work = Work::Fill(Box::new(fill));
                    return self.task_within(Side::Destination, access, work);
                }
                FillPlan::Wait(ticket) => {
                    return self.park(space, ticket, Work::Fill(Box::new(fill)));
                }
            }
        }
        self.fill_ended(fill, true);
    }

    fn fill_ended(&mut self, fill: Fill, ok: bool) {
        match (fill.conn, self.dst.daemon.life.as_ref().map(|life| life.id)) {
            (Some(conn), _) => self.frame_done(conn, ok),
            // Zeroes that could not be stored end the connection that told of them.
            (None, Some(life)) if !ok => self.destination_life_ended(life),
            (None, _) => {}
        }
        self.idle_yet();
    }

    fn fill_goes_on(&mut self, mut fill: Fill) {
        let Some(grant) = fill.grant.take() else {
            return self.fill_piece(fill);
        };
        let space = fill.space;
        let is_ram = space == self.ram_space();
        let ok = is_ram || !self.fails(Side::Destination);
        let piece = fill.pieces.pop().expect("the piece that was granted");
        if !fill.again {
            self.store(space, &grant, &piece, if ok { 100 } else { 50 });
        }
        let now = self.now / 1_000;
        let Some(target) = self.space_in(space) else {
            return self.fill_ended(fill, true);
        };
        let done = target.end_fill(grant, ok, now);
        self.wake(space, &done);
        if is_ram {
            self.pages_arrived();
        } else if !self.dst.daemon.ahead.pending || self.has(DriverFault::RecordedAhead) {
            self.dst.residency[usize::from(space.0)]
                .lazy
                .extend(&done.changes);
        }
        if ok || self.is_told_unstored(space, piece.0) {
            self.fill_piece(fill);
        } else {
            self.fill_ended(fill, false);
        }
    }

    /// A copy could not be stored: who waits for it fails. Whether the source has been told; if not, the connection
    /// is to break.
    fn is_told_unstored(&mut self, space: SpaceId, run: Extent) -> bool {
        if self.dst.daemon.ahead.pending {
            return false;
        }
        let target = self.space_in(space);
        for ticket in target.map(|t| t.give_up(run)).unwrap_or_default() {
            if let Some(task) = self.dst.daemon.parked.remove(&(space, ticket))
                && let Some(Task {
                    work: Work::Read { op },
                    ..
                }) = self.tasks.remove(&task)
            {
                self.coverage.deed("reads of what could not be stored");
                self.again(op);
            }
        }
        let told = self.scenario.tells_unstored && self.dst.daemon.link_up;
        if told {
            self.coverage.deed("copies that could not be stored");
            let runs = vec![run];
            self.destination_says(Message::Unstored { space, runs });
        }
        told
    }

    /// Puts a copy where it belongs; if not all, then so many of a hundred units.
    fn store(&mut self, space: SpaceId, grant: &FillGrant, piece: &Piece, percent: u64) {
        let (run, content) = piece;
        let of = |unit: u64| match content {
            Some(content) => content[(unit - run.start) as usize],
            None => [0; SECTORS as usize],
        };
        let whole = grant
            .store
            .iter()
            .flat_map(Extent::iter)
            .map(|unit| (unit, 0));
        let all: Vec<(u64, u8)> = whole.chain(grant.merge.iter().copied()).collect();
        for (unit, keep) in all {
            if percent < 100 && !self.chances.mishap.percent(percent) {
                continue;
            }
            if space == self.ram_space() {
                self.place(unit, of(unit)[0]);
                continue;
            }
            let store = &mut self.dst.stores[usize::from(space.0)];
            for bit in 0..SECTORS {
                let sector = unit * SECTORS + bit;
                if sector < store.sectors() && keep >> bit & 1 == 0 {
                    store.write(sector, of(unit)[bit as usize]);
                }
            }
        }
    }

    fn place(&mut self, page: u64, version: u32) {
        if self.dst.daemon.sated || self.dst.qemu.state == crate::destination::QemuState::Gone {
            return;
        }
        if self.dst.qemu.placed[page as usize]
            .replace(version)
            .is_some()
        {
            self.broken("placed once", format!("page {page} is placed twice"));
        }
        self.dst.qemu.wanted.remove(&page);
    }

    /// Gives pages to a QEMU that does not run yet, over what it may have of them.
    fn replace(&mut self, run: Extent, content: Option<Vec<[u32; SECTORS as usize]>>) {
        if self.dst.daemon.sated || self.dst.qemu.state == crate::destination::QemuState::Gone {
            return;
        }
        if self.dst.qemu.state != crate::destination::QemuState::Waiting {
            self.broken("placed once", format!("pages {run} may have run already"));
        }
        for unit in run.iter() {
            let version = match &content {
                Some(content) => content[(unit - run.start) as usize][0],
                None => 0,
            };
            self.dst.qemu.placed[unit as usize] = Some(version);
        }
    }

    fn pages_arrived(&mut self) {
        if self.dst.qemu.state == crate::destination::QemuState::Loading && self.dst.daemon.ram_gate
        {
            self.after(1_000, Event::QemuLoads);
        }
        self.wake_page_waiters();
        self.ram_progress();
    }

    // ---- durability ----

    /// Makes a disk durable, and then tells who waits. Who comes while that is under way waits for the next.
    pub fn flush(&mut self, side: Side, disk: usize, waiter: Waiter) {
        let running = self
            .tasks
            .values()
            .any(|t| matches!(&t.work, Work::Flush(flush) if t.side == side && flush.disk == disk));
        self.guest.flushing[side.index()].push((disk, waiter));
        if !running {
            self.begin_flush(side, disk);
        }
    }

    fn begin_flush(&mut self, side: Side, disk: usize) {
        let waiting = &mut self.guest.flushing[side.index()];
        let joined: Vec<Waiter> = waiting
            .iter()
            .filter(|w| w.0 == disk)
            .map(|w| w.1)
            .collect();
        waiting.retain(|w| w.0 != disk);
        if joined.is_empty() {
            return;
        }
        let flush = Flush {
            disk,
            stage: FlushStage::Append,
            records: 0,
            sync: Sync::new(),
            joined,
        };
        let wait = self.scenario.access / 2;
        self.task_within(side, wait, Work::Flush(Box::new(flush)));
    }

    fn flush_goes_on(&mut self, side: Side, mut flush: Flush) {
        let disk = flush.disk;
        let journal = side == Side::Destination && !self.dst.daemon.open;
        match flush.stage {
            FlushStage::Append => {
                if journal {
                    self.dst.residency[disk].append(&[]);
                    flush.records = self.dst.residency[disk].records();
                    if self.has(DriverFault::ResidencyBeforeData) {
                        self.dst.residency[disk].barrier_durable(flush.records);
                    }
                }
                flush.sync = match side {
                    Side::Source => self.src.stores[disk].sync_begin(),
                    Side::Destination => self.dst.stores[disk].sync_begin(),
                };
                flush.stage = FlushStage::Data;
                let durable = self.scenario.durable;
                return self.task_within(side, durable, Work::Flush(Box::new(flush)));
            }
            FlushStage::Data => {
                let sync = std::mem::take(&mut flush.sync);
                match side {
                    Side::Source => self.src.stores[disk].sync_end(sync),
                    Side::Destination => self.dst.stores[disk].sync_end(sync),
                }
                if journal && !self.has(DriverFault::FlushBeforeResidency) {
                    self.dst.residency[disk].barrier_written(flush.records);
                    flush.stage = FlushStage::Log;
                    let durable = self.scenario.durable;
                    return self.task_within(side, durable, Work::Flush(Box::new(flush)));
                }
            }
            FlushStage::Log => self.dst.residency[disk].barrier_durable(flush.records),
        }
        for waiter in flush.joined {
            match waiter {
                Waiter::Op(op) => self.acknowledge(op, side),
                Waiter::Verify => {
                    let daemon = self.dst.driver.daemon;
                    self.after(0, Event::AskDigest(daemon, disk));
                }
            }
        }
        self.begin_flush(side, disk);
    }

    // ---- ends ----

    /// The daemon of a side has died: what its tasks were writing is written in part.
    pub fn lose_tasks(&mut self, side: Side) {
        let lost: Vec<TaskId> = self
            .tasks
            .iter()
            .filter(|(_, t)| t.side == side)
            .map(|(&id, _)| id)
            .collect();
        for id in lost {
            let Some(task) = self.tasks.remove(&id) else {
                continue;
            };
            let percent = self.chances.mishap.pick(&[0, 50, 100]);
            match task.work {
                Work::Plain { op } | Work::Write { op, .. } if percent > 0 => {
                    self.apply(side, op, percent);
                }
                Work::Record { op, done } => {
                    let kept = self.chances.mishap.below(done.changes.len() as u64 + 1) as usize;
                    if let Some(disk) = self.guest.disk_of(op) {
                        self.append_torn(disk, &done.changes[..kept]);
                    }
                }
                Work::Fill(fill) => {
                    if let (Some(grant), Some(piece), true) =
                        (&fill.grant, fill.pieces.last(), percent > 0 && !fill.again)
                    {
                        self.store(fill.space, grant, piece, percent);
                    }
                }
                _ => {}
            }
        }
        self.guest.flushing[side.index()].clear();
        if self.guest.dead && (side == Side::Destination) == self.guest.ran_there {
            self.guest.ops.clear();
        }
        if self.guest.at == Some(side) {
            for op in self.guest.ops.values_mut() {
                op.submitted = false;
            }
        }
        if side == Side::Destination {
            self.wake_page_waiters();
        }
    }

    fn append_torn(&mut self, disk: usize, changes: &[Change]) {
        if !changes.is_empty() {
            self.dst.residency[disk].append(changes);
        }
    }

    /// What was to be stored here is thrown away with the volumes.
    pub fn drop_destination_tasks(&mut self) {
        self.tasks.retain(|_, task| task.side != Side::Destination);
        self.dst.daemon.parked.clear();
        self.guest.flushing[Side::Destination.index()].clear();
        self.idle_yet();
    }
}
