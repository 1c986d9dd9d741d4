//! What can go wrong with two hosts and a guest between them.

use super::command::Refusal;
use crate::LabError;
use crate::guest::GuestError;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum PairError {
    #[error(transparent)]
    Lab(#[from] LabError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("there is no {}; build it with `cargo build --release -p whimbrel-cli`", path.display())]
    NoProgram { path: PathBuf },
    #[error("`{command}` could not be run: {source}")]
    Start { command: String, source: io::Error },
    #[error("{0}")]
    Refused(Box<Refusal>),
    #[error("`{command}` did not end within {after:?}")]
    Timeout { command: String, after: Duration },
    #[error("`{command}` answered with something not understood ({source}): {answer}")]
    Answer {
        command: String,
        answer: String,
        source: serde_json::Error,
    },
    #[error("the daemon of {host} ended ({status}); its log ends with:\n{log}")]
    DaemonEnded {
        host: String,
        status: ExitStatus,
        log: String,
    },
    #[error("the daemon of {host} is not up after {after:?}; its log ends with:\n{log}")]
    DaemonNotUp {
        host: String,
        after: Duration,
        log: String,
    },
    #[error("no word from the guest within {after:?}; its console ends with:\n{console}")]
    NoGuest { after: Duration, console: String },
    #[error("the guest's program cannot go on: {message}")]
    GuestFatal { message: String },
    #[error("the guest shut down, but machine `{machine}` still has a process after {after:?}")]
    StillThere { machine: String, after: Duration },
    #[error("the migration did not come to {awaited} within {after:?}; last seen: {last}")]
    NotReached {
        awaited: &'static str,
        after: Duration,
        last: String,
    },
    #[error("`{program}`: {said}")]
    Helper { program: &'static str, said: String },
    #[error("QEMU's monitor, asked for `{command}`: {said}")]
    Monitor { command: String, said: String },
    #[error("the migration ended before {awaited}: {end}")]
    EndedEarly { awaited: &'static str, end: String },
}

impl PairError {
    /// For `map_err` on file operations.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> PairError {
        let path = path.into();
        move |source| PairError::Io {
            action,
            path,
            source,
        }
    }

    /// What the command said, if it refused.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            PairError::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }
}
