//! `bench ram`: how RAM moves, by Whimbrel and by QEMU's own ways, side by side.
//!
//! Guests that use their memory in different ways, over three links, each moved by each mover, a freshly booted guest
//! every time. The disk is small and nobody uses it; QEMU's ways need not carry it at all (see [`theirs`]).
//! After each move the guest checks every page, and its disk is looked at from outside.

mod case;
mod cpu;
mod ours;
mod row;
mod stream;
mod table;
mod theirs;

use crate::screen::Screen;
use case::{Cell, GuestKind, Link, Mover, Only, Way, chosen};
use clap::Args;
use row::{HEAD, Row};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use whimbrel_lab::pair::PairError;

/// What `--quick` leaves, where `--only` says nothing else.
const QUICK: [Only; 6] = [
    Only::Guest(GuestKind::Sparse),
    Only::Link(Link::Usual),
    Only::Mover(Mover::WhimbrelHybrid),
    Only::Mover(Mover::WhimbrelPostcopy),
    Only::Mover(Mover::QemuPrecopy),
    Only::Mover(Mover::QemuPostcopy),
];

#[derive(Debug, Args)]
pub struct RamArgs {
    /// Only these, such as guest=sparse,link=100mbit/40ms,mover=qemu-postcopy; a key may come several times
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = Only::parse)]
    only: Vec<Only>,
    /// One guest, one link, four movers; shorter looks at the undisturbed guest
    #[arg(long)]
    quick: bool,
    /// Seconds that each move may take
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    limit: u64,
    /// How often each; medians are compared
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// MiB of the guest's memory
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    memory: u32,
    /// MiB that the guest's program has, writes and checks
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    region: u32,
    /// Pages a second that writing guests write; by default 20000 (sparse) and 4000 (zipf)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pace: Option<u32>,
    /// Write all figures into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl RamArgs {
    fn limit(&self) -> Duration {
        Duration::from_secs(self.limit)
    }

    /// How long the guest is looked at before and after.
    fn quiet_time(&self) -> Duration {
        Duration::from_secs(if self.quick { 4 } else { 6 })
    }

    /// The conditions, with those of `--quick` for what `--only` does not speak of.
    fn conditions(&self) -> Vec<Only> {
        let mut conditions = self.only.clone();
        if self.quick {
            let kind = std::mem::discriminant::<Only>;
            let spoken: Vec<_> = self.only.iter().map(kind).collect();
            let quick = QUICK.iter().filter(|only| !spoken.contains(&kind(only)));
            conditions.extend(quick);
        }
        conditions
    }
}

#[derive(Debug, Serialize)]
struct Report {
    limit_s: u64,
    memory_mib: u32,
    region_mib: u32,
    rounds: u32,
    rows: Vec<Row>,
    /// Movers left out, and why.
    skipped: Vec<String>,
    took_s: f64,
}

pub fn run(args: &RamArgs) -> ExitCode {
    let began = Instant::now();
    let mut screen = Screen::new();
    let only = args.conditions();
    let guests = chosen(&only, |only| match only {
        Only::Guest(guest) => Some(*guest),
        _ => None,
    });
    let links = chosen(&only, |only| match only {
        Only::Link(link) => Some(*link),
        _ => None,
    });
    let mut movers = chosen(&only, |only| match only {
        Only::Mover(mover) => Some(*mover),
        _ => None,
    });
    let mut report = Report {
        limit_s: args.limit,
        memory_mib: args.memory,
        region_mib: args.region,
        rounds: args.rounds,
        rows: Vec::new(),
        skipped: Vec::new(),
        took_s: 0.0,
    };
    if let Err(error) = prepare(args, &mut movers, &mut report, &mut screen) {
        screen.put(&error.to_string());
        return ExitCode::FAILURE;
    }
    screen.put(&format!(
        "{} guests, {} links, {} movers, {} rounds; guests of {} MiB, {} of them in use by their program; {} s each at most",
        guests.len(),
        links.len(),
        movers.len(),
        args.rounds,
        args.memory,
        args.region,
        args.limit
    ));
    for &guest in &guests {
        for &link in &links {
            let cell = Cell { guest, link };
            screen.put(&format!("\n{cell}\n{HEAD}"));
            for round in 1..=args.rounds {
                for &mover in &movers {
                    let row = played(args, cell, mover, round, &mut screen);
                    screen.put(&row.text());
                    report.rows.push(row);
                }
            }
        }
    }
    report.took_s = began.elapsed().as_secs_f64();
    screen.put(&format!("\n{}", table::text(&report.rows)));
    let wrong = report.rows.iter().filter(|row| !row.is_sound()).count();
    let late = report.rows.iter().filter(|row| !row.finished).count();
    screen.put(&format!(
        "{} moves in {:.0} s: {wrong} with errors, {late} not finished within {} s; {} movers skipped",
        report.rows.len(),
        report.took_s,
        args.limit,
        report.skipped.len()
    ));
    super::ended(&mut screen, &args.json, &report, wrong == 0)
}

/// What is slow the first time, and which movers there are.
fn prepare(
    args: &RamArgs,
    movers: &mut Vec<Mover>,
    report: &mut Report,
    screen: &mut Screen,
) -> Result<(), PairError> {
    let delta = ours::knows("--delta")?;
    movers.retain(|mover| {
        let whole = matches!(mover.way(), Way::Ours(ours) if ours.whole);
        if whole && !delta {
            let why = format!("{mover}: this `whimbrel migrate` has no --delta");
            screen.put(&format!("skipped: {why}"));
            report.skipped.push(why);
        }
        delta || !whole
    });
    let spec = GuestKind::Idle.spec(args);
    screen.while_doing("kernel, initramfs and disk", || spec.build())?;
    Ok(())
}

fn played(args: &RamArgs, cell: Cell, mover: Mover, round: u32, screen: &mut Screen) -> Row {
    let mut row = Row::new(cell, mover, round);
    let error = match mover.way() {
        Way::Ours(ours) => ours::play(args, cell, ours, &mut row, screen)
            .err()
            .map(|error| error.to_string()),
        Way::Theirs(theirs) => theirs::play(args, cell, theirs, &mut row, screen)
            .err()
            .map(|error| error.to_string()),
    };
    row.problems.extend(error);
    row
}
