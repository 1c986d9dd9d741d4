//! What fio writes and verifies, piece by piece.
//!
//! The volume is cut into *slices*. The first ones are **old**: written before the move, with fio's checksums,
//! and only read after it, so they show that what is relocated arrives. The others are **new**: they hold noise
//! at the source, and each *round* of fio writes one of them in full, in requests of 512 bytes to 64 KiB that
//! begin at any sector, reads everything back, and reads some of the old ones besides.
//!
//! A round's content is a pattern of its own with the offset in it, and a slice may get several rounds. So
//! whatever is not the last answered write is seen: the source's noise, a lost write, a write of an earlier
//! round, a copy that came late.

use crate::pair::PairError;
use crate::process::Process;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Bytes of a slice.
pub const SLICE: u64 = 8 << 20;

/// How long one run of fio may take. A round takes seconds, and as long as its daemons are away.
const RUN_WITHIN: Duration = Duration::from_secs(300);

/// Bytes per second that a round may write, and read: it is to be at work when a daemon dies, and to leave
/// something to relocate.
const PACE: &str = "2m";

/// Bytes of old slices that a round reads.
const OLD_PER_ROUND: u64 = 512 << 10;

/// What lies where.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub old: u64,
    pub new: u64,
}

impl Layout {
    pub fn bytes(self) -> u64 {
        (self.old + self.new) * SLICE
    }

    fn of_new(self, slice: u64) -> u64 {
        (self.old + slice) * SLICE
    }
}

/// What one run of fio did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    pub written: u64,
    pub verified: u64,
}

/// A run of fio and what it said.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub done: Done,
    /// A sentence, if fio found anything wrong.
    pub problem: Option<String>,
}

/// Runs fio on one target, its files in one folder.
#[derive(Clone, Debug)]
pub struct Fio {
    /// `--ioengine` and where.
    target: Vec<String>,
    folder: PathBuf,
    layout: Layout,
}

impl Fio {
    pub fn on_export(uri: &str, folder: &Path, layout: Layout) -> Fio {
        let target = vec!["--ioengine=nbd".to_owned(), format!("--uri={uri}")];
        let folder = folder.to_owned();
        Fio {
            target,
            folder,
            layout,
        }
    }

    /// Makes the volume's content as it is before the move.
    pub fn prepare(file: &Path, folder: &Path, layout: Layout, seed: u64) -> Result<(), PairError> {
        let fio = Fio {
            target: vec![
                "--ioengine=psync".to_owned(),
                format!("--filename={}", file.display()),
            ],
            folder: folder.to_owned(),
            layout,
        };
        let mut noise = vec![
            "--name=noise".to_owned(),
            "--rw=write".to_owned(),
            "--bs=1m".to_owned(),
            "--refill_buffers".to_owned(),
            format!("--randseed={}", seed % (1 << 31)),
            format!("--offset={}", layout.of_new(0)),
            format!("--size={}", layout.new * SLICE),
        ];
        let mut old = fio.old("write");
        old.push("--do_verify=0".to_owned());
        noise.extend(old);
        let outcome = fio.run("prepare", &noise)?;
        match outcome.problem {
            None => Ok(()),
            Some(said) => Err(PairError::Helper {
                program: "fio",
                said,
            }),
        }
    }

    fn old(&self, rw: &str) -> Vec<String> {
        vec![
            "--name=old".to_owned(),
            format!("--rw={rw}"),
            "--bs=16k".to_owned(),
            "--verify=crc32c".to_owned(),
            "--verify_fatal=1".to_owned(),
            "--verify_interval=4096".to_owned(),
            "--offset=0".to_owned(),
            format!("--size={}", self.layout.old * SLICE),
        ]
    }

    fn new_slice(&self, slice: u64, round: u32) -> Vec<String> {
        vec![
            "--name=new".to_owned(),
            "--rw=randwrite".to_owned(),
            "--bssplit=512/10:4k/40:16k/30:64k/20".to_owned(),
            format!("--randseed={}", 1000 + round),
            "--verify=pattern".to_owned(),
            format!("--verify_pattern=%o0x{:08x}", round + 1),
            "--verify_interval=512".to_owned(),
            "--verify_fatal=1".to_owned(),
            format!("--offset={}", self.layout.of_new(slice)),
            format!("--size={SLICE}"),
        ]
    }

    /// Writes a new slice and verifies it, and reads a little of the old ones.
    pub fn round(&self, slice: u64, round: u32) -> Result<Outcome, PairError> {
        let mut args = self.new_slice(slice, round);
        args.extend([
            "--verify_backlog=32".to_owned(),
            "--do_verify=1".to_owned(),
            format!("--rate={PACE}"),
        ]);
        let old = self.old("randread");
        args.extend(old);
        args.extend([
            format!("--randseed={}", 5000 + round),
            format!("--io_size={OLD_PER_ROUND}"),
        ]);
        self.run(&format!("round {round}"), &args)
    }

    /// Reads a new slice that this round was the last to write, and writes nothing.
    pub fn verify_new(&self, slice: u64, round: u32) -> Result<Outcome, PairError> {
        let mut args = self.new_slice(slice, round);
        args.push("--verify_only".to_owned());
        let mut outcome = self.run(&format!("last look at round {round}"), &args)?;
        // fio counts the writes it leaves out.
        outcome.done.written = 0;
        Ok(outcome)
    }

    pub fn verify_old(&self) -> Result<Outcome, PairError> {
        self.run("last look at the old slices", &self.old("read"))
    }

    fn run(&self, what: &str, jobs: &[String]) -> Result<Outcome, PairError> {
        let (report, log) = (self.folder.join("fio.json"), self.folder.join("fio.log"));
        // fio appends to neither; the log holds this run's words alone.
        for old in [&report, &log] {
            match std::fs::remove_file(old) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(PairError::io("remove", old)(e));
                }
                _ => {}
            }
        }
        let mut command = Command::new("fio");
        command
            .current_dir(&self.folder)
            .args(&self.target)
            .args(["--iodepth=8", "--output-format=json"])
            .arg(format!("--output={}", report.display()))
            .args(jobs);
        let mut process = Process::spawn("fio", command, &log)?;
        let status = process.wait(RUN_WITHIN)?;
        let text = std::fs::read_to_string(&report).unwrap_or_default();
        // What fio has to say about a failure goes before the report, in the same file or in the log.
        let report = text.find('{').and_then(|at| parse(&text[at..]));
        let done = report.as_ref().map(Report::done).unwrap_or_default();
        let sound = status.success() && report.is_some_and(|r| r.jobs.iter().all(|j| j.error == 0));
        let problem = (!sound).then(|| {
            let said: String = process.output().chars().take(400).collect();
            format!("fio, {what} ({status}): {}", said.trim())
        });
        Ok(Outcome { done, problem })
    }
}

#[derive(Deserialize)]
struct Report {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    jobname: String,
    error: i32,
    read: Way,
    write: Way,
}

#[derive(Deserialize)]
struct Way {
    io_bytes: u64,
}

impl Report {
    fn done(&self) -> Done {
        Done {
            written: self.jobs.iter().map(|j| j.write.io_bytes).sum(),
            verified: self
                .jobs
                .iter()
                .filter(|j| j.jobname != "noise")
                .map(|j| j.read.io_bytes)
                .sum(),
        }
    }
}

fn parse(text: &str) -> Option<Report> {
    serde_json::Deserializer::from_str(text)
        .into_iter()
        .next()?
        .ok()
}
