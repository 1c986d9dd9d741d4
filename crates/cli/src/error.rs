//! What the command can fail with, how it is told, and the exit code it ends in.

use std::io;
use std::path::PathBuf;
use whimbrel_host::api::{ApiError, ErrorCode, MigrationState, MigrationView};
use whimbrel_host::config::ConfigError;
use whimbrel_host::state::{Name, SpecError, StateError};
use whimbrel_peer::PeerError;
use whimbrel_volume::trace::TraceError;

/// How the process ends; the help lists the same codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Done = 0,
    Failed = 1,
    Usage = 2,
    NoDaemon = 3,
    SafeAtSource = 4,
    NeedsOperator = 5,
}

#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error("{0}")]
    Api(ApiError),
    #[error("the daemon cannot be reached at {}: {source}", socket.display())]
    NoDaemon { socket: PathBuf, source: io::Error },
    #[error("the daemon broke the connection off: {source}")]
    BrokenOff {
        socket: PathBuf,
        source: hyper::Error,
    },
    #[error("the daemon's answer ended too early")]
    CutShort { socket: PathBuf },
    #[error("the daemon's answer is not understood: {source}")]
    NotUnderstood {
        socket: PathBuf,
        source: serde_json::Error,
    },
    #[error("the daemon answered with more than {most} bytes")]
    TooLong { socket: PathBuf, most: usize },
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot take the trace {}: {source}", path.display())]
    Trace { path: PathBuf, source: TraceError },
    #[error("{errors} of {requests} requests failed")]
    ReplayErrors { errors: u64, requests: u64 },
    #[error("the recording of {volume} is being ended, and was not waited for")]
    LeftRecording { volume: Name },
    #[error("{}", settled(.0))]
    Migration(Box<MigrationView>),
    #[error("several machines migrate: {}", .0.iter().map(Name::as_str).collect::<Vec<_>>().join(", "))]
    WhichMigration(Vec<Name>),
    #[error("{}", no_report(.asked))]
    NoReport { asked: String, known: Vec<String> },
    #[error("volume {volume} is broken")]
    Broken { volume: Name },
    #[error("something in {} is broken", root.display())]
    StateBroken { root: PathBuf },
    #[error("something in the repository {} is damaged", place.display())]
    RepositoryDamaged { place: PathBuf },
    #[error("no longer watching")]
    Interrupted { machine: Name },
    #[error("the log's filter `{filter}` is not understood: {source}")]
    LogFilter {
        filter: String,
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("cannot start: {0}")]
    Runtime(io::Error),
}

fn no_report(asked: &str) -> String {
    match asked {
        "" => "there is no migration to report on".to_string(),
        asked => format!("no migration, or more than one, goes by `{asked}`"),
    }
}

fn settled(view: &MigrationView) -> String {
    let MigrationView {
        machine,
        peer,
        state,
        ..
    } = view;
    match (&view.error, state) {
        (Some(error), _) => format!("the migration of {machine} to {peer}: {error}"),
        (None, MigrationState::Cancelled) => {
            format!("the migration of {machine} to {peer} was cancelled")
        }
        (None, _) => format!("the migration of {machine} to {peer} did not complete"),
    }
}

impl CliError {
    pub fn exit(&self) -> Exit {
        match self {
            CliError::NoDaemon { .. } => Exit::NoDaemon,
            CliError::Migration(view) if view.state == MigrationState::NeedsOperator => {
                Exit::NeedsOperator
            }
            CliError::Migration(_) => Exit::SafeAtSource,
            CliError::Api(error) => match error.code {
                ErrorCode::MigrationFailed => Exit::SafeAtSource,
                ErrorCode::NeedsOperator => Exit::NeedsOperator,
                ErrorCode::Stopping => Exit::NoDaemon,
                _ => Exit::Failed,
            },
            CliError::WhichMigration(_) => Exit::Usage,
            CliError::BrokenOff { .. }
            | CliError::CutShort { .. }
            | CliError::NotUnderstood { .. }
            | CliError::TooLong { .. }
            | CliError::File { .. }
            | CliError::NoReport { .. }
            | CliError::Trace { .. }
            | CliError::ReplayErrors { .. }
            | CliError::LeftRecording { .. }
            | CliError::Broken { .. }
            | CliError::StateBroken { .. }
            | CliError::RepositoryDamaged { .. }
            | CliError::Interrupted { .. }
            | CliError::LogFilter { .. }
            | CliError::Runtime(_) => Exit::Failed,
        }
    }

    /// Whether the daemon went away rather than said something.
    pub fn daemon_is_away(&self) -> bool {
        match self {
            CliError::NoDaemon { .. } | CliError::BrokenOff { .. } | CliError::CutShort { .. } => {
                true
            }
            CliError::Api(error) => error.code == ErrorCode::Stopping,
            _ => false,
        }
    }

    /// What / where / the machine's state now / what to do next.
    pub fn explain(&self) -> ApiError {
        let told = |code| ApiError::new(code, self.to_string());
        match self {
            CliError::Api(error) => error.clone(),
            CliError::NoDaemon { socket, source } => told(ErrorCode::Io)
                .at(Some(socket.display().to_string()))
                .machine_state("unknown from here; machines run on without a daemon")
                .next_step(match source.kind() {
                    io::ErrorKind::PermissionDenied => {
                        "run the command as the user who runs the daemon (usually root)"
                    }
                    _ => "start it with `whimbrel host run`, or name its socket with --socket",
                }),
            CliError::BrokenOff { socket, .. } | CliError::CutShort { socket } => told(ErrorCode::Io)
                .at(Some(socket.display().to_string()))
                .machine_state("unknown from here; what the daemon had begun it goes on with when it is back")
                .next_step("look with `whimbrel status`, and into the daemon's log"),
            CliError::NotUnderstood { socket, .. } | CliError::TooLong { socket, .. } => {
                told(ErrorCode::Internal)
                    .at(Some(socket.display().to_string()))
                    .next_step("use a command and a daemon of the same version")
            }
            CliError::File { path, .. } => told(ErrorCode::Io)
                .at(Some(path.display().to_string()))
                .machine_state("nothing was changed")
                .next_step("name another file, or see that this one may be used"),
            CliError::ReplayErrors { .. } => told(ErrorCode::Io)
                .machine_state("the other requests were done")
                .next_step("look into the server's log"),
            CliError::LeftRecording { .. } => told(ErrorCode::Io)
                .machine_state("the daemon finishes the trace; the machine is as it was")
                .next_step("look at the trace with `whimbrel trace show`"),
            CliError::Trace { path, source } => told(match source {
                TraceError::Io(_) => ErrorCode::Io,
                _ => ErrorCode::Invalid,
            })
            .at(Some(path.display().to_string()))
            .machine_state("nothing was changed")
            .next_step(match source {
                TraceError::Magic => "if it is another tool's record, make a trace of it with `trace import`",
                TraceError::Unknown { .. } => "say what it is with `trace import --format`",
                TraceError::SeveralDevices { .. } => "name one of them with --device",
                TraceError::Empty { device: Some(_) } => "see how the record names its disks",
                TraceError::Block { .. } | TraceError::CutOff { .. } => "take the record again, if there is one",
                _ => "mend or cut the record there, or say with --format what it is",
            }),
            CliError::Migration(view) => {
                let error = view.error.as_ref();
                let safe = if view.state == MigrationState::NeedsOperator {
                    format!("{} is paused; neither host may run it by itself", view.machine)
                } else {
                    format!("{} is at its source as before", view.machine)
                };
                told(error.map_or(ErrorCode::MigrationFailed, |e| e.code))
                    .at(error.and_then(|e| e.place.clone()))
                    .machine_state(error.and_then(|e| e.machine_state.clone()).unwrap_or(safe))
                    .next_step(error.and_then(|e| e.next_step.clone()).unwrap_or_else(|| {
                        format!("look with `whimbrel status {}`", view.machine)
                    }))
            }
            CliError::WhichMigration(_) => {
                told(ErrorCode::Invalid).next_step("name the one to watch: `whimbrel watch MACHINE`")
            }
            CliError::NoReport { known, .. } => told(ErrorCode::NotFound)
                .machine_state("nothing was changed")
                .next_step(crate::report::known_words(known)),
            CliError::Broken { .. } | CliError::StateBroken { .. } => told(ErrorCode::Damaged)
                .machine_state("nothing was changed")
                .next_step("do as the findings above say"),
            CliError::RepositoryDamaged { place } => told(ErrorCode::Damaged)
                .at(Some(place.display().to_string()))
                .machine_state("nothing was changed; what is not named above can be restored")
                .next_step("make a new snapshot, or bring the named objects back from a copy of the repository"),
            CliError::Interrupted { machine } => told(ErrorCode::Busy)
                .machine_state(format!("the migration of {machine} goes on"))
                .next_step(format!(
                    "`whimbrel watch {machine}` to watch again, `whimbrel cancel {machine}` to give it up"
                )),
            CliError::LogFilter { .. } => told(ErrorCode::Invalid)
                .machine_state("nothing was started")
                .next_step("write it as in `info` or `warn,whimbrel_host=debug`"),
            CliError::Runtime(_) => told(ErrorCode::Io)
                .machine_state("nothing was changed")
                .next_step("see whether this process may still open files and start threads"),
        }
    }
}

impl From<ApiError> for CliError {
    fn from(error: ApiError) -> CliError {
        CliError::Api(error)
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> CliError {
        CliError::Api(error.into())
    }
}

impl From<StateError> for CliError {
    fn from(error: StateError) -> CliError {
        CliError::Api(error.into())
    }
}

impl From<SpecError> for CliError {
    fn from(error: SpecError) -> CliError {
        CliError::from(StateError::from(error))
    }
}

impl From<PeerError> for CliError {
    fn from(error: PeerError) -> CliError {
        CliError::Api(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_from_what_happened() {
        for (code, exit) in [
            (ErrorCode::NotFound, Exit::Failed),
            (ErrorCode::MigrationFailed, Exit::SafeAtSource),
            (ErrorCode::NeedsOperator, Exit::NeedsOperator),
            (ErrorCode::Stopping, Exit::NoDaemon),
        ] {
            assert_eq!(CliError::Api(ApiError::new(code, "x")).exit(), exit);
        }
    }
}
