//! `bench codec`: what `--compress auto` costs beside the best fixed choice, for kinds of data on links of all speeds.
//!
//! Real moves of a machine that does nothing; its disk holds the data. What is compared is the drain, from the
//! guest's start at the destination until all of the disk is there and compared: what a user waits for.

use crate::screen::Screen;
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};
use whimbrel_lab::links::Rig;
use whimbrel_lab::links::data::{self, KINDS};
use whimbrel_lab::net::{Host, LabSpec};
use whimbrel_lab::pair::answers::{CodecUnits, MigrationState};
use whimbrel_lab::pair::{Folder, Pair, PairError, PairSpec};
use whimbrel_lab::wan::{LineSpec, WanSpec};

/// Mbit/s, and MiB of disk: some seconds each.
const LINKS: [(u64, u64); 3] = [(20, 16), (200, 128), (1000, 384)];

const FIXED: [&str; 4] = ["none", "zstd:-3", "zstd:1", "zstd:5"];

const AUTO: &str = "auto";

/// How long a move may take.
const PATIENCE: Duration = Duration::from_secs(180);

#[derive(Debug, Args)]
pub struct CodecArgs {
    /// How often each; medians are compared
    #[arg(long, value_name = "N", default_value_t = 1)]
    rounds: u32,
    /// Only these kinds of data
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = KINDS)]
    data: Vec<String>,
    /// Only links of these rates, in Mbit/s
    #[arg(long, value_name = "RATE", value_delimiter = ',')]
    rate: Vec<u64>,
    /// Write all figures into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One kind of data on one link.
#[derive(Clone, Debug, Serialize)]
struct Row {
    data: String,
    mbits: u64,
    mib: u64,
    /// Seconds of the drain, by what was asked for; one for each round.
    drains: BTreeMap<String, Vec<f64>>,
    /// Of the last move by `auto`.
    chosen: CodecUnits,
    problems: Vec<String>,
}

impl Row {
    fn median(&self, compress: &str) -> Option<f64> {
        let mut all = self.drains.get(compress)?.clone();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied()
    }

    fn best(&self) -> Option<(&'static str, f64)> {
        let of = |&fixed: &&'static str| Some((fixed, self.median(fixed)?));
        FIXED
            .iter()
            .filter_map(of)
            .min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// How much longer `auto` took than the best fixed choice.
    fn cost(&self) -> Option<f64> {
        Some(self.median(AUTO)? / self.best()?.1 - 1.0)
    }

    fn misses(&self) -> bool {
        self.cost().is_some_and(|cost| cost > 0.05)
    }

    fn text(&self) -> String {
        let shown = |s: Option<f64>| s.map_or("-".to_owned(), |s| format!("{s:.2}"));
        let fixed: Vec<_> = FIXED
            .iter()
            .map(|fixed| format!("{:>8}", shown(self.median(fixed))))
            .collect();
        let cost = self.cost();
        let mark = if self.misses() { "*" } else { " " };
        format!(
            "{:<9} {:>6} {:>5}  {} {:>8}  {:>7} {mark}  {:>9} {:>9} {:>9}  {}",
            self.data,
            self.mbits,
            self.mib,
            fixed.join(" "),
            shown(self.median(AUTO)),
            cost.map_or("-".to_owned(), |c| format!("{:+.1} %", c * 100.0)),
            self.chosen.plain,
            self.chosen.zstd,
            self.chosen.zero,
            self.problems.join("; "),
        )
    }
}

pub fn run(args: &CodecArgs) -> ExitCode {
    let mut screen = Screen::new();
    let mut rows = Vec::new();
    if let Err(error) = compare(args, &mut rows, &mut screen) {
        screen.put(&error.to_string());
        return ExitCode::FAILURE;
    }
    let over = rows.iter().filter(|row| row.misses());
    screen.put(&format!(
        "{} rows, {} of them more than 5 % over the best fixed choice (marked *)",
        rows.len(),
        over.count()
    ));
    let sound = rows.iter().all(|row| row.problems.is_empty());
    super::ended(&mut screen, &args.json, &rows, sound)
}

fn compare(args: &CodecArgs, rows: &mut Vec<Row>, screen: &mut Screen) -> Result<(), PairError> {
    let folder = Folder::new()?;
    let fixed: Vec<_> = FIXED.iter().map(|name| format!("{name:>8}")).collect();
    screen.put(&format!(
        "data      Mbit/s   MiB  {} {:>8}  auto to best   plain units    zstd      zero",
        fixed.join(" "),
        AUTO
    ));
    for kind in KINDS {
        if !args.data.is_empty() && !args.data.iter().any(|wanted| wanted == kind) {
            continue;
        }
        for (mbits, mib) in LINKS {
            if !args.rate.is_empty() && !args.rate.contains(&mbits) {
                continue;
            }
            let file = folder.path().join("data");
            screen.while_doing("data", || data::write(kind, &file, mib << 20))?;
            let mut row = Row {
                data: kind.to_owned(),
                mbits,
                mib,
                drains: BTreeMap::new(),
                chosen: CodecUnits::default(),
                problems: Vec::new(),
            };
            for _ in 0..args.rounds {
                for compress in FIXED.into_iter().chain([AUTO]) {
                    screen.live(&format!("{kind}, {mbits} Mbit/s, {compress}"));
                    match drain(&file, mbits, compress) {
                        Ok((seconds, codecs)) => {
                            let all = row.drains.entry(compress.to_owned()).or_default();
                            all.push(seconds);
                            if compress == AUTO {
                                row.chosen = codecs;
                            }
                        }
                        Err(error) => row.problems.push(format!("{compress}: {error}")),
                    }
                }
            }
            screen.put(&row.text());
            rows.push(row);
        }
    }
    Ok(())
}

/// Moves a machine with this disk; how long its drain took, and how its content was written.
fn drain(disk: &Path, mbits: u64, compress: &str) -> Result<(f64, CodecUnits), PairError> {
    let line = LineSpec::new(mbits * 1_000_000, Duration::from_millis(5));
    let spec = PairSpec::new(LabSpec::new(WanSpec::symmetric(line)));
    let rig = Rig::new(Pair::start(&spec)?, disk)?;
    rig.depart_packed("unlimited", compress)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let view = rig.view(Host::A)?;
        let ended = view.filter(|view| view.state != MigrationState::Running);
        if let Some(view) = ended {
            let report = view.report.filter(|report| report.verified);
            let found = report.and_then(|r| Some((r.drain_ms? / 1e3, r.codecs)));
            return found.ok_or_else(|| PairError::NotReached {
                awaited: "a verified end",
                after: PATIENCE,
                last: format!("{:?}", view.state),
            });
        }
        if Instant::now() >= deadline {
            return Err(PairError::NotReached {
                awaited: "the end",
                after: PATIENCE,
                last: "running".to_owned(),
            });
        }
        sleep(Duration::from_millis(100));
    }
}
