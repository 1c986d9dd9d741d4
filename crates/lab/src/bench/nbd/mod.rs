//! `bench nbd`: Whimbrel's NBD export beside qemu-nbd and nbdkit, on the same file, in one run.
//!
//! Row by row; within a row the servers take turns, and the order of turns rotates from round to round, so
//! that whatever else the machine does meets all of them. Each round is compared with itself: a row's
//! ratio is the median of the rounds' ratios to the *better* of the others. What the others can be set to
//! (qemu-nbd's way of asynchronous I/O, nbdkit's threads) is tried first, for each row, and the best taken.
//!
//! Traps: writes through the page cache are synced between the runs, off the clock, else one server pays
//! for what another wrote. Rows past the page cache come last, as they empty it.

mod export;
mod in_turn;
mod load;
mod server;
mod table;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use whimbrel_lab::LabError;
use whimbrel_volume::VolumeError;
use whimbrel_workload::chance::Rng;

use crate::screen::Screen;
use in_turn::Price;
use load::{Cores, Load};
use server::{IN_TURN, Kind, Server};
use table::{Row, Run};

pub use export::{ExportArgs, run as export};

#[derive(Debug, Args)]
pub struct NbdArgs {
    /// Write all figures into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Two short rounds, for a look
    #[arg(long)]
    quick: bool,
    /// Rounds of each row
    #[arg(long, value_name = "N", default_value_t = 5, conflicts_with = "quick")]
    rounds: u32,
    /// Seconds of each run
    #[arg(
        long,
        value_name = "S",
        default_value_t = 1.0,
        conflicts_with = "quick"
    )]
    seconds: f64,
    /// Only rows whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    rows: String,
    /// Compare Whimbrel's access log on with off, instead of Whimbrel with others
    #[arg(long)]
    access_log: bool,
    /// The disk is made in this folder, and removed at the end
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Size of the disk, MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    size: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("fio could not be started: {0}")]
    Client(std::io::Error),
    #[error("fio failed on {load}: {stderr}")]
    ClientFailed { load: String, stderr: String },
    #[error("{name} did not start: {output}")]
    Server { name: String, output: String },
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("too few slices of {load} to compare")]
    TooFew { load: String },
    #[error("/proc tells nothing of the server's {what}")]
    Proc { what: &'static str },
    #[error("the server cannot be held on cores {cores} (taskset): {stderr}")]
    NotHeld { cores: String, stderr: String },
    #[error(transparent)]
    Lab(#[from] LabError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

#[derive(Serialize)]
struct Outcome {
    seconds: f64,
    rounds: u32,
    disk_mib: u64,
    rows: Vec<Row>,
    access_log: Vec<Price>,
}

pub fn run(args: &NbdArgs) -> ExitCode {
    let mut screen = Screen::new();
    let outcome = match measure(args, &mut screen) {
        Ok(outcome) => outcome,
        Err(error) => {
            screen.put(&error.to_string());
            return ExitCode::FAILURE;
        }
    };
    super::ended(&mut screen, &args.json, &outcome, true)
}

fn measure(args: &NbdArgs, screen: &mut Screen) -> Result<Outcome, BenchError> {
    let folder = match &args.folder {
        Some(folder) => tempfile::tempdir_in(folder),
        None => tempfile::tempdir(),
    };
    let folder = folder.map_err(|source| BenchError::File {
        path: args.folder.clone().unwrap_or_else(std::env::temp_dir),
        source,
    })?;
    let (rounds, seconds) = if args.quick {
        (2, 0.4)
    } else {
        (args.rounds, args.seconds)
    };
    let mut bench = Bench {
        disk: Disk::make(&folder.path().join("disk"), args.size)?,
        folder: folder.path(),
        servers: BTreeMap::new(),
        time: Duration::from_secs_f64(seconds),
        rounds,
    };
    let (mut rows, mut prices) = (Vec::new(), Vec::new());
    if args.access_log {
        screen.put(in_turn::HEAD);
    } else {
        screen.put(table::HEAD);
    }
    let mut direct = false;
    for load in Load::all() {
        if !load.name().contains(&args.rows) {
            continue;
        }
        if load.direct != direct {
            direct = load.direct;
            // None that is not measured shall do anything, nor hold pages of the file.
            bench.servers.clear();
            bench.disk.leave_cache()?;
        }
        if args.access_log {
            // What a request costs at least is where the log's share is largest.
            if load.block == 4 << 10 && load.cores == Cores::Any {
                let price = bench.price(load, screen)?;
                screen.put(&price.text());
                prices.push(price);
            }
            continue;
        }
        let row = bench.row(load, screen)?;
        screen.put(&row.text());
        rows.push(row);
    }
    Ok(Outcome {
        seconds,
        rounds,
        disk_mib: args.size,
        rows,
        access_log: prices,
    })
}

struct Bench<'f> {
    // Before the folder goes, the servers do.
    servers: BTreeMap<(Kind, String), Server>,
    disk: Disk,
    folder: &'f Path,
    time: Duration,
    rounds: u32,
}

impl Bench<'_> {
    fn row(&mut self, load: Load, screen: &mut Screen) -> Result<Row, BenchError> {
        let name = load.name();
        let mut choosing = Vec::new();
        let mut best = Vec::new();
        for kind in Kind::ALL {
            let mut tried: Vec<Run> = Vec::new();
            for variant in kind.variants() {
                screen.live(&format!("{name}: {} {variant}", kind.word()));
                if kind.variants().len() > 1 {
                    tried.push(self.one(load, kind, variant, 0, self.time / 2)?);
                }
            }
            let fastest = tried
                .iter()
                .max_by(|a, b| a.figures.iops.total_cmp(&b.figures.iops));
            let variant = fastest.map_or(kind.variants()[0].to_owned(), |r| r.variant.clone());
            best.push((kind, variant));
            choosing.extend(tried);
        }
        let mut runs = Vec::new();
        for round in 0..self.rounds {
            let from = round as usize % best.len();
            for (kind, variant) in best[from..].iter().chain(&best[..from]) {
                screen.live(&format!("{name}: round {}, {}", round + 1, kind.word()));
                runs.push(self.one(load, *kind, variant, round, self.time)?);
            }
        }
        Ok(Row::of(load, choosing, runs))
    }

    /// What the access log costs, over twice the time of all rounds.
    fn price(&mut self, load: Load, screen: &mut Screen) -> Result<Price, BenchError> {
        let name = load.name();
        screen.live(&name);
        let time = 2 * self.rounds * self.time;
        self.one(load, Kind::Whimbrel, IN_TURN, 0, time)?;
        let key = (Kind::Whimbrel, IN_TURN.to_owned());
        let server = self.servers.remove(&key);
        let output = server.map_or(String::new(), |server| server.output());
        Price::of(name.clone(), &output).ok_or(BenchError::TooFew { load: name })
    }

    fn one(
        &mut self,
        load: Load,
        kind: Kind,
        variant: &str,
        round: u32,
        time: Duration,
    ) -> Result<Run, BenchError> {
        let key = (kind, variant.to_owned());
        if !self.servers.contains_key(&key) {
            let server = Server::start(kind, variant, load.direct, &self.disk.path, self.folder)?;
            self.servers.insert(key.clone(), server);
        }
        let server = &self.servers[&key];
        server.hold(load.cores.of_server())?;
        if !load.direct {
            self.disk.warm()?;
        }
        let client = || load::run(&load, server.socket(), time, round + 1);
        let (figures, cost) = server.cost_of(client)?;
        if load.access.writes() {
            self.disk.sync()?;
        }
        Ok(Run {
            server: kind,
            variant: variant.to_owned(),
            round,
            figures,
            cost,
        })
    }
}

/// The file that is served: full of what nothing can compress, and without holes.
struct Disk {
    path: PathBuf,
    file: File,
}

impl Disk {
    fn make(path: &Path, mib: u64) -> Result<Disk, BenchError> {
        let disk = Disk {
            path: path.to_owned(),
            file: File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(path)
                .map_err(|source| BenchError::File {
                    path: path.to_owned(),
                    source,
                })?,
        };
        let mut rng = Rng::new(1, 1);
        let mut piece = vec![0; 1 << 20];
        for _ in 0..mib {
            for word in piece.chunks_exact_mut(8) {
                word.copy_from_slice(&rng.next_u64().to_le_bytes());
            }
            (&disk.file).write_all(&piece).map_err(|e| disk.error(e))?;
        }
        disk.sync()?;
        Ok(disk)
    }

    fn error(&self, source: std::io::Error) -> BenchError {
        BenchError::File {
            path: self.path.clone(),
            source,
        }
    }

    fn sync(&self) -> Result<(), BenchError> {
        self.file.sync_all().map_err(|e| self.error(e))
    }

    /// Makes all of it lie in the page cache.
    fn warm(&self) -> Result<(), BenchError> {
        let mut piece = vec![0; 1 << 20];
        let mut from = &self.file;
        std::io::Seek::rewind(&mut from).map_err(|e| self.error(e))?;
        while from.read(&mut piece).map_err(|e| self.error(e))? > 0 {}
        Ok(())
    }

    fn leave_cache(&self) -> Result<(), BenchError> {
        self.sync()?;
        rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed)
            .map_err(|errno| self.error(errno.into()))
    }
}
