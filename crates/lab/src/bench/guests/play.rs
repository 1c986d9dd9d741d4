//! One case: boot, move, move back, look at everything.

use super::cases::{Case, During, NAME, Need};
use super::memory::HugePages;
use crate::demo::shown;
use crate::link::LinkArgs;
use crate::screen::Screen;
use serde::Serialize;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use whimbrel_lab::net::Host;
use whimbrel_lab::pair::answers::{
    MachineStatus, MigrationReport, MigrationView, Phase, SpaceKind, VolumeView,
};
use whimbrel_lab::pair::{Ended, Guest, Monitor, Pair, PairError, PairSpec};

const TICK: Duration = Duration::from_millis(100);

const MOVE_WITHIN: Duration = Duration::from_secs(600);

/// A guest that was reset must be at work again.
const REBOOT_WITHIN: Duration = Duration::from_secs(300);

const SPEAKS_WITHIN: Duration = Duration::from_secs(60);

const END_WITHIN: Duration = Duration::from_secs(120);

/// One move of a case, or the reason why there is none.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    case: String,
    what: String,
    way: String,
    moved: bool,
    /// Disks by the daemons, everything by the guest and from outside at the case's end.
    verified: bool,
    total_s: f64,
    blackout_ms: Option<f64>,
    ram_blocks: usize,
    ram_mib: f64,
    ram_sent_mib: f64,
    /// How RAM went, if not as asked.
    note: Option<String>,
    problems: Vec<String>,
    pub skipped: Option<String>,
}

pub const HEAD: &str = "case                   way  moved verified    total  blackout      RAM     sent  blocks  errors";

impl Row {
    fn of(case: &Case, from: Host) -> Row {
        Row {
            case: case.name.clone(),
            what: case.what.to_owned(),
            way: match from {
                Host::A => "a>b".to_owned(),
                Host::B => "b>a".to_owned(),
            },
            ..Row::default()
        }
    }

    pub fn is_wrong(&self) -> bool {
        !self.problems.is_empty()
    }

    pub fn text(&self) -> String {
        if let Some(reason) = &self.skipped {
            return format!("{:22} not here: {reason}", self.case);
        }
        let word = |yes| if yes { "yes" } else { "no" };
        format!(
            "{:22} {:4} {:5} {:8} {:6.1} s {:>9} {:4.0} MiB {:4.0} MiB {:7}  {}{}",
            self.case,
            self.way,
            word(self.moved),
            word(self.verified),
            self.total_s,
            shown(self.blackout_ms, "ms", 0),
            self.ram_mib,
            self.ram_sent_mib,
            self.ram_blocks,
            match self.problems.is_empty() {
                true => "none".to_owned(),
                false => self.problems.join("; "),
            },
            match &self.note {
                Some(note) => format!(" ({note})"),
                None => String::new(),
            },
        )
    }

    fn measured(&mut self, ended: &Ended, took: Duration) {
        self.moved = ended.completed();
        self.total_s = took.as_secs_f64();
        if !self.moved {
            self.problems
                .push(format!("the migration: {}", ended.describe()));
        }
        let Some(view) = ended.last.as_ref().map(|seen| &seen.view) else {
            return;
        };
        for space in view.spaces.iter().filter(|s| s.kind == SpaceKind::Ram) {
            self.ram_blocks += 1;
            self.ram_mib += space.units_total as f64 / 256.0;
            self.ram_sent_mib += space.units_sent as f64 / 256.0;
        }
        let by = view.messages.iter().find(|m| m.contains("pre-copy:"));
        self.note = by.cloned();
        if let Some(report) = &view.report {
            self.blackout_ms = MigrationReport::stop_to_resume_ms(report).or(report.blackout_ms);
            self.verified = report.verified;
            if !report.verified {
                self.problems
                    .push("the daemons did not compare the disks".to_owned());
            }
            let most = report.units_live + report.units_outdated + report.units_repeated;
            if report.units_sent > most || report.units_sent_again > 0 {
                self.problems.push(format!(
                    "{} units were sent, {most} had to be, {} twice",
                    report.units_sent, report.units_sent_again
                ));
            }
        }
    }
}

pub fn play(case: &Case, link: &LinkArgs, screen: &mut Screen) -> Vec<Row> {
    let mut kept = Vec::new();
    for need in &case.needs {
        let reason = match need {
            Need::Never(reason) => (*reason).to_owned(),
            Need::HugePages { mib } => match HugePages::take(*mib) {
                Ok(pages) => {
                    kept.push(pages);
                    continue;
                }
                Err(reason) => reason,
            },
        };
        let skipped = Some(reason);
        return vec![Row {
            skipped,
            ..Row::of(case, Host::A)
        }];
    }
    let mut rows = Vec::new();
    if let Err(error) = Scene::new(case, link, screen).and_then(|s| s.play(screen, &mut rows)) {
        if rows.is_empty() {
            rows.push(Row::of(case, Host::A));
        }
        if let Some(last) = rows.last_mut() {
            last.verified = false;
            last.problems.push(error.to_string());
        }
    }
    rows
}

/// Two hosts with the case's machine, at work on the first.
struct Scene<'c> {
    case: &'c Case,
    pair: Pair,
    guest: Guest,
    meddler: Meddler,
}

impl<'c> Scene<'c> {
    fn new(case: &'c Case, link: &LinkArgs, screen: &mut Screen) -> Result<Scene<'c>, PairError> {
        let name = &case.name;
        screen.while_doing(&format!("{name}: disk and initramfs"), || case.spec.build())?;
        let pair = Pair::start(&PairSpec::new(link.lab()))?;
        let mut guest = Guest::new(pair.lab(), case.spec.clone())?;
        if let Some(image) = &case.more_volume {
            let image = image.to_string_lossy();
            pair.on(Host::A)
                .run(&["volume", "import", "vars", &image])?;
        }
        screen.while_doing(&format!("{name}: boot"), || {
            pair.define(Host::A, &guest)?;
            pair.boot(Host::A, &mut guest)
        })?;
        let meddler = Meddler {
            during: case.during,
            at_source: Monitor::connect(pair.site(Host::A).namespace())?,
            done: [false; 2],
        };
        Ok(Scene {
            case,
            pair,
            guest,
            meddler,
        })
    }

    fn play(mut self, screen: &mut Screen, rows: &mut Vec<Row>) -> Result<(), PairError> {
        let played = self.moves(screen, rows);
        if played.is_err() || rows.iter().any(Row::is_wrong) {
            self.pair.keep_files();
            screen.put(&format!(
                "kept for a look: {}",
                self.pair.folder().path().display()
            ));
        }
        played
    }

    fn moves(&mut self, screen: &mut Screen, rows: &mut Vec<Row>) -> Result<(), PairError> {
        let during = self.case.during;
        let memory = u64::from(self.case.spec.memory_mib) << 20;
        self.meddler.before(memory)?;
        let mut row = Row::of(self.case, Host::A);
        let outcome = self.one_move(Host::A, true, &mut row, screen);
        rows.push(row);
        outcome?;
        let row = rows.last_mut().expect("pushed above");
        match during {
            During::PowerOffInDrain | During::PowerOffInCopy => return Ok(()),
            During::Paused | During::PausedInCopy => {
                let mut monitor = Monitor::connect(self.pair.site(Host::B).namespace())?;
                let status = monitor.status()?;
                if status != "paused" {
                    let problem = format!("it was stopped, and arrived {status}");
                    row.problems.push(problem);
                }
                self.resume()?;
            }
            _ => {}
        }
        if row.is_wrong() {
            return Ok(());
        }
        self.settled()?;
        if self.case.refused.is_some() {
            // It works on where it is.
            let verdict = self.pair.finish(Host::A, &mut self.guest)?;
            row.problems.extend(verdict.problems);
            row.verified = row.problems.is_empty();
            return Ok(());
        }
        let mut row = Row::of(self.case, Host::B);
        let outcome = self.one_move(Host::B, false, &mut row, screen);
        rows.push(row);
        outcome?;
        let row = rows.last_mut().expect("pushed above");
        if row.is_wrong() {
            return Ok(());
        }
        self.settled()?;
        let case = &self.case.name;
        let verdict = screen.while_doing(&format!("{case}: check"), || {
            self.pair.finish(Host::A, &mut self.guest)
        })?;
        row.problems.extend(verdict.problems);
        row.verified &= row.problems.is_empty();
        Ok(())
    }

    /// Lets a guest that arrived stopped go on, as its operator would.
    fn resume(&mut self) -> Result<(), PairError> {
        self.pair.on(Host::B).run(&["machine", "resume", NAME])?;
        Ok(())
    }

    /// Waits until the guest is at work, after a reboot too.
    fn settled(&mut self) -> Result<(), PairError> {
        let reboots = matches!(self.case.during, During::ResetInCopy | During::ResetInDrain);
        if reboots {
            self.guest.set_back();
            self.guest.wait_until_at_work(REBOOT_WITHIN)?;
        }
        self.guest.wait_for_report(SPEAKS_WITHIN)
    }

    fn one_move(
        &mut self,
        from: Host,
        meddle: bool,
        row: &mut Row,
        screen: &mut Screen,
    ) -> Result<(), PairError> {
        let began = Instant::now();
        let to = from.other().to_string();
        let mut args = vec!["migrate", NAME, "--to", &to];
        args.extend(self.case.options.iter().map(String::as_str));
        let mut follow = self.pair.on(from).follow(&args)?;
        let mut outcome = None;
        let ended = loop {
            let over = follow.is_over();
            let seen = follow.next(TICK)?;
            if let Some(seen) = &seen {
                let view = &seen.view;
                screen.live(&format!(
                    "{} {}: {} {:.1} %",
                    self.case.name,
                    row.way,
                    view.phase,
                    f64::from(view.permille) / 10.0
                ));
                if meddle && outcome.is_none() {
                    let Scene {
                        meddler,
                        pair,
                        guest,
                        ..
                    } = self;
                    outcome = meddler.meddle(view, pair, guest)?;
                }
            }
            if seen.is_none() && over {
                break follow.end(Duration::from_secs(10))?;
            }
            if began.elapsed() > MOVE_WITHIN {
                return Err(PairError::NotReached {
                    awaited: "its end",
                    after: MOVE_WITHIN,
                    last: format!("{:?}", seen.map(|s| s.view.phase)),
                });
            }
        };
        row.measured(&ended, began.elapsed());
        if let Some(word) = self.case.refused {
            row.problems.clear();
            row.note = Some(ended.describe());
            if row.moved || !ended.describe().contains(word) {
                let problem = format!("not refused with `{word}`");
                row.problems.push(problem);
            }
            return Ok(());
        }
        match (self.case.during, outcome) {
            (During::PowerOffInDrain, Some(last)) if meddle => self.ended_on(Host::B, last, row)?,
            (During::PowerOffInCopy, Some(last)) if meddle => {
                // Nothing moved, and nothing must be lost or left behind.
                row.problems.clear();
                row.note = Some(ended.describe());
                if row.moved {
                    row.problems.push("a machine moved that was off".to_owned());
                }
                if self.pair.machine(Host::B, NAME)?.is_some() {
                    row.problems
                        .push("the destination still knows it".to_owned());
                }
                self.ended_on(Host::A, last, row)?;
            }
            (During::PowerOffInDrain | During::PowerOffInCopy, None) if meddle => {
                row.problems
                    .push("the guest was not shut down in time".to_owned());
            }
            _ => {}
        }
        if meddle && !self.meddler.is_done() {
            row.problems.push("what was to happen did not".to_owned());
        }
        self.guest.listen();
        if self.guest.errors() > 0 {
            let problem = format!("the guest found {} errors", self.guest.errors());
            row.problems.push(problem);
        }
        row.verified &= row.problems.is_empty();
        Ok(())
    }

    /// A guest that shut itself down: what the host shows, and its disk there.
    fn ended_on(
        &mut self,
        host: Host,
        last: whimbrel_lab::guest::Outcome,
        row: &mut Row,
    ) -> Result<(), PairError> {
        let deadline = Instant::now() + END_WITHIN;
        while !self.pair.site(host).qemus().is_empty() && Instant::now() < deadline {
            std::thread::sleep(TICK);
        }
        let shown = self.pair.machine(host, NAME)?.map(|m| m.status);
        if shown != Some(MachineStatus::Defined) {
            let problem = format!("it shut itself down, and {host} shows {shown:?}");
            row.problems.push(problem);
        }
        let volume: VolumeView = self.pair.on(host).answer(&["volume", "show", NAME])?;
        let verdict = self.guest.verify(last, &volume.data)?;
        row.problems.extend(verdict.problems);
        row.verified = row.problems.is_empty();
        Ok(())
    }
}

/// Whoever does something to the machine while it moves.
struct Meddler {
    during: During,
    at_source: Monitor,
    /// What was done in the copy, and in the drain.
    done: [bool; 2],
}

impl Meddler {
    fn before(&mut self, memory: u64) -> Result<(), PairError> {
        match self.during {
            During::Balloon => {
                self.balloon(memory / 2)?;
                // The guest gives its pages one by one.
                let deadline = Instant::now() + SPEAKS_WITHIN;
                while self.actual()? > memory / 2 + (4 << 20) && Instant::now() < deadline {
                    std::thread::sleep(TICK);
                }
                Ok(())
            }
            During::Paused => self.tell("stop", json!({})),
            _ => Ok(()),
        }
    }

    fn is_done(&self) -> bool {
        match self.during {
            During::Nothing | During::Paused => true,
            During::Balloon => self.done == [true; 2],
            During::ResetInCopy | During::PausedInCopy | During::PowerOffInCopy => self.done[0],
            During::ResetInDrain | During::PowerOffInDrain => self.done[1],
        }
    }

    /// What is due in this phase; the last words of a guest that was shut down.
    fn meddle(
        &mut self,
        view: &MigrationView,
        pair: &Pair,
        guest: &mut Guest,
    ) -> Result<Option<whimbrel_lab::guest::Outcome>, PairError> {
        let stage = match view.phase {
            Phase::Copy => 0,
            Phase::Drain => 1,
            _ => return Ok(None),
        };
        if std::mem::replace(&mut self.done[stage], true) {
            return Ok(None);
        }
        let memory = u64::from(guest.spec().memory_mib) << 20;
        let there = || Monitor::connect(pair.site(Host::B).namespace());
        match (self.during, stage) {
            (During::Balloon, 0) => self.balloon(memory * 2 / 5)?,
            (During::Balloon, _) => {
                there()?.execute("balloon", json!({ "value": memory * 4 / 5 }))?;
            }
            (During::ResetInCopy, 0) => self.tell("system_reset", json!({}))?,
            (During::PausedInCopy, 0) => self.tell("stop", json!({}))?,
            (During::ResetInDrain, 1) => {
                there()?.execute("system_reset", json!({}))?;
            }
            (During::PowerOffInCopy, 0) | (During::PowerOffInDrain, 1) => {
                return guest.power_off(pair.lab()).map(Some);
            }
            _ => {}
        }
        Ok(None)
    }

    fn balloon(&mut self, bytes: u64) -> Result<(), PairError> {
        self.tell("balloon", json!({ "value": bytes }))
    }

    fn actual(&mut self) -> Result<u64, PairError> {
        let answer = self.at_source.execute("query-balloon", json!({}))?;
        Ok(answer["actual"].as_u64().unwrap_or(0))
    }

    fn tell(&mut self, command: &str, arguments: Value) -> Result<(), PairError> {
        self.at_source.execute(command, arguments).map(drop)
    }
}
