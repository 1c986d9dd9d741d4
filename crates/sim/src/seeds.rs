//! Disks that were at the destination before, after `crates/host/src/migration/incoming/seeding.rs` and
//! `Flow::compare`. A unit's content stands in for its hash.

use std::collections::{BTreeMap, BTreeSet};

use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId};

use crate::faults::DriverFault;
use crate::link::LifeId;
use crate::message::Message;
use crate::store::{Store, Unit};
use crate::world::World;

/// Units that are asked about at once.
const STRETCH: u64 = 16;

/// What a destination's daemon knows of its older copies.
#[derive(Default)]
pub struct SeedsIn {
    /// What was asked about on this connection and not answered.
    asked: BTreeMap<(SpaceId, u64), Vec<(u64, Unit)>>,
    over: BTreeSet<SpaceId>,
}

impl World {
    /// The destination has the disks as they were when the guest left it, which was a moment ago.
    pub fn leave_older_copies(&mut self) {
        if self.scenario.seeded {
            self.dst.older = self.src.stores.clone();
        }
    }

    fn seeded_spaces(&self) -> Vec<SpaceId> {
        let spaces = (0..self.dst.older.len()).map(|disk| SpaceId(disk as u16));
        let over = &self.dst.daemon.seeds.over;
        spaces.filter(|space| !over.contains(space)).collect()
    }

    /// Tells the source before it pushes any.
    pub fn say_seeded(&mut self) {
        for space in self.seeded_spaces() {
            self.destination_says(Message::Seeded { space });
        }
    }

    /// A new connection: what was asked about is asked about again.
    pub fn seeding_begins(&mut self) {
        self.dst.daemon.seeds.asked.clear();
        if !self.dst.settled || !self.dst.daemon.link_up || self.dst.daemon.open {
            return;
        }
        for space in self.seeded_spaces() {
            let disk = usize::from(space.0);
            let Some(absent) = self.dst.daemon.disks.get(disk).map(|disk| {
                let mut absent = UnitSet::full(disk.info().units());
                absent.subtract(disk.resident());
                absent
            }) else {
                continue;
            };
            let older: &Store = &self.dst.older[disk];
            let mut stretches = Vec::new();
            for first in (0..absent.capacity()).step_by(STRETCH as usize) {
                let runs = absent.runs_within(Extent::new(first, STRETCH));
                let units = runs.flat_map(|run| run.iter());
                let has: Vec<(u64, Unit)> = units.map(|unit| (unit, older.unit(unit))).collect();
                stretches.push((first, has));
            }
            for (first, has) in stretches {
                self.dst
                    .daemon
                    .seeds
                    .asked
                    .insert((space, first), has.clone());
                self.destination_says(Message::SeedHashes { space, first, has });
            }
            self.seeds_over_yet(space);
        }
    }

    fn seeds_over_yet(&mut self, space: SpaceId) {
        let seeds = &mut self.dst.daemon.seeds;
        if seeds.asked.keys().all(|asked| asked.0 != space) && seeds.over.insert(space) {
            self.destination_says(Message::SeedEnd { space });
        }
    }

    /// The source says what is the same.
    pub fn seed_alike(&mut self, space: SpaceId, first: u64, alike: &[Extent]) {
        let Some(has) = self.dst.daemon.seeds.asked.remove(&(space, first)) else {
            return;
        };
        let mut pieces = Vec::new();
        for (unit, content) in has {
            if alike.iter().any(|run| run.contains(unit)) {
                self.coverage.deed("units taken from an older copy");
                pieces.push((Extent::unit(unit), Some(vec![content])));
            }
        }
        if !pieces.is_empty() {
            self.fill(space, pieces, None);
        }
        self.seeds_over_yet(space);
    }

    /// The source hears what the destination's older copy has.
    pub fn compare(&mut self, life: LifeId, space: SpaceId, first: u64, has: &[(u64, Unit)]) {
        let stretch = Extent::new(first, STRETCH);
        let mut alike = Vec::new();
        if self.src.daemon.out.info(space).is_some() {
            let readable = self.src.frozen && !self.src.daemon.out.is_withheld(space);
            let pending = self.src.daemon.out.begin_compare(space, stretch);
            let careless = self.has(DriverFault::OldCopyTakenForSame);
            let store = &self.src.stores[usize::from(space.0)];
            let same = has.iter().filter(|(unit, content)| {
                let is_pending = pending.iter().any(|run| run.contains(*unit));
                readable && is_pending && (careless || store.unit(*unit) == *content)
            });
            let same: Vec<Extent> = same.map(|(unit, _)| Extent::unit(*unit)).collect();
            alike = self.src.daemon.out.end_compare(space, stretch, &same);
            for unit in alike.iter().flat_map(Extent::iter) {
                self.src.daemon.asked.remove(&(space, unit));
                let handed = &mut self.src.daemon.handed[usize::from(space.0)];
                if handed.insert(Extent::unit(unit)) == 0 {
                    self.broken("once", format!("unit {unit} of {space} is had and goes"));
                }
            }
        }
        if self.src.daemon.life.as_ref().is_some_and(|l| l.id == life) {
            self.source_says(Message::SeedAlike {
                space,
                first,
                alike,
            });
        }
        self.wake_pushes();
    }

    /// A new connection at the source: nothing is held back unless it is said again.
    pub fn settle_spaces(&mut self) {
        let out = &mut self.src.daemon.out;
        let spaces: Vec<SpaceId> = out.infos().map(|info| info.id).collect();
        spaces.into_iter().for_each(|space| out.settle(space));
    }

    pub fn any_unsettled(&self) -> bool {
        let out = &self.src.daemon.out;
        out.infos().any(|info| out.is_unsettled(info.id))
    }
}
