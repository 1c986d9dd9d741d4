//! The destination: its driver, after `crates/host/src/migration/incoming`, performing what the engine's
//! `Destination` decides.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use whimbrel_engine::inflow::{SpaceIn, Ticket};
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId};
use whimbrel_engine::switchover::{
    Action, Destination, DestinationEvent, Epoch, Phase, Record, Say,
};

use crate::arrival::DestinationLife;
use crate::disks_ahead::DisksIn;
use crate::faults::DriverFault;
use crate::filling::TaskId;
use crate::flow::digest;
use crate::link::{LifeId, Side};
use crate::message::Message;
use crate::scenario::{MS, SECOND, Scenario};
use crate::seeds::SeedsIn;
use crate::source::{disk_info, ram_info};
use crate::store::{Residency, SECTORS, Store};
use crate::world::{Driver, Event, World};

const TICK: u64 = 250 * MS;
const PATIENCE_BEFORE_GRANT: u64 = 90 * SECOND;
const LINGER: u64 = 10 * SECOND;
const ASK_AGAIN: u64 = 15 * SECOND;

#[derive(Debug)]
pub enum DestinationInbox {
    Up,
    Down,
    Heard(Message),
    Tick,
    /// RAM is in place; or nobody needs it any more.
    Ram,
    /// Disks are complete, verified and durable.
    Disks,
    /// The guest runs.
    Resumed,
    /// QEMU could not load the state.
    LoadFailed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QemuState {
    None,
    /// Takes memory, and waits for the device state.
    Waiting,
    /// Loads the device state, which touches some pages.
    Loading,
    /// Its feeder died while it loaded: it will never run.
    LostLoading,
    Running,
    Gone,
}

/// The destination's QEMU.
pub struct DestinationQemu {
    pub state: QemuState,
    pub placed: Vec<Option<u32>>,
    /// Pages that it has asked for and not been given.
    pub wanted: BTreeSet<u64>,
}

/// What is in the daemon's memory, gone with it.
pub struct DestinationDaemon {
    pub session: bool,
    pub known: bool,
    offered: bool,
    /// Spaces of the disks, once they may be filled.
    pub disks: Vec<SpaceIn>,
    pub ahead: DisksIn,
    pub seeds: SeedsIn,
    /// The disks are whole and the guest's alone.
    pub open: bool,
    pub ram: Option<SpaceIn>,
    /// No QEMU lacks memory: what comes is thrown away.
    pub sated: bool,
    pub expected: usize,
    pub disk_gate: bool,
    pub ram_gate: bool,
    pub refused: bool,
    pub evicted: bool,
    /// The disks' files were made by this daemon.
    pub fresh: bool,
    pub frames: u64,
    pub ram_end: Option<u64>,
    pub stale: UnitSet,
    state: bool,
    pub link_up: bool,
    pub life: Option<DestinationLife>,
    pub doorstep: VecDeque<LifeId>,
    /// A life has ended, and what it brought is still being stored.
    pub ending: bool,
    /// Who waits for which ticket of which space.
    pub parked: BTreeMap<(SpaceId, Ticket), TaskId>,
    ram_said: bool,
    ram_done: bool,
    /// The disk that is being waited for, or verified.
    verifying: Option<usize>,
    asked_digest: Option<UnitSet>,
    disks_done: bool,
    over: Option<Phase>,
    linger: Option<u64>,
    down_since: Option<u64>,
}

impl DestinationDaemon {
    fn new(pages: u64) -> Self {
        DestinationDaemon {
            session: false,
            known: false,
            offered: false,
            disks: Vec::new(),
            ahead: DisksIn::default(),
            seeds: SeedsIn::default(),
            open: false,
            ram: None,
            sated: false,
            expected: 0,
            disk_gate: false,
            ram_gate: false,
            refused: false,
            evicted: false,
            fresh: false,
            frames: 0,
            ram_end: None,
            stale: UnitSet::empty(pages),
            state: false,
            link_up: false,
            life: None,
            doorstep: VecDeque::new(),
            ending: false,
            parked: BTreeMap::new(),
            ram_said: false,
            ram_done: false,
            verifying: None,
            asked_digest: None,
            disks_done: false,
            over: None,
            linger: None,
            down_since: None,
        }
    }
}

impl DestinationDaemon {
    /// The migration was over before this daemon: it says so to whoever asks, and nothing else.
    pub fn knows_its_epoch(&self) -> bool {
        self.offered || self.known
    }

    pub fn only_answers(&self) -> bool {
        self.known && self.refused
    }
}

pub struct DestinationHost {
    pub driver: Driver<DestinationInbox>,
    pub daemon: DestinationDaemon,
    pub switch: Destination,
    /// Durable.
    pub journal: Vec<Record>,
    pub writing: Option<Record>,
    pub over_mark: bool,
    /// Volumes were made for the machine.
    pub made: bool,
    /// The machine's record says that its process runs.
    pub settled: bool,
    pub stores: Vec<Store>,
    /// The disks as the machine left them here, if it did.
    pub older: Vec<Store>,
    pub residency: Vec<Residency>,
    pub qemu: DestinationQemu,
    /// The guest wrote here.
    pub touched: bool,
    pub refuse_ready: bool,
    pub load_fails: bool,
    /// What was told to a person.
    pub needs_operator: Option<&'static str>,
}

impl DestinationHost {
    pub fn new(scenario: &Scenario) -> Self {
        DestinationHost {
            driver: Driver::idle(),
            daemon: DestinationDaemon::new(scenario.ram),
            switch: Destination::new(Epoch(0)),
            journal: Vec::new(),
            writing: None,
            over_mark: false,
            made: false,
            settled: false,
            stores: Vec::new(),
            older: Vec::new(),
            residency: Vec::new(),
            qemu: DestinationQemu {
                state: QemuState::None,
                placed: vec![None; scenario.ram as usize],
                wanted: BTreeSet::new(),
            },
            touched: false,
            refuse_ready: false,
            load_fails: false,
            needs_operator: None,
        }
    }
}

impl World {
    pub fn tell_destination(&mut self, event: DestinationInbox) {
        if self.dst.driver.up && self.dst.daemon.session {
            self.dst.driver.inbox.push_back(event);
            self.wake_driver(Side::Destination);
        }
    }

    /// The first connection of a session that this daemon does not know.
    pub fn begin_incoming(&mut self) {
        self.dst.daemon = DestinationDaemon::new(self.scenario.ram);
        self.dst.daemon.session = true;
        self.dst.switch = Destination::new(Epoch(0));
        if !self.dst.journal.is_empty() {
            let (destination, _) = Destination::recover(&self.dst.journal);
            self.dst.daemon.refused = true;
            self.dst.daemon.disk_gate = true;
            self.dst.daemon.ram_gate = true;
            self.dst.daemon.known = true;
            if destination.phase() == Phase::Complete {
                self.dst.daemon.open = true;
            }
            self.dst.switch = destination;
        }
        let daemon = self.dst.driver.daemon;
        self.after(TICK, Event::Tick(Side::Destination, daemon));
    }

    pub fn destination_tick(&mut self, daemon: u32) {
        if !matches!(self.dst.driver.inbox.back(), Some(DestinationInbox::Tick)) {
            self.tell_destination(DestinationInbox::Tick);
        }
        if self.dst.daemon.only_answers() {
            return;
        }
        let calm = self.dst.switch.phase() > Phase::Grant;
        let wait = if calm { SECOND } else { TICK };
        self.after(wait, Event::Tick(Side::Destination, daemon));
    }

    pub fn step_destination(&mut self, daemon: u32) {
        let driver = &mut self.dst.driver;
        if driver.daemon != daemon {
            return;
        }
        driver.awake = false;
        driver.steps += 1;
        let steps = driver.steps;
        match driver.doing.take() {
            Some(action) => self.destination_did(action),
            None => {
                if let Some(action) = driver.todo.pop_front() {
                    self.destination_perform(action);
                } else if let Some(event) = driver.inbox.pop_front() {
                    self.destination_event(event);
                }
            }
        }
        self.arm(Side::Destination, self.dst.switch.phase(), steps);
        self.wake_driver(Side::Destination);
    }

    fn destination_handle(&mut self, event: DestinationEvent) {
        let actions = self.dst.switch.handle(event);
        self.dst.driver.todo.extend(actions);
    }

    fn destination_takes(&mut self, action: Action, longest: u64) {
        self.dst.driver.doing = Some(action);
        self.dst.driver.awake = true;
        let wait = self.chances.destination.below(longest + 1);
        let daemon = self.dst.driver.daemon;
        self.after(wait, Event::Step(Side::Destination, daemon));
    }

    fn destination_perform(&mut self, action: Action) {
        self.note(|| format!("destination performs {action:?}"));
        match action {
            Action::Journal(record) => {
                self.dst.writing = Some(record);
                self.destination_takes(action, self.scenario.durable);
            }
            Action::Send(Say::Prepared { epoch }) => {
                self.say_seeded();
                self.destination_says(Message::Prepared { epoch });
            }
            Action::Send(say) => self.destination_says(Message::Own(say)),
            Action::MakeReady => self.destination_takes(action, 500 * MS),
            Action::RunGuest { .. } => self.run_guest(action),
            Action::CleanUp | Action::EndGuest => self.destination_takes(action, 20 * MS),
            Action::Finish(phase) => self.finish_destination(phase),
            Action::Inspect => {}
            other => self.broken("actions", format!("{other:?} is not for a destination")),
        }
    }

    fn destination_did(&mut self, action: Action) {
        match action {
            Action::Journal(record) => {
                self.dst.writing = None;
                self.dst.journal.push(record);
            }
            Action::MakeReady => self.make_ready(),
            Action::CleanUp => self.clean_up(),
            Action::EndGuest => self.end_guest(),
            other => self.broken("actions", format!("{other:?} takes no time")),
        }
    }

    fn make_ready(&mut self) {
        if self.dst.refuse_ready {
            return self.destination_handle(DestinationEvent::Failed);
        }
        self.dst.made = true;
        self.dst.stores = self.scenario.disks.iter().map(|&s| Store::new(s)).collect();
        self.dst.residency = vec![Residency::default(); self.scenario.disks.len()];
        self.dst.qemu.state = QemuState::Waiting;
        self.dst.daemon.expected = self.scenario.disks.len();
        self.destination_handle(DestinationEvent::Ready);
    }

    fn destination_event(&mut self, event: DestinationInbox) {
        match event {
            DestinationInbox::Up => {
                self.dst.daemon.down_since = None;
                self.destination_handle(DestinationEvent::LinkUp);
            }
            DestinationInbox::Down => {
                let now = self.now;
                self.dst.daemon.down_since.get_or_insert(now);
            }
            DestinationInbox::Heard(message) => self.destination_message(message),
            DestinationInbox::Tick => self.destination_sample(),
            DestinationInbox::Ram => self.dst.daemon.ram_done = true,
            DestinationInbox::Disks => self.dst.daemon.disks_done = true,
            // Of a life of QEMU's that is over.
            DestinationInbox::Resumed | DestinationInbox::LoadFailed => {}
        }
        if self.dst.daemon.ram_done && self.dst.daemon.disks_done {
            self.destination_handle(DestinationEvent::NothingAbsent);
        }
    }

    fn destination_message(&mut self, message: Message) {
        let unknown = !self.dst.daemon.offered && !self.dst.daemon.known;
        match message {
            Message::Prepare { epoch } => {
                if unknown && self.dst.daemon.over.is_some() {
                    return self.destination_says(Message::Own(Say::Refused { epoch }));
                }
                if unknown {
                    self.dst.switch = Destination::new(epoch);
                    self.dst.daemon.offered = true;
                }
                self.destination_handle(DestinationEvent::Heard(Say::Prepare { epoch }));
            }
            Message::Layout => self.take_layout(),
            Message::Grant { epoch } => {
                self.dst.daemon.state = true;
                self.destination_handle(DestinationEvent::Heard(Say::Grant { epoch }));
            }
            Message::Own(say) => {
                if unknown {
                    self.dst.switch = Destination::new(say.epoch());
                }
                self.destination_handle(DestinationEvent::Heard(say));
            }
            Message::DisksAhead => self.begin_disks_ahead(),
            Message::Stale { space, runs } => {
                let daemon = &mut self.dst.daemon;
                let stale = match daemon.ahead.stale.get_mut(usize::from(space.0)) {
                    Some(disk) => disk,
                    None => &mut daemon.stale,
                };
                for run in runs {
                    stale.insert(run);
                }
            }
            Message::SeedAlike {
                space,
                first,
                alike,
            } => self.seed_alike(space, first, &alike),
            Message::DigestAnswer { space, same } => self.digest_answered(space, same),
            other => self.broken("words", format!("{other:?} has no place at a destination")),
        }
    }

    fn take_layout(&mut self) {
        if self.dst.daemon.ram.is_some() {
            return self.destination_says(Message::LayoutTaken);
        }
        if self.dst.qemu.state != QemuState::Waiting {
            return self.destination_handle(DestinationEvent::Failed);
        }
        self.dst.daemon.ram = Some(SpaceIn::absent(ram_info(&self.scenario)));
        self.destination_says(Message::LayoutTaken);
        self.hear_control();
    }

    fn destination_sample(&mut self) {
        let waiting = matches!(self.dst.switch.phase(), Phase::Prepare | Phase::Copy);
        let since = self.dst.daemon.down_since;
        if waiting && since.is_some_and(|since| self.now - since > PATIENCE_BEFORE_GRANT) {
            self.dst.daemon.down_since = None;
            self.coverage
                .deed("destination gave an unreachable source up");
            self.destination_handle(DestinationEvent::Failed);
        }
        if self.dst.daemon.over.is_some() {
            let until = *self.dst.daemon.linger.get_or_insert(self.now + LINGER);
            if self.now > until {
                self.end_incoming();
            }
        }
    }

    fn end_incoming(&mut self) {
        self.note(|| "the destination's session is over".into());
        self.dst.daemon.session = false;
        self.dst.driver.inbox.clear();
        self.dst.daemon.doorstep.clear();
        if let Some(life) = self.dst.daemon.life.take() {
            self.close(life.id, Side::Destination, false);
        }
    }

    /// Gives QEMU the machine.
    fn run_guest(&mut self, action: Action) {
        let whole = self.dst.daemon.state
            && self.dst.daemon.ram.is_some()
            && self.dst.qemu.state == QemuState::Waiting
            && self.dst.made;
        if !whole {
            return self.destination_handle(DestinationEvent::Failed);
        }
        self.dst.daemon.state = false;
        self.take_disks_over();
        self.dst.touched = false;
        self.dst.daemon.fresh = true;
        self.dst.daemon.disk_gate = true;
        let stale = self.dst.daemon.stale.clone();
        let ram = self.dst.daemon.ram.as_mut().expect("tested above");
        ram.evict(&stale);
        self.dst.daemon.evicted = true;
        for page in stale.runs().flat_map(|run| run.iter()) {
            self.dst.qemu.placed[page as usize] = None;
        }
        self.dst.qemu.state = QemuState::Loading;
        self.dst.driver.doing = Some(action);
        let wait = self.chances.destination.below(10 * MS);
        self.after(wait, Event::QemuLoads);
        self.gates_changed();
    }

    /// The device state is with QEMU, which touches its first pages.
    pub fn qemu_loads(&mut self) {
        if self.dst.qemu.state != QemuState::Loading {
            return;
        }
        if self.dst.load_fails {
            self.dst.qemu.state = QemuState::Gone;
            return self.loading_failed();
        }
        if self.dst.driver.up && self.dst.daemon.evicted {
            self.dst.daemon.ram_gate = true;
            self.gates_changed();
        }
        let early = 0..self.scenario.early.min(self.scenario.ram);
        let absent: Vec<u64> = early
            .filter(|&p| self.dst.qemu.placed[p as usize].is_none())
            .collect();
        if !absent.is_empty() {
            for page in absent {
                self.page_wanted(page);
            }
            return;
        }
        self.may_run(Side::Destination, self.dst.switch.epoch());
        self.note(|| "the guest runs at the destination".into());
        self.dst.qemu.state = QemuState::Running;
        self.guest.at = Some(Side::Destination);
        self.guest.ran_there = true;
        self.wake_guest();
        if self.dst.driver.up && self.dst.driver.doing.take().is_some() {
            self.destination_handle(DestinationEvent::Running);
            self.settle();
            self.wake_driver(Side::Destination);
        }
    }

    /// A QEMU that was given the machine has ended before its guest ran.
    pub fn loading_failed(&mut self) {
        if !self.dst.driver.up || self.dst.driver.doing.take().is_none() {
            return;
        }
        self.coverage.deed("device state could not be loaded");
        if self.dst.touched {
            self.dst.needs_operator = Some("it failed, yet the guest has written here");
        } else {
            self.destination_handle(DestinationEvent::Failed);
        }
        self.wake_driver(Side::Destination);
    }

    /// The machine is this host's: records, and the tasks that see the rest arrive.
    fn settle(&mut self) {
        self.dst.settled = true;
        self.record_ahead();
        self.dst.daemon.verifying = Some(0);
        self.submit_all();
        self.ram_progress();
        self.disk_progress();
        self.seeding_begins();
    }

    /// Whether all of RAM is in place, and so said.
    pub fn ram_progress(&mut self) {
        let complete = self.dst.daemon.sated
            || self
                .dst
                .daemon
                .ram
                .as_ref()
                .is_some_and(SpaceIn::is_complete);
        if complete && self.dst.settled && !self.dst.daemon.ram_said {
            self.dst.daemon.ram_said = true;
            self.tell_destination(DestinationInbox::Ram);
        }
    }

    /// The guest's process has ended: its memory is needed no more.
    pub fn process_ended(&mut self) {
        if self.dst.driver.up && self.dst.settled {
            self.dst.daemon.sated = true;
            self.ram_progress();
        }
    }

    /// The disks are verified one after the other, each when it is complete.
    pub fn disk_progress(&mut self) {
        let Some(disk) = self.dst.daemon.verifying else {
            return;
        };
        let Some(space) = self.dst.daemon.disks.get(disk) else {
            if !self.dst.daemon.disks.is_empty() {
                self.dst.daemon.verifying = None;
                self.tell_destination(DestinationInbox::Disks);
            }
            return;
        };
        if space.is_complete() && self.dst.daemon.asked_digest.is_none() {
            self.dst.daemon.asked_digest = Some(UnitSet::empty(0));
            self.flush(Side::Destination, disk, crate::filling::Waiter::Verify);
        }
    }

    /// A complete disk is durable: it is compared with the source's.
    pub fn ask_digest(&mut self, daemon: u32, disk: usize) {
        if self.dst.driver.daemon != daemon || self.dst.daemon.verifying != Some(disk) {
            return;
        }
        let space = &self.dst.daemon.disks[disk];
        let mut included = space.resident().clone();
        included.subtract(space.guest_owned());
        self.dst.daemon.asked_digest = Some(included.clone());
        if included.is_empty() {
            return self.digest_answered(SpaceId(disk as u16), true);
        }
        let digest = digest(&included, |unit| self.dst.stores[disk].unit(unit));
        let space = SpaceId(disk as u16);
        self.destination_says(Message::Digest {
            space,
            included,
            digest,
        });
        self.after(ASK_AGAIN, Event::AskDigest(daemon, disk));
    }

    fn digest_answered(&mut self, space: SpaceId, same: bool) {
        if self.dst.daemon.verifying != Some(usize::from(space.0))
            || self.dst.daemon.asked_digest.is_none()
        {
            return;
        }
        if !same {
            return self.broken("verified", format!("{space} differs from the source"));
        }
        self.dst.daemon.asked_digest = None;
        self.dst.daemon.verifying = Some(usize::from(space.0) + 1);
        self.disk_progress();
    }

    /// What still comes goes nowhere.
    fn stop_taking(&mut self) {
        self.drop_destination_tasks();
        self.dst.daemon.refused = true;
        self.dst.daemon.disk_gate = true;
        self.dst.daemon.ram_gate = true;
        self.dst.daemon.disks.clear();
        self.dst.daemon.ram = None;
    }

    fn clean_up(&mut self) {
        self.stop_taking();
        self.undo_landing();
        self.gates_changed();
    }

    /// The machine is the source's again. What its guest wrote here is left alone.
    fn end_guest(&mut self) {
        self.coverage.deed("the destination gave the machine back");
        self.stop_taking();
        if self.guest.at == Some(Side::Destination) {
            self.guest_dies(false);
        }
        if self.dst.qemu.state != QemuState::None {
            self.dst.qemu.state = QemuState::Gone;
        }
        self.gates_changed();
    }

    fn undo_landing(&mut self) {
        if self.dst.qemu.state == QemuState::Running {
            self.broken("two owners", "a guest that ran is cleaned away");
        }
        if self.dst.qemu.state != QemuState::None {
            self.dst.qemu.state = QemuState::Gone;
        }
        self.dst.made = false;
        self.dst.stores.clear();
        self.dst.residency.clear();
    }

    fn finish_destination(&mut self, phase: Phase) {
        self.dst.daemon.over = Some(phase);
        self.dst.daemon.verifying = None;
        self.dst.over_mark = true;
        if phase == Phase::Complete {
            self.dst.daemon.open = true;
        }
    }

    /// The daemon dies. Its QEMU lives on.
    pub fn destination_daemon_dies(&mut self) {
        if !self.dst.driver.up {
            return;
        }
        self.dst.driver.die();
        if let Some(record) = self.dst.writing.take()
            && self.chances.mishap.percent(50)
        {
            self.dst.journal.push(record);
        }
        if let Some(life) = self.dst.daemon.life.take() {
            self.close(life.id, Side::Destination, true);
        }
        for life in std::mem::take(&mut self.dst.daemon.doorstep) {
            self.close(life, Side::Destination, true);
        }
        self.lose_tasks(Side::Destination);
        for residency in &mut self.dst.residency {
            residency.daemon_died();
        }
        let early = 0..self.scenario.early.min(self.scenario.ram);
        let mut early = early.map(|p| self.dst.qemu.placed[p as usize]);
        if self.dst.qemu.state == QemuState::Loading && early.any(|page| page.is_none()) {
            // It ends by itself, sooner or later.
            self.dst.qemu.state = if self.chances.mishap.percent(30) {
                QemuState::Gone
            } else {
                QemuState::LostLoading
            };
        }
        self.dst.daemon = DestinationDaemon::new(self.scenario.ram);
    }

    /// The next daemon looks at what the last one left.
    pub fn destination_daemon_starts(&mut self) {
        self.dst.driver.up = true;
        if self.dst.over_mark || self.dst.journal.is_empty() {
            self.open_if_ours();
            return;
        }
        let (mut destination, actions) = Destination::recover(&self.dst.journal);
        self.note(|| format!("destination recovers {destination:?}"));
        if self.has(DriverFault::RefusedUnasked) && actions.contains(&Action::Inspect) {
            let actions = destination.handle(DestinationEvent::Failed);
            return self.take_up_refused(&actions);
        }
        if actions.contains(&Action::Inspect) {
            return self.take_up_arriving(destination);
        }
        self.take_up_refused(&actions);
        self.dst.over_mark = true;
        self.open_if_ours();
    }

    fn take_up_refused(&mut self, actions: &[Action]) {
        for action in actions {
            match *action {
                Action::Journal(record) => self.dst.journal.push(record),
                Action::CleanUp => {
                    self.coverage.deed("destination restarted and refused");
                    self.undo_landing();
                }
                Action::EndGuest => self.end_guest(),
                _ => {}
            }
        }
    }

    /// A machine that came whole is served from its volumes alone.
    fn open_if_ours(&mut self) {
        if matches!(self.dst.journal.last(), Some(Record::Completed { .. })) {
            self.dst.daemon.open = true;
            self.submit_all();
        }
    }

    /// A machine that this host owns and whose content was still arriving.
    fn take_up_arriving(&mut self, destination: Destination) {
        self.coverage.deed("destination taken up after it accepted");
        self.dst.switch = destination;
        self.dst.daemon.session = true;
        self.dst.daemon.known = true;
        let mut wrote = false;
        for (n, &sectors) in self.scenario.disks.iter().enumerate() {
            let units = sectors.div_ceil(SECTORS);
            wrote |= !self.dst.residency[n].recover(units).1.is_empty();
            if !self.has(DriverFault::DoubtForgotten) {
                let guest_gone = self.dst.qemu.state == QemuState::Gone;
                self.dst.residency[n].own_what_is_doubtful(units, guest_gone);
            }
            let (resident, owned, mut partial) = self.dst.residency[n].recover(units);
            if self.fault == Some(DriverFault::PartsForgottenAtRestart) {
                partial.clear();
            }
            let space = SpaceIn::recovered(disk_info(n, sectors), resident, owned, partial);
            self.dst.daemon.disks.push(space);
        }
        self.dst.daemon.expected = self.dst.daemon.disks.len();
        let daemon = self.dst.driver.daemon;
        self.after(TICK, Event::Tick(Side::Destination, daemon));
        let ran = self.dst.settled || wrote;
        match self.dst.qemu.state {
            QemuState::Running => self.take_up_ram(),
            QemuState::Gone | QemuState::None if ran => self.dst.daemon.sated = true,
            QemuState::Gone | QemuState::None => {
                self.dst.daemon.disks.clear();
                self.dst.needs_operator = Some("whether the guest ran is unknown");
                return;
            }
            QemuState::Waiting | QemuState::Loading | QemuState::LostLoading => {
                self.dst.daemon.disks.clear();
                self.dst.qemu.state = QemuState::Gone;
                self.destination_handle(DestinationEvent::Failed);
                return self.wake_driver(Side::Destination);
            }
        }
        if self.dst.daemon.sated {
            let mut ram = SpaceIn::absent(ram_info(&self.scenario));
            ram.zeroes(Extent::new(0, self.scenario.ram), 0);
            self.dst.daemon.ram = Some(ram);
        }
        self.dst.daemon.disk_gate = true;
        self.dst.daemon.ram_gate = true;
        self.dst.daemon.evicted = true;
        self.settle();
        self.destination_handle(DestinationEvent::Running);
        self.wake_driver(Side::Destination);
    }
}
