//! How everything that goes wrong is told: what, where, the machine's state now, what to do next.

use serde::{Deserialize, Serialize};

/// What kind of thing went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The request makes no sense as it stands.
    Invalid,
    NotFound,
    Exists,
    /// Someone else is at it; the same request may succeed later.
    Busy,
    /// The machine, volume or migration is not in a state that allows it.
    WrongState,
    /// Neither this host nor its QEMU can do it.
    Unsupported,
    PeerUnreachable,
    PeerRefused,
    /// The peer has not the right to it.
    NotAllowed,
    Qemu,
    Io,
    StorageFull,
    /// A record in the state directory cannot be understood.
    Damaged,
    /// A migration failed; the machine runs at its source as before.
    MigrationFailed,
    /// Nobody but the operator may decide what comes next.
    NeedsOperator,
    /// The daemon is stopping.
    Stopping,
    /// A fault of the program itself.
    Internal,
}

impl ErrorCode {
    /// The HTTP status that fits.
    pub fn status(self) -> u16 {
        match self {
            ErrorCode::Invalid => 400,
            ErrorCode::NotAllowed => 403,
            ErrorCode::NotFound => 404,
            ErrorCode::Exists
            | ErrorCode::Busy
            | ErrorCode::WrongState
            | ErrorCode::NeedsOperator => 409,
            ErrorCode::Unsupported => 422,
            ErrorCode::PeerUnreachable | ErrorCode::PeerRefused => 502,
            ErrorCode::Stopping => 503,
            ErrorCode::StorageFull => 507,
            ErrorCode::Qemu
            | ErrorCode::Io
            | ErrorCode::Damaged
            | ErrorCode::MigrationFailed
            | ErrorCode::Internal => 500,
        }
    }
}

/// An error as people and programs get it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{what}")]
pub struct ApiError {
    pub code: ErrorCode,
    /// What went wrong, one sentence.
    pub what: String,
    /// The file, host or process it happened at.
    #[serde(default, rename = "where", skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// The machine's state now (or, where no machine is concerned, of whatever was being changed).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_state: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_step: Option<String>,
}

impl ApiError {
    pub fn new(code: ErrorCode, what: impl Into<String>) -> ApiError {
        ApiError {
            code,
            what: what.into(),
            place: None,
            machine_state: None,
            next_step: None,
        }
    }

    pub fn at(mut self, place: Option<String>) -> ApiError {
        self.place = place;
        self
    }

    pub fn machine_state(mut self, state: impl Into<String>) -> ApiError {
        self.machine_state = Some(state.into());
        self
    }

    pub fn next_step(mut self, step: impl Into<String>) -> ApiError {
        self.next_step = Some(step.into());
        self
    }

    /// The daemon is stopping; what it was asked to watch or to import is not waited for.
    pub fn stopping() -> ApiError {
        ApiError::new(ErrorCode::Stopping, "the daemon is stopping")
            .machine_state("machines keep running; migrations go on when the daemon is back")
            .next_step("start the daemon again, then look with `whimbrel status`")
    }
}
