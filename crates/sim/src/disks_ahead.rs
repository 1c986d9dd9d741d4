//! Disks ahead of the switch, after `crates/host/src/migration/{outgoing/disks,incoming/ahead}.rs`.

use whimbrel_engine::disks_ahead::{DiskBefore, DisksAhead};
use whimbrel_engine::inflow::SpaceIn;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SECTOR, SpaceId};
use whimbrel_engine::switchover::Phase;

use crate::faults::DriverFault;
use crate::message::Message;
use crate::scenario::{MS, Scenario};
use crate::source::disk_info;
use crate::store::SECTORS;
use crate::world::World;

/// The disks on their way ahead, at the source.
pub struct DisksOut {
    ahead: DisksAhead,
    /// By disk: where the guest wrote since the last look.
    noted: Vec<UnitSet>,
    /// By disk: what was said to be stale on this connection.
    said: Vec<UnitSet>,
}

/// The same at the destination.
#[derive(Default)]
pub struct DisksIn {
    /// The machine is not this host's yet: nothing is recorded.
    pub pending: bool,
    pub stale: Vec<UnitSet>,
    /// By disk: units of a fresh file that were stored to before the switch.
    pub trodden: Vec<UnitSet>,
}

fn none(scenario: &Scenario) -> Vec<UnitSet> {
    let units = scenario.disks.iter().map(|s| s.div_ceil(SECTORS));
    units.map(UnitSet::empty).collect()
}

impl World {
    pub fn begin_disks(&mut self) {
        let stores = self.src.stores.iter().enumerate();
        let before = stores.map(|(n, store)| {
            let units = store.sectors().div_ceil(SECTORS);
            let mut content = UnitSet::empty(units);
            for unit in 0..units {
                if store.unit(unit) != [0; SECTORS as usize] {
                    content.insert(Extent::unit(unit));
                }
            }
            DiskBefore {
                space: SpaceId(n as u16),
                content,
                read: vec![Extent::new(units / 2, units / 8)],
                written: vec![Extent::new(0, units / 8)],
            }
        });
        let before: Vec<DiskBefore> = before.collect();
        let now = self.now / MS;
        self.src.daemon.disks_out = Some(DisksOut {
            ahead: DisksAhead::begin(&mut self.src.daemon.out, before, now),
            noted: none(&self.scenario),
            said: none(&self.scenario),
        });
        self.say_disks_ahead();
        self.open_flow();
    }

    /// The guest writes to a disk at the source.
    pub fn note_change(&mut self, disk: usize, sector: u64, len: u64) {
        if let Some(out) = &mut self.src.daemon.disks_out {
            let units = Extent::touching(sector * SECTOR, len * SECTOR);
            out.noted[disk].insert(units);
        }
    }

    fn refresh_disks(&mut self) {
        let daemon = &mut self.src.daemon;
        let Some(disks) = &mut daemon.disks_out else {
            return;
        };
        for (n, noted) in disks.noted.iter_mut().enumerate() {
            let none = UnitSet::empty(noted.capacity());
            let units = std::mem::replace(noted, none);
            if !units.is_empty() {
                disks.ahead.written(&mut daemon.out, n, &units);
            }
        }
    }

    /// Brings of the disks ahead what is to go; whether that is all handed out.
    pub fn step_disks(&mut self) -> bool {
        self.refresh_disks();
        if self.src.daemon.link_up {
            self.say_stale_disks();
        }
        let now = self.now / MS;
        let daemon = &mut self.src.daemon;
        let Some(disks) = &mut daemon.disks_out else {
            return true;
        };
        let over = disks.ahead.step(&mut daemon.out, now);
        self.wake_pushes();
        over
    }

    /// On each connection before the stop; what was said on the one before may not have been heard.
    pub fn say_disks_ahead(&mut self) {
        let again = self.has(DriverFault::StaleSaidOnce);
        let none = none(&self.scenario);
        let Some(disks) = &mut self.src.daemon.disks_out else {
            return;
        };
        if !again {
            disks.said = none;
        }
        if !self.src.daemon.handover {
            self.source_says(Message::DisksAhead);
        }
    }

    pub fn say_stale_disks(&mut self) {
        let Some(disks) = &mut self.src.daemon.disks_out else {
            return;
        };
        let mut messages = Vec::new();
        for (n, (space, vain)) in disks.ahead.vain().enumerate() {
            let mut new = vain.clone();
            new.subtract(&disks.said[n]);
            disks.said[n].union_with(&new);
            let runs: Vec<Extent> = new.runs().collect();
            if !runs.is_empty() {
                messages.push(Message::Stale { space, runs });
            }
        }
        for message in messages {
            self.source_says(message);
        }
    }

    /// The guest and its disks have stopped.
    pub fn settle_disks(&mut self) {
        self.refresh_disks();
        let daemon = &mut self.src.daemon;
        let Some(disks) = &mut daemon.disks_out else {
            return;
        };
        disks.ahead.end(&mut daemon.out);
        for (space, vain) in disks.ahead.settle(&mut daemon.out) {
            if !vain.is_empty() {
                self.coverage.deed("units of disks went ahead in vain");
            }
            let sent = daemon.out.sent(space);
            if !sent.is_empty() {
                self.coverage.deed("disks went ahead");
            }
            let handed = &mut daemon.handed[usize::from(space.0)];
            *handed = handed.intersection(sent);
            daemon.outdated.insert(space, vain);
        }
    }

    // ---- the destination ----

    pub fn begin_disks_ahead(&mut self) {
        let began = !self.dst.daemon.ahead.stale.is_empty();
        if began || self.dst.switch.phase() != Phase::Copy || !self.dst.made {
            return;
        }
        self.dst.daemon.ahead = DisksIn {
            pending: true,
            stale: none(&self.scenario),
            trodden: none(&self.scenario),
        };
        self.dst.daemon.disks = self.absent_disks();
        self.dst.daemon.disk_gate = true;
        self.gates_changed();
    }

    pub fn absent_disks(&self) -> Vec<SpaceIn> {
        let disks = self.scenario.disks.iter().enumerate();
        disks
            .map(|(n, &sectors)| SpaceIn::absent(disk_info(n, sectors)))
            .collect()
    }

    /// The machine is the destination's: what came ahead and is old is absent again.
    pub fn take_disks_over(&mut self) {
        if self.dst.daemon.ahead.stale.is_empty() {
            self.dst.daemon.disks = self.absent_disks();
        }
        let daemon = &mut self.dst.daemon;
        for (disk, stale) in daemon.disks.iter_mut().zip(&daemon.ahead.stale) {
            disk.evict(stale);
        }
        daemon.ahead.pending = false;
    }

    /// Records what came ahead, now that the machine is this host's.
    pub fn record_ahead(&mut self) {
        if self.dst.daemon.ahead.stale.is_empty() {
            return;
        }
        for (disk, residency) in self.dst.daemon.disks.iter().zip(&mut self.dst.residency) {
            let held = disk.resident().runs();
            residency
                .lazy
                .extend(held.map(whimbrel_engine::inflow::Change::Filled));
        }
    }

    /// Copies of these units are about to be stored.
    pub fn tread(&mut self, space: SpaceId, runs: &[Extent]) {
        let ahead = &mut self.dst.daemon.ahead;
        if ahead.pending
            && let Some(trodden) = ahead.trodden.get_mut(usize::from(space.0))
        {
            for &run in runs {
                trodden.insert(run);
            }
        }
    }

    /// Whether zeroes must be stored there, though the file was made for this move.
    pub fn is_trodden(&self, space: SpaceId, run: Extent) -> bool {
        let trodden = self.dst.daemon.ahead.trodden.get(usize::from(space.0));
        !self.has(DriverFault::TroddenTakenForFresh)
            && trodden.is_some_and(|set| set.runs_within(run).next().is_some())
    }
}
