//! `bench disks`: a guest at work moves with its disk, by Whimbrel's ways and by QEMU's own, side by side.
//!
//! QEMU's own: blockdev-mirror to an export of the destination's QEMU, and when the disk is equal, memory by
//! pre-copy or post-copy; the mirror ends while the guest stands still (see [`crate::compare`]). A freshly booted guest for
//! each move, which checks every page in the end, and whose disk is looked at from outside.
//!
//! How long reads take is told by the guest itself, for all movers alike: each quarter of a second its slowest. Of these
//! the quantiles are taken; they are above those of all reads, and compare.

mod case;
mod row;

use crate::compare::{self, Ways};
use crate::demo::{Figures, Setting};
use crate::link::LinkArgs;
use crate::screen::Screen;
use case::{Load, Mover, Way};
use clap::Args;
use row::{HEAD, Row};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use whimbrel_lab::net::Host;
use whimbrel_lab::pair::journey::{Journey, Moment, Route, travel};
use whimbrel_lab::pair::{Guest, Pair, PairError, PairSpec};

/// What `--quick` leaves: one load, and each way of disks and of memory once.
const QUICK_LOADS: [Load; 1] = [Load::Mail];
const QUICK_MOVERS: [Mover; 4] = [
    Mover::WhimbrelPostcopy,
    Mover::WhimbrelHybrid,
    Mover::QemuBackground,
    Mover::QemuBlockingPostcopy,
];

#[derive(Debug, Args)]
pub struct DisksArgs {
    /// What the guests do [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    load: Vec<Load>,
    /// Who moves them [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    mover: Vec<Mover>,
    /// One load, four movers
    #[arg(long)]
    quick: bool,
    /// Seconds that each move may take
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    limit: u64,
    /// Write all figures into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Report {
    setting: Setting,
    limit_s: u64,
    rows: Vec<Row>,
    took_s: f64,
}

/// 100 Mbit/s, a round trip of 20 ms.
fn link() -> LinkArgs {
    LinkArgs {
        link: 100_000_000,
        rtt: Duration::from_millis(20),
        loss: 0.0,
        seed: 1,
    }
}

fn chosen<T: clap::ValueEnum + Clone>(asked: &[T], quick: Option<&[T]>) -> Vec<T> {
    match (asked, quick) {
        ([], Some(quick)) => quick.to_vec(),
        ([], None) => T::value_variants().to_vec(),
        (asked, _) => asked.to_vec(),
    }
}

pub fn run(args: &DisksArgs) -> ExitCode {
    let began = Instant::now();
    let mut screen = Screen::new();
    let loads = chosen(&args.load, args.quick.then_some(&QUICK_LOADS[..]));
    let movers = chosen(&args.mover, args.quick.then_some(&QUICK_MOVERS[..]));
    let mut report = Report {
        setting: Setting::of(&link(), &Load::Mail.spec()),
        limit_s: args.limit,
        rows: Vec::new(),
        took_s: 0.0,
    };
    screen.put(&format!(
        "{} loads, {} movers over {}; {} s each at most",
        loads.len(),
        movers.len(),
        link().describe(),
        args.limit
    ));
    for &load in &loads {
        screen.put(&format!("\n{}: {}\n{HEAD}", load.name(), load.describe()));
        let first = report.rows.len();
        for &mover in &movers {
            let mut row = Row::new(load, mover);
            if let Err(error) = play(args, load, mover, &mut row, &mut screen) {
                row.problems.push(error.to_string());
            }
            screen.put(&row.text());
            report.rows.push(row);
        }
        row::compare(&mut report.rows[first..]);
    }
    report.took_s = began.elapsed().as_secs_f64();
    screen.put(&format!("\n{}", row::ratios(&report.rows)));
    let wrong = report.rows.iter().filter(|row| !row.is_sound()).count();
    let late = report.rows.iter().filter(|row| !row.finished).count();
    screen.put(&format!(
        "{} moves in {:.0} s: {wrong} with errors, {late} not finished within {} s",
        report.rows.len(),
        report.took_s,
        args.limit
    ));
    super::ended(&mut screen, &args.json, &report, wrong == 0)
}

fn play(
    args: &DisksArgs,
    load: Load,
    mover: Mover,
    row: &mut Row,
    screen: &mut Screen,
) -> Result<(), PairError> {
    let spec = load.spec();
    screen.while_doing("kernel, initramfs and disk", || spec.build())?;
    let pair = Pair::start(&PairSpec::new(link().lab()))?;
    match mover.way() {
        Way::Ours(disks) => ours(&pair, args, load, disks, row, screen),
        Way::Theirs(ways) => {
            theirs(&pair, args, load, ways, row, screen);
            Ok(())
        }
    }
}

fn ours(
    pair: &Pair,
    args: &DisksArgs,
    load: Load,
    disks: &str,
    row: &mut Row,
    screen: &mut Screen,
) -> Result<(), PairError> {
    let spec = load.spec();
    let setting = Setting::of(&link(), &spec);
    let mut guest = Guest::new(pair.lab(), spec)?;
    screen.while_doing("import and boot", || {
        pair.define(Host::A, &guest)?;
        pair.boot(Host::A, &mut guest)
    })?;
    let route = Route {
        options: vec!["--disks".to_owned(), disks.to_owned()],
        within: Duration::from_secs(args.limit),
        ..Route::from(Host::A)
    };
    let quiet_from = Instant::now();
    let mut began = None;
    let journey = travel(pair, &mut guest, &route, |moment| {
        if let Moment::Moving { since, view, .. } = moment {
            began.get_or_insert_with(|| Instant::now().checked_sub(since));
            screen.live(&format!(
                "{}: {} {:.1} %, {:.1} Mbit/s",
                row.mover,
                view.phase,
                f64::from(view.permille) / 10.0,
                view.rate as f64 / 1e6
            ));
        }
    })?;
    // A move that told nothing at all began when the rates before had been taken.
    let began = began.flatten().unwrap_or(quiet_from + route.rates_for);
    row.reads(guest.reports(), quiet_from, began, began + journey.took);
    row.finished = journey.ended.completed();
    let verdict = match row.finished {
        true => {
            let verdict = screen.while_doing("check", || pair.finish(Host::B, &mut guest));
            Some(verdict.map_err(|error| error.to_string()))
        }
        false => None,
    };
    let figures = Figures::gather(setting, &journey, verdict.as_ref());
    row.switch_s = switched(&journey);
    row.take_ours(&figures);
    Ok(())
}

/// When the command first told that the guest ran at the destination.
fn switched(journey: &Journey) -> Option<f64> {
    use whimbrel_lab::pair::answers::Phase;
    let there = [Phase::Run, Phase::Drain, Phase::Complete];
    let told = journey.phases.iter().filter(|(p, _)| there.contains(p));
    told.map(|(_, at)| at.as_secs_f64()).reduce(f64::min)
}

fn theirs(
    pair: &Pair,
    args: &DisksArgs,
    load: Load,
    ways: Ways,
    row: &mut Row,
    screen: &mut Screen,
) {
    let limit = Duration::from_secs(args.limit);
    let theirs = compare::run_by(pair, &load.spec(), ways, limit, screen);
    if let Some(times) = &theirs.times {
        row.reads(&times.reports, times.quiet_from, times.began, times.ended);
    }
    row.take_theirs(&theirs);
}
