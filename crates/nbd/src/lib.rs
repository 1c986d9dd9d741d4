//! The NBD server: protocol, negotiation, one validate step, trusted handlers.
//!
//! It speaks the fixed newstyle of the NBD protocol (`doc/proto.md` of the NBD project) over any stream,
//! for whoever implements [`Directory`] and [`Export`]. Two halves, and the line between them is I/O:
//!
//! - without: [`option`] and [`handshake`] (the negotiation), [`request`] (the one validate step of the
//!   transmission phase) and [`reply`] turn bytes into meaning and back. They are public to be fuzzed.
//! - with: [`serve_connection`] drives them for one client, [`Server`] for a listener.
//!
//! Offered: structured replies with holes, extended headers, FLUSH, FUA, TRIM, CACHE, WRITE_ZEROES with
//! NO_HOLE and FAST_ZERO, block status for any metadata contexts, block size constraints, multi-conn, and
//! STARTTLS. Not offered: resizing. `docs/nbd.md` has it option by option.

#![forbid(unsafe_code)]

mod connection;
mod contexts;
mod dialect;
mod error;
mod execute;
mod export;
pub mod handshake;
mod inbox;
mod inflight;
mod limits;
mod line;
mod load;
pub mod option;
mod outbox;
mod replies;
pub mod reply;
pub mod request;
mod server;
pub mod spec;
mod tls;
mod transmission;

pub use connection::serve_connection;
pub use contexts::ContextSet;
pub use dialect::Dialect;
pub use error::ServeError;
pub use export::{
    BASE_ALLOCATION, BadInfo, Content, Directory, Errno, Export, ExportInfo, MAX_CONTEXTS,
    MAX_PIECES, MAX_STATUS_RUNS, OpenError, Piece, STATE_HOLE, STATE_ZERO, StatusRun, ZeroHow,
};
pub use inbox::INBOX;
pub use limits::Limits;
pub use server::Server;
pub use tls::{Secrecy, Tls};
