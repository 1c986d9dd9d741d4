//! The lines the guest speaks: to the client by UDP, to the serial console, and in answer to control.
//!
//! Each is one JSON object on one line with a `kind`. The console also carries the kernel's messages and
//! may break in the middle of a line: [`Line::find`] takes what is whole and leaves the rest.

use crate::cell::Broken;
use crate::params::{Pace, Params};
use serde::{Deserialize, Serialize};

/// A line of the guest's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Line {
    /// The workloads start.
    Start(Start),
    /// Every interval.
    Report(Report),
    /// After each fsync; by UDP only.
    Ack(Ack),
    /// A check failed, at the moment it did; at most [`FAULTS_KEPT`] of them.
    Fault(FaultLine),
    /// The last line before the guest powers off.
    Result(Outcome),
    /// The program cannot go on.
    Fatal { message: String },
}

impl Line {
    /// The line in a line of the console or in a datagram, if there is a whole one.
    pub fn find(text: &str) -> Option<Line> {
        let start = text.find("{\"kind\"")?;
        let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter();
        values.next()?.ok()
    }

    /// One line of JSON, without its end.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain structs with string keys serialise")
    }
}

/// Faults kept for `status` and printed to the console; all are counted.
pub const FAULTS_KEPT: usize = 32;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// Seconds from the kernel's start.
    pub uptime_s: f64,
    pub params: Params,
    /// Log records found on the disk from an earlier run.
    pub recovered_seq: u64,
    /// Random writes found on the disk from an earlier run.
    pub recovered_generation: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Seconds since the workloads started, by the guest's clock, which stands still while the guest
    /// does.
    pub t: f64,
    /// Counts reports from 1.
    pub seq: u64,
    pub ram_pages_per_s: f64,
    pub ram_checks_per_s: f64,
    pub disk_records_per_s: f64,
    pub disk_random_per_s: f64,
    pub read_bytes_per_s: f64,
    /// Checks and operations that failed since the start.
    pub errors: u64,
    /// Highest log record that an fsync covered.
    pub last_fsynced_seq: u64,
    /// Last random write that an fsync covered.
    pub last_fsynced_generation: u64,
    pub slowest_us: Slowest,
    pub totals: Totals,
}

/// The longest single operation since the last report, in microseconds of the guest's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slowest {
    /// A batch of page writes (a 200th of a second's worth).
    pub ram: u64,
    /// A log append with its fsync.
    pub log: u64,
    /// A random write, check or fsync.
    pub random: u64,
    /// A read of up to 64 KiB.
    pub read: u64,
    /// Oversleep of a thread that does nothing but look at the clock.
    pub tick: u64,
}

/// Counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub ram_pages: u64,
    /// Pages the sweep checked; each page written was checked as well.
    pub ram_checks: u64,
    pub log_records: u64,
    pub random_writes: u64,
    pub random_checks: u64,
    pub files_read: u64,
    pub read_bytes: u64,
    pub echoes: u64,
    /// Datagrams the guest's kernel did not take.
    pub unsent: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// Highest log record that an fsync covered.
    pub seq: u64,
    /// Last random write that an fsync covered.
    pub generation: u64,
}

impl Ack {
    /// The newer of each: datagrams may come late or twice.
    pub fn max(self, other: Ack) -> Ack {
        Ack {
            seq: self.seq.max(other.seq),
            generation: self.generation.max(other.generation),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultLine {
    pub fault: Fault,
}

/// The five workloads; `sweep` goes with the RAM writer but has its own pace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    Ram,
    Sweep,
    Log,
    Random,
    Read,
}

impl Workload {
    pub const ALL: [Workload; 5] = [
        Workload::Ram,
        Workload::Sweep,
        Workload::Log,
        Workload::Random,
        Workload::Read,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Workload::Ram => "ram",
            Workload::Sweep => "sweep",
            Workload::Log => "log",
            Workload::Random => "random",
            Workload::Read => "read",
        }
    }

    pub fn by_name(name: &str) -> Option<Self> {
        Workload::ALL.into_iter().find(|w| w.name() == name)
    }
}

/// What the guest found wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The page's word is not that of its last write.
    RamWord {
        page: u64,
        generation: u64,
        expected: u64,
        found: u64,
    },
    /// The page's content is not whole.
    RamContent { page: u64, broken: Broken },
    /// The page's content is of another write.
    RamStale {
        page: u64,
        expected: u64,
        found: u64,
    },
    /// After a restart: an fsynced log record is not there.
    LogLost { seq: u64, broken: Option<Broken> },
    /// A random block is not whole.
    RandomBroken { block: u64, broken: Broken },
    /// A random block is of another write than its last.
    RandomStale {
        block: u64,
        expected: u64,
        found: u64,
    },
    /// A file's length or content is not the manifest's.
    FileDiffers {
        path: String,
        size: u64,
        xxh3: String,
    },
    /// An operation failed.
    Io {
        workload: Workload,
        operation: Operation,
        /// The system's error number, where there was one.
        errno: Option<i32>,
    },
    /// A workload's thread ended by itself.
    Died { workload: Workload },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    Open,
    Allocate,
    Read,
    Write,
    Sync,
    Unmount,
}

/// The answer to `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub paused: bool,
    /// Every workload stands at its gate (after `pause`).
    pub parked: bool,
    /// The present paces, in the order of [`Workload::ALL`].
    pub paces: Vec<(Workload, Pace)>,
    /// As of the last interval.
    pub report: Report,
    /// The first [`FAULTS_KEPT`].
    pub faults: Vec<Fault>,
}

/// The answer to `poweroff`, and the last line on the console.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// All faults, the final check's included.
    pub errors: u64,
    /// Pages looked at in the final check: all of them.
    pub ram_pages_checked: u64,
    pub last_fsynced_seq: u64,
    pub last_fsynced_generation: u64,
    /// The disk was unmounted (or there is none).
    pub unmounted: bool,
    pub totals: Totals,
    pub faults: Vec<Fault>,
}

/// The answer to the other control lines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    pub ok: bool,
    /// Why not.
    pub message: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_among_the_kernels_words() {
        let line = Line::Ack(Ack {
            seq: 5,
            generation: 77,
        });
        let json = line.to_json();
        assert_eq!(json, r#"{"kind":"ack","seq":5,"generation":77}"#);
        assert_eq!(Line::find(&json), Some(line.clone()));
        assert_eq!(
            Line::find(&format!("\x1b[0m[  1.0] eth0: {json}\r")),
            Some(line)
        );
        assert_eq!(Line::find("[ 2.0] reboot: Power down"), None);
        assert_eq!(Line::find(&json[..20]), None);
    }

    #[test]
    fn every_kind_survives_the_wire() {
        let report = Report {
            t: 1.5,
            seq: 1,
            ram_pages_per_s: 2000.0,
            ram_checks_per_s: 0.0,
            disk_records_per_s: 19.5,
            disk_random_per_s: 50.0,
            read_bytes_per_s: 2.0,
            errors: 1,
            last_fsynced_seq: 3,
            last_fsynced_generation: 4,
            slowest_us: Slowest::default(),
            totals: Totals::default(),
        };
        let fault = Fault::RamContent {
            page: 1,
            broken: Broken::Misplaced { found: 2 },
        };
        for line in [
            Line::Start(Start {
                uptime_s: 2.5,
                params: Params::default(),
                recovered_seq: 0,
                recovered_generation: 0,
            }),
            Line::Report(report),
            Line::Fault(FaultLine {
                fault: fault.clone(),
            }),
            Line::Result(Outcome {
                errors: 1,
                ram_pages_checked: 10,
                last_fsynced_seq: 1,
                last_fsynced_generation: 2,
                unmounted: true,
                totals: Totals::default(),
                faults: vec![fault],
            }),
            Line::Fatal {
                message: "no disk".into(),
            },
        ] {
            assert_eq!(Line::find(&line.to_json()), Some(line));
        }
    }
}
