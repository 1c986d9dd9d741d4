//! The command line of `whimbrel trace`.

use clap::{Subcommand, ValueEnum};
use std::path::PathBuf;
use whimbrel_volume::trace::import::Foreign;

#[derive(Debug, Subcommand)]
pub enum TraceCommand {
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
