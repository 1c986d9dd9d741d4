//! `bench link`: what push makes of a link, and what a demand waits beside it.
//!
//! For each link a machine is switched over while push is held; its disk is read from outside, which gives
//! demands alone. Then push is let go, and after a time to find the link's rate a window is measured. In the
//! end the link is made fast, so that the move completes and both sides compare what arrived.

mod direct;
mod row;

use crate::screen::Screen;
use clap::Args;
use direct::Direct;
use row::{Case, Row};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use whimbrel_lab::pair::Folder;

const RATES: [u64; 3] = [10, 100, 1000];
const RTTS: [u64; 3] = [2, 40, 200];
const LOSSES: [f64; 3] = [0.0, 0.1, 1.0];

#[derive(Debug, Args)]
pub struct LinkArgs {
    /// Only links of these, such as rate=100,rtt=40,loss=1 (Mbit/s, ms, %); a key may come several times
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = condition)]
    only: Vec<(String, f64)>,
    /// Shorter windows: half the time, coarser figures
    #[arg(long)]
    quick: bool,
    /// Leave out the plain TCP copies beside it
    #[arg(long)]
    no_tcp: bool,
    /// Only the copy without emulation, beside a bare one over TLS
    #[arg(long, conflicts_with = "only")]
    direct: bool,
    /// The log's filter for both daemons; files are kept then
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// Write all figures into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn condition(text: &str) -> Result<(String, f64), String> {
    let wanted = "rate=..., rtt=... or loss=... and a number";
    let (key, value) = text.split_once('=').ok_or(wanted)?;
    let value = value.parse().map_err(|_| wanted)?;
    match key {
        "rate" | "rtt" | "loss" => Ok((key.to_owned(), value)),
        _ => Err(wanted.to_owned()),
    }
}

impl LinkArgs {
    fn wants(&self, case: &Case) -> bool {
        let fits = |key: &str, value: f64| {
            let mut named = self.only.iter().filter(|(k, _)| k == key).peekable();
            named.peek().is_none() || named.any(|(_, wanted)| *wanted == value)
        };
        fits("rate", case.mbits as f64)
            && fits("rtt", case.rtt_ms as f64)
            && fits("loss", case.loss)
    }

    fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for mbits in RATES {
            for rtt_ms in RTTS {
                for loss in LOSSES {
                    let case = Case {
                        mbits,
                        rtt_ms,
                        loss,
                    };
                    if !self.direct && self.wants(&case) {
                        cases.push(case);
                    }
                }
            }
        }
        cases
    }
}

#[derive(Debug, Default, Serialize)]
struct Report {
    rows: Vec<Row>,
    direct: Option<Direct>,
    took_s: f64,
}

pub fn run(args: &LinkArgs) -> ExitCode {
    let began = Instant::now();
    let mut screen = Screen::new();
    let mut report = Report::default();
    let mut sound = true;
    let folder = match Folder::new() {
        Ok(folder) => folder,
        Err(error) => {
            screen.put(&error.to_string());
            return ExitCode::FAILURE;
        }
    };
    let cases = args.cases();
    if !cases.is_empty() {
        screen.put(row::HEAD);
    }
    for case in cases {
        let mut row = Row::new(case);
        if let Err(error) = row.measure(args, folder.path(), &mut screen) {
            row.problems.push(error.to_string());
        }
        sound &= row.problems.is_empty();
        screen.put(&row.text());
        report.rows.push(row);
    }
    if args.direct || args.only.is_empty() {
        match Direct::measure(args, folder.path(), &mut screen) {
            Ok(direct) => {
                screen.put(&direct.text());
                report.direct = Some(direct);
            }
            Err(error) => {
                screen.put(&format!("without emulation: {error}"));
                sound = false;
            }
        }
    }
    report.took_s = began.elapsed().as_secs_f64();
    let misses = report.rows.iter().filter(|row| row.misses()).count();
    screen.put(&format!(
        "{} links in {:.0} s, {misses} of them short of a target (marked *)",
        report.rows.len(),
        report.took_s
    ));
    super::ended(&mut screen, &args.json, &report, sound)
}
