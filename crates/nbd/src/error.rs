//! Why a connection ended other than by the client's wish or the server's shutdown.

use std::io;

use crate::handshake::{Refused, UnknownFlags};
use crate::option::NotAnOption;
use crate::request::StreamLost;

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    #[error("negotiation: {0}")]
    UnknownFlags(#[from] UnknownFlags),
    #[error("negotiation: {0}")]
    NotAnOption(#[from] NotAnOption),
    #[error("negotiation took longer than allowed")]
    HandshakeTimeout,
    /// The client used EXPORT_NAME, to which there is no answer but to hang up.
    #[error("negotiation: {0}")]
    Refused(#[from] Refused),
    /// Somebody on the way may have put it there.
    #[error("negotiation: {bytes} bytes between STARTTLS and TLS")]
    BeforeTls { bytes: usize },
    #[error("TLS: {0}")]
    Tls(#[source] io::Error),
    #[error("transmission: {0}")]
    StreamLost(#[from] StreamLost),
    #[error("closed with {requests} requests unanswered after lingering")]
    Lingered { requests: usize },
}
