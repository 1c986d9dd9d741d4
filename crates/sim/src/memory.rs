//! The guest's memory at the source: QEMU, the daemon's copy of it, what goes ahead of the switch, and the stop.
//!
//! After `crates/host/src/migration/outgoing/{ahead,stop}.rs` and `crates/qemu`'s source.

use std::collections::BTreeMap;

use whimbrel_engine::ahead::{Ahead, Step};
use whimbrel_engine::inflow::SpaceIn;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::Extent;
use whimbrel_engine::switchover::SourceEvent;

use crate::link::Side;
use crate::message::Message;
use crate::scenario::MS;
use crate::source::ram_info;
use crate::world::{Event, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceState {
    Running,
    /// Its requests are being finished.
    Stopping,
    Paused,
    Gone,
}

/// The source's QEMU.
#[derive(Clone, Debug)]
pub struct SourceQemu {
    pub state: SourceState,
    /// By page: the version of its content, 0 being zeroes.
    pub memory: Vec<u32>,
    /// Pages whose newest content has not been delivered to the daemon.
    pub dirty: UnitSet,
    pub migrating: bool,
    cursor: u64,
}

impl SourceQemu {
    pub fn new(memory: Vec<u32>) -> Self {
        SourceQemu {
            state: SourceState::Running,
            dirty: UnitSet::empty(memory.len() as u64),
            memory,
            migrating: false,
            cursor: 0,
        }
    }

    pub fn is_there(&self) -> bool {
        self.state != SourceState::Gone
    }

    pub fn start_copy(&mut self) {
        self.migrating = true;
        self.dirty = UnitSet::full(self.memory.len() as u64);
        self.cursor = 0;
    }

    /// The next page to deliver, and whether with it a pass over all is done.
    fn next(&mut self) -> (Option<u64>, bool) {
        match self.dirty.next_present(self.cursor) {
            Some(page) => {
                self.cursor = page + 1;
                self.dirty.remove(Extent::unit(page));
                (Some(page), false)
            }
            None => {
                self.cursor = 0;
                (None, true)
            }
        }
    }
}

/// The daemon's copy of the guest's memory.
pub struct RamCopy {
    pub pages: Vec<u32>,
    /// Pages that came since this was last looked at.
    dirtied: UnitSet,
    /// The first pass is done.
    pub collected: bool,
    /// Pages that QEMU still delivers after the stop.
    pub stale: UnitSet,
}

impl RamCopy {
    pub fn new(pages: u64) -> Self {
        RamCopy {
            pages: vec![0; pages as usize],
            dirtied: UnitSet::empty(pages),
            collected: false,
            stale: UnitSet::empty(pages),
        }
    }

    fn take_dirtied(&mut self) -> UnitSet {
        let none = UnitSet::empty(self.dirtied.capacity());
        std::mem::replace(&mut self.dirtied, none)
    }

    /// Pages that are not zero.
    fn held(&self) -> UnitSet {
        let mut held = UnitSet::empty(self.dirtied.capacity());
        for (page, &content) in self.pages.iter().enumerate() {
            if content != 0 {
                held.insert(Extent::unit(page as u64));
            }
        }
        held
    }
}

/// Pages in one delivery of QEMU's.
const DELIVERY: usize = 8;

impl World {
    /// QEMU delivers some pages to the daemon.
    pub fn ram_pass(&mut self, daemon: u32) {
        if self.src.driver.daemon != daemon || !self.src.qemu.migrating || !self.src.qemu.is_there()
        {
            return;
        }
        let stopped = self.src.qemu.state == SourceState::Paused;
        let Some(ram) = &mut self.src.daemon.ram else {
            return;
        };
        for _ in 0..DELIVERY {
            match self.src.qemu.next() {
                (Some(page), _) => {
                    ram.pages[page as usize] = self.src.qemu.memory[page as usize];
                    ram.dirtied.insert(Extent::unit(page));
                    ram.stale.remove(Extent::unit(page));
                }
                (None, done) => {
                    ram.collected |= done;
                    break;
                }
            }
        }
        if stopped {
            let stale = ram.stale.clone();
            let space = self.ram_space();
            if self.src.daemon.handover {
                self.src.daemon.out.set_withheld(space, &stale);
                self.wake_pushes();
            }
            if stale.is_empty() {
                self.src.qemu.migrating = false;
                return;
            }
        }
        let wait = self.chances.source.between(MS / 4, 4 * MS);
        self.after(wait, Event::RamPass(daemon));
    }

    /// The guest is to stop: it does nothing new, and its requests are finished first.
    pub fn stop_guest(&mut self, daemon: u32) {
        if self.src.qemu.state != SourceState::Running || self.src.daemon.ram.is_none() {
            self.src.driver.doing = None;
            return self.source_handle(SourceEvent::Failed);
        }
        self.src.qemu.state = SourceState::Stopping;
        if self.guest.disk_requests() == 0 {
            let wait = self.chances.source.below(self.scenario.durable + 1);
            self.after(wait, Event::Stopped(daemon));
        }
    }

    /// The last request of a guest that is being stopped was answered: its disks are flushed next.
    pub fn requests_finished(&mut self) {
        if self.src.qemu.state == SourceState::Stopping {
            let daemon = self.src.driver.daemon;
            let wait = self.chances.source.below(self.scenario.durable + 1);
            self.after(wait, Event::Stopped(daemon));
        }
    }

    /// The guest has stopped, and its disks are durable.
    pub fn stopped(&mut self, daemon: u32) {
        if self.src.driver.daemon != daemon || self.src.qemu.state != SourceState::Stopping {
            return;
        }
        for n in 0..self.src.stores.len() {
            let sync = self.src.stores[n].sync_begin();
            self.src.stores[n].sync_end(sync);
            self.guest.flushed_all(n);
        }
        self.src.qemu.state = SourceState::Paused;
        self.guest.at = None;
        self.src.frozen = true;
        self.note(|| "the guest has stopped at the source".into());
        if self.src.daemon.ram.is_some() {
            self.outdate_ahead();
            self.offer_ram();
            self.settle_disks();
        }
        self.src.daemon.handover = true;
        self.src.driver.doing = None;
        self.source_handle(SourceEvent::Stopped);
        self.wake_driver(Side::Source);
    }

    fn outdate_ahead(&mut self) {
        let stale = self.src.qemu.dirty.clone();
        let ram = self
            .src
            .daemon
            .ram
            .as_mut()
            .expect("copied since StartCopy");
        ram.stale = stale.clone();
        self.refresh_ahead();
        if self.src.daemon.ahead.is_none() || !self.scenario.ahead {
            return;
        }
        let space = self.ram_space();
        let vain = self.src.daemon.out.outdate(space, &stale);
        if !vain.is_empty() {
            self.coverage.deed("pages went ahead in vain");
        }
        if self.src.daemon.out.tally(space).repeated > 0 {
            self.coverage.deed("pages went ahead twice");
        }
        let sent = self.src.daemon.out.sent(space);
        let handed = &mut self.src.daemon.handed[usize::from(space.0)];
        *handed = handed.intersection(sent);
        self.src.daemon.outdated.insert(space, vain);
    }

    /// All of RAM that did not go ahead is offered; what QEMU still delivers is withheld.
    fn offer_ram(&mut self) {
        let space = self.ram_space();
        let ram = self
            .src
            .daemon
            .ram
            .as_ref()
            .expect("copied since StartCopy");
        let stale = ram.stale.clone();
        let mut live = ram.held();
        live.union_with(&stale);
        let out = &mut self.src.daemon.out;
        live.subtract(out.sent(space));
        out.offer_set(space, &live);
        out.set_withheld(space, &stale);
        for page in 0..self.scenario.early.min(self.scenario.ram) {
            out.demand(space, Extent::unit(page));
        }
        for run in stale.runs() {
            out.prefer(space, run);
        }
        self.wake_pushes();
    }

    /// Brings ahead what can be; whether the guest may stop as far as this goes.
    pub fn step_ahead(&mut self) -> bool {
        if !self.scenario.ahead && self.src.daemon.disks_out.is_none() {
            return true;
        }
        let now = self.now / MS;
        let space = self.ram_space();
        if self.src.daemon.ahead.is_none() {
            let ram = self.src.daemon.ram.as_mut().expect("collected");
            ram.take_dirtied();
            let held = ram.held();
            // Without RAM that goes ahead it is the barrier alone.
            let blocks = self.scenario.ahead.then_some((space, held));
            let ahead = Ahead::begin(&mut self.src.daemon.out, blocks, now);
            self.src.daemon.ahead = Some(ahead);
            self.say_ahead();
            self.open_flow();
            return false;
        }
        self.refresh_ahead();
        let daemon = &mut self.src.daemon;
        let (frames, link_up, is_held) = (daemon.frames, daemon.link_up, !daemon.may_switch);
        let ahead = daemon.ahead.as_mut().expect("tested above");
        // What goes twice must not overtake itself on another connection.
        let again = self.scenario.pushes == 1;
        let step = ahead.step(&mut daemon.out, now, is_held, again);
        match step {
            Step::Ends if link_up => {
                ahead.end_said();
                self.source_says(Message::RamEnd { frames });
            }
            Step::Begins if link_up => {
                ahead.begin_said();
                self.coverage.deed("more went ahead under a hold");
                self.say_ahead();
            }
            Step::Going | Step::Waiting | Step::Ends | Step::Begins | Step::Closed => {}
        }
        self.wake_pushes();
        step == Step::Closed
    }

    pub fn say_ahead(&mut self) {
        if self.src.daemon.ahead.is_some() && !self.src.daemon.handover {
            self.source_says(Message::Ahead);
        }
    }

    /// Notes what was written to since the last look.
    fn refresh_ahead(&mut self) {
        let daemon = &mut self.src.daemon;
        if let (Some(ram), Some(ahead)) = (&mut daemon.ram, &mut daemon.ahead) {
            ahead.written(&mut daemon.out, 0, &ram.take_dirtied());
        }
    }

    /// Names to the destination what it must not keep.
    pub fn say_stale(&mut self) {
        let space = self.ram_space();
        if let Some(outdated) = self.src.daemon.outdated.get(&space) {
            let runs: Vec<Extent> = outdated.runs().collect();
            if !runs.is_empty() {
                self.source_says(Message::Stale { space, runs });
            }
        }
    }

    /// The guest runs at the source, again or still.
    pub fn source_runs(&mut self) {
        if self.src.qemu.is_there() {
            if self.guest.ran_there {
                self.broken(
                    "two owners",
                    "the source runs a guest that has run at the destination",
                );
            }
            self.src.qemu.state = SourceState::Running;
            self.guest.at = Some(Side::Source);
            self.wake_guest();
        }
        self.submit_all();
    }

    /// QEMU tells which pages it has, and asks again for those that it waits for.
    pub fn take_up_ram(&mut self) {
        let mut received = UnitSet::empty(self.scenario.ram);
        for (page, content) in self.dst.qemu.placed.iter().enumerate() {
            if content.is_some() {
                received.insert(Extent::unit(page as u64));
            }
        }
        let none = UnitSet::empty(self.scenario.ram);
        let info = ram_info(&self.scenario);
        let space = SpaceIn::recovered(info, received, none, BTreeMap::new());
        self.dst.daemon.ram = Some(space);
        for page in self.dst.qemu.wanted.clone() {
            self.page_wanted(page);
        }
    }
}
