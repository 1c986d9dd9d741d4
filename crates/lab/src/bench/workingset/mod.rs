//! `bench workingset`: how good the working-set estimators are, on traces.
//!
//! Nothing is moved: the engine's judge (`whimbrel_engine::workingset::judge`, which defines every figure) plays each
//! trace to each estimator. Figures do not depend on the machine but for the nanoseconds, and are the same each time.
//!
//! A move begins at [`STARTS`] points of a trace, evenly spread from a fifth of it to nine tenths, the two ends left out;
//! it switches two windows later.

mod generated;
mod row;

use crate::screen::Screen;
use clap::Args;
use row::{Average, Row};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use whimbrel_engine::space::Extent;
use whimbrel_engine::workingset::heat::DecayedHeat;
use whimbrel_engine::workingset::judge::{Move, foretelling, migration};
use whimbrel_engine::workingset::lifetable::LifeTable;
use whimbrel_engine::workingset::oracle::Oracle;
use whimbrel_engine::workingset::windows::SlidingWindows;
use whimbrel_engine::workingset::{Access, Estimator, REGION_UNITS, REGIONS, Touch};
use whimbrel_volume::heat::AccessKind;
use whimbrel_volume::trace;

/// Moves for each trace, link and budget.
const STARTS: u64 = 12;

/// Regions of a MiB.
const PER_MIB: u64 = (1 << 20) / 4096 / REGION_UNITS;

/// Half-life of heat, in windows.
const HALF_LIFE: u64 = 4;

#[derive(Debug, Args)]
pub struct WorkingSetArgs {
    /// A trace, in any format that `whimbrel trace import` takes; may be repeated [default: three generated ones]
    #[arg(long = "trace", value_name = "FILE")]
    traces: Vec<PathBuf>,
    /// Length of a window in seconds
    #[arg(long, value_name = "S", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    window: u64,
    /// Links, in Mbit/s
    #[arg(
        long,
        value_name = "RATE",
        value_delimiter = ',',
        default_value = "20,100"
    )]
    rate: Vec<u64>,
    /// MiB that a prediction may name, of reads and of writes
    #[arg(
        long,
        value_name = "MIB",
        value_delimiter = ',',
        default_value = "32,128"
    )]
    budget: Vec<u64>,
    /// Write all figures into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The estimators, by the names that figures have.
const ESTIMATORS: [&str; 4] = ["heat", "windows", "lifetable", "oracle"];

/// What the others are compared with.
const PLAIN: &str = "windows";

fn estimator<'a>(name: &str, window_ms: u64, trace: &'a [Access]) -> Box<dyn Estimator + 'a> {
    match name {
        "heat" => Box::new(DecayedHeat::new(HALF_LIFE * window_ms, REGIONS)),
        "windows" => Box::new(SlidingWindows::new(window_ms, REGIONS)),
        "lifetable" => Box::new(LifeTable::new(window_ms, REGIONS)),
        _ => Box::new(Oracle::new(trace)),
    }
}

struct Trace {
    name: String,
    accesses: Vec<Access>,
}

#[derive(serde::Serialize)]
struct Figures {
    window_s: u64,
    rows: Vec<Row>,
    averages: Vec<Average>,
}

pub fn run(args: &WorkingSetArgs) -> ExitCode {
    let mut screen = Screen::new();
    let mut traces = Vec::new();
    for path in &args.traces {
        match load(path) {
            Ok(trace) => traces.push(trace),
            Err(error) => {
                screen.put(&format!("{}: {error}", path.display()));
                return ExitCode::FAILURE;
            }
        }
    }
    if traces.is_empty() {
        screen.put("no --trace is given: generated traces, which say little about real guests");
        traces = generated::all();
    }
    let mut figures = Figures {
        window_s: args.window,
        rows: Vec::new(),
        averages: Vec::new(),
    };
    for trace in &traces {
        let last = trace.accesses.last().map_or(0, |access| access.at_ms);
        screen.put(&format!(
            "\n{}: {} requests in {} s",
            trace.name,
            trace.accesses.len(),
            last / 1000
        ));
        screen.put(row::HEAD);
        for &budget in &args.budget {
            let mut rows: Vec<Row> = Vec::new();
            for name in ESTIMATORS {
                screen.live(&format!("{}: {name}, {budget} MiB", trace.name));
                rows.push(judge(args, trace, name, budget));
            }
            let plain = rows
                .iter()
                .find(|row| row.estimator == PLAIN)
                .map(|row| row.cost);
            for row in &mut rows {
                row.compare(plain);
                screen.put(&row.text());
            }
            figures.rows.append(&mut rows);
        }
    }
    figures.averages = row::averages(&figures.rows);
    screen.put("\nagain + stalled beside sliding windows', averaged over traces (each one's sum over links and starts):");
    for average in &figures.averages {
        screen.put(&average.text());
    }
    super::ended(&mut screen, &args.json, &figures, true)
}

/// Requests in the engine's terms.
fn load(path: &Path) -> Result<Trace, trace::TraceError> {
    let mut accesses = Vec::new();
    trace::read(BufReader::new(File::open(path)?), None, |request| {
        accesses.push(Access {
            at_ms: request.at_us / 1000,
            touch: match request.kind {
                AccessKind::Read => Touch::Read,
                AccessKind::Write => Touch::Write,
            },
            units: Extent::touching(request.offset, request.len),
        });
    })?;
    let name = path.file_stem().unwrap_or(path.as_os_str());
    Ok(Trace {
        name: name.to_string_lossy().into_owned(),
        accesses,
    })
}

fn judge(args: &WorkingSetArgs, trace: &Trace, name: &str, budget_mib: u64) -> Row {
    let all = &trace.accesses;
    let window_ms = args.window * 1000;
    let last = all.last().map_or(0, |access| access.at_ms);
    let budget = (budget_mib * PER_MIB) as usize;
    let make = || estimator(name, window_ms, all);
    let [reads, writes] = foretelling(all, &mut *make(), window_ms, last / 5, budget);
    let mut row = Row::new(&trace.name, name, budget_mib, reads, writes);
    for &mbits in &args.rate {
        for n in 0..STARTS {
            let start_ms = last / 5 + last * 7 * (2 * n + 1) / (20 * STARTS);
            let plan = Move {
                start_ms,
                switch_ms: start_ms + 2 * window_ms,
                ask_ms: (window_ms / 6).max(1),
                window_ms,
                bytes_per_second: mbits * 125_000,
                budget,
            };
            row.moved(mbits, plan, migration(all, &mut *make(), &plan));
        }
    }
    let (took, memory) = fed(&mut *make(), all);
    row.nanoseconds = took.as_nanos() as f64 / all.len().max(1) as f64;
    row.memory = memory;
    row
}

/// How long it takes to tell all, and what is remembered at the end.
fn fed(estimator: &mut dyn Estimator, all: &[Access]) -> (Duration, usize) {
    let begun = Instant::now();
    all.iter().for_each(|access| estimator.access(*access));
    (begun.elapsed(), estimator.memory())
}
