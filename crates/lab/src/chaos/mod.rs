//! Every cell of the crash table, on real QEMUs: one of the four processes of a move is killed, or the link
//! is cut, in each of its phases; what comes of it is compared with what the table says.
//!
//! ```text
//!   host-a                                     host-b
//!   daemon ---------- emulated WAN ----------> daemon      each may get SIGKILL; a daemon is started again
//!     |                                          |
//!   QEMU, the guest                            QEMU, waiting, then the guest
//!     \------------- its reports ---------------/---> the client;  `running` looks at both from outside
//! ```
//!
//! `cell` has what there is to try, and the table. `strike` meets a phase from outside and strikes: the
//! product has no fault points. `settle` waits for the outcome. What is judged after each run:
//! - the outcome is one the table allows for the phase that was *really hit*, as both journals tell it;
//! - at no moment did the guest run at its source after it had run at its destination ([`running`]), and its
//!   numbered reports never went back; in the end one QEMU is left, or none where the table says so;
//! - a guest that lives works on without errors, and its disk is compared with everything known about it when
//!   its stage ends; the disk of one that crashed is compared at once, and it is booted from it.
//!
//! A guest that lives goes through the next run where it is, so runs go to and fro. Power cuts of hosts are
//! not here: `crates/sim` makes them.

pub mod cell;
mod journal;
pub mod running;
mod settle;
mod strike;

use crate::net::{Host, LabSpec};
use crate::pair::answers::{MigrationView, VolumeView};
use crate::pair::{Guest, GuestSpec, Pair, PairError, PairSpec, SiteSpec};
use crate::wan::WanSpec;
use cell::{Cell, Outcome, expected};
use journal::Journals;
use running::{NOTICED, Running};
use serde::{Deserialize, Serialize};
use settle::{Sides, is_well, settle};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use strike::{Draw, Striking, Stroke, fast};

/// The machine, and its volume.
const NAME: &str = "guest";

/// How often a cell is tried until its phase is hit.
pub const TRIES: u32 = 5;

/// Five reports left out: the guest stood still.
const SILENCE: Duration = Duration::from_millis(5 * INTERVAL_MS as u64);

/// Between two reports of the guest.
const INTERVAL_MS: u32 = 200;

/// How long two daemons may take to have their connection.
const CONNECTED_WITHIN: Duration = Duration::from_secs(30);

/// How long a guest that crashed may take to be at work again.
const BOOT_WITHIN: Duration = Duration::from_secs(300);

/// Runs with one guest before it is shut down and checked, so that a fault of its disk is found near the run
/// that made it.
const RUNS_OF_A_GUEST: u32 = 12;

#[derive(Clone, Debug)]
pub struct ChaosSpec {
    pub cells: Vec<Cell>,
    pub seed: u64,
}

/// What came of a cell.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    pub cell: String,
    /// Until the phase was hit.
    pub tries: u32,
    /// Phases that were hit instead, each judged as what it was.
    pub hit_instead: Vec<String>,
    pub hit: bool,
    pub outcome: Option<&'static str>,
    pub expected: Vec<&'static str>,
    /// What came of it when the operator had done what the table leaves to one.
    pub helped: Option<&'static str>,
    /// Source and destination, at the stroke and in the end.
    pub journals_at_stroke: String,
    pub journals: String,
    /// What both daemons said in the end, and the last that the source's told of the move.
    pub state: String,
    pub told: Vec<String>,
    /// From the stroke to the end of the guest's last silence, or else to its next report; none if it did
    /// not live. What the laboratory itself held is in it.
    pub again_s: Option<f64>,
    /// The guest's longest silence that lasted until after the stroke or began after it.
    pub silence_s: Option<f64>,
    pub dead_ms: u64,
    /// Half of the runs, but none that is struck in the drain.
    pub disks_ahead: bool,
    /// On a virtual processor at the destination, and at the source after that.
    pub ran_there_ms: f64,
    pub ran_here_after_ms: f64,
    pub took_s: f64,
    pub problems: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct ChaosReport {
    pub seed: u64,
    pub rows: Vec<Row>,
    /// Guests that were shut down and checked, and disks checked after a crash.
    pub guests_checked: u32,
    pub crashed_disks_checked: u32,
    pub took_s: f64,
    pub problems: Vec<String>,
}

impl ChaosReport {
    pub fn passed(&self) -> bool {
        self.problems.is_empty() && self.rows.iter().all(|row| row.problems.is_empty())
    }
}

/// Of `whimbrel status MACHINE`, what counts here.
#[derive(Deserialize)]
struct Status {
    migration: Option<MigrationView>,
}

fn latest(pair: &Pair, host: Host) -> Option<MigrationView> {
    let status: Status = pair.on(host).answer(&["status", NAME]).ok()?;
    status.migration
}

/// Tries each cell until its phase was hit. `tell` hears a line for each step.
///
/// # Errors
/// What keeps the trial from being made. What it finds is in the report's problems.
pub fn chaos(spec: &ChaosSpec, mut tell: impl FnMut(&str)) -> Result<ChaosReport, PairError> {
    let began = Instant::now();
    let mut report = ChaosReport {
        seed: spec.seed,
        ..ChaosReport::default()
    };
    let all = Cell::all();
    let mut stage: Option<Stage> = None;
    for &cell in &spec.cells {
        let number = all.iter().position(|c| *c == cell).unwrap_or(0) as u64;
        let mut row = Row::default();
        for attempt in 1..=TRIES {
            if stage.as_ref().is_some_and(|s| s.runs >= RUNS_OF_A_GUEST)
                && let Some(old) = stage.take()
            {
                old.finish(&mut report, &mut tell);
            }
            let on = match &mut stage {
                Some(stage) => stage,
                None => stage.insert(Stage::set(spec.seed, &mut tell)?),
            };
            let draw = Draw::new(spec.seed, number * u64::from(TRIES) + u64::from(attempt));
            let instead = std::mem::take(&mut row.hit_instead);
            row = on.run(cell, draw);
            row.tries = attempt;
            row.hit_instead.splice(..0, instead);
            tell(&row.line());
            report.crashed_disks_checked += u32::from(on.checked_disk);
            if !row.problems.is_empty() {
                on.pair.keep_files();
                tell(&format!(
                    "kept for a look: {}",
                    on.pair.folder().path().display()
                ));
            }
            if !on.goes_on {
                stage = None;
            }
            if row.hit || !row.problems.is_empty() {
                break;
            }
        }
        if !row.hit && row.problems.is_empty() {
            let said = format!("the phase was not hit in {TRIES} tries");
            row.problems.push(said);
        }
        report.rows.push(row);
    }
    if let Some(stage) = stage {
        stage.finish(&mut report, &mut tell);
    }
    report.took_s = began.elapsed().as_secs_f64();
    Ok(report)
}

/// Two hosts and a guest that goes to and fro between them.
struct Stage {
    running: Running,
    pair: Pair,
    guest: Guest,
    at: Host,
    runs: u32,
    /// Reports of an earlier boot.
    reports_before: usize,
    /// The guest lives, or was booted again.
    goes_on: bool,
    /// In the last run.
    checked_disk: bool,
}

impl Stage {
    fn set(seed: u64, tell: &mut impl FnMut(&str)) -> Result<Stage, PairError> {
        let wan = WanSpec {
            seed,
            ..WanSpec::symmetric(fast())
        };
        let mut pair = Pair::prepare(&PairSpec::new(LabSpec::new(wan)))?;
        let qemu = pair.folder().path().join("qemu");
        let named = "#!/bin/sh\nexec qemu-system-x86_64 \"$@\" -name debug-threads=on\n";
        std::fs::write(&qemu, named).map_err(PairError::io("write", &qemu))?;
        std::fs::set_permissions(&qemu, std::fs::Permissions::from_mode(0o755))
            .map_err(PairError::io("make executable", &qemu))?;
        for host in Host::BOTH {
            let site = SiteSpec {
                qemu: Some(qemu.clone()),
                ..SiteSpec::default()
            };
            pair.site(host).configure(&site)?;
            pair.site_mut(host).start()?;
        }
        let hosts = Host::BOTH.map(|host| (host, pair.site(host).namespace().clone()));
        let running = Running::start(hosts)?;
        let mut guest_spec = GuestSpec::small(NAME);
        guest_spec.params.interval_ms = INTERVAL_MS;
        let mut guest = Guest::new(pair.lab(), guest_spec)?;
        pair.define(Host::A, &guest)?;
        let took = pair.boot(Host::A, &mut guest)?;
        tell(&format!(
            "a guest is at work on host-a after {:.0} s",
            took.as_secs_f64()
        ));
        Ok(Stage {
            running,
            pair,
            guest,
            at: Host::A,
            runs: 0,
            reports_before: 0,
            goes_on: true,
            checked_disk: false,
        })
    }

    /// Whatever keeps a run from being made or judged is its problem.
    fn run(&mut self, cell: Cell, draw: Draw) -> Row {
        let began = Instant::now();
        let mut row = Row {
            cell: cell.to_string(),
            dead_ms: draw.dead.as_millis() as u64,
            disks_ahead: draw.disks_ahead,
            expected: cell.expected().iter().map(|o| o.name()).collect(),
            ..Row::default()
        };
        self.runs += 1;
        self.goes_on = false;
        self.checked_disk = false;
        if let Err(error) = self.try_run(cell, draw, &mut row) {
            row.problems.push(error.to_string());
            if let Ok(sides) = Sides::look(&self.pair, self.at) {
                row.state = sides.text();
            }
        }
        if !row.problems.is_empty() {
            self.goes_on = false;
        }
        row.took_s = began.elapsed().as_secs_f64();
        row
    }

    fn try_run(&mut self, cell: Cell, draw: Draw, row: &mut Row) -> Result<(), PairError> {
        let from = self.at;
        row.problems.extend(is_well(&mut self.guest));
        self.running.begin();
        let stroke = Striking::new(&mut self.pair, &self.running, from, cell, draw).strike()?;
        row.hit = stroke.phase == cell.moment.phase();
        if !row.hit {
            row.hit_instead.push(stroke.phase.to_string());
        }
        row.journals_at_stroke = stroke.journals.text();
        let (outcome, sides) = settle(&self.pair, &mut self.guest, from, None)?;
        row.outcome = outcome.map(Outcome::name);
        self.told(row, &stroke, &sides, from);
        let allowed = match row.hit {
            true => cell.expected(),
            false => expected(stroke.phase, cell.victim, cell.moment),
        };
        match outcome {
            None => row.problems.push("it comes to no outcome".to_owned()),
            // What was missed, and ended before it was struck, may have either of the moves' good ends.
            Some(outcome) if allowed.is_empty() && outcome.survives() => {}
            Some(outcome) if allowed.contains(&outcome) => {}
            Some(outcome) => row.problems.push(format!(
                "{} in {}, and the table has {}",
                outcome.name(),
                stroke.phase,
                names(allowed)
            )),
        }
        self.one_ran(from, row);
        self.guest_goes_on(outcome, from, row)?;
        self.reports_went_on(&stroke, row);
        Ok(())
    }

    /// What both sides left in writing.
    fn told(&self, row: &mut Row, stroke: &Stroke, sides: &Sides, from: Host) {
        let state = |host: Host| self.pair.site(host).state();
        let journals = Journals::read(&state(from), &state(from.other()), &stroke.migration);
        row.journals = journals.text();
        row.state = sides.text();
        let view = [&sides.source, &sides.destination];
        let messages = view.into_iter().filter_map(|side| side.migration.as_ref());
        row.told = messages.flat_map(|view| view.messages.clone()).collect();
    }

    /// The guest is well where it lives; one that crashed is booted again from what is left.
    fn guest_goes_on(
        &mut self,
        outcome: Option<Outcome>,
        from: Host,
        row: &mut Row,
    ) -> Result<(), PairError> {
        match outcome {
            Some(Outcome::Source | Outcome::Destination) => {
                self.at = match outcome {
                    Some(Outcome::Source) => from,
                    _ => from.other(),
                };
                row.problems.extend(is_well(&mut self.guest));
                self.goes_on = true;
            }
            // What the table leaves to the operator: end its QEMU, whose disks are whole; take it back.
            Some(Outcome::Starved) => {
                let qemus = self.pair.site(from.other()).qemus();
                qemus.into_iter().for_each(strike::kill);
                let crashed = [Outcome::CrashedAtSource, Outcome::CrashedAtDestination];
                return self.helped(Outcome::Starved, &crashed, from, row);
            }
            Some(Outcome::Paused) => {
                self.take_back(from)?;
                return self.helped(Outcome::Paused, &[Outcome::Source], from, row);
            }
            Some(Outcome::CrashedAtSource | Outcome::CrashedAtDestination) => {
                self.at = match outcome {
                    Some(Outcome::CrashedAtSource) => from,
                    _ => from.other(),
                };
                let command = self.pair.on(self.at);
                let volume: VolumeView = command.answer(&["volume", "show", NAME])?;
                row.problems
                    .extend(self.guest.verify_crashed(&volume.data)?);
                self.checked_disk = true;
                self.guest.listen();
                self.reports_before = self.guest.reports().len();
                self.pair.on(self.at).run(&["machine", "start", NAME])?;
                self.guest.wait_until_at_work(BOOT_WITHIN)?;
                self.goes_on = true;
            }
            None => {}
        }
        Ok(())
    }

    /// Asked again while the daemons are not connected.
    fn take_back(&self, from: Host) -> Result<(), PairError> {
        let began = Instant::now();
        loop {
            match self.pair.on(from).run(&["recover", NAME, "--take-back"]) {
                Err(PairError::Refused(_)) if began.elapsed() < CONNECTED_WITHIN => {}
                other => return other.map(drop),
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// After the operator's part.
    fn helped(
        &mut self,
        before: Outcome,
        wanted: &[Outcome],
        from: Host,
        row: &mut Row,
    ) -> Result<(), PairError> {
        let (outcome, sides) = settle(&self.pair, &mut self.guest, from, Some(before))?;
        row.helped = outcome.map(Outcome::name);
        if outcome.is_some_and(|outcome| wanted.contains(&outcome)) {
            return self.guest_goes_on(outcome, from, row);
        }
        row.state = sides.text();
        row.problems
            .push("the operator's part did not help".to_owned());
        Ok(())
    }

    /// Never at the source after it ran at the destination, by the processors' time.
    fn one_ran(&self, from: Host, row: &mut Row) {
        let ran = self.running.ran(from);
        row.ran_there_ms = ran.at_destination.as_secs_f64() * 1e3;
        row.ran_here_after_ms = ran.at_source_after.as_secs_f64() * 1e3;
        if ran.at_source_after > NOTICED {
            row.problems.push(format!(
                "the guest ran for {:?} at the source after {:?} at the destination",
                ran.at_source_after, ran.at_destination
            ));
        }
    }

    /// Their numbers never went back, and they tell when the guest stood still.
    fn reports_went_on(&mut self, stroke: &Stroke, row: &mut Row) {
        self.guest.listen();
        let reports = self.guest.reports();
        let life = &reports[self.reports_before.min(reports.len())..];
        for pair in life.windows(2) {
            if pair[1].1.seq <= pair[0].1.seq {
                row.problems.push(format!(
                    "the guest's report {} came after its report {}",
                    pair[1].1.seq, pair[0].1.seq
                ));
            }
        }
        if self.checked_disk || !self.goes_on {
            return;
        }
        let after = life.windows(2).filter(|pair| pair[1].0 > stroke.at);
        let gaps: Vec<(Instant, Duration)> = after
            .map(|pair| (pair[1].0, pair[1].0 - pair[0].0))
            .collect();
        let last = gaps.iter().rfind(|(_, gap)| *gap > SILENCE);
        let again = last.or(gaps.first()).map(|(at, _)| *at - stroke.at);
        row.again_s = again.map(|time| time.as_secs_f64());
        let longest = gaps.iter().map(|(_, gap)| gap.as_secs_f64());
        row.silence_s = longest.reduce(f64::max);
    }

    /// Shuts the guest down and checks everything.
    fn finish(mut self, report: &mut ChaosReport, tell: &mut impl FnMut(&str)) {
        let checked = self.pair.finish(self.at, &mut self.guest);
        let problems = match checked {
            Ok(verdict) => verdict.problems,
            Err(error) => vec![error.to_string()],
        };
        report.guests_checked += 1;
        let said = match problems.first() {
            None => "well".to_owned(),
            Some(problem) => problem.clone(),
        };
        tell(&format!(
            "the guest is shut down after {} runs, and it and its disk are checked: {said}",
            self.runs
        ));
        if !problems.is_empty() {
            self.pair.keep_files();
        }
        report.problems.extend(problems);
    }
}

fn names(outcomes: &[Outcome]) -> String {
    let names: Vec<&str> = outcomes.iter().map(|o| o.name()).collect();
    names.join(" or ")
}

/// The columns of [`Row::line`].
pub const HEAD: &str = "cell                                       try  outcome                     again  silence   took  journals";

impl Row {
    pub fn line(&self) -> String {
        let seconds = |s: Option<f64>| s.map_or("-".to_owned(), |s| format!("{s:.1} s"));
        let mut line = format!(
            "{:42} {:3}  {:26} {:>6} {:>8} {:4.0} s  {}",
            self.cell,
            self.tries,
            self.outcome.unwrap_or("none"),
            seconds(self.again_s),
            seconds(self.silence_s),
            self.took_s,
            self.journals,
        );
        if let Some(helped) = self.helped {
            line += &format!("  (then {helped})");
        }
        if !self.hit {
            line += &format!("  (hit {})", self.hit_instead.join(", "));
        }
        for problem in &self.problems {
            line += &format!("\n      PROBLEM {problem}\n      {}", self.state);
        }
        line
    }
}
