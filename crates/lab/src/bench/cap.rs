//! `bench cap`: whether `--bandwidth` and `throttle` hold on the wide area, RAM and disks together.
//!
//! A guest at work moves over a link that carries much more than it may use. The cap is changed under way;
//! what counts is what the source's host puts on the link, in IP packets, as the emulator sees them. Push does not
//! yield to the guest here (`--guest-latency off`): that would be less than the cap, and not the cap's doing.

use crate::screen::Screen;
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use whimbrel_lab::links::noise;
use whimbrel_lab::net::{Host, LabSpec};
use whimbrel_lab::pair::answers::{MigrationView, Phase, SpaceKind};
use whimbrel_lab::pair::{Guest, GuestSpec, Pair, PairError, PairSpec};
use whimbrel_lab::wan::{Direction, LineSpec, Wan, WanSpec};
use whimbrel_workload::params::Pace;

const NAME: &str = "cap";
const MORE: &str = "more";

/// Of the volume beside the guest's own: what the caps let through, and more.
const MORE_BYTES: u64 = 192 << 20;

const LINK: u64 = 200_000_000;
const ONE_WAY: Duration = Duration::from_millis(10);

/// Caps in Mbit/s, one after the other.
const CAPS: [u64; 6] = [20, 50, 5, 50, 20, 5];

const EVERY: Duration = Duration::from_millis(100);

/// A new rate holds when so long a time has it, within the share.
const HOLDS: usize = 5;
const SHARE: f64 = 0.05;

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub struct CapArgs {
    /// Seconds with each cap
    #[arg(long, value_name = "S", default_value_t = 8)]
    seconds: u64,
    /// Write all figures into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One cap.
#[derive(Clone, Debug, Serialize)]
struct Row {
    cap_mbits: u64,
    /// From a second after the change to the next.
    mbits: f64,
    /// In per cent of the cap.
    error: f64,
    /// From the command's start until the rate held.
    settled_s: Option<f64>,
    /// What the command itself took.
    command_s: f64,
    /// Content that arrived meanwhile, in MiB.
    ram_mib: f64,
    disk_mib: f64,
    /// Megabits a second, by 100 ms.
    series: Vec<f64>,
}

impl Row {
    fn misses(&self) -> bool {
        self.error.abs() > 100.0 * SHARE || self.settled_s.is_none_or(|s| s > 1.0)
    }

    fn text(&self) -> String {
        format!(
            "{:4} Mbit/s  {:6.2} Mbit/s  {:+5.1} %  {:>6}  {:6.1} MiB  {:6.1} MiB{}",
            self.cap_mbits,
            self.mbits,
            self.error,
            self.settled_s
                .map_or("-".to_owned(), |s| format!("{s:.1} s")),
            self.ram_mib,
            self.disk_mib,
            if self.misses() { "  *" } else { "" }
        )
    }
}

const HEAD: &str = "      cap   on the link    error  settled        RAM       disks";

pub fn run(args: &CapArgs) -> ExitCode {
    let mut screen = Screen::new();
    let rows = match play(args, &mut screen) {
        Ok(rows) => rows,
        Err(error) => {
            screen.put(&error.to_string());
            return ExitCode::FAILURE;
        }
    };
    screen.put(HEAD);
    for row in &rows {
        screen.put(&row.text());
    }
    super::ended(&mut screen, &args.json, &rows, true)
}

fn play(args: &CapArgs, screen: &mut Screen) -> Result<Vec<Row>, PairError> {
    let mut spec = GuestSpec::small(NAME);
    spec.more_volumes = vec![MORE.to_owned()];
    // What a guest demands is never held back, so it must be less than the lowest cap.
    spec.params.read.pace = Pace::PerSecond(64);
    screen.while_doing("the guest is built", || spec.build())?;
    let line = LineSpec::new(LINK, ONE_WAY);
    let pair = Pair::start(&PairSpec::new(LabSpec::new(WanSpec::symmetric(line))))?;
    let mut guest = Guest::new(pair.lab(), spec)?;
    let file = pair.folder().path().join("noise");
    noise(&file, MORE_BYTES)?;
    let command = pair.on(Host::A);
    command.run(&["volume", "import", MORE, &file.to_string_lossy()])?;
    screen.while_doing("import and boot", || {
        pair.define(Host::A, &guest)?;
        pair.boot(Host::A, &mut guest)
    })?;
    let first = format!("{}Mbit", CAPS[0]);
    command.run(&[
        "migrate",
        NAME,
        "--to",
        "host-b",
        "--ram",
        "postcopy",
        "--compress",
        "none",
        "--bandwidth",
        &first,
        "--guest-latency",
        "off",
        "--detach",
    ])?;
    let deadline = Instant::now() + PATIENCE;
    while view(&pair).map_or(true, |view| view.phase != Phase::Drain) {
        if Instant::now() >= deadline {
            return Err(PairError::NotReached {
                awaited: "the drain",
                after: PATIENCE,
                last: "no drain".to_owned(),
            });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let series = threads.spawn(|| sample(pair.lab().wan(), &stop));
        let marks = mark(args, &pair, screen);
        stop.store(true, Ordering::Relaxed);
        let series = series
            .join()
            .expect("a panic there is a fault of this program");
        let marks = marks?;
        Ok(marks
            .windows(2)
            .map(|pair| evaluate(&series, &pair[0], &pair[1]))
            .collect())
    })
}

/// When a cap was set, and what had arrived by then.
struct Mark {
    cap_mbits: u64,
    at: Instant,
    done: Instant,
    ram: u64,
    disk: u64,
}

fn mark(args: &CapArgs, pair: &Pair, screen: &mut Screen) -> Result<Vec<Mark>, PairError> {
    let mut marks = Vec::new();
    for (n, &cap) in CAPS.iter().chain(&[CAPS[0]]).enumerate() {
        let view = view(pair)?;
        let at = Instant::now();
        // The first is the one it began with.
        if n > 0 {
            let rate = format!("{cap}Mbit");
            pair.on(Host::A).run(&["throttle", NAME, &rate])?;
        }
        let arrived = |kind| {
            let spaces = view.spaces.iter().filter(|s| s.kind == kind);
            spaces.map(|s| s.units_resident * 4096).sum()
        };
        marks.push(Mark {
            cap_mbits: cap,
            at,
            done: Instant::now(),
            ram: arrived(SpaceKind::Ram),
            disk: arrived(SpaceKind::Disk),
        });
        if n < CAPS.len() {
            screen.live(&format!("{cap} Mbit/s"));
            std::thread::sleep(Duration::from_secs(args.seconds));
        }
    }
    Ok(marks)
}

fn view(pair: &Pair) -> Result<MigrationView, PairError> {
    #[derive(serde::Deserialize)]
    struct Status {
        migration: Option<MigrationView>,
    }
    let status: Status = pair.on(Host::B).answer(&["status", NAME])?;
    status.migration.ok_or(PairError::EndedEarly {
        awaited: "the last cap",
        end: "there is no move".to_owned(),
    })
}

/// Bytes put on the link so far, ten times a second.
fn sample(wan: &Wan, stop: &AtomicBool) -> Vec<(Instant, u64)> {
    let mut series = Vec::new();
    let mut due = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let bytes = wan.stats(Direction::AToB).counts.in_bytes;
        series.push((Instant::now(), bytes));
        due += EVERY;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    series
}

fn mbits(from: &(Instant, u64), to: &(Instant, u64)) -> f64 {
    (to.1 - from.1) as f64 * 8e-6 / (to.0 - from.0).as_secs_f64()
}

fn evaluate(series: &[(Instant, u64)], mark: &Mark, next: &Mark) -> Row {
    let within: Vec<_> = (series
        .iter()
        .filter(|(at, _)| *at >= mark.at && *at < next.at))
    .collect();
    let cap = mark.cap_mbits as f64;
    let is_steady = |(at, _): &&&(Instant, u64)| *at >= mark.at + Duration::from_secs(1);
    let mean = match (within.iter().find(is_steady), within.last()) {
        (Some(first), Some(last)) if last.0 > first.0 => mbits(first, last),
        _ => f64::NAN,
    };
    let near = |rate: f64| (rate / cap - 1.0).abs() <= SHARE;
    let last = within.last();
    let settled = (0..within.len().saturating_sub(HOLDS)).find(|&n| {
        let all = last.is_some_and(|last| near(mbits(within[n], last)));
        all && near(mbits(within[n], within[n + HOLDS]))
    });
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    Row {
        cap_mbits: mark.cap_mbits,
        mbits: mean,
        error: (mean / cap - 1.0) * 100.0,
        settled_s: settled.map(|n| (within[n].0 - mark.at).as_secs_f64()),
        command_s: (mark.done - mark.at).as_secs_f64(),
        ram_mib: mib(next.ram - mark.ram),
        disk_mib: mib(next.disk - mark.disk),
        series: within
            .windows(2)
            .map(|pair| mbits(pair[0], pair[1]))
            .collect(),
    }
}
