//! What can go wrong between Whimbrel and a QEMU.

use std::path::PathBuf;
use std::time::Duration;

use crate::stream::{ReturnError, StreamError};

/// The state in which a failed hand-over left the source machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceState {
    /// The guest runs at the source as if nothing had been tried.
    Running,
    /// The guest is paused at the source with all its memory; `cont` resumes it.
    Paused,
    /// The guest is stopped and QEMU has not finished handing over its memory: it can neither be
    /// resumed nor is its memory complete on our side.
    Undecided,
    /// QEMU does not answer any more.
    Gone,
}

/// Everything this crate can fail with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// "connect to", "listen on", "start", ...
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("QMP {command} failed: {desc} ({class})")]
    Qmp {
        command: String,
        class: String,
        desc: String,
    },
    #[error("QMP connection closed: {reason}")]
    Disconnected { reason: String },
    #[error("QMP peer broke the protocol: {what}")]
    Protocol { what: String },
    #[error("QMP {command} answered in an unknown form: {what}")]
    Answer {
        command: &'static str,
        what: &'static str,
    },
    #[error("no answer to {what} within {after:?}")]
    Timeout { what: &'static str, after: Duration },
    #[error("{missed} QMP events were lost: the listener was too slow")]
    EventsLost { missed: u64 },
    #[error("migration stream: {0}")]
    Stream(#[from] StreamError),
    #[error("return path: {0}")]
    ReturnPath(#[from] ReturnError),
    #[error("RAM block {block} is out of range (there are {blocks})")]
    NoSuchBlock { block: usize, blocks: usize },
    #[error("units {start}..{end} are outside RAM block {block} of {units} units")]
    OutOfBlock {
        block: usize,
        start: u64,
        end: u64,
        units: u64,
    },
    #[error("{len} bytes are not a whole number of units")]
    NotWholeUnits { len: usize },
    #[error("unit {unit} of RAM block {block} is not current: its content is still to come")]
    NotCurrent { block: usize, unit: u64 },
    #[error("unit {unit} of RAM block {block} was released")]
    Released { block: usize, unit: u64 },
    #[error("guest memory of {bytes} bytes is more than the {limit} bytes this daemon accepts")]
    TooMuchRam { bytes: u64, limit: u64 },
    #[error("RAM block {name} is in pages of {} KiB, and a guest cannot run before such memory is there", page_size >> 10)]
    PageSize { name: String, page_size: u64 },
    /// See [`SourceOptions::accept_lost_writes`](crate::source::SourceOptions::accept_lost_writes).
    #[error(
        "QEMU {version} without KVM loses track of the guest's writes: every migration of it, \
         QEMU's own too, can corrupt the guest"
    )]
    LosesWrites { version: crate::qmp::Version },
    /// The guest's memory is in several parts, and QEMU runs it without KVM.
    #[error(
        "the guest's memory is in {parts} parts (NUMA nodes or modules with memory of their own), and QEMU {version} \
         without KVM dies or loses track of the guest's writes when such a guest is migrated, by itself too"
    )]
    LosesParts {
        version: crate::qmp::Version,
        parts: usize,
    },
    #[error("the machine has live state besides RAM that cannot be handed over: section {idstr}")]
    OtherLiveSection { idstr: String },
    #[error("source migration failed, guest {state:?}: {reason}")]
    Source { state: SourceState, reason: String },
    #[error("{what} is not possible in this phase of the hand-over")]
    Phase { what: &'static str },
    #[error("unit {unit} of RAM block {block} was placed before; not sent again")]
    PlacedTwice { block: usize, unit: u64 },
    #[error("{missing} units were never placed")]
    Incomplete { missing: u64 },
    #[error("device state of {len} bytes is more than the {limit} QEMU accepts in one package")]
    DeviceStateTooBig { len: usize, limit: usize },
    #[error("destination migration failed: {reason}")]
    Sink { reason: String },
    #[error("the destination's post-copy cannot be taken up again: {state}")]
    NotRecoverable {
        state: crate::sink::DestinationState,
    },
    #[error("the guest is {status}: its memory is no snapshot")]
    NotStopped { status: String },
    #[error("QEMU {version} does not say where its RAM blocks are")]
    NoHostAddresses { version: crate::qmp::Version },
    /// `used` is `None` if QEMU has no such block.
    #[error("RAM block {name} of {len} bytes is {used:?} bytes in this QEMU")]
    BlockDiffers {
        name: String,
        len: u64,
        used: Option<u64>,
    },
    #[error("post-copy is not possible here: {desc}")]
    NoPostcopy { desc: String },
    #[error("no QEMU at {}", path.display())]
    NoBinary { path: PathBuf },
    #[error("QEMU {major}.{minor} is too old: 7.2 or newer is needed")]
    TooOld { major: u64, minor: u64 },
    #[error("this QEMU does not know the machine type {machine}")]
    UnknownMachine { machine: String },
    /// Carries the end of QEMU's log.
    #[error("QEMU exited while starting: {log}")]
    Exited { log: String },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
