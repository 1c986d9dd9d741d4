//! The API by which the command, and anything else on this host, talks to the daemon: JSON over HTTP/1.1
//! over a unix socket that only its owner may open.

pub mod error;
#[cfg(any(test, feature = "fake-service"))]
pub mod fake;
pub mod joining;
pub mod recordings;
pub mod reporting;
pub mod router;
pub mod server;
pub mod service;
pub mod snapshots;
pub mod socket;
mod stream;
pub mod types;

#[cfg(test)]
mod tests;

pub use error::{ApiError, ErrorCode};
pub use router::{MAX_BODY, router};
pub use server::serve;
pub use service::Service;
pub use socket::{ApiConnection, ApiSocket, MAX_CONNECTIONS, SocketError, bind};
pub use stream::NDJSON;
pub use types::*;
