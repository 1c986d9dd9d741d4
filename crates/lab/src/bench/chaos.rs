//! `bench chaos`: each process of a move killed, and the link cut, in each phase; every cell of the crash table.

use crate::screen::Screen;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use whimbrel_lab::chaos::cell::{Cell, Moment, Victim};
use whimbrel_lab::chaos::{ChaosSpec, HEAD, chaos};

#[derive(Debug, Args)]
pub struct ChaosArgs {
    /// What delays and times of being dead are drawn from
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Only cells whose name (PHASE/VICTIM/MOMENT) contains one of these
    #[arg(long, value_name = "CELL")]
    only: Vec<String>,
    /// Go through the cells so often, each time with another seed
    #[arg(long, value_name = "N", default_value_t = 1)]
    rounds: u64,
    /// Name the cells, and what is left out and why; do nothing
    #[arg(long)]
    list: bool,
    /// Write all rows into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(args: &ChaosArgs) -> ExitCode {
    let mut screen = Screen::new();
    if args.list {
        list(&mut screen);
        return ExitCode::SUCCESS;
    }
    let mut cells = Cell::all();
    cells.retain(|cell| {
        let name = cell.to_string();
        args.only.is_empty() || args.only.iter().any(|only| name.contains(only))
    });
    if cells.is_empty() {
        screen.put("there is no such cell; `--list` names them");
        return ExitCode::FAILURE;
    }
    let mut reports = Vec::new();
    for seed in args.seed..args.seed + args.rounds {
        screen.put(&format!(
            "{} cells of the crash table, seed {seed}; a daemon that is killed is dead for up to 1.5 s\n{HEAD}",
            cells.len()
        ));
        let spec = ChaosSpec {
            cells: cells.clone(),
            seed,
        };
        match chaos(&spec, |line| screen.put(line)) {
            Ok(report) => reports.push(report),
            Err(error) => {
                screen.put(&error.to_string());
                return ExitCode::FAILURE;
            }
        }
    }
    let mut passed = true;
    for report in &reports {
        passed &= report.passed();
        screen.put(&format!(
            "seed {}: {} cells, {} hit, {} as the table says, {} guests and {} crashed disks checked; {:.0} s",
            report.seed,
            report.rows.len(),
            report.rows.iter().filter(|row| row.hit).count(),
            report.rows.iter().filter(|row| row.problems.is_empty()).count(),
            report.guests_checked,
            report.crashed_disks_checked,
            report.took_s,
        ));
        for problem in &report.problems {
            screen.put(&format!("  PROBLEM {problem}"));
        }
    }
    super::ended(&mut screen, &args.json, &reports, passed)
}

fn list(screen: &mut Screen) {
    for moment in Moment::ALL {
        for victim in Victim::ALL {
            let cell = Cell { moment, victim };
            match cell.left_out() {
                None => {
                    let expected: Vec<&str> = cell.expected().iter().map(|o| o.name()).collect();
                    screen.put(&format!("{cell:42} {}", expected.join(" or ")));
                }
                Some(why) => screen.put(&format!("{cell:42} left out: {why}")),
            }
        }
    }
    screen.put("not here: hosts that lose power, which the simulator makes (`cargo xtask sim`)");
}
