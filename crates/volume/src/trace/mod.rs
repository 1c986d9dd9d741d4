//! Traces: what a guest did to a disk, recorded elsewhere and read here.
//!
//! | module | idea |
//! |---|---|
//! | [`mod@format`] | our own file: compact, checksummed in blocks, read in bounded memory |
//! | [`import`] | other tools' records: blkparse, fio, MSR Cambridge, CloudPhysics, QEMU's virtio-blk events |
//! | [`summary`] | how much, how fast, and the size of the working set over time |
//!
//! A trace says when, what kind, where and how long; never content. Times count from its first record. Only reads and
//! writes are kept: discards and flushes are skipped, and counted.

pub mod error;
pub mod format;
pub mod import;
pub mod summary;

pub use error::TraceError;

use crate::heat::AccessKind;
use std::io::{BufRead, Read};

/// First byte that no record may reach: 64 TiB. Above that a trace is a mistake, and whoever keeps a bit for each unit
/// would run out of memory.
pub const REACH: u64 = 1 << 46;

/// One request. `offset + len` is at most [`REACH`], and `len` is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Microseconds since the trace's first record; never less than the one before has.
    pub at_us: u64,
    pub kind: AccessKind,
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// What a file turned out to be, once it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// None: our own.
    pub format: Option<import::Foreign>,
    pub records: u64,
    /// Discards, flushes and what else is no read or write.
    pub skipped: u64,
}

/// Reads a trace in our own or any known format, in bounded memory. `device` is as for [`import::import`].
pub fn read(
    mut input: impl BufRead,
    device: Option<&str>,
    mut each: impl FnMut(Request),
) -> Result<Taken, TraceError> {
    let mut head = Vec::new();
    (&mut input)
        .take(format::MAGIC.len() as u64)
        .read_to_end(&mut head)?;
    let input = head.as_slice().chain(input);
    if head != format::MAGIC {
        return import::import(input, None, device, each);
    }
    let mut reader = format::Reader::new(input)?;
    let mut records = 0;
    while let Some(request) = reader.next_request()? {
        each(request);
        records += 1;
    }
    Ok(Taken {
        format: None,
        records,
        skipped: 0,
    })
}
