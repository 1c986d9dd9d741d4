//! Two hosts, a link and a guest, on virtual time.
//!
//! One queue of events, ordered by time and then by the order in which they were made, drives everything; no
//! clock and no thread is involved, so a seed always gives the same run. An event of a daemon carries the
//! number of the daemon's life and is void in the next.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};

use whimbrel_engine::outflow::Batch;
use whimbrel_engine::switchover::{Epoch, Phase};

use crate::coverage::Coverage;
use crate::destination::DestinationHost;
use crate::faults::DriverFault;
use crate::filling::{Task, TaskId};
use crate::guest::{Guest, OpId};
use crate::link::{ConnId, LifeId, Link, Side};
use crate::message::Message;
use crate::rng::Rng;
use crate::scenario::{SECOND, Scenario, When};
use crate::source::SourceHost;

/// Something that happens at a time. Numbers named `daemon` are lives of a daemon.
#[derive(Debug)]
pub enum Event {
    /// A side's driver goes on.
    Step(Side, u32),
    /// A side's driver looks at the time.
    Tick(Side, u32),
    Arrive(ConnId, Side),
    /// A side notices that a life of the session is over.
    Notice(LifeId, Side),
    Dial(u32),
    Dialled(LifeId, u32),
    Door(LifeId),
    PushReady(ConnId),
    PushDoor(ConnId),
    /// A push connection has room.
    PushRoom(ConnId),
    /// A batch was read at the source.
    Loaded(ConnId, Batch, Vec<crate::store::Unit>),
    /// A task of a side's daemon goes on.
    Task(TaskId),
    /// A thread of the guest does the next thing.
    Think(usize),
    /// A request of the guest that could not be served is made again.
    Again(OpId),
    /// QEMU delivers memory to the source's daemon.
    RamPass(u32),
    /// The source's QEMU has finished its requests and stops.
    Stopped(u32),
    /// The destination's QEMU goes on.
    QemuLoads,
    Mishap(usize),
    Restart(Side),
    /// The operator lets the switch happen.
    EndHold,
    PersonEndsGuest,
    /// The destination asks again for a digest that was not answered.
    AskDigest(u32, usize),
}

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub rule: &'static str,
    pub what: String,
}

struct Queued(u64, u64, Event);

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Queued {}

impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// Streams of chance.
pub struct Chances {
    pub link: Rng,
    pub source: Rng,
    pub destination: Rng,
    pub guest: Rng,
    pub mishap: Rng,
}

impl Chances {
    pub fn of(&mut self, side: Side) -> &mut Rng {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }
}

pub struct World {
    pub now: u64,
    pub scenario: Scenario,
    pub fault: Option<DriverFault>,
    pub chances: Chances,
    pub link: Link,
    pub src: SourceHost,
    pub dst: DestinationHost,
    pub guest: Guest,
    pub tasks: BTreeMap<TaskId, Task>,
    pub next_task: TaskId,
    pub coverage: Coverage,
    pub violation: Option<Violation>,
    pub trace: Option<Vec<String>>,
    /// Phases that a side has been in, for mishaps that wait for one.
    pub seen: BTreeSet<(Side, Phase)>,
    pub armed: BTreeSet<usize>,
    pub steps_of_tasks: [u32; 2],
    /// The epoch that a source has durably promised.
    pub promised: Epoch,
    /// The highest epoch under which a guest was let run.
    pub highest: Epoch,
    /// Disk accesses fail until then, by side.
    pub errors_until: [u64; 2],
    /// The last time at which something went wrong, or was put right again.
    pub last_mishap: u64,
    queue: BinaryHeap<Reverse<Queued>>,
    made: u64,
    pub events: u64,
}

/// A run that has not ended so long after its last mishap never will.
pub const FAIR: u64 = 400 * SECOND;

/// How long a kernel tries to deliver what a closed connection still held.
const KERNEL_GOES_ON: u64 = 60 * SECOND;

/// More events than any run needs.
const MOST_EVENTS: u64 = 2_000_000;

impl World {
    pub fn new(scenario: Scenario, fault: Option<DriverFault>, traced: bool) -> Self {
        let stream = |n| Rng::new(scenario.seed, n);
        let mut chances = Chances {
            link: stream(2),
            source: stream(3),
            destination: stream(4),
            guest: stream(5),
            mishap: stream(6),
        };
        let src = SourceHost::new(&scenario, &mut chances.guest);
        let guest = Guest::new(&scenario, &src);
        World {
            now: 0,
            link: Link::new(scenario.path),
            dst: DestinationHost::new(&scenario),
            src,
            guest,
            scenario,
            fault,
            chances,
            tasks: BTreeMap::new(),
            next_task: 0,
            coverage: Coverage::default(),
            violation: None,
            trace: traced.then(Vec::new),
            seen: BTreeSet::new(),
            armed: BTreeSet::new(),
            steps_of_tasks: [0; 2],
            promised: Epoch(0),
            highest: Epoch(0),
            errors_until: [0; 2],
            last_mishap: 0,
            queue: BinaryHeap::new(),
            made: 0,
            events: 0,
        }
    }

    pub fn at(&mut self, time: u64, event: Event) {
        self.made += 1;
        self.queue
            .push(Reverse(Queued(time.max(self.now), self.made, event)));
    }

    pub fn after(&mut self, wait: u64, event: Event) {
        self.at(self.now + wait, event);
    }

    /// A line of the trace, if there is one.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let ms = self.now as f64 / 1e6;
            trace.push(format!("{ms:>12.3} ms  {}", line()));
        }
    }

    pub fn broken(&mut self, rule: &'static str, what: impl Into<String>) {
        let what = what.into();
        self.note(|| format!("BROKEN {rule}: {what}"));
        if self.violation.is_none() {
            self.violation = Some(Violation { rule, what });
        }
    }

    pub fn has(&self, fault: DriverFault) -> bool {
        self.fault == Some(fault)
    }

    /// Runs until nothing happens any more, or a promise is broken.
    pub fn run(&mut self) {
        self.begin();
        while self.violation.is_none() {
            let Some(Reverse(Queued(time, _, event))) = self.queue.pop() else {
                break;
            };
            self.now = time;
            self.events += 1;
            if self.events > MOST_EVENTS {
                self.broken("ends", "the run goes on for ever");
                break;
            }
            // A state that waits for a person lasts for ever.
            let fair = if self.waits_for_person() {
                FAIR / 10
            } else {
                FAIR
            };
            if self.now > self.last_mishap.max(20 * SECOND) + fair {
                break;
            }
            self.handle(event);
        }
        if self.violation.is_none() {
            self.verdict();
        }
    }

    fn begin(&mut self) {
        for thread in 0..self.guest.threads.len() {
            let wait = self.chances.guest.below(self.scenario.think);
            self.after(wait, Event::Think(thread));
        }
        for n in 0..self.scenario.mishaps.len() {
            if let When::At(time) = self.scenario.mishaps[n].when {
                self.at(time, Event::Mishap(n));
            }
        }
        self.begin_source();
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Step(side, daemon) => self.step(side, daemon),
            Event::Tick(side, daemon) => self.tick(side, daemon),
            Event::Arrive(conn, from) => self.arrive(conn, from),
            Event::Notice(life, side) => self.notice(life, side),
            Event::Dial(daemon) => self.dial(daemon),
            Event::Dialled(life, daemon) => self.dialled(life, daemon),
            Event::Door(life) => self.door(life),
            Event::PushReady(conn) => self.push_ready(conn),
            Event::PushDoor(conn) => self.push_door(conn),
            Event::PushRoom(conn) => self.push_room(conn),
            Event::Loaded(conn, batch, content) => self.loaded(conn, batch, content),
            Event::Task(task) => self.go_on(task),
            Event::Think(thread) => self.think(thread),
            Event::Again(op) => self.submit(op),
            Event::RamPass(daemon) => self.ram_pass(daemon),
            Event::Stopped(daemon) => self.stopped(daemon),
            Event::QemuLoads => self.qemu_loads(),
            Event::Mishap(n) => self.mishap(n),
            Event::Restart(side) => self.restart(side),
            Event::EndHold => self.tell_source(crate::source::SourceInbox::Switch),
            Event::PersonEndsGuest => self.person_ends_guest(),
            Event::AskDigest(daemon, disk) => self.ask_digest(daemon, disk),
        }
    }

    fn arrive(&mut self, conn: ConnId, from: Side) {
        if self.link.is_out(self.now) {
            let until = self.link.outage_until;
            return self.at(until, Event::Arrive(conn, from));
        }
        if self.link.arrive(conn, from, self.now).is_some() {
            match (from.other(), conn.lane) {
                (Side::Source, _) => self.hear_source(conn.life),
                (Side::Destination, 0) => self.hear_control(),
                (Side::Destination, _) => self.hear_push(conn),
            }
        }
    }

    /// Says something on a connection; when the wire is free again.
    pub fn send(&mut self, conn: ConnId, from: Side, message: Message) -> u64 {
        let (now, rng) = (self.now, &mut self.chances.link);
        match self.link.send(conn, from, message, now, rng) {
            Some((arrival, free)) => {
                self.at(arrival, Event::Arrive(conn, from));
                free
            }
            None => now,
        }
    }

    /// A side closes a life that it has given up, in good order or by dying.
    pub fn close(&mut self, life: LifeId, side: Side, abruptly: bool) {
        if self.link.has_ended(life, side) {
            return;
        }
        self.link.end(life, side);
        // A kernel goes on with what it was given before the end, if it can.
        let begin = self
            .now
            .max(self.link.outage_until.min(self.now + KERNEL_GOES_ON));
        let mut until = self
            .link
            .last_arrival(life, side)
            .max(begin + self.link.path.delay);
        if abruptly {
            until = self.now + self.chances.link.below(until - self.now + 1);
        }
        self.link.silence(life, side, until);
        self.at(until + 1, Event::Notice(life, side.other()));
    }

    /// A side's connection broke.
    fn notice(&mut self, life: LifeId, side: Side) {
        if self.link.is_out(self.now) {
            let until = self.link.outage_until;
            return self.at(until + 1, Event::Notice(life, side));
        }
        if self.link.has_ended(life, side) {
            return;
        }
        self.note(|| format!("{side:?} notices that life {life} is over"));
        self.link.end(life, side);
        // The other end hears of it, if only much later.
        self.link
            .silence(life, side, self.now + self.link.path.delay);
        self.after(self.link.path.delay, Event::Notice(life, side.other()));
        match side {
            Side::Source => self.source_life_ended(life),
            Side::Destination => self.destination_life_ended(life),
        }
    }

    /// Whether the driver of a side's daemon has something to do; it is woken if so.
    pub fn wake_driver(&mut self, side: Side) {
        let daemon = match side {
            Side::Source => self.src.driver.wake(),
            Side::Destination => self.dst.driver.wake(),
        };
        let Some(daemon) = daemon else { return };
        let wait = self.chances.of(side).between(5_000, 200_000);
        self.after(wait, Event::Step(side, daemon));
    }

    /// A guest is about to run somewhere.
    pub fn may_run(&mut self, side: Side, epoch: Epoch) {
        let (here, there) = (side, side.other());
        if self.guest.runs_at(there) {
            self.broken(
                "two owners",
                format!("the guest runs at the {here:?} while it runs at the {there:?}"),
            );
        }
        if epoch < self.highest {
            self.broken(
                "epochs",
                format!("the guest runs under {epoch} after {}", self.highest),
            );
        }
        self.highest = epoch;
    }

    /// After each step of a driver: what waits for a phase or a step is armed.
    pub fn arm(&mut self, side: Side, phase: Phase, steps: u32) {
        let new = self.seen.insert((side, phase));
        if new {
            self.note(|| format!("{side:?} is in {phase}"));
            self.coverage.phase(side, phase);
        }
        self.arm_for(|when| match when {
            When::Phase(s, p, wait) if new && (s, p) == (side, phase) => Some(wait),
            When::Step(s, at) if s == side && at == steps => Some(0),
            _ => None,
        });
    }

    /// Arms what is to happen so long after this.
    pub fn arm_for(&mut self, wait: impl Fn(When) -> Option<u64>) {
        for n in 0..self.scenario.mishaps.len() {
            if let Some(wait) = wait(self.scenario.mishaps[n].when)
                && self.armed.insert(n)
            {
                self.after(wait, Event::Mishap(n));
            }
        }
    }
}

/// A side's driver: one thing at a time, in order.
#[derive(Debug)]
pub struct Driver<T> {
    pub up: bool,
    /// Which life of the daemon.
    pub daemon: u32,
    pub todo: VecDeque<whimbrel_engine::switchover::Action>,
    pub inbox: VecDeque<T>,
    /// An action that takes its time.
    pub doing: Option<whimbrel_engine::switchover::Action>,
    pub awake: bool,
    pub steps: u32,
}

impl<T> Driver<T> {
    pub fn idle() -> Self {
        Driver {
            up: true,
            daemon: 1,
            todo: VecDeque::new(),
            inbox: VecDeque::new(),
            doing: None,
            awake: false,
            steps: 0,
        }
    }

    /// The life of the daemon in which the driver is to go on, if it is not at it already.
    fn wake(&mut self) -> Option<u32> {
        if self.awake || !self.up || self.is_busy() || self.is_idle() {
            return None;
        }
        self.awake = true;
        Some(self.daemon)
    }

    pub fn is_busy(&self) -> bool {
        self.doing.is_some()
    }

    pub fn is_idle(&self) -> bool {
        self.todo.is_empty() && self.inbox.is_empty()
    }

    /// The daemon is gone; the next one has the next number.
    pub fn die(&mut self) {
        self.up = false;
        self.daemon += 1;
        self.todo.clear();
        self.inbox.clear();
        self.doing = None;
        self.awake = false;
    }
}
