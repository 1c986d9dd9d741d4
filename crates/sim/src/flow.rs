//! The source's session and what flows out, after `crates/host/src/migration/{departure,flow}.rs`.

use std::collections::BTreeMap;

use whimbrel_engine::outflow::{Batch, Class};
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId, SpaceInfo};

use crate::faults::DriverFault;
use crate::link::{ConnId, LifeId, Side};
use crate::message::{Message, Units};
use crate::scenario::{MS, SECOND};
use crate::source::SourceInbox;
use crate::store::{SECTORS, Unit};
use crate::world::{Event, World};

/// Units of one demanded frame.
const DEMAND_UNITS: u64 = 8;
const MAX_ZERO_ANSWERS: usize = 4096;
const BACKOFF_FIRST: u64 = 200 * MS;
const BACKOFF_CEILING: u64 = 10 * SECOND;

/// A life of the session, at the source.
pub struct SourceLife {
    pub id: LifeId,
    /// The peer has said what it holds.
    told: bool,
    holdings: BTreeMap<SpaceId, UnitSet>,
    evicted: bool,
    /// Push connections that have room, and those that are at something.
    idle: Vec<ConnId>,
}

enum Answer {
    Batch(Batch),
    Zero(SpaceId, Extent),
}

impl World {
    pub fn dial(&mut self, daemon: u32) {
        if self.src.driver.daemon != daemon
            || !self.src.daemon.session
            || self.src.daemon.life.is_some()
            || self.src.daemon.dialling.is_some()
        {
            return;
        }
        if self.link.is_out(self.now) || !self.dst.driver.up {
            let wait = if self.link.is_out(self.now) {
                (self.link.outage_until - self.now).min(5 * SECOND)
            } else {
                self.link.rtt()
            };
            return self.dial_failed(wait);
        }
        let life = self.link.new_life();
        self.src.daemon.dialling = Some(life);
        let rtt = self.link.rtt();
        self.after(rtt * 3 / 2, Event::Door(life));
        self.after(rtt * 2 + 1, Event::Dialled(life, daemon));
    }

    fn dial_failed(&mut self, wait: u64) {
        let backoff = self.src.daemon.backoff;
        self.src.daemon.backoff = (2 * backoff).min(BACKOFF_CEILING);
        let daemon = self.src.driver.daemon;
        let jitter = self.chances.source.below(backoff / 4);
        self.after(wait + backoff + jitter, Event::Dial(daemon));
        self.tell_source(SourceInbox::Down);
    }

    pub fn dialled(&mut self, life: LifeId, daemon: u32) {
        if self.src.driver.daemon != daemon || self.src.daemon.dialling != Some(life) {
            return;
        }
        self.src.daemon.dialling = None;
        if self.link.has_ended(life, Side::Source) || self.link.is_out(self.now) {
            self.close(life, Side::Source, true);
            return self.dial_failed(0);
        }
        if !self.src.daemon.session {
            return self.close(life, Side::Source, false);
        }
        self.note(|| format!("life {life} of the session begins at the source"));
        self.src.daemon.backoff = BACKOFF_FIRST;
        self.src.daemon.frames = 0;
        self.src.daemon.asked.clear();
        self.settle_spaces();
        self.src.daemon.life = Some(SourceLife {
            id: life,
            told: false,
            holdings: BTreeMap::new(),
            evicted: false,
            idle: Vec::new(),
        });
        let rtt = self.link.rtt();
        for lane in 1..=self.scenario.pushes {
            let conn = ConnId { life, lane };
            self.after(rtt * 3 / 2, Event::PushDoor(conn));
            self.after(rtt * 2 + 1, Event::PushReady(conn));
        }
        self.hear_source(life);
    }

    /// The life that the source has is over.
    pub fn source_life_ended(&mut self, life: LifeId) {
        if self.src.daemon.dialling == Some(life) {
            self.src.daemon.dialling = None;
            return self.dial_failed(0);
        }
        if self.src.daemon.life.as_ref().is_some_and(|l| l.id == life) {
            self.src.daemon.life = None;
            self.dial_failed(0);
        }
    }

    fn life_at_source(&mut self, life: LifeId) -> Option<&mut SourceLife> {
        self.src.daemon.life.as_mut().filter(|l| l.id == life)
    }

    /// Reads what has come on the control connection.
    pub fn hear_source(&mut self, life: LifeId) {
        let conn = ConnId { life, lane: 0 };
        while self.life_at_source(life).is_some() && self.violation.is_none() {
            let Some(message) = self.link.next_arrived(conn, Side::Source) else {
                return;
            };
            self.note(|| format!("source hears {message:?}"));
            match message {
                Message::Demand { space, runs } => self.demanded(space, &runs),
                Message::Forget { space, runs } => {
                    for run in runs {
                        self.src
                            .daemon
                            .asked
                            .retain(|a| a.0 != space || !run.contains(a.1));
                        if self.src.daemon.out.info(space).is_some() {
                            self.src.daemon.out.forget(space, run);
                        }
                    }
                }
                Message::Seeded { space } => {
                    if self.src.daemon.out.info(space).is_some() {
                        self.src.daemon.out.unsettle(space);
                    }
                }
                Message::SeedEnd { space } => {
                    if self.src.daemon.out.info(space).is_some() {
                        self.src.daemon.out.settle(space);
                    }
                    self.wake_pushes();
                }
                Message::SeedHashes { space, first, has } => self.compare(life, space, first, &has),
                Message::Unstored { space, runs } => self.unstored(space, &runs),
                Message::Have { space, held } => {
                    if let Some(life) = self.life_at_source(life) {
                        life.holdings.insert(space, held);
                    }
                }
                Message::Evicted => {
                    if let Some(life) = self.life_at_source(life) {
                        life.evicted = true;
                    }
                }
                Message::HaveEnd => self.peer_has(),
                Message::Digest {
                    space,
                    included,
                    digest,
                } => {
                    // A source that was restarted when all was over has no content: it does not answer.
                    if self.src.daemon.out.info(space).is_some() {
                        let same = self.digest_at_source(space, &included) == digest;
                        self.source_says(Message::DigestAnswer { space, same });
                    }
                }
                other => self.tell_source(SourceInbox::Heard(other)),
            }
        }
    }

    /// The peer has said what it holds; content may flow.
    fn peer_has(&mut self) {
        let changing = !self.src.daemon.handover && !self.src.daemon.taken_up;
        let infos: Vec<SpaceInfo> = self.src.daemon.out.infos().cloned().collect();
        let keep_stale = self.has(DriverFault::StaleTakenForHeld);
        let unknown_is_held = self.has(DriverFault::UnknownTakenForHeld);
        let daemon = &mut self.src.daemon;
        let Some(life) = &mut daemon.life else { return };
        let mut said = std::mem::take(&mut life.holdings);
        for info in infos {
            let none = UnitSet::empty(info.units());
            let mut held = said.remove(&info.id).unwrap_or_else(|| none.clone());
            daemon.handed[usize::from(info.id.0)] = none.clone();
            if changing {
                daemon.out.peer_received(info.id, &held);
                continue;
            }
            if !life.evicted {
                match daemon.outdated.get(&info.id) {
                    Some(vain) if !keep_stale => held.subtract(vain),
                    // Only an earlier daemon knew what of it is stale.
                    None if daemon.taken_up && !unknown_is_held => held = none,
                    _ => {}
                }
            }
            daemon.out.peer_has(info.id, &held);
        }
        life.told = true;
        self.tell_source(SourceInbox::Up);
        self.wake_pushes();
    }

    fn unstored(&mut self, space: SpaceId, runs: &[Extent]) {
        if self.has(DriverFault::UnstoredUnheard) {
            return;
        }
        let daemon = &mut self.src.daemon;
        if daemon.out.info(space).is_none() {
            return;
        }
        for &run in runs {
            let empty = daemon.out.unstored(space, run);
            daemon.handed[usize::from(space.0)].remove(run);
            let empty = empty.into_iter().map(|run| (space, run));
            daemon.zero_answers.extend(empty);
        }
        self.wake_pushes();
    }

    fn demanded(&mut self, space: SpaceId, runs: &[Extent]) {
        let Some(info) = self.src.daemon.out.info(space) else {
            return;
        };
        let units = info.units();
        for &run in runs {
            let outcome = self.src.daemon.out.demand(space, run);
            let told = self.src.daemon.life.as_ref().is_some_and(|l| l.told);
            let handed = &self.src.daemon.handed[usize::from(space.0)];
            for unit in run.clamp_to(Extent::new(0, units)).iter() {
                let empty = outcome.empty.iter().any(|run| run.contains(unit));
                if told && !empty && outcome.already_sent == 0 && !handed.contains(unit) {
                    self.src.daemon.asked.insert((space, unit));
                }
            }
            for empty in outcome.empty {
                self.src.daemon.zero_answers.push_back((space, empty));
            }
            while self.src.daemon.zero_answers.len() > MAX_ZERO_ANSWERS {
                self.src.daemon.zero_answers.pop_front();
            }
        }
        self.wake_pushes();
    }

    pub fn open_flow(&mut self) {
        self.src.daemon.open = true;
        self.wake_pushes();
    }

    pub fn push_ready(&mut self, conn: ConnId) {
        if let Some(life) = self.life_at_source(conn.life) {
            life.idle.push(conn);
            self.wake_pushes();
        }
    }

    /// A push connection may have something to send.
    pub fn wake_pushes(&mut self) {
        let daemon = &mut self.src.daemon;
        if let Some(life) = daemon.life.as_mut().filter(|l| l.told && daemon.open) {
            for conn in std::mem::take(&mut life.idle) {
                self.after(1_000, Event::PushRoom(conn));
            }
        }
    }

    /// A push connection takes what goes next.
    pub fn push_room(&mut self, conn: ConnId) {
        let open = self.src.daemon.open;
        let Some(life) = self.life_at_source(conn.life) else {
            return;
        };
        if !life.told || !open {
            return life.idle.push(conn);
        }
        match self.next_answer() {
            None => {
                if let Some(life) = self.life_at_source(conn.life) {
                    life.idle.push(conn);
                }
            }
            Some(Answer::Zero(space, run)) => {
                let units = Units {
                    space,
                    class: Class::Demand,
                    runs: vec![run],
                    content: None,
                };
                let free = self.send(conn, Side::Source, Message::Units(units));
                self.at(free, Event::PushRoom(conn));
            }
            Some(Answer::Batch(batch)) => {
                let wait = self.chances.source.below(self.scenario.access + 1);
                // The disk, or the store, is read at some moment of that time: at its beginning or its end.
                let now = self.chances.source.percent(50);
                let content = if now {
                    self.content(&batch)
                } else {
                    Vec::new()
                };
                self.after(wait, Event::Loaded(conn, batch, content));
            }
        }
    }

    fn next_answer(&mut self) -> Option<Answer> {
        let answer = match self.src.daemon.zero_answers.pop_front() {
            Some((space, run)) => Answer::Zero(space, run),
            None => {
                let out = &mut self.src.daemon.out;
                let batch = match out.next_demand(DEMAND_UNITS) {
                    Some(batch) => batch,
                    None => out.next_push(self.scenario.frame_units)?,
                };
                self.check_batch(&batch);
                Answer::Batch(batch)
            }
        };
        self.src.daemon.frames += 1;
        Some(answer)
    }

    fn check_batch(&mut self, batch: &Batch) {
        let ram = self.ram_space();
        for unit in batch.runs.iter().flat_map(Extent::iter) {
            self.src.daemon.asked.remove(&(batch.space, unit));
            let handed = &mut self.src.daemon.handed[usize::from(batch.space.0)];
            // What changes may go again before the guest stops.
            let changes = batch.space == ram && !self.src.daemon.handover;
            if handed.insert(Extent::unit(unit)) == 0 && !changes {
                self.broken("once", format!("unit {unit} of {} goes twice", batch.space));
            }
        }
        if batch.class == Class::Push {
            let stale = self.src.daemon.ram.as_ref().map(|ram| &ram.stale);
            let waits = self.src.daemon.asked.iter().find(|(space, unit)| {
                let is_ram = *space == ram;
                let withheld = is_ram && stale.is_some_and(|stale| stale.contains(*unit));
                let readable = if is_ram {
                    self.src.daemon.handover || self.src.daemon.ram.is_none()
                } else {
                    self.src.frozen
                };
                !withheld && readable
            });
            if let Some((space, unit)) = waits {
                let what =
                    format!("unit {unit} of {space} is waited for while {batch:?} is pushed");
                self.broken("demand first", what);
            }
        } else {
            self.coverage.deed("units demanded");
        }
    }

    fn content(&self, batch: &Batch) -> Vec<Unit> {
        let units = batch.runs.iter().flat_map(Extent::iter);
        if batch.space == self.ram_space() {
            let page = |unit: u64| match &self.src.daemon.ram {
                Some(ram) => ram.pages[unit as usize],
                None => self.src.qemu.memory[unit as usize],
            };
            let whole = |page: u32| {
                let mut unit = [0; SECTORS as usize];
                unit[0] = page;
                unit
            };
            return units.map(|unit| whole(page(unit))).collect();
        }
        let store = &self.src.stores[usize::from(batch.space.0)];
        units.map(|unit| store.unit(unit)).collect()
    }

    pub fn loaded(&mut self, conn: ConnId, batch: Batch, content: Vec<Unit>) {
        if self.life_at_source(conn.life).is_none() {
            return;
        }
        let content = if content.is_empty() {
            self.content(&batch)
        } else {
            content
        };
        let units = Units {
            space: batch.space,
            class: batch.class,
            runs: batch.runs,
            content: Some(content),
        };
        let free = self.send(conn, Side::Source, Message::Units(units));
        self.at(free, Event::PushRoom(conn));
    }

    fn digest_at_source(&self, space: SpaceId, included: &UnitSet) -> u64 {
        digest(included, |unit| {
            self.src.stores[usize::from(space.0)].unit(unit)
        })
    }
}

/// A number that differs if the content does.
pub fn digest(included: &UnitSet, content: impl Fn(u64) -> Unit) -> u64 {
    let units = included.runs().flat_map(|run| run.iter());
    units.fold(0xcbf2_9ce4_8422_2325, |sum, unit| {
        content(unit).iter().fold(sum ^ unit, |sum, &version| {
            (sum ^ u64::from(version)).wrapping_mul(0x0100_0000_01b3)
        })
    })
}
