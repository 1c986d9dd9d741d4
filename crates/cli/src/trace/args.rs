//! The command line of `whimbrel trace`.

use clap::{Args, Subcommand, ValueEnum};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use whimbrel_host::state::Name;
use whimbrel_host::volumes::nbd::NbdUri;
use whimbrel_volume::trace::import::Foreign;

#[derive(Debug, Subcommand)]
pub enum TraceCommand {
    /// Record what a running machine's guest asks of a disk: each request's time, kind, place and length, never content
    ///
    /// Until the time is over, or Ctrl-C. The daemon writes the trace, so the file is on its host, readable by the
    /// daemon's user alone. Requests that come faster than they can be written are left out, counted and told.
    Record {
        /// The volume; or a machine that has but one
        #[arg(value_name = "MACHINE|VOLUME")]
        name: Name,
        /// How long, such as 60s [default: until Ctrl-C]
        #[arg(long = "for", value_name = "TIME")]
        time: Option<humantime::Duration>,
        /// The trace to make; must not exist
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Do what a trace tells to an NBD export, and measure what it answers
    ///
    /// Reads, writes, zeroes, discards and flushes go out at the times of the trace, or faster, over one connection. What is
    /// written is no guest's content, but bytes that follow from the place and the number of the write.
    Replay(Replay),
    /// Make a trace of ours from another tool's record of a disk's requests
    Import {
        /// The record
        from: PathBuf,
        /// The trace to make; must not exist
        to: PathBuf,
        /// What the record is [default: what its first line looks like]
        #[arg(long, value_enum, value_name = "FORMAT")]
        format: Option<TraceFormat>,
        /// The disk to take, if the record is of several, as it names them: `8,0` (blkparse), a path (fio), a number
        /// (MSR), the address after `vdev` (QEMU)
        #[arg(long, value_name = "NAME")]
        device: Option<String>,
    },
    /// Show what a trace amounts to, and how big its working sets are over time
    ///
    /// Takes traces of ours and whatever `trace import` takes.
    Show {
        /// The trace
        file: PathBuf,
        /// The disk to take, if the record is of several
        #[arg(long, value_name = "NAME")]
        device: Option<String>,
        /// Length of the windows that working sets are counted in; longer ones are taken for a very long trace
        #[arg(long, value_name = "TIME", default_value = "60s")]
        window: humantime::Duration,
        /// Draw where and when the disk was used, and the working sets, into this file
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
}

impl TraceCommand {
    /// Whether the daemon does it.
    pub fn asks_daemon(&self) -> bool {
        matches!(self, TraceCommand::Record { .. })
    }
}

#[derive(Debug, Args)]
pub struct Replay {
    /// The trace, of our own format; `trace import` makes one of another's
    pub file: PathBuf,
    /// The export, by its NBD URI: `nbd://host/export`, or `nbd+unix:///export?socket=path`
    #[arg(long, value_name = "NBD-URI")]
    pub to: NbdUri,
    /// When requests go out: `original` (as in the trace), `xN` (N times as fast, such as x2 or x0.5), `max` (as soon as the
    /// queue has room)
    #[arg(long, value_name = "SPEED", default_value = "original")]
    pub speed: Speed,
    /// Requests in flight, at most; one for which there is no room goes out late
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub queue: u32,
    /// Overwrite the export's content, if the trace has writes, zeroes or discards
    #[arg(long)]
    pub yes: bool,
}

/// How fast a trace is replayed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Speed {
    /// So many times as fast as it was recorded; more than 0.
    Times(f64),
    Max,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a speed is `original`, `max`, or a number with an x before it, such as x2")]
pub struct NotASpeed;

impl FromStr for Speed {
    type Err = NotASpeed;

    fn from_str(word: &str) -> Result<Speed, NotASpeed> {
        match word {
            "original" => Ok(Speed::Times(1.0)),
            "max" => Ok(Speed::Max),
            _ => {
                let times = word.strip_prefix('x').and_then(|n| n.parse().ok());
                let times = times.filter(|n: &f64| (0.001..=1e6).contains(n));
                times.map(Speed::Times).ok_or(NotASpeed)
            }
        }
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Speed::Times(1.0) => f.write_str("original"),
            Speed::Times(n) => write!(f, "x{n}"),
            Speed::Max => f.write_str("max"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TraceFormat {
    /// Text of blkparse; requests as they were queued
    Blkparse,
    /// What fio writes with --write_iolog, version 2 or 3
    FioIolog,
    /// SNIA's MSR Cambridge traces
    MsrCsv,
    /// CloudPhysics traces
    CloudphysicsCsv,
    /// QEMU's log of virtio_blk_handle_read and _write, with `-msg timestamp=on`
    QemuVirtioBlk,
}

impl From<TraceFormat> for Foreign {
    fn from(format: TraceFormat) -> Foreign {
        match format {
            TraceFormat::Blkparse => Foreign::Blkparse,
            TraceFormat::FioIolog => Foreign::FioIolog,
            TraceFormat::MsrCsv => Foreign::MsrCsv,
            TraceFormat::CloudphysicsCsv => Foreign::CloudPhysicsCsv,
            TraceFormat::QemuVirtioBlk => Foreign::QemuVirtioBlk,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_understood_or_refused() {
        for (word, speed) in [
            ("original", Some(Speed::Times(1.0))),
            ("max", Some(Speed::Max)),
            ("x4", Some(Speed::Times(4.0))),
            ("x0.5", Some(Speed::Times(0.5))),
            ("x0", None),
            ("xNaN", None),
            ("x-1", None),
            ("2", None),
        ] {
            assert_eq!(word.parse::<Speed>().ok(), speed, "{word}");
        }
    }
}
