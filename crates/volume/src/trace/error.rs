//! Why a trace cannot be read or written.

use std::io;

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it is no trace of ours")]
    Magic,
    #[error(
        "it is a trace of version {found}, this program knows {}",
        super::format::VERSION
    )]
    Version { found: u32 },
    #[error("its head is damaged")]
    Head,
    /// What stands in the blocks before is sound.
    #[error("block {block} is damaged")]
    Block { block: u64 },
    #[error("it ends without its end, after block {block}: the recording was cut off, or the file")]
    CutOff { block: u64 },
    /// Of text; lines count from 1.
    #[error("line {line}: expected {expected}, found `{found}`")]
    Line {
        line: u64,
        expected: &'static str,
        found: String,
    },
    #[error("line {line} is longer than {} bytes", super::import::LINE)]
    LongLine { line: u64 },
    #[error("line 1 is of no format known: `{found}`")]
    Unknown { found: String },
    /// A trace is of one disk.
    #[error("line {line}: it is of {second}, lines before of {first}; name the one to take")]
    SeveralDevices {
        line: u64,
        first: String,
        second: String,
    },
    #[error("it has no read or write{}", .device.as_ref().map(|d| format!(" of {d}")).unwrap_or_default())]
    Empty { device: Option<String> },
    /// To be written: reaches beyond [`REACH`](super::REACH), is empty, or is earlier than the one before.
    #[error("{len} bytes at {offset} after {at_us} us cannot stand in a trace")]
    Request { at_us: u64, offset: u64, len: u64 },
}
