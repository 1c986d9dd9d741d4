//! What can go wrong with a volume, with everything needed to say where.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What was being done when an I/O error came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Open,
    Create,
    Stat,
    Read,
    Write,
    WriteZeroes,
    Discard,
    Sync,
    FindData,
    Prefetch,
    List,
    Rename,
    Remove,
    Lock,
    Resize,
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Operation::Open => "open",
            Operation::Create => "create",
            Operation::Stat => "stat",
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::WriteZeroes => "write zeroes",
            Operation::Discard => "discard",
            Operation::Sync => "sync",
            Operation::FindData => "find data",
            Operation::Prefetch => "prefetch",
            Operation::List => "list",
            Operation::Rename => "rename",
            Operation::Remove => "remove",
            Operation::Lock => "lock",
            Operation::Resize => "resize",
        })
    }
}

/// Every error of this crate. Cloneable, because one failed write or sync may be the answer to many
/// callers who shared it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VolumeError {
    /// The file system or device refused. `offset` and `len` are bytes; both 0 where the operation
    /// has no range.
    #[error("cannot {op} {} ({len} bytes at {offset}): {source}", path.display())]
    Io {
        path: PathBuf,
        op: Operation,
        offset: u64,
        len: u64,
        source: Arc<io::Error>,
    },

    /// As [`Io`](Self::Io), but there is no room (ENOSPC, EDQUOT): freeing some makes a retry work.
    #[error("no space to {op} {} ({len} bytes at {offset}): {source}", path.display())]
    NoSpace {
        path: PathBuf,
        op: Operation,
        offset: u64,
        len: u64,
        source: Arc<io::Error>,
    },

    #[error("cannot {op} {len} bytes at {offset} of {}: it has {size} bytes", path.display())]
    OutOfRange {
        path: PathBuf,
        op: Operation,
        offset: u64,
        len: u64,
        size: u64,
    },

    /// Zeroing was to be fast or not at all, and this file system would have to write zeroes.
    #[error("{} cannot be zeroed without writing zeroes", path.display())]
    NotFast { path: PathBuf },

    /// Another volume, a file system or another program has it.
    #[error("{} is in use by another volume, a file system or another program", path.display())]
    InUse { path: PathBuf },

    #[error("{} is not a block device", path.display())]
    NotADevice { path: PathBuf },

    #[error("{} has {found} bytes, {needed} are needed", path.display())]
    TooSmall {
        path: PathBuf,
        found: u64,
        needed: u64,
    },

    /// A qcow2 image that cannot be used, or not in this way.
    #[error("{} cannot be used: {fault}", path.display())]
    Image {
        path: PathBuf,
        fault: crate::backend::ImageFault,
    },

    /// A sync failed before. The kernel then forgets the dirty pages it could not write and the
    /// *next* sync succeeds, so no later success may be believed until the file is opened afresh.
    #[error("an earlier sync of {} failed, so what was written before it may be lost: {first}", path.display())]
    SyncLost {
        path: PathBuf,
        first: Arc<io::Error>,
    },

    /// The I/O pool was shut down, or a job on it panicked, before the answer came.
    #[error("the I/O pool stopped before the operation ended")]
    PoolStopped,

    #[error("there is no residency journal in {}", dir.display())]
    JournalAbsent { dir: PathBuf },

    #[error("{} already holds a residency journal: open it, or remove it first", dir.display())]
    JournalExists { dir: PathBuf },

    #[error("the residency journal in {} is in use by another process", dir.display())]
    JournalBusy { dir: PathBuf },

    /// The journal belongs to another volume, size or epoch.
    #[error("the residency journal {} is of {found}, not of {wanted}", path.display())]
    JournalForeign {
        path: PathBuf,
        found: crate::journal::VolumeIdentity,
        wanted: crate::journal::VolumeIdentity,
    },

    /// Something that was durable is no longer readable. Which units are local is then not known, and
    /// guessing loses guest writes: copying over them, or reading what never arrived.
    #[error(
        "the residency journal is damaged: {} at byte {offset}: {fault}. \
         Do not fill this volume further. Restore the file, or, if the source still has its copy and the \
         guest has not run here since the switchover, remove the journal and start the move again",
        path.display()
    )]
    JournalDamaged {
        path: PathBuf,
        offset: u64,
        fault: crate::journal::Fault,
    },

    /// Written by another version of this program.
    #[error("{} has version {found}, this program knows {known}: use the program that wrote it", path.display())]
    JournalVersion {
        path: PathBuf,
        found: u32,
        known: u32,
    },

    /// A sync of the volume or of the journal failed earlier; no flush may be acknowledged any more.
    #[error("the residency journal in {} cannot promise durability any more: {first}", dir.display())]
    JournalPoisoned {
        dir: PathBuf,
        first: Box<VolumeError>,
    },

    /// A change names units past the volume's end, an empty extent or an empty mask.
    #[error("a journal change names {extent}, sectors {mask:#010b}, of a volume of {units} units")]
    JournalChange {
        extent: whimbrel_engine::space::Extent,
        mask: u8,
        units: u64,
    },

    #[error("the volume is not complete: {absent} units are absent")]
    JournalIncomplete { absent: u64 },
}

impl VolumeError {
    /// Refuses a range that is not within a volume of `size` bytes.
    pub(crate) fn test_range(
        path: &Path,
        op: Operation,
        offset: u64,
        len: u64,
        size: u64,
    ) -> Result<(), Self> {
        if offset.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(VolumeError::OutOfRange {
            path: path.to_owned(),
            op,
            offset,
            len,
            size,
        })
    }

    /// An I/O error with its place; out-of-space errors become [`NoSpace`](Self::NoSpace).
    pub fn io(path: &Path, op: Operation, offset: u64, len: u64, source: io::Error) -> Self {
        let path = path.to_owned();
        let no_space = matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        );
        let source = Arc::new(source);
        if no_space {
            VolumeError::NoSpace {
                path,
                op,
                offset,
                len,
                source,
            }
        } else {
            VolumeError::Io {
                path,
                op,
                offset,
                len,
                source,
            }
        }
    }

    /// Whether freeing space would help.
    pub fn is_no_space(&self) -> bool {
        match self {
            VolumeError::NoSpace { .. } => true,
            VolumeError::JournalPoisoned { first, .. } => first.is_no_space(),
            _ => false,
        }
    }
}
