//! Traces: what a guest did to a disk, recorded elsewhere and read here.
//!
//! | module | idea |
//! |---|---|
//! | [`mod@format`] | our own file: compact, checksummed in blocks, read in bounded memory |
//! | [`import`] | other tools' records: blkparse, fio, MSR Cambridge, CloudPhysics, QEMU's virtio-blk events |
//! | [`summary`] | how much, how fast, and the size of the working set over time |
//!
//! A trace says when, what kind, where and how long; never content. Times count from its first record, or from the
//! beginning of the recording. Our own knows zeroes, discards, flushes, and gaps where a recording lost requests
//! ([`Record`]); of others' only reads and writes are taken ([`Request`]), what else they have is skipped and counted.

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

/// What a record of our own format tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Read,
    Write,
    /// Zeroes written without sending them.
    Zero,
    /// A discard.
    Trim,
    /// What was written becomes durable: of no place and no length.
    Flush,
    /// Requests that were not recorded: as many as its length says, at offset 0.
    Gap,
}

impl Kind {
    /// All, by their number in the file.
    pub const ALL: [Kind; 6] = [
        Kind::Read,
        Kind::Write,
        Kind::Zero,
        Kind::Trim,
        Kind::Flush,
        Kind::Gap,
    ];

    /// What it goes by in words.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Zero => "zero",
            Kind::Trim => "trim",
            Kind::Flush => "flush",
            Kind::Gap => "gap",
        }
    }

    /// Whether it is of bytes of the disk.
    pub fn has_place(self) -> bool {
        !matches!(self, Kind::Flush | Kind::Gap)
    }

    /// Whether content may be another afterwards.
    pub fn changes(self) -> bool {
        matches!(self, Kind::Write | Kind::Zero | Kind::Trim)
    }
}

/// One record of our own format. A [`Request`] is one that reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// As a request's.
    pub at_us: u64,
    pub kind: Kind,
    /// Bytes.
    pub offset: u64,
    /// Bytes; requests of a [`Kind::Gap`].
    pub len: u64,
}

impl Record {
    /// As a read or a write, if it is one. Zeroes are written.
    pub fn request(&self) -> Option<Request> {
        let kind = match self.kind {
            Kind::Read => AccessKind::Read,
            Kind::Write | Kind::Zero => AccessKind::Write,
            Kind::Trim | Kind::Flush | Kind::Gap => return None,
        };
        let Record {
            at_us, offset, len, ..
        } = *self;
        Some(Request {
            at_us,
            kind,
            offset,
            len,
        })
    }
}

impl From<Request> for Record {
    fn from(request: Request) -> Record {
        Record {
            at_us: request.at_us,
            kind: match request.kind {
                AccessKind::Read => Kind::Read,
                AccessKind::Write => Kind::Write,
            },
            offset: request.offset,
            len: request.len,
        }
    }
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
    let (mut records, mut skipped) = (0, 0);
    while let Some(record) = reader.next_record()? {
        match record.request() {
            Some(request) => {
                each(request);
                records += 1;
            }
            // Of those in a gap nobody knows what they were.
            None if record.kind == Kind::Gap => skipped += record.len,
            None => skipped += 1,
        }
    }
    Ok(Taken {
        format: None,
        records,
        skipped,
    })
}
