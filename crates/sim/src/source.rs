//! The source: its driver, after `crates/host/src/migration/outgoing`, performing what the engine's `Source`
//! decides.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::destination::QemuState;
use crate::disks_ahead::DisksOut;
use whimbrel_engine::ahead::Ahead;
use whimbrel_engine::outflow::Outflow;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SECTOR, SpaceId, SpaceInfo, SpaceKind, UNIT};
use whimbrel_engine::switchover::{Action, Epoch, Phase, Record, Say, Source, SourceEvent};

use crate::faults::DriverFault;
use crate::flow::SourceLife;
use crate::link::{ConnId, LifeId, Side};
use crate::memory::{RamCopy, SourceQemu};
use crate::message::Message;
use crate::rng::Rng;
use crate::scenario::{MS, SECOND, Scenario};
use crate::store::{SECTORS, Store};
use crate::world::{Driver, Event, World};

/// The epoch under which the machine is the source's.
pub const OWN: Epoch = Epoch(7);

const TICK: u64 = 200 * MS;
const PATIENCE_BEFORE_GRANT: u64 = 60 * SECOND;
const FAREWELL: u64 = 3 * SECOND;
const LONGEST_FAREWELL: u64 = 3600 * SECOND;

/// What the driver is told.
#[derive(Debug)]
pub enum SourceInbox {
    Up,
    Down,
    Heard(Message),
    Tick,
    Switch,
    Cancel,
    TakeBack {
        lost: bool,
    },
    /// QEMU's end was noticed.
    QemuGone,
}

/// What is in the daemon's memory, gone with it.
pub struct SourceDaemon {
    /// A session of the migration is kept up.
    pub session: bool,
    pub out: Outflow,
    pub zero_answers: VecDeque<(SpaceId, Extent)>,
    pub open: bool,
    pub frames: u64,
    /// By space that went ahead: what of it was sent in vain.
    pub outdated: BTreeMap<SpaceId, UnitSet>,
    pub life: Option<SourceLife>,
    pub dialling: Option<LifeId>,
    pub backoff: u64,
    pub ram: Option<RamCopy>,
    pub ahead: Option<Ahead>,
    pub disks_out: Option<DisksOut>,
    /// An earlier daemon had granted.
    pub taken_up: bool,
    pub handover: bool,
    pub layout_taken: bool,
    pub may_switch: bool,
    pub link_up: bool,
    pub down_since: Option<u64>,
    pub after_grant_done: bool,
    pub empties_said: bool,
    /// Said when what the state machine asked for has been.
    pub empties_due: bool,
    pub over: Option<Phase>,
    pub over_since: Option<u64>,
    pub quiet_since: Option<u64>,
    /// For the checks: units handed out since the peer last said what it holds, by space.
    pub handed: Vec<UnitSet>,
    /// For the checks: demands that were heard and can be answered.
    pub asked: BTreeSet<(SpaceId, u64)>,
}

impl SourceDaemon {
    fn new() -> Self {
        SourceDaemon {
            session: false,
            out: Outflow::new(Vec::new()),
            zero_answers: VecDeque::new(),
            open: false,
            frames: 0,
            outdated: BTreeMap::new(),
            life: None,
            dialling: None,
            backoff: 200 * MS,
            ram: None,
            ahead: None,
            disks_out: None,
            taken_up: false,
            handover: false,
            layout_taken: false,
            may_switch: false,
            link_up: false,
            down_since: None,
            after_grant_done: false,
            empties_said: false,
            empties_due: false,
            over: None,
            over_since: None,
            quiet_since: None,
            handed: Vec::new(),
            asked: BTreeSet::new(),
        }
    }

    fn add(&mut self, info: SpaceInfo) {
        self.handed.push(UnitSet::empty(info.units()));
        self.out.add(info);
    }
}

pub struct SourceHost {
    pub driver: Driver<SourceInbox>,
    pub powered: bool,
    pub daemon: SourceDaemon,
    pub switch: Source,
    /// Durable: the migration's journal, and the mark that nothing is left to do.
    pub journal: Vec<Record>,
    pub writing: Option<Record>,
    pub over_mark: bool,
    pub layout_kept: bool,
    pub stores: Vec<Store>,
    pub frozen: bool,
    pub qemu: SourceQemu,
}

/// The spaces of the disks.
pub fn disk_info(n: usize, sectors: u64) -> SpaceInfo {
    SpaceInfo {
        id: SpaceId(n as u16),
        kind: SpaceKind::Disk,
        name: format!("disk{n}"),
        len: sectors * SECTOR,
    }
}

/// The space of the guest's memory, after the disks'.
pub fn ram_info(scenario: &Scenario) -> SpaceInfo {
    SpaceInfo {
        id: ram_id(scenario),
        kind: SpaceKind::Ram,
        name: "pc.ram".into(),
        len: scenario.ram * UNIT,
    }
}

pub fn ram_id(scenario: &Scenario) -> SpaceId {
    SpaceId(scenario.disks.len() as u16)
}

impl SourceHost {
    pub fn new(scenario: &Scenario, rng: &mut Rng) -> Self {
        let mut version = 0;
        let mut fresh = |rng: &mut Rng| {
            version += 1;
            if rng.percent(scenario.empty) {
                0
            } else {
                version
            }
        };
        let stores = scenario.disks.iter().map(|&sectors| {
            let mut store = Store::new(sectors);
            for unit in 0..sectors.div_ceil(SECTORS) {
                let content = fresh(rng);
                for sector in unit * SECTORS..sectors.min((unit + 1) * SECTORS) {
                    store.write(sector, content);
                }
            }
            let sync = store.sync_begin();
            store.sync_end(sync);
            store
        });
        SourceHost {
            driver: Driver::idle(),
            powered: true,
            daemon: SourceDaemon::new(),
            switch: Source::new(OWN),
            journal: Vec::new(),
            writing: None,
            over_mark: false,
            layout_kept: false,
            stores: stores.collect(),
            frozen: false,
            qemu: SourceQemu::new((0..scenario.ram).map(|_| fresh(rng)).collect()),
        }
    }
}

impl World {
    pub fn begin_source(&mut self) {
        self.src.daemon.session = true;
        self.offer_disks();
        self.src.daemon.may_switch = self.scenario.hold == 0;
        let actions = self.src.switch.handle(SourceEvent::Start);
        self.src.driver.todo.extend(actions);
        let daemon = self.src.driver.daemon;
        self.after(0, Event::Dial(daemon));
        self.after(self.scenario.hold, Event::EndHold);
        self.after(TICK, Event::Tick(Side::Source, daemon));
        self.wake_driver(Side::Source);
    }

    /// Offers the disks, whole. Nothing of one flows until it is frozen and looked through.
    fn offer_disks(&mut self) {
        for n in 0..self.src.stores.len() {
            let info = disk_info(n, self.src.stores[n].sectors());
            let (space, units) = (info.id, info.units());
            self.src.daemon.add(info);
            let whole = Extent::new(0, units);
            if self.has(DriverFault::CopyBeforeFreeze) {
                self.src.daemon.out.offer(space, whole);
            } else {
                self.src.daemon.out.offer_withheld(space, whole);
            }
        }
    }

    pub fn tell_source(&mut self, event: SourceInbox) {
        if self.src.driver.up && self.src.daemon.session {
            self.src.driver.inbox.push_back(event);
            self.wake_driver(Side::Source);
        }
    }

    pub fn tick(&mut self, side: Side, daemon: u32) {
        let session = match side {
            Side::Source => self.src.driver.daemon == daemon && self.src.daemon.session,
            Side::Destination => self.dst.driver.daemon == daemon && self.dst.daemon.session,
        };
        if !session {
            return;
        }
        match side {
            Side::Source => {
                if !matches!(self.src.driver.inbox.back(), Some(SourceInbox::Tick)) {
                    self.tell_source(SourceInbox::Tick);
                }
                // Where nothing hangs on the time, it is looked at less often.
                let calm = self.src.switch.phase() > Phase::Grant;
                self.after(if calm { SECOND } else { TICK }, Event::Tick(side, daemon));
            }
            Side::Destination => self.destination_tick(daemon),
        }
    }

    /// The driver of a side goes on by one action, or one event.
    pub fn step(&mut self, side: Side, daemon: u32) {
        if side == Side::Destination {
            return self.step_destination(daemon);
        }
        let driver = &mut self.src.driver;
        if driver.daemon != daemon {
            return;
        }
        driver.awake = false;
        driver.steps += 1;
        let steps = driver.steps;
        match driver.doing.take() {
            Some(action) => self.source_did(action),
            None => {
                if let Some(action) = driver.todo.pop_front() {
                    self.source_perform(action);
                } else if self.src.daemon.empties_due {
                    self.src.daemon.empties_due = false;
                    self.say_empties();
                } else if let Some(event) = driver.inbox.pop_front() {
                    self.source_event(event);
                }
            }
        }
        self.arm(side, self.src.switch.phase(), steps);
        self.source_may_leave();
        self.wake_driver(side);
        if self.src.daemon.empties_due && !self.src.driver.is_busy() && !self.src.driver.awake {
            self.src.driver.awake = true;
            self.after(1_000, Event::Step(side, daemon));
        }
    }

    pub fn source_handle(&mut self, event: SourceEvent) {
        let actions = self.src.switch.handle(event);
        self.src.driver.todo.extend(actions);
    }

    /// Begins an action. What takes time is `doing` until it is done.
    fn source_perform(&mut self, action: Action) {
        self.note(|| format!("source performs {action:?}"));
        let daemon = self.src.driver.daemon;
        match action {
            Action::Journal(record) => {
                self.src.writing = Some(record);
                self.source_takes(action, self.scenario.durable);
            }
            Action::Send(Say::Prepare { epoch }) => self.source_says(Message::Prepare { epoch }),
            Action::Send(Say::Grant { epoch }) => self.say_grant(epoch),
            Action::Send(say) => self.source_says(Message::Own(say)),
            Action::StartCopy => self.start_copy(),
            Action::StopGuest => {
                self.src.driver.doing = Some(action);
                self.stop_guest(daemon);
            }
            Action::KeepGuest { .. } => self.source_takes(action, 5 * MS),
            Action::Drain => self.open_flow(),
            Action::Finish(phase) => {
                self.src.daemon.over = Some(phase);
                self.src.daemon.open = false;
                self.coverage.deed(match phase {
                    Phase::Complete => "source ended complete",
                    Phase::Rewind => "source took the machine back",
                    _ => "source kept the machine",
                });
            }
            other => self.broken("actions", format!("{other:?} is not for a source")),
        }
    }

    fn source_takes(&mut self, action: Action, longest: u64) {
        self.src.driver.doing = Some(action);
        self.src.driver.awake = true;
        let wait = self.chances.source.below(longest + 1);
        let daemon = self.src.driver.daemon;
        self.after(wait, Event::Step(Side::Source, daemon));
    }

    /// An action that took its time is done.
    fn source_did(&mut self, action: Action) {
        match action {
            Action::Journal(record) => {
                self.src.writing = None;
                let lost = matches!(record, Record::Granted { .. })
                    && self.has(DriverFault::GrantNotDurable);
                if !lost {
                    self.src.journal.push(record);
                    if let Record::Granted { epoch } = record {
                        self.promised = epoch;
                    }
                }
            }
            Action::KeepGuest { epoch } => self.keep_guest(epoch),
            other => self.broken("actions", format!("{other:?} takes no time")),
        }
    }

    /// The guest stays, or comes back.
    fn keep_guest(&mut self, epoch: Epoch) {
        self.may_run(Side::Source, epoch);
        if epoch <= self.promised {
            let promised = self.promised;
            self.broken(
                "epochs",
                format!(
                    "the source takes the machine back under {epoch}, having promised {promised}"
                ),
            );
        }
        self.src.frozen = false;
        self.src.daemon.ram = None;
        self.src.qemu.migrating = false;
        let given_back = matches!(self.dst.journal.last(), Some(Record::Yielded { .. }))
            || self.dst.qemu.state == QemuState::Gone;
        if self.guest.ran_there && given_back && !self.guest.runs_at(Side::Destination) {
            self.rewind_guest();
        }
        self.source_runs();
    }

    pub fn source_says(&mut self, message: Message) {
        if let Some(life) = &self.src.daemon.life {
            let conn = ConnId {
                life: life.id,
                lane: 0,
            };
            self.send(conn, Side::Source, message);
        }
    }

    fn source_event(&mut self, event: SourceInbox) {
        match event {
            SourceInbox::Up => self.source_up(),
            SourceInbox::Down => {
                let now = self.now;
                let daemon = &mut self.src.daemon;
                daemon.link_up = false;
                if let Some(ahead) = &mut daemon.ahead {
                    ahead.link_down();
                }
                daemon.down_since.get_or_insert(now);
            }
            SourceInbox::Heard(message) => self.source_message(message),
            SourceInbox::Tick => self.source_sample(),
            SourceInbox::Switch => self.src.daemon.may_switch = true,
            SourceInbox::Cancel => {
                if self.src.switch.can_cancel() {
                    self.coverage.deed("cancelled by the operator in time");
                    self.source_handle(SourceEvent::Cancel);
                }
            }
            SourceInbox::TakeBack { lost } => {
                // Sworn only as long as it is so.
                let lost = lost && self.dst.qemu.state == QemuState::Gone;
                if self.src.switch.can_take_back() {
                    self.coverage.deed(if lost {
                        "taken back from a host that is lost"
                    } else {
                        "asked back"
                    });
                    self.source_handle(SourceEvent::TakeBack { lost });
                }
            }
            SourceInbox::QemuGone => {
                if self.src.switch.can_cancel() {
                    self.source_handle(SourceEvent::Failed);
                }
            }
        }
    }

    fn source_up(&mut self) {
        self.src.daemon.link_up = true;
        self.src.daemon.down_since = None;
        if self.src.switch.phase() == Phase::Copy
            && self.src.daemon.ram.is_some()
            && !self.src.daemon.layout_taken
        {
            self.source_says(Message::Layout);
        }
        self.say_disks_ahead();
        self.say_ahead();
        self.source_handle(SourceEvent::LinkUp);
        if self.src.daemon.empties_said {
            if self.has(DriverFault::EmptyBeforeGrant) {
                self.say_empties();
            } else {
                // Only after the grant or the question: a destination that has heard neither lets nothing
                // in, and would read no further.
                self.src.daemon.empties_due = true;
            }
        }
    }

    fn source_message(&mut self, message: Message) {
        match message {
            Message::Prepared { epoch } => {
                self.source_handle(SourceEvent::Heard(Say::Prepared { epoch }));
            }
            Message::LayoutTaken => self.src.daemon.layout_taken = true,
            Message::Own(say) => self.source_handle(SourceEvent::Heard(say)),
            Message::RamTaken => {
                if let Some(ahead) = &mut self.src.daemon.ahead {
                    ahead.taken();
                }
            }
            other => self.broken("words", format!("{other:?} has no place at a source")),
        }
    }

    /// Time has passed.
    fn source_sample(&mut self) {
        if let Some(since) = self.src.daemon.down_since {
            let patient = self.now - since <= PATIENCE_BEFORE_GRANT;
            if self.src.daemon.over.is_none() && self.src.switch.can_cancel() && !patient {
                self.coverage
                    .deed("source gave an unreachable destination up");
                self.source_handle(SourceEvent::Failed);
            } else if self.src.switch.is_unanswered()
                && self.src.switch.phase() == Phase::Cancel
                && !patient
            {
                self.coverage.deed("cancel could not be told");
                self.src.switch = Source::new(OWN);
            }
        }
        if self.src.switch.phase() != Phase::Copy {
            return;
        }
        let disks_are_ahead = self.step_disks();
        if disks_are_ahead && self.src.daemon.ram.is_none() {
            self.start_ram();
        }
        let collected = self.src.daemon.ram.as_ref().is_some_and(|r| r.collected);
        if !self.src.daemon.layout_taken || !collected {
            return;
        }
        let all_ahead = self.step_ahead();
        let alive = self.source_hears();
        if self.src.daemon.may_switch && all_ahead && alive {
            self.source_handle(SourceEvent::Switch);
        }
    }

    fn say_grant(&mut self, epoch: Epoch) {
        if !self.src.daemon.handover {
            return;
        }
        self.say_stale_disks();
        self.say_stale();
        self.source_says(Message::Grant { epoch });
        self.open_flow();
        if !self.src.daemon.after_grant_done {
            self.src.daemon.after_grant_done = true;
            self.release_disks();
            self.src.daemon.empties_said = true;
            self.say_empties();
        }
    }

    /// With the disks frozen it can be seen what of them is empty, and the rest may flow.
    fn release_disks(&mut self) {
        for n in 0..self.src.stores.len() {
            let space = SpaceId(n as u16);
            let store = &self.src.stores[n];
            let units = store.sectors().div_ceil(SECTORS);
            for unit in 0..units {
                let sent = self.src.daemon.out.sent(space).contains(unit);
                if !sent && store.unit(unit) == [0; SECTORS as usize] {
                    self.src.daemon.out.emptied(space, Extent::unit(unit));
                }
            }
            self.src.daemon.out.ready(space, Extent::new(0, units));
        }
        self.wake_pushes();
    }

    fn say_empties(&mut self) {
        let infos: Vec<SpaceInfo> = self.src.daemon.out.infos().cloned().collect();
        for info in infos {
            let mut set = UnitSet::empty(info.units());
            for run in self.src.daemon.out.empty_runs(info.id) {
                set.insert(run);
            }
            if !set.is_empty() {
                self.source_says(Message::Empty {
                    space: info.id,
                    set,
                });
            }
        }
    }

    /// Whether pings would be answered now: a connection can be silent without being broken.
    fn source_hears(&self) -> bool {
        let life = self.src.daemon.life.as_ref();
        life.is_some_and(|life| {
            !self.link.is_out(self.now) && !self.link.is_dead(life.id, self.now)
        })
    }

    fn source_may_leave(&mut self) {
        // A connection over which nothing comes may have swallowed what was said last.
        let alive = self.source_hears() || self.has(DriverFault::FarewellUnheard);
        let daemon = &mut self.src.daemon;
        if !daemon.session || daemon.over.is_none() || self.src.switch.is_unanswered() {
            return;
        }
        let over_since = *daemon.over_since.get_or_insert(self.now);
        let quiet_since = if daemon.link_up && alive {
            *daemon.quiet_since.get_or_insert(self.now)
        } else {
            daemon.quiet_since = None;
            self.now
        };
        let complete = daemon.over == Some(Phase::Complete);
        if complete
            && self.now - quiet_since <= FAREWELL
            && self.now - over_since <= LONGEST_FAREWELL
        {
            return;
        }
        if !complete || daemon.quiet_since.is_some() {
            self.src.over_mark = true;
        }
        self.note(|| "the source's session is over".into());
        self.end_source_session();
    }

    fn end_source_session(&mut self) {
        self.src.daemon.session = false;
        self.src.driver.inbox.clear();
        if let Some(life) = self.src.daemon.life.take() {
            self.close(life.id, Side::Source, false);
        }
    }

    /// The daemon dies. Its QEMU lives on.
    pub fn source_daemon_dies(&mut self) {
        if !self.src.driver.up {
            return;
        }
        self.src.driver.die();
        if let Some(record) = self.src.writing.take()
            && self.chances.mishap.percent(50)
        {
            self.src.journal.push(record);
        }
        if let Some(life) = self.src.daemon.life.take() {
            self.close(life.id, Side::Source, true);
        }
        if let Some(life) = self.src.daemon.dialling.take() {
            self.close(life, Side::Source, true);
        }
        self.src.daemon = SourceDaemon::new();
        self.src.qemu.migrating = false;
        self.lose_tasks(Side::Source);
        self.src.frozen = true;
    }

    /// The next daemon looks at what the last one left.
    pub fn source_daemon_starts(&mut self) {
        self.src.driver.up = true;
        let daemon = self.src.driver.daemon;
        if self.src.over_mark || self.src.journal.is_empty() {
            // The machine's record says whose it is, and follows the journal.
            if self.src.switch.may_run() || self.src.journal.is_empty() {
                self.src.frozen = false;
                self.source_runs();
            }
            return;
        }
        let (source, actions) = Source::recover(&self.src.journal);
        self.note(|| format!("source recovers {source:?}"));
        self.src.switch = source;
        let phase = self.src.switch.phase();
        self.coverage.deed(match phase {
            Phase::Grant => "source taken up in grant",
            Phase::Drain => "source taken up in drain",
            Phase::Complete => "source taken up complete",
            _ => "source taken up before the grant, or after the end",
        });
        if self.src.switch.may_run() {
            self.src.driver.todo.extend(actions);
        } else if phase == Phase::Complete {
            self.src.driver.todo.push_back(Action::Finish(phase));
        } else {
            self.offer_again();
            self.src.driver.todo.push_back(Action::Drain);
        }
        self.src.daemon.session = true;
        self.src.daemon.empties_said = true;
        self.after(0, Event::Dial(daemon));
        self.after(self.scenario.hold, Event::EndHold);
        self.after(TICK, Event::Tick(Side::Source, daemon));
        self.wake_driver(Side::Source);
    }

    /// Offers all that the disks and the stopped QEMU hold.
    fn offer_again(&mut self) {
        self.src.daemon.taken_up = true;
        self.offer_disks();
        self.release_disks();
        if !self.src.layout_kept || !self.src.qemu.is_there() {
            return;
        }
        let info = ram_info(&self.scenario);
        let space = info.id;
        self.src.daemon.add(info);
        let mut live = UnitSet::empty(self.scenario.ram);
        for (page, &content) in self.src.qemu.memory.iter().enumerate() {
            if content != 0 {
                live.insert(Extent::unit(page as u64));
            }
        }
        self.src.daemon.out.offer_set(space, &live);
    }

    fn start_copy(&mut self) {
        if self.scenario.disks_ahead && !self.any_unsettled() {
            self.begin_disks();
        } else {
            self.start_ram();
        }
    }

    /// QEMU starts to send its memory to the daemon.
    fn start_ram(&mut self) {
        if !self.src.qemu.is_there() {
            return self.source_handle(SourceEvent::Failed);
        }
        let info = ram_info(&self.scenario);
        self.src.daemon.add(info);
        self.src.layout_kept = true;
        self.src.daemon.ram = Some(RamCopy::new(self.scenario.ram));
        self.src.qemu.start_copy();
        self.source_says(Message::Layout);
        let daemon = self.src.driver.daemon;
        self.after(MS, Event::RamPass(daemon));
    }

    pub fn ram_space(&self) -> SpaceId {
        ram_id(&self.scenario)
    }
}
