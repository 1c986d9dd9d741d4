//! What the daemon implements: exports, and the directory that names them.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;

use crate::spec;

/// What an export is. All sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Length of the export, at most `i64::MAX` (clients keep offsets in a signed number). It should be
    /// a multiple of `min_block`; if it is not, only the last, shorter block may be asked for unaligned.
    pub size: u64,
    pub read_only: bool,
    /// Smallest addressable length and alignment: a power of two, at most 64 KiB. Enforced, with
    /// `EINVAL`, whether or not the client asked for it.
    pub min_block: u32,
    /// Smallest efficient length and alignment: a power of two, at least 512 and `min_block`.
    pub preferred_block: u32,
    /// Largest READ and WRITE, at least `preferred_block`. The other commands have no payload and are
    /// not limited by it.
    pub max_block: u32,
    /// True only if a flush (or FUA write) on one connection covers what any connection was told is
    /// written, and every connection sees what any other has written.
    pub multi_conn: bool,
    /// Names of the metadata contexts that [`Export::block_status`] can answer, such as
    /// [`BASE_ALLOCATION`]; at most [`MAX_CONTEXTS`], each `namespace:leaf`.
    pub contexts: Vec<String>,
    /// One line for a human being.
    pub description: Option<String>,
}

/// The metadata context every client knows: bit 0 of the flags is [`STATE_HOLE`], bit 1 [`STATE_ZERO`].
pub const BASE_ALLOCATION: &str = "base:allocation";
/// `base:allocation`: nothing is allocated for the run.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: the run reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// Most metadata contexts an export may have.
pub const MAX_CONTEXTS: usize = 16;

/// Most runs sent for one context in one reply. [`Export::block_status`] may stop there; what it
/// returns beyond is not sent, and the client asks again from where the reply ended.
pub const MAX_STATUS_RUNS: usize = 8192;

/// Most pieces of one [`Content`]. More are an error of the export, which the client sees as `EIO`.
pub const MAX_PIECES: usize = 64;

/// What was read, for a client that need not be sent zeroes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    Whole(Bytes),
    /// One after the other, none of them empty, at least one and at most [`MAX_PIECES`].
    Pieces(Vec<Piece>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Data(Bytes),
    /// So many bytes that read as zero.
    Zeroes(u32),
}

impl Piece {
    /// Bytes of the export.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Piece::Data(data) => data.len() as u64,
            Piece::Zeroes(len) => (*len).into(),
        }
    }

    /// Bytes of memory.
    pub(crate) fn held(&self) -> usize {
        match self {
            Piece::Data(data) => data.len(),
            Piece::Zeroes(_) => 0,
        }
    }
}

/// An [`ExportInfo`] that the protocol cannot express.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadInfo {
    #[error("size {0} exceeds i64::MAX")]
    Size(u64),
    #[error("minimum block {0} is not a power of two of at most 65536")]
    MinBlock(u32),
    #[error("preferred block {0} is not a power of two of at least 512 and the minimum block")]
    PreferredBlock(u32),
    #[error("largest request {0} is less than the preferred block")]
    MaxBlock(u32),
    #[error("{0} contexts, more than 16")]
    Contexts(usize),
    #[error("context {0} is not a namespace, a colon and a leaf, in at most 4096 bytes")]
    ContextName(usize),
    #[error("description of {0} bytes, more than 4096")]
    Description(usize),
}

impl ExportInfo {
    /// A writable export of `size` bytes with 512 B, 4 KiB and 32 MiB as its block sizes.
    pub fn new(size: u64) -> Self {
        ExportInfo {
            size,
            read_only: false,
            min_block: 512,
            preferred_block: 4096,
            max_block: 32 << 20,
            multi_conn: true,
            contexts: Vec::new(),
            description: None,
        }
    }

    /// Whether the protocol can express it. The server checks this before it offers the export.
    pub fn check(&self) -> Result<(), BadInfo> {
        if i64::try_from(self.size).is_err() {
            return Err(BadInfo::Size(self.size));
        }
        if !self.min_block.is_power_of_two() || self.min_block > 1 << 16 {
            return Err(BadInfo::MinBlock(self.min_block));
        }
        if !self.preferred_block.is_power_of_two() || self.preferred_block < self.min_block.max(512)
        {
            return Err(BadInfo::PreferredBlock(self.preferred_block));
        }
        if self.max_block < self.preferred_block {
            return Err(BadInfo::MaxBlock(self.max_block));
        }
        if self.contexts.len() > MAX_CONTEXTS {
            return Err(BadInfo::Contexts(self.contexts.len()));
        }
        for (index, name) in self.contexts.iter().enumerate() {
            let parts = name.split_once(':');
            if name.len() > spec::MAX_STRING
                || !parts.is_some_and(|(space, leaf)| !space.is_empty() && !leaf.is_empty())
            {
                return Err(BadInfo::ContextName(index));
            }
        }
        if let Some(text) = &self.description
            && text.len() > spec::MAX_STRING
        {
            return Err(BadInfo::Description(text.len()));
        }
        Ok(())
    }
}

/// A run of bytes with one status, in the answer to a BLOCK_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    /// Bytes.
    pub len: u64,
    /// Meaning given by the context.
    pub flags: u32,
}

/// How a range is to be zeroed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ZeroHow {
    /// Durable before it is answered.
    pub fua: bool,
    /// The range must stay allocated.
    pub no_hole: bool,
    /// Answer [`Errno::Enotsup`], with nothing changed, unless it is faster than writing zeroes.
    pub fast: bool,
}

/// The errors the protocol knows; every other error of a backend must become one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Errno {
    #[error("operation not permitted")]
    Eperm,
    #[error("input/output error")]
    Eio,
    #[error("out of memory")]
    Enomem,
    #[error("invalid argument")]
    Einval,
    #[error("no space left")]
    Enospc,
    #[error("value too large")]
    Eoverflow,
    /// Only as the answer to a zeroing that had to be fast; elsewhere the server sends `EIO` instead.
    #[error("not supported")]
    Enotsup,
    /// QEMU hands this one to its guest as an I/O error. An export that goes away under a guest which
    /// is to reconnect must leave its requests unanswered, and have the connection closed.
    #[error("server is shutting down")]
    Eshutdown,
}

impl Errno {
    /// The number on the wire.
    pub fn code(self) -> u32 {
        match self {
            Errno::Eperm => 1,
            Errno::Eio => 5,
            Errno::Enomem => 12,
            Errno::Einval => 22,
            Errno::Enospc => 28,
            Errno::Eoverflow => 75,
            Errno::Enotsup => 95,
            Errno::Eshutdown => 108,
        }
    }
}

impl From<&std::io::Error> for Errno {
    fn from(error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Kind;
        match error.kind() {
            Kind::PermissionDenied | Kind::ReadOnlyFilesystem => Errno::Eperm,
            Kind::OutOfMemory => Errno::Enomem,
            Kind::InvalidInput => Errno::Einval,
            Kind::StorageFull | Kind::QuotaExceeded | Kind::FileTooLarge => Errno::Enospc,
            Kind::Unsupported => Errno::Enotsup,
            _ => Errno::Eio,
        }
    }
}

/// One open export: a volume as a guest sees it.
///
/// Every argument has been validated: ranges are not empty, lie inside the export and are aligned to
/// `min_block`; a read-only export gets no writes; a context is one of those the export named.
///
/// The futures of one connection's requests, at most [`Limits::requests`](crate::Limits::requests) of
/// them, are polled by that connection's task, side by side and in no promised order: one that waits
/// holds up nobody, but one that blocks the thread or computes for milliseconds holds up the whole
/// connection and belongs on a thread or task of its own. What they spawn must go to another runtime: the
/// one they run on may end with the connection. Futures that read may be dropped unfinished
/// when the client has gone. Futures that write are always driven to their end, unless the future of
/// [`serve_connection`](crate::serve_connection) is itself dropped. One that panics is answered `EIO`.
pub trait Export: Send + Sync + 'static {
    /// Asked once for each connection; it must not change while the connection lasts.
    fn info(&self) -> ExportInfo;

    /// Exactly `len` bytes. They are sent as they are, without a copy.
    fn read(&self, offset: u64, len: u32) -> impl Future<Output = Result<Bytes, Errno>> + Send;

    /// The same for a client that need not be sent zeroes. Worth implementing where zeroes are known
    /// without looking for them; it must cost no more than [`Export::read`].
    fn read_sparse(
        &self,
        offset: u64,
        len: u32,
    ) -> impl Future<Output = Result<Content, Errno>> + Send {
        async move { Ok(Content::Whole(self.read(offset, len).await?)) }
    }

    /// With `fua`, durable before it returns.
    fn write(
        &self,
        offset: u64,
        data: Bytes,
        fua: bool,
    ) -> impl Future<Output = Result<(), Errno>> + Send;

    /// Makes durable every write, trim and zeroing that had returned before this was called.
    fn flush(&self) -> impl Future<Output = Result<(), Errno>> + Send;

    /// The content of the range is no longer needed. Doing nothing is allowed.
    fn trim(
        &self,
        offset: u64,
        len: u64,
        fua: bool,
    ) -> impl Future<Output = Result<(), Errno>> + Send;

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        how: ZeroHow,
    ) -> impl Future<Output = Result<(), Errno>> + Send;

    /// The range will be read soon. Doing nothing is allowed.
    fn cache(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), Errno>> + Send;

    /// The status of consecutive runs from `offset` on, at least one. It may end before `offset + len`
    /// (the client asks again) or beyond. With `one` only the first run is used.
    fn block_status(
        &self,
        context: &str,
        offset: u64,
        len: u64,
        one: bool,
    ) -> impl Future<Output = Result<Vec<StatusRun>, Errno>> + Send;
}

/// Why an export was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("no such export")]
    Unknown,
    /// The text is shown to the client.
    #[error("refused: {0}")]
    Policy(String),
    #[error("server is shutting down")]
    Shutdown,
}

/// The exports there are. The methods are called by connections' tasks and must not block.
pub trait Directory: Send + Sync + 'static {
    type Export: Export;

    /// Names of the exports, each of at most 4096 bytes of UTF-8 without NUL; others are left out.
    fn list(&self) -> Vec<String>;

    /// Opens an export for one connection. The name may be empty: the client wants the default export.
    fn open(&self, name: &str) -> Result<Arc<Self::Export>, OpenError>;

    /// Called once for every successful `open`, when none of the connection's requests runs any more.
    fn closed(&self, name: &str);

    /// Called first on the thread that a [`Server`](crate::Server) starts for each connection, and that
    /// ends with it. On it this connection's requests are served and nothing else.
    fn thread_started(&self) {}

    /// What `open` would offer, for clients that only ask.
    fn describe(&self, name: &str) -> Result<ExportInfo, OpenError> {
        let info = self.open(name)?.info();
        self.closed(name);
        Ok(info)
    }
}
