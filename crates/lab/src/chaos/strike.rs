//! Meeting a moment of a move from outside, and the stroke.
//!
//! The product has nothing for this to take hold of. The phases that last (prepare, copy, drain) are waited
//! for in what the command tells. Those of milliseconds are made to last by stopping (SIGSTOP) whoever would
//! end them, or by cutting the link as they begin, or they are met by polling what appears on the way:
//! a record in a journal, a descriptor in QEMU's file table. Each hold ends right after the stroke.

use super::cell::{Cell, Moment, Victim};
use super::journal::{Journals, migrations, records};
use super::running::Running;
use super::{NAME, latest};
use crate::net::Host;
use crate::pair::answers::{MigrationState, Phase};
use crate::pair::{Follow, Pair, PairError};
use crate::wan::{Direction, LineSpec};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use whimbrel_workload::chance::Rng;

/// How long each thing that is waited for may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between two looks at what a moment is met by. A phase of milliseconds is hit within it.
const POLL: Duration = Duration::from_micros(100);

/// What of the stopped guest's memory QEMU had not delivered takes tens of milliseconds; far more.
const LAST_PAGES: Duration = Duration::from_millis(500);

/// Before the drain and after the stroke.
const FAST: u64 = 400_000_000;

/// Until the stroke in the drain, which is to find it under way.
const SLOW: u64 = 40_000_000;

const ONE_WAY: Duration = Duration::from_millis(5);

pub fn fast() -> LineSpec {
    LineSpec::new(FAST, ONE_WAY)
}

/// What is drawn for one try.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// From the moment to the stroke, in thousandths of what the moment allows.
    pub delay: u64,
    /// How long a daemon stays dead.
    pub dead: Duration,
    /// How long the link stays cut.
    pub cut: Duration,
    /// `--disks hybrid`: what the guest does not write to of its disk goes ahead.
    pub disks_ahead: bool,
}

impl Draw {
    pub fn new(seed: u64, stream: u64) -> Draw {
        let mut rng = Rng::new(seed, stream);
        Draw {
            delay: rng.below(1000),
            dead: Duration::from_millis(rng.below(1500)),
            cut: Duration::from_millis(1000 + rng.below(2500)),
            disks_ahead: rng.below(2) == 0,
        }
    }

    fn of(&self, most: Duration) -> Duration {
        most * (self.delay as u32) / 1000
    }
}

/// What was struck, when and where.
#[derive(Clone, Debug)]
pub struct Stroke {
    pub at: Instant,
    pub migration: String,
    /// As both sides had it at the stroke.
    pub journals: Journals,
    /// The phase that was really hit.
    pub phase: Phase,
}

/// One move with its stroke.
pub struct Striking<'p> {
    pair: &'p mut Pair,
    running: &'p Running,
    from: Host,
    cell: Cell,
    draw: Draw,
    before: BTreeSet<String>,
    follow: Option<Follow>,
    /// Stopped by SIGSTOP.
    held: Vec<u32>,
    daemon_held: bool,
    link_held: bool,
    migration: String,
    source_qemu: u32,
}

impl<'p> Striking<'p> {
    pub fn new(
        pair: &'p mut Pair,
        running: &'p Running,
        from: Host,
        cell: Cell,
        draw: Draw,
    ) -> Self {
        let before = migrations(&pair.site(from).state());
        Striking {
            pair,
            running,
            from,
            cell,
            draw,
            before,
            follow: None,
            held: Vec::new(),
            daemon_held: false,
            link_held: false,
            migration: String::new(),
            source_qemu: 0,
        }
    }

    /// Begins the move, meets the moment, strikes, lets go, and starts a daemon that was killed again.
    pub fn strike(mut self) -> Result<Stroke, PairError> {
        let struck = self.try_strike();
        // Whatever went wrong, nobody is left stopped.
        self.let_go();
        let mended = self.mend();
        let stroke = struck?;
        mended?;
        Ok(stroke)
    }

    fn to(&self) -> Host {
        self.from.other()
    }

    fn state(&self, host: Host) -> PathBuf {
        self.pair.site(host).state()
    }

    fn try_strike(&mut self) -> Result<Stroke, PairError> {
        self.pair.lab().wan().set_both(fast())?;
        self.source_qemu = self.qemu(self.from)?;
        let told = self.begin()?;
        self.meet()?;
        let stroke = self.hit(told)?;
        self.after()?;
        Ok(stroke)
    }

    /// Until the move is where the order to switch would be next; what the command told last.
    fn begin(&mut self) -> Result<Phase, PairError> {
        let to = self.to().to_string();
        let mut args = vec!["migrate", NAME, "--to", &to];
        let held = self.cell.moment != Moment::Starting;
        if held {
            args.push("--hold");
        }
        // With little left for it, the drain is over before it is struck.
        if self.draw.disks_ahead && self.cell.moment != Moment::Draining {
            args.extend(["--disks", "hybrid"]);
        }
        let mut follow = self.pair.on(self.from).follow(&args)?;
        if held {
            let seen = follow.until("being held", PATIENCE, |view| {
                view.state == MigrationState::Held
            })?;
            self.migration = seen.view.id;
        } else {
            self.wait("the move's beginning", |this| {
                let now = migrations(&this.state(this.from));
                let new = now.difference(&this.before).next().cloned();
                this.migration = new.unwrap_or_default();
                !this.migration.is_empty()
            })?;
        }
        self.follow = Some(follow);
        Ok(if held { Phase::Copy } else { Phase::Prepare })
    }

    /// Comes to the moment, holding what makes it last.
    fn meet(&mut self) -> Result<(), PairError> {
        match self.cell.moment {
            Moment::Starting => {
                self.wait("the destination's QEMU", |this| {
                    !this.pair.site(this.to()).qemus().is_empty()
                })?;
                let qemu = self.qemu(self.to())?;
                self.hold(qemu);
                self.rest(Duration::from_millis(300));
            }
            Moment::Held => self.rest(Duration::from_millis(500)),
            Moment::BeforeStop => {
                self.hold(self.source_qemu);
                self.switch()?;
                self.told(Phase::Quiesce)?;
                self.rest(Duration::from_millis(300));
            }
            Moment::InStop => {
                self.switch_to_stop()?;
                self.rest(Duration::from_millis(16));
            }
            Moment::Unheard | Moment::UnheardAtOnce => {
                self.switch_to_stop()?;
                self.cut(None)?;
                self.recorded(self.from, "granted")?;
                if self.cell.moment == Moment::Unheard {
                    std::thread::sleep(LAST_PAGES);
                }
            }
            Moment::Unread => {
                let to = self.to();
                self.switch_to_stop()?;
                self.pair.site_mut(to).signal(Signal::STOP)?;
                self.daemon_held = true;
                self.recorded(self.from, "granted")?;
                std::thread::sleep(10 * ONE_WAY);
            }
            Moment::Loading => {
                let qemu = self.qemu(self.to())?;
                self.switch_to_stop()?;
                self.hold(qemu);
                self.recorded(self.to(), "accepted")?;
                self.rest(Duration::from_millis(300));
            }
            Moment::Accepted => {
                self.switch()?;
                self.recorded(self.to(), "accepted")?;
                self.rest(Duration::from_millis(60));
            }
            Moment::Draining => {
                self.switch()?;
                self.recorded(self.to(), "accepted")?;
                let slow = LineSpec::new(SLOW, ONE_WAY);
                self.pair.lab().wan().set_both(slow)?;
                self.recorded(self.from, "peer-accepted")?;
                self.rest(Duration::from_millis(2000));
            }
            Moment::Completed => {
                self.switch()?;
                self.recorded(self.from, "completed")?;
            }
        }
        Ok(())
    }

    fn hit(&mut self, told: Phase) -> Result<Stroke, PairError> {
        let (from, to) = (self.from, self.to());
        let at = Instant::now();
        match self.cell.victim {
            Victim::SourceDaemon => self.pair.site_mut(from).kill9()?,
            Victim::DestinationDaemon => {
                self.pair.site_mut(to).kill9()?;
                self.daemon_held = false;
            }
            Victim::SourceQemu => kill(self.source_qemu),
            Victim::DestinationQemu => {
                let qemus = self.pair.site(to).qemus();
                qemus.into_iter().for_each(kill);
            }
            Victim::Link => self.cut(Some(self.draw.cut))?,
        }
        let journals = Journals::read(&self.state(from), &self.state(to), &self.migration);
        let phase = match (journals.phase(), self.cell.moment) {
            (Some(phase), _) => phase,
            // What made it last, or what it was met by, is what says so.
            (None, Moment::BeforeStop | Moment::InStop) => Phase::Quiesce,
            (None, _) => told,
        };
        Ok(Stroke {
            at,
            migration: self.migration.clone(),
            journals,
            phase,
        })
    }

    /// Holds end; what the moment kept from happening goes on.
    fn after(&mut self) -> Result<(), PairError> {
        self.let_go();
        self.follow = None;
        if self.cell.victim.is_daemon() {
            std::thread::sleep(self.draw.dead);
            let host = match self.cell.victim {
                Victim::SourceDaemon => self.from,
                _ => self.to(),
            };
            self.pair.site_mut(host).start()?;
        }
        if self.link_held && self.cell.victim == Victim::Link {
            std::thread::sleep(self.draw.cut);
        }
        // What of a move nobody told to switch would still wait for the order.
        let waits = matches!(self.cell.moment, Moment::Held)
            && matches!(self.cell.victim, Victim::Link | Victim::DestinationQemu);
        if waits {
            self.switch()?;
        }
        Ok(())
    }

    /// The link as it was.
    fn mend(&mut self) -> Result<(), PairError> {
        let wan = self.pair.lab().wan();
        wan.set_both(fast())?;
        if std::mem::take(&mut self.link_held) {
            Direction::BOTH.into_iter().try_for_each(|d| wan.mend(d))?;
        }
        Ok(())
    }

    /// Cuts the link for a time, or until it is mended.
    fn cut(&mut self, time: Option<Duration>) -> Result<(), PairError> {
        if self.link_held {
            // Already; it lasts so much longer.
            return Ok(());
        }
        self.link_held = time.is_none();
        let wan = self.pair.lab().wan();
        for direction in Direction::BOTH {
            wan.cut(direction, time)?;
        }
        Ok(())
    }

    fn let_go(&mut self) {
        for pid in self.held.drain(..) {
            signal(pid, Signal::CONT);
        }
        if std::mem::take(&mut self.daemon_held) {
            let to = self.to();
            if let Err(error) = self.pair.site_mut(to).signal(Signal::CONT) {
                tracing::warn!(%error, "a daemon stays stopped");
            }
        }
    }

    fn hold(&mut self, pid: u32) {
        signal(pid, Signal::STOP);
        self.held.push(pid);
    }

    fn switch(&self) -> Result<(), PairError> {
        self.running.begin();
        self.pair.on(self.from).run(&["switch", NAME])?;
        Ok(())
    }

    /// Until the source's QEMU was given the end of its stream to keep: it is asked to stop next. What holds
    /// up the destination or the link may begin only now, as a move that is held up is not switched.
    fn switch_to_stop(&mut self) -> Result<(), PairError> {
        let before = descriptors(self.source_qemu);
        self.switch()?;
        self.wait("the stop", |this| descriptors(this.source_qemu) > before)
    }

    fn rest(&self, most: Duration) {
        std::thread::sleep(self.draw.of(most));
    }

    /// The one QEMU with a machine on a host.
    fn qemu(&self, host: Host) -> Result<u32, PairError> {
        match self.pair.site(host).qemus()[..] {
            [qemu] => Ok(qemu),
            ref other => Err(PairError::NotReached {
                awaited: "one QEMU with a machine",
                after: Duration::ZERO,
                last: format!("{host} has {other:?}"),
            }),
        }
    }

    fn told(&mut self, phase: Phase) -> Result<(), PairError> {
        let Some(follow) = &mut self.follow else {
            return Ok(());
        };
        follow.until("the phase", PATIENCE, |view| view.phase == phase)?;
        Ok(())
    }

    fn recorded(&mut self, host: Host, word: &'static str) -> Result<(), PairError> {
        self.wait(word, |this| {
            let state = this.state(host);
            records(&state, &this.migration).iter().any(|r| r == word)
        })
    }

    fn wait(
        &mut self,
        awaited: &'static str,
        mut met: impl FnMut(&mut Self) -> bool,
    ) -> Result<(), PairError> {
        let deadline = Instant::now() + PATIENCE;
        while !met(self) {
            if Instant::now() >= deadline {
                let host = self.from;
                return Err(PairError::NotReached {
                    awaited,
                    after: PATIENCE,
                    last: format!("{:?}", latest(self.pair, host).map(|v| (v.phase, v.state))),
                });
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}

/// How many a process has open.
fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Ends a process now; one that has ended already stays so.
pub fn kill(pid: u32) {
    signal(pid, Signal::KILL);
}

fn signal(pid: u32, signal: Signal) {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return;
    };
    // It may have ended.
    let _ = kill_process(pid, signal);
}
