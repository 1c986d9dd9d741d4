//! A move by Whimbrel.

use super::RamArgs;
use super::case::{Cell, GuestKind, Ours, STREAM_PORT};
use super::cpu::CpuMeter;
use super::row::{Row, Seen};
use super::stream::StreamClient;
use crate::screen::Screen;
use serde::Deserialize;
use std::process::Command;
use std::time::{Duration, Instant};
use whimbrel_lab::net::{Host, guest_address};
use whimbrel_lab::pair::answers::{
    MachineStatus, MigrationReport, MigrationState, MigrationView, Phase, SpaceKind,
};
use whimbrel_lab::pair::journey::{Journey, Moment, Route, travel};
use whimbrel_lab::pair::{Guest, Pair, PairError, PairSpec, whimbrel_program};

/// How long a move that was given up may take to end.
const CANCEL_WITHIN: Duration = Duration::from_secs(60);

/// Whether the command under test knows an option of `migrate`.
pub fn knows(option: &str) -> Result<bool, PairError> {
    let program = whimbrel_program()?;
    let output = Command::new(&program).args(["migrate", "--help"]).output();
    let output = output.map_err(|source| PairError::Start {
        command: format!("{} migrate --help", program.display()),
        source,
    })?;
    Ok(String::from_utf8_lossy(&output.stdout).contains(option))
}

pub fn play(
    args: &RamArgs,
    cell: Cell,
    ours: Ours,
    row: &mut Row,
    screen: &mut Screen,
) -> Result<(), PairError> {
    let spec = cell.guest.spec(args);
    let seed = spec.params.seed;
    let pair = Pair::start(&PairSpec::new(cell.link.lab()))?;
    let mut guest = Guest::new(pair.lab(), spec)?;
    screen.while_doing("import and boot", || {
        pair.define(Host::A, &guest)?;
        pair.boot(Host::A, &mut guest)
    })?;
    let stream = match cell.guest {
        GuestKind::Stream => Some(StreamClient::start(
            pair.lab(),
            guest_address(0),
            STREAM_PORT,
            seed,
        )?),
        _ => None,
    };
    let meter = CpuMeter::start(pair.lab());
    let mut options = vec!["--ram".to_owned(), ours.ram.to_owned()];
    if ours.whole {
        options.extend(["--delta", "off"].map(str::to_owned));
    }
    let route = Route {
        options,
        rates_for: args.quiet_time(),
        within: args.limit(),
        ..Route::from(Host::A)
    };
    let quiet_from = Instant::now();
    let mut began = None;
    let journey = travel(&pair, &mut guest, &route, |moment| {
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
    let ended = began + journey.took;
    let streamed = stream.map(StreamClient::stop).transpose()?;
    told(&journey, row);
    row.measured(&Seen {
        quiet_from,
        began,
        ended,
        resumed: resumed(&journey, began),
        reports: guest.reports(),
        echo: &journey.echo,
        streamed: streamed.as_ref(),
        cpu: meter.stop(began, ended),
    });
    let home = screen.while_doing("the move is settled", || {
        settle(&pair, &guest, args, &journey)
    })?;
    if let Some(host) = home {
        let verdict = screen.while_doing("check", || pair.finish(host, &mut guest))?;
        row.problems.extend(verdict.problems);
        row.checked = true;
    }
    Ok(())
}

/// What the command said about the move.
fn told(journey: &Journey, row: &mut Row) {
    row.finished = journey.ended.completed();
    row.wan_bytes = journey.wan_out.out_bytes;
    row.wan_bytes_back = journey.wan_back.out_bytes;
    if let Some(view) = journey.view() {
        let ram = view.spaces.iter().filter(|s| s.kind == SpaceKind::Ram);
        let (sent, live) = ram.fold((0, 0), |(sent, live), space| {
            (sent + space.units_sent, live + space.units_live)
        });
        row.passes = (live > 0).then(|| sent as f64 / live as f64);
    }
    let Some(report) = journey.report().filter(|_| row.finished) else {
        row.note = Some(journey.ended.describe());
        if journey.view().is_none_or(|view| !may_stay(view, row)) {
            row.problems.push(journey.ended.describe());
        }
        return;
    };
    row.blackout_ms = MigrationReport::stop_to_resume_ms(report);
    if !report.verified {
        row.problems
            .push("the daemons did not compare the content".to_owned());
    }
}

/// Whether a move may be where this one is: not over by the limit, or a pre-copy that found that it will never be.
fn may_stay(view: &MigrationView, row: &Row) -> bool {
    use super::case::Mover;
    match view.state {
        MigrationState::Running | MigrationState::Waiting | MigrationState::Completed => true,
        _ => matches!(
            row.mover,
            Mover::WhimbrelPrecopy | Mover::WhimbrelPrecopyWhole
        ),
    }
}

/// When the guest ran at the destination: when the command first told so.
fn resumed(journey: &Journey, began: Instant) -> Option<Instant> {
    let there = [Phase::Run, Phase::Drain, Phase::Complete];
    let told = journey.phases.iter().filter(|(p, _)| there.contains(p));
    told.map(|(_, at)| began + *at).min()
}

/// Where the guest can be checked: at the destination if it went, else at the source, once the move was given up.
/// Nowhere while the move goes on.
fn settle(
    pair: &Pair,
    guest: &Guest,
    args: &RamArgs,
    journey: &Journey,
) -> Result<Option<Host>, PairError> {
    if journey.ended.completed() {
        return Ok(Some(Host::B));
    }
    let name = guest.name();
    let view = journey.view();
    if view.is_some_and(|view| view.state == MigrationState::Running) {
        match pair.on(Host::A).run(&["cancel", name]) {
            Ok(_) => {}
            // The guest is there, parts of it are not: as much time again.
            Err(PairError::Refused(_)) => {
                let watched = pair.on(Host::A).follow(&["watch", name])?.end(args.limit());
                let there = watched.is_ok_and(|ended| ended.completed());
                return Ok(there.then_some(Host::B));
            }
            Err(error) => return Err(error),
        }
    }
    let deadline = Instant::now() + CANCEL_WITHIN;
    while Instant::now() < deadline {
        let running = pair.machine(Host::A, name)?.map(|machine| machine.status);
        if running == Some(MachineStatus::Running) && !is_moving(pair, name)? {
            return Ok(Some(Host::A));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(None)
}

fn is_moving(pair: &Pair, name: &str) -> Result<bool, PairError> {
    #[derive(Deserialize)]
    struct Status {
        migration: Option<MigrationView>,
    }
    let status: Status = pair.on(Host::A).answer(&["status", name])?;
    let migration = status.migration;
    Ok(migration.is_some_and(|view| view.state == MigrationState::Running))
}
