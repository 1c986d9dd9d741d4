//! The destination's session, after `crates/host/src/migration/{arrival,arrivals}.rs`.

use std::collections::VecDeque;

use whimbrel_engine::inflow::SpaceIn;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId};

use crate::destination::{DestinationInbox, QemuState};
use crate::faults::DriverFault;
use crate::filling::{Piece, TaskId, Work};
use crate::link::{ConnId, LifeId, Side};
use crate::message::{Message, Units};
use crate::world::World;

/// Frames of one connection that are being stored at once; fewer than really, so that the bound is met.
const STORING: usize = 6;

/// In place of their number: one frame that nothing may be stored beside.
const ALONE: usize = STORING + 1;

/// A life of the session, at the destination.
pub struct DestinationLife {
    pub id: LifeId,
    /// Frames being stored, by push connection.
    storing: Vec<(u8, usize)>,
}

/// Where content goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Disk,
    Ram,
    Nowhere,
    /// Not yet: the gate is closed.
    Gate,
    /// Such a space does not exist yet: an error.
    TooEarly,
}

impl World {
    pub fn destination_says(&mut self, message: Message) {
        if let Some(life) = &self.dst.daemon.life {
            let conn = ConnId {
                life: life.id,
                lane: 0,
            };
            self.send(conn, Side::Destination, message);
        }
    }

    /// A control connection comes.
    pub fn door(&mut self, life: LifeId) {
        if self.link.has_ended(life, Side::Destination) {
            return;
        }
        if !self.dst.driver.up {
            return self.close(life, Side::Destination, true);
        }
        if !self.dst.daemon.session {
            let open = self.dst.daemon.open;
            self.begin_incoming();
            self.dst.daemon.open |= open;
        }
        self.dst.daemon.doorstep.push_back(life);
        match &self.dst.daemon.life {
            Some(old) => {
                self.coverage
                    .deed("a newer connection replaced one that seemed alive");
                let old = old.id;
                self.destination_life_ended(old);
            }
            None => self.next_life(),
        }
    }

    pub fn destination_life_ended(&mut self, life: LifeId) {
        self.dst.daemon.doorstep.retain(|&waiting| waiting != life);
        if self.dst.daemon.life.as_ref().is_none_or(|l| l.id != life) {
            return;
        }
        self.dst.daemon.life = None;
        self.close(life, Side::Destination, false);
        // What waits at a gate belongs to its connection; what is being stored is stored.
        self.tasks
            .retain(|_, task| !matches!(task.work, Work::Gate { .. }));
        self.dst.daemon.ending = true;
        self.idle_yet();
    }

    /// A life ends when what it brought is stored; only then may the next say what is held.
    pub fn idle_yet(&mut self) {
        let storing = self
            .tasks
            .values()
            .any(|task| matches!(task.work, Work::Fill { .. }));
        if !self.dst.daemon.ending || storing {
            return;
        }
        self.dst.daemon.ending = false;
        self.dst.daemon.link_up = false;
        self.tell_destination(DestinationInbox::Down);
        self.next_life();
    }

    fn next_life(&mut self) {
        if self.dst.daemon.ending || self.dst.daemon.life.is_some() {
            return;
        }
        while let Some(life) = self.dst.daemon.doorstep.pop_front() {
            if !self.link.has_ended(life, Side::Destination) {
                return self.begin_life(life);
            }
        }
    }

    /// Says what is held, and what is still waited for.
    fn begin_life(&mut self, life: LifeId) {
        self.note(|| format!("life {life} of the session begins at the destination"));
        self.dst.daemon.frames = 0;
        self.dst.daemon.ram_end = None;
        self.dst.daemon.life = Some(DestinationLife {
            id: life,
            storing: (1..=self.scenario.pushes).map(|lane| (lane, 0)).collect(),
        });
        let spaces = self.dst.daemon.disks.iter().chain(&self.dst.daemon.ram);
        let held: Vec<(SpaceId, UnitSet)> = spaces
            .map(|s| (s.info().id, s.resident().clone()))
            .collect();
        for (space, held) in held {
            self.destination_says(Message::Have { space, held });
        }
        if self.dst.daemon.evicted {
            self.destination_says(Message::Evicted);
        }
        if self.dst.daemon.expected > 0 {
            self.say_seeded();
        }
        self.destination_says(Message::HaveEnd);
        self.dst.daemon.link_up = true;
        let spaces = self.dst.daemon.disks.iter().chain(&self.dst.daemon.ram);
        let outstanding: Vec<(SpaceId, Vec<Extent>)> =
            spaces.map(|s| (s.info().id, s.outstanding())).collect();
        for (space, runs) in outstanding.into_iter().filter(|(_, runs)| !runs.is_empty()) {
            self.destination_says(Message::Demand { space, runs });
        }
        self.tell_destination(DestinationInbox::Up);
        self.seeding_begins();
        self.hear_control();
    }

    pub fn push_door(&mut self, conn: ConnId) {
        if self
            .dst
            .daemon
            .life
            .as_ref()
            .is_some_and(|l| l.id == conn.life)
        {
            self.hear_push(conn);
        }
    }

    /// Asks the source for units, if there is a connection: on the next one all is asked for anew.
    pub fn demand(&mut self, space: SpaceId, runs: Vec<Extent>) {
        if self.dst.daemon.link_up && !runs.is_empty() {
            self.destination_says(Message::Demand { space, runs });
        }
    }

    pub fn forget(&mut self, space: SpaceId, runs: Vec<Extent>) {
        if self.dst.daemon.link_up && !runs.is_empty() {
            self.destination_says(Message::Forget { space, runs });
        }
    }

    pub fn target(&self, space: SpaceId) -> Target {
        let daemon = &self.dst.daemon;
        if daemon.refused {
            Target::Nowhere
        } else if usize::from(space.0) < daemon.expected {
            if daemon.disk_gate {
                Target::Disk
            } else {
                Target::Gate
            }
        } else if daemon.ram.is_none() {
            Target::TooEarly
        } else if daemon.ram_gate {
            Target::Ram
        } else {
            Target::Gate
        }
    }

    /// Reads what has come on the control connection, as far as it can be taken.
    pub fn hear_control(&mut self) {
        while let Some(life) = self.dst.daemon.life.as_ref().map(|l| l.id) {
            if self.violation.is_some() {
                return;
            }
            let conn = ConnId { life, lane: 0 };
            let Some(message) = self.link.next_arrived(conn, Side::Destination) else {
                return;
            };
            match message {
                Message::Empty { space, ref set } => match self.target(space) {
                    // Nothing behind it is read either.
                    Target::Gate => return self.link.unread(conn, Side::Destination, message),
                    Target::TooEarly => return self.destination_life_ended(life),
                    Target::Nowhere => {}
                    Target::Disk | Target::Ram => {
                        self.note(|| format!("destination hears {message:?}"));
                        let pieces = set.runs().map(|run| (run, None)).collect();
                        self.fill(space, pieces, None);
                    }
                },
                Message::Ahead => {
                    self.dst.daemon.ram_gate |= self.dst.daemon.ram.is_some();
                    self.gates_changed();
                }
                Message::RamEnd { frames } => {
                    self.dst.daemon.ram_end.get_or_insert(frames);
                    self.frames_stored();
                }
                message => {
                    self.note(|| format!("destination hears {message:?}"));
                    self.tell_destination(DestinationInbox::Heard(message));
                }
            }
        }
    }

    /// So many frames of this life are stored: perhaps all that were to come ahead.
    fn frames_stored(&mut self) {
        let daemon = &mut self.dst.daemon;
        if daemon.ram_end.is_some_and(|end| daemon.frames >= end) {
            daemon.ram_end = None;
            if !daemon.evicted && self.fault != Some(DriverFault::GateLeftOpen) {
                self.dst.daemon.ram_gate = false;
                self.dst.daemon.disk_gate = false;
            }
            self.destination_says(Message::RamTaken);
        }
    }

    /// What waited at a gate may go through.
    pub fn gates_changed(&mut self) {
        let waiting = self
            .tasks
            .iter()
            .filter(|(_, t)| matches!(t.work, Work::Gate { .. }));
        let waiting: Vec<TaskId> = waiting.map(|(&id, _)| id).collect();
        for id in waiting {
            let Some(task) = self.tasks.remove(&id) else {
                continue;
            };
            if let Work::Gate { units, conn } = task.work {
                self.take_frame(units, conn);
            }
        }
        self.hear_control();
    }

    /// Reads frames of a push connection, as many as may be stored at once.
    pub fn hear_push(&mut self, conn: ConnId) {
        loop {
            let Some(life) = self.dst.daemon.life.as_mut().filter(|l| l.id == conn.life) else {
                return;
            };
            let Some(storing) = life.storing.iter_mut().find(|s| s.0 == conn.lane) else {
                return;
            };
            if storing.1 >= STORING {
                return;
            }
            let is_idle = storing.1 == 0;
            let Some(message) = self.link.next_arrived(conn, Side::Destination) else {
                return;
            };
            let Message::Units(units) = message else {
                return self.broken("words", "a message on a push connection");
            };
            // Pages of before the switch are stored in order, each of their frames alone.
            let in_order = units.space == self.ram_space() && !self.dst.daemon.evicted;
            if in_order && !is_idle {
                return self
                    .link
                    .unread(conn, Side::Destination, Message::Units(units));
            }
            let Some(life) = self.dst.daemon.life.as_mut() else {
                return;
            };
            if let Some(storing) = life.storing.iter_mut().find(|s| s.0 == conn.lane) {
                storing.1 = if in_order { ALONE } else { storing.1 + 1 };
            }
            self.take_frame(units, conn);
        }
    }

    fn take_frame(&mut self, units: Units, conn: ConnId) {
        match self.target(units.space) {
            Target::Gate => {
                self.coverage.deed("frames that waited at a gate");
                self.task(Side::Destination, Work::Gate { units, conn });
            }
            Target::TooEarly => self.destination_life_ended(conn.life),
            Target::Nowhere => self.frame_done(conn, true),
            Target::Disk | Target::Ram => {
                let mut content = units.content.map(VecDeque::from);
                let pieces: Vec<Piece> = units
                    .runs
                    .iter()
                    .map(|&run| {
                        let part = content
                            .as_mut()
                            .map(|c| c.drain(..run.len as usize).collect());
                        (run, part)
                    })
                    .collect();
                self.fill(units.space, pieces, Some(conn));
            }
        }
    }

    /// A frame was stored, or could not be.
    pub fn frame_done(&mut self, conn: ConnId, ok: bool) {
        let Some(life) = self.dst.daemon.life.as_mut().filter(|l| l.id == conn.life) else {
            return;
        };
        if !ok {
            self.coverage.deed("a copy could not be stored");
            return self.destination_life_ended(conn.life);
        }
        if let Some(storing) = life.storing.iter_mut().find(|s| s.0 == conn.lane) {
            storing.1 = match storing.1 {
                ALONE => 0,
                several => several - 1,
            };
        }
        self.dst.daemon.frames += 1;
        self.frames_stored();
        self.hear_push(conn);
    }

    /// QEMU asks for a page.
    pub fn page_wanted(&mut self, page: u64) {
        self.dst.qemu.wanted.insert(page);
        let now = self.now / 1_000;
        let id = self.ram_space();
        if self.dst.driver.up
            && matches!(self.dst.qemu.state, QemuState::Loading | QemuState::Running)
            && let Some(ram) = &mut self.dst.daemon.ram
        {
            let demands = ram.want(Extent::unit(page), now);
            self.demand(id, demands);
        }
    }

    pub fn space_in(&mut self, space: SpaceId) -> Option<&mut SpaceIn> {
        let n = usize::from(space.0);
        if n < self.scenario.disks.len() {
            self.dst.daemon.disks.get_mut(n)
        } else {
            self.dst.daemon.ram.as_mut()
        }
    }
}
