//! `bench kills`: daemons killed with SIGKILL under `fio --verify` while a volume is relocated.

use crate::demo::mib;
use crate::screen::Screen;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use whimbrel_lab::kills::{KillsReport, KillsSpec, kills};

#[derive(Debug, Args)]
pub struct KillsArgs {
    /// How many kills; about 3 s each
    #[arg(long, value_name = "N", default_value_t = 100)]
    kills: u32,
    /// What the daemons killed and the moments are drawn from
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Write all figures into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(args: &KillsArgs) -> ExitCode {
    let mut screen = Screen::new();
    let spec = KillsSpec {
        kills: args.kills,
        seed: args.seed,
    };
    screen.put(&format!(
        "{} daemons killed with SIGKILL under fio --verify while a volume is relocated; seed {}",
        spec.kills, spec.seed
    ));
    let report = match kills(&spec, |line| screen.say(line)) {
        Ok(report) => report,
        Err(error) => {
            screen.put(&error.to_string());
            return ExitCode::FAILURE;
        }
    };
    screen.put(&table(&report));
    let sound = report.problems.is_empty();
    super::ended(&mut screen, &args.json, &report, sound)
}

fn table(report: &KillsReport) -> String {
    let count = |n: Option<u64>| n.map_or("-".to_owned(), |n| n.to_string());
    let mut rows = vec![
        (
            "kills",
            format!(
                "{} of {} ({} destination, {} source), seed {}",
                report.kills.len(),
                report.wanted,
                report.kills_of_destination,
                report.kills_of_source,
                report.seed
            ),
        ),
        ("volume", mib(report.volume_bytes)),
        ("time in all", format!("{:.0} s", report.took_s)),
        ("fio, rounds", report.rounds.to_string()),
        ("fio, written", mib(report.bytes_written)),
        ("fio, verified", mib(report.bytes_verified)),
        ("  relocated", mib(report.bytes_relocated_verified)),
        ("units sent again", count(report.units_sent_again)),
        ("late copies", count(report.late_copies)),
        ("guest's errors", report.guest_errors.to_string()),
    ];
    match report.problems.as_slice() {
        [] => rows.push(("result", "ok: nothing lost".to_owned())),
        problems => rows.extend(problems.iter().map(|p| ("PROBLEM", p.clone()))),
    }
    rows.iter()
        .map(|(name, value)| format!("  {name:<18}{value}"))
        .collect::<Vec<_>>()
        .join("\n")
}
