//! What must hold when all is over: somebody owns the machine, all of it is there, and nothing is left half done
//! without having been said.

use whimbrel_engine::switchover::{Phase, Record};

use crate::coverage::Outcome;
use crate::destination::QemuState;
use crate::guest::Thread;
use crate::link::Side;
use crate::memory::SourceState;
use crate::store::SECTORS;
use crate::world::World;

impl World {
    pub fn waits_for_person(&self) -> bool {
        self.dst.needs_operator.is_some()
    }

    /// Whether neither daemon has anything left to do.
    pub fn is_settled(&self) -> bool {
        let over = self.src.driver.up
            && self.dst.driver.up
            && !self.src.daemon.session
            && (!self.dst.daemon.session || self.dst.daemon.only_answers());
        over || self.waits_for_person()
    }

    pub fn not_settled(&mut self) {
        let (source, destination) = (self.src.switch.phase(), self.dst.switch.phase());
        let link = self.src.daemon.life.is_some();
        let left: u64 = self
            .dst
            .daemon
            .disks
            .iter()
            .map(|d| d.info().units() - d.resident().len())
            .sum();
        self.broken(
            "ends",
            format!(
                "{} s after the last mishap the source is in {source}, the destination in {destination}, connected: {link}, {left} units of disks absent, QEMU there {:?}, RAM absent there: {:?}",
                crate::world::FAIR / crate::scenario::SECOND,
                self.dst.qemu.state,
                self.dst.daemon.ram.as_ref().map(|r| r.info().units() - r.resident().len()),
            ),
        );
    }

    /// Nothing happens any more.
    pub fn verdict(&mut self) {
        let outcome = if self.waits_for_person() {
            Outcome::Operator
        } else if !self.is_settled() {
            return self.not_settled();
        } else {
            match self.src.switch.phase() {
                Phase::Complete => Outcome::Completed,
                Phase::Cancel | Phase::Rewind | Phase::Prepare => {
                    if matches!(self.src.journal.last(), Some(Record::Kept { epoch }) if *epoch != crate::source::OWN)
                    {
                        Outcome::Rewound
                    } else {
                        Outcome::Cancelled
                    }
                }
                other => return self.broken("ends", format!("the source ended in {other}")),
            }
        };
        *self.coverage.outcomes.entry(outcome).or_default() += 1;
        match outcome {
            Outcome::Completed => self.at_destination(),
            Outcome::Cancelled | Outcome::Rewound => self.at_source(),
            Outcome::Operator => {}
        }
    }

    fn at_destination(&mut self) {
        let asked = |record: &Record| matches!(record, Record::AskedBack { .. });
        if self.src.journal.iter().any(asked) {
            let what = "the machine was asked back, and the move completed".to_string();
            return self.broken("asked back", what);
        }
        if !matches!(self.dst.journal.last(), Some(Record::Completed { .. })) {
            let what = format!(
                "the source is complete, the destination's journal {:?}",
                self.dst.journal
            );
            return self.broken("nobody owns it", what);
        }
        self.guest_is(Side::Destination);
        for disk in 0..self.dst.stores.len() {
            for sector in 0..self.dst.stores[disk].sectors() {
                let seen = self.dst.stores[disk].read(sector);
                self.check_sector(disk, sector, seen);
            }
        }
        if !self.guest.dead {
            for page in 0..self.guest.memory.len() {
                let (seen, expected) = (self.dst.qemu.placed[page], self.guest.memory[page]);
                if seen != Some(expected) {
                    self.broken(
                        "reads",
                        format!("page {page} holds {seen:?}, not {expected}"),
                    );
                }
            }
        }
    }

    fn at_source(&mut self) {
        let last = self.dst.journal.last();
        if !matches!(
            last,
            None | Some(Record::Refused { .. } | Record::Preparing { .. } | Record::Yielded { .. })
        ) {
            let what = format!(
                "the source keeps the machine, the destination's journal is {:?}",
                self.dst.journal
            );
            return self.broken("two owners", what);
        }
        let yielded = matches!(last, Some(Record::Yielded { .. }));
        if (self.dst.made && !yielded)
            || !matches!(self.dst.qemu.state, QemuState::None | QemuState::Gone)
        {
            self.broken(
                "half done",
                "the destination keeps what was made for the machine",
            );
        }
        self.guest_is(Side::Source);
        for disk in 0..self.src.stores.len() {
            for unit in 0..self.src.stores[disk].sectors().div_ceil(SECTORS) {
                let content = self.src.stores[disk].unit(unit);
                let sectors = self.src.stores[disk].sectors();
                for sector in unit * SECTORS..sectors.min((unit + 1) * SECTORS) {
                    self.check_sector(disk, sector, content[(sector % SECTORS) as usize]);
                }
            }
        }
        if !self.guest.dead && self.src.qemu.memory != self.guest.memory {
            self.broken(
                "reads",
                "the guest's memory at the source is not what it was",
            );
        }
    }

    /// The guest runs there and has done all it wanted, or is gone as its host or its QEMU is.
    fn guest_is(&mut self, side: Side) {
        if self.guest.dead {
            return;
        }
        let runs = match side {
            Side::Source => self.src.qemu.state == SourceState::Running,
            Side::Destination => self.dst.qemu.state == QemuState::Running,
        };
        if !runs || self.guest.at != Some(side) {
            let what = format!(
                "the {side:?} owns the machine, whose guest is at {:?}",
                self.guest.at
            );
            return self.broken("nobody runs it", what);
        }
        if let Some(thread) = self.guest.threads.iter().find(|t| **t != Thread::Done) {
            let what = format!(
                "a thread of the guest is {thread:?} for ever; requests {:?}",
                self.guest.ops
            );
            self.broken("ends", what);
        }
    }
}
