//! `whimbrel trace`: traces of disks. Only recording asks the daemon.

pub mod args;
pub mod record;
mod replay;
mod svg;

use crate::error::CliError;
use crate::output;
use crate::show::bytes;
use args::TraceCommand;
use serde_json::json;
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use whimbrel_volume::trace::format::Writer;
use whimbrel_volume::trace::import::{Foreign, import};
use whimbrel_volume::trace::summary::{Summary, Summing};
use whimbrel_volume::trace::{self, Request, Taken, TraceError};

pub fn trace(command: TraceCommand, json: bool) -> Result<(), CliError> {
    match command {
        TraceCommand::Import {
            from,
            to,
            format,
            device,
        } => {
            let taken = convert(&from, &to, format.map(Foreign::from), device.as_deref())?;
            let format = taken.format.map_or("whimbrel", Foreign::name);
            if json {
                output::print_json(&json!({
                    "format": format, "records": taken.records, "skipped": taken.skipped,
                }));
            } else {
                output::print(&format!(
                    "{}: {} reads and writes from {format}, {} other requests left out",
                    to.display(),
                    taken.records,
                    taken.skipped
                ));
            }
        }
        TraceCommand::Show {
            file,
            device,
            window,
            svg,
        } => {
            let window_us = window.as_micros().min(u128::from(u64::MAX)) as u64;
            let (taken, summary) = summarise(&file, device.as_deref(), window_us)?;
            if let Some(svg) = svg {
                std::fs::write(&svg, svg::draw(&summary)).map_err(failed("write", &svg))?;
            }
            if json {
                output::print_json(&summary);
            } else {
                output::print(&text(&taken, &summary));
            }
        }
        TraceCommand::Replay(command) => replay::replay(&command, json)?,
        // Asks the daemon, and is done elsewhere.
        TraceCommand::Record { .. } => {}
    }
    Ok(())
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CliError {
    let path = path.to_path_buf();
    move |source| CliError::File {
        action,
        path,
        source,
    }
}

fn of(path: &Path) -> impl Fn(TraceError) -> CliError {
    let path: PathBuf = path.to_path_buf();
    move |source| CliError::Trace {
        path: path.clone(),
        source,
    }
}

fn open(path: &Path) -> Result<BufReader<File>, CliError> {
    Ok(BufReader::new(
        File::open(path).map_err(failed("read", path))?,
    ))
}

/// A trace that is not finished is removed again.
fn convert(
    from: &Path,
    to: &Path,
    format: Option<Foreign>,
    device: Option<&str>,
) -> Result<Taken, CliError> {
    let input = open(from)?;
    let made = File::create_new(to).map_err(failed("make", to))?;
    let copy = || {
        let mut writer = Writer::new(BufWriter::new(made)).map_err(of(to))?;
        let mut refused = None;
        let put = |request: Request| {
            if refused.is_none() {
                refused = writer.push(&request.into()).err();
            }
        };
        let taken = match format {
            Some(_) => import(input, format, device, put),
            None => trace::read(input, device, put),
        }
        .map_err(of(from))?;
        if let Some(error) = refused {
            return Err(of(to)(error));
        }
        let written = writer.finish().map_err(of(to))?;
        let file = written
            .into_inner()
            .map_err(|e| failed("write", to)(e.into_error()))?;
        file.sync_all().map_err(failed("write", to))?;
        Ok(taken)
    };
    copy().inspect_err(|_| {
        // What is told is why there is no trace.
        let _ = std::fs::remove_file(to);
    })
}

/// Reads it twice: its length and reach decide what a window and a stripe are.
fn summarise(
    file: &Path,
    device: Option<&str>,
    window_us: u64,
) -> Result<(Taken, Summary), CliError> {
    let (mut duration, mut reach) = (0, 0);
    let measure = |request: Request| {
        duration = request.at_us.max(duration);
        reach = (request.offset + request.len).max(reach);
    };
    trace::read(open(file)?, device, measure).map_err(of(file))?;
    let mut summing = Summing::new(window_us, duration, reach);
    let taken = trace::read(open(file)?, device, |request| summing.take(&request));
    Ok((taken.map_err(of(file))?, summing.finish()))
}

fn text(taken: &Taken, summary: &Summary) -> String {
    let seconds = |us: u64| format!("{:.1} s", us as f64 / 1e6);
    let head = output::pairs(&[
        (
            "format",
            taken.format.map_or("whimbrel", Foreign::name).to_owned(),
        ),
        ("duration", seconds(summary.duration_us)),
        ("disk", format!("at least {}", bytes(summary.reach))),
        (
            "beside",
            match taken.skipped {
                0 => String::new(),
                n => format!(
                    "{n} requests that are no reads or writes, or of which nothing is known"
                ),
            },
        ),
    ]);
    let row = |name: &str, amount: &trace::summary::Amount| {
        [
            name.to_owned(),
            amount.requests.to_string(),
            bytes(amount.bytes),
            bytes(amount.footprint),
        ]
    };
    let totals = output::table(
        ["", "REQUESTS", "BYTES", "TOUCHED"],
        &[row("reads", &summary.reads), row("writes", &summary.writes)],
    );
    let mut windows: Vec<_> = summary.windows.iter().enumerate().collect();
    let all = windows.len();
    // A screenful, evenly spread.
    let step = all.div_ceil(30).max(1);
    windows.retain(|(n, _)| n % step == 0);
    let rows: Vec<_> = windows
        .iter()
        .map(|(n, window)| {
            [
                seconds(*n as u64 * summary.window_us),
                window.read_requests.to_string(),
                window.written_requests.to_string(),
                bytes(window.read_set),
                bytes(window.written_set),
            ]
        })
        .collect();
    let table = output::table(["FROM", "READS", "WRITES", "READ SET", "WRITE SET"], &rows);
    let which = match step {
        1 => format!("windows of {}", seconds(summary.window_us)),
        _ => format!("one window of {} in {step}", seconds(summary.window_us)),
    };
    format!("{head}\n\n{totals}\n\n{which}\n{table}")
}
