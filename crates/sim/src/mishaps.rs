//! Things that go wrong, done to the world.

use whimbrel_engine::switchover::{Epoch, Say};

use crate::destination::QemuState;
use crate::link::{LifeId, Side};
use crate::memory::SourceState;
use crate::message::Message;
use crate::scenario::{MS, Mishap, SECOND};
use crate::source::{OWN, SourceInbox};
use crate::world::{Event, World};

/// How long a person takes to see that a guest stands still for memory that is lost.
const PERSON: u64 = 60 * SECOND;

impl World {
    pub fn mishap(&mut self, n: usize) {
        let what = self.scenario.mishaps[n].what;
        let phase = self.src.switch.phase();
        self.note(|| format!("MISHAP {what:?}, the source being in {phase}"));
        self.coverage.strike(&what, phase);
        let mut until = self.now;
        match what {
            Mishap::Crash { side, down } => {
                self.daemon_dies(side, down);
                until += down;
            }
            Mishap::PowerCut { side, down } => {
                self.power_cut(side, down);
                until += down + PERSON;
            }
            Mishap::Outage { len } => {
                until += len;
                self.link.outage_until = self.link.outage_until.max(until);
            }
            Mishap::Cut => self.cut(),
            Mishap::DiskErrors { side, len } => {
                until += len;
                self.errors_until[side.index()] = until;
            }
            Mishap::QemuDies => self.destination_qemu_dies(),
            Mishap::Refuse => self.dst.refuse_ready = true,
            Mishap::LoadFails => self.dst.load_fails = true,
            Mishap::Cancel => self.tell_source(SourceInbox::Cancel),
            Mishap::TakeBack { lost } => {
                let lost = lost && self.dst.qemu.state == QemuState::Gone;
                self.tell_source(SourceInbox::TakeBack { lost });
            }
            Mishap::Stray { to, which } => self.stray(to, which),
        }
        self.last_mishap = self.last_mishap.max(until);
    }

    fn daemon_dies(&mut self, side: Side, down: u64) {
        let up = match side {
            Side::Source => self.src.driver.up,
            Side::Destination => self.dst.driver.up,
        };
        if !up {
            return;
        }
        match side {
            Side::Source => self.source_daemon_dies(),
            Side::Destination => self.destination_daemon_dies(),
        }
        self.after(down, Event::Restart(side));
    }

    pub fn restart(&mut self, side: Side) {
        self.note(|| format!("the {side:?}'s daemon starts"));
        match side {
            Side::Source => self.source_daemon_starts(),
            Side::Destination => self.destination_daemon_starts(),
        }
    }

    fn power_cut(&mut self, side: Side, down: u64) {
        let was_there = self.guest.at == Some(side)
            || (side == Side::Source && self.guest.at.is_none() && !self.guest.ran_there);
        self.daemon_dies(side, down);
        let rng = &mut self.chances.mishap;
        match side {
            Side::Source => {
                for store in &mut self.src.stores {
                    store.power_cut(rng);
                }
                self.src.qemu.state = SourceState::Gone;
                // The guest may lack memory at the destination for good: a person ends it there.
                self.after(down + PERSON, Event::PersonEndsGuest);
            }
            Side::Destination => {
                for store in &mut self.dst.stores {
                    store.power_cut(rng);
                }
                for residency in &mut self.dst.residency {
                    residency.power_cut(rng);
                }
                if self.dst.qemu.state != QemuState::None {
                    self.dst.qemu.state = QemuState::Gone;
                }
            }
        }
        if was_there && !self.guest.dead {
            self.guest_dies(true);
        } else if self.guest.dead && (side == Side::Destination) == self.guest.ran_there {
            // Of a guest that had died before, what it wrote and did not flush.
            for oracle in &mut self.guest.oracles {
                oracle.power_cut(std::iter::empty());
            }
            // It stood still somewhere, for memory that was lost.
            if self.guest.at == Some(side) {
                self.guest.at = None;
            }
        }
    }

    fn destination_qemu_dies(&mut self) {
        match self.dst.qemu.state {
            QemuState::None | QemuState::Gone => {}
            QemuState::Waiting | QemuState::LostLoading => self.dst.qemu.state = QemuState::Gone,
            QemuState::Loading => {
                self.dst.qemu.state = QemuState::Gone;
                self.loading_failed();
            }
            QemuState::Running => {
                self.dst.qemu.state = QemuState::Gone;
                self.guest_dies(false);
                self.process_ended();
            }
        }
    }

    /// A guest that lacks memory which nobody has any more stands still, and says so; a person ends it.
    pub fn person_ends_guest(&mut self) {
        let lacks = self.dst.qemu.placed.iter().any(Option::is_none);
        let there = matches!(self.dst.qemu.state, QemuState::Loading | QemuState::Running);
        if lacks && there && !self.src.qemu.is_there() {
            self.coverage
                .deed("a person ended a guest whose memory was lost");
            self.destination_qemu_dies();
        }
    }

    /// All connections break; each end notices in its own time.
    fn cut(&mut self) {
        let lives: Vec<LifeId> = self.link.lives.keys().copied().collect();
        for life in lives {
            if self.link.has_ended(life, Side::Source)
                && self.link.has_ended(life, Side::Destination)
            {
                continue;
            }
            for side in [Side::Source, Side::Destination] {
                let rng = &mut self.chances.mishap;
                let until = self.now + rng.below(self.link.path.delay + 1);
                let notices = match rng.below(10) {
                    0..6 => rng.below(50 * MS),
                    6..9 => rng.below(2 * SECOND),
                    _ => rng.below(40 * SECOND),
                };
                self.link.silence(life, side.other(), until);
                self.at(until + 1 + notices, Event::Notice(life, side));
                self.last_mishap = self.last_mishap.max(until + notices);
            }
        }
    }

    /// A message of an older migration, or of none, must change nothing.
    fn stray(&mut self, to: Side, which: u8) {
        let epoch = Epoch(OWN.0 - u64::from(which / 4));
        match to {
            Side::Source => {
                let say = match which % 4 {
                    0 => Say::Refused { epoch },
                    1 => Say::Accepted { epoch },
                    2 => Say::Drained { epoch },
                    _ => Say::Prepared { epoch },
                };
                self.tell_source(SourceInbox::Heard(match say {
                    Say::Prepared { epoch } => Message::Prepared { epoch },
                    say => Message::Own(say),
                }));
            }
            Side::Destination => {
                let say = match which % 4 {
                    0 => Say::Cancel { epoch },
                    1 => Say::Ask { epoch },
                    2 => Say::Completed { epoch },
                    _ => Say::Prepare { epoch },
                };
                // To a session that knows its epoch; before that a stray would be a session of its own.
                if self.dst.daemon.knows_its_epoch() {
                    self.tell_destination(crate::destination::DestinationInbox::Heard(
                        Message::Own(say),
                    ));
                }
            }
        }
    }
}
