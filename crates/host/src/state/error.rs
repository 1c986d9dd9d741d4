//! What can be wrong with the state directory. Each error says what and where (its text), what state
//! things are in now, and what to do next.

use super::machine::SpecError;
use super::name::Name;
use super::toml_text::TomlError;
use crate::api::{ApiError, ErrorCode};
use std::io;
use std::path::{Path, PathBuf};

/// What a record is about, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    Volume,
    Machine,
    Migration,
}

impl std::fmt::Display for RecordKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            RecordKind::Volume => "volume",
            RecordKind::Machine => "machine",
            RecordKind::Migration => "migration",
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    #[error("{} is damaged: {problem}", path.display())]
    Damaged { path: PathBuf, problem: String },

    #[error("{} is damaged: {error}", error.file.display())]
    DamagedToml { error: TomlError },

    #[error("{} has state format {found}; this program knows formats up to {known}", path.display())]
    NewerFormat {
        path: PathBuf,
        found: u64,
        known: u64,
    },

    #[error("{} is not a Whimbrel state directory (it has no VERSION file)", path.display())]
    NotInitialised { path: PathBuf },

    #[error("{} has other things in it (such as {:?}), so it was not made a state directory", path.display(), found)]
    NotEmpty { path: PathBuf, found: String },

    #[error("another daemon{} holds {}", pid.map(|p| format!(" (process {p})")).unwrap_or_default(), path.display())]
    Locked { path: PathBuf, pid: Option<u32> },

    #[error("there is no {kind} `{name}` on this host")]
    NoSuch { kind: RecordKind, name: String },

    #[error("there is already a {kind} `{name}` on this host")]
    Exists { kind: RecordKind, name: String },

    #[error(transparent)]
    Spec(#[from] SpecError),
}

impl StateError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
        let path = path.to_path_buf();
        move |source| StateError::Io {
            action,
            path,
            source,
        }
    }

    /// The file or folder concerned.
    pub fn place(&self) -> Option<&Path> {
        match self {
            StateError::Io { path, .. }
            | StateError::Damaged { path, .. }
            | StateError::NewerFormat { path, .. }
            | StateError::NotInitialised { path }
            | StateError::NotEmpty { path, .. }
            | StateError::Locked { path, .. } => Some(path),
            StateError::DamagedToml { error } => Some(&error.file),
            StateError::Spec(SpecError::Read { path, .. }) => Some(path),
            StateError::Spec(SpecError::Syntax(error)) => Some(&error.file),
            StateError::Spec(SpecError::Invalid { .. })
            | StateError::NoSuch { .. }
            | StateError::Exists { .. } => None,
        }
    }

    /// The state things are in now.
    pub fn state_now(&self) -> &'static str {
        match self {
            StateError::Io { .. } => {
                "records are replaced whole, so each holds either its old or its new content"
            }
            StateError::Damaged { .. } | StateError::DamagedToml { .. } => {
                "the file was left as found; a machine that runs keeps running, and nothing is decided from this record"
            }
            StateError::NewerFormat { .. }
            | StateError::NotInitialised { .. }
            | StateError::NotEmpty { .. }
            | StateError::NoSuch { .. }
            | StateError::Exists { .. }
            | StateError::Spec(_) => "nothing was changed",
            StateError::Locked { .. } => {
                "the other daemon goes on undisturbed; nothing was changed"
            }
        }
    }

    /// What to do next.
    pub fn next_step(&self) -> String {
        match self {
            StateError::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    "run as the user who owns the state directory (usually root), or choose another with --state".to_string()
                }
                io::ErrorKind::StorageFull => "make room on that file system and try again".to_string(),
                _ => "look at the file system named here, then try again".to_string(),
            },
            StateError::Damaged { path, .. } => repair(path),
            StateError::DamagedToml { error } => repair(&error.file),
            StateError::NewerFormat { .. } => {
                "install the version of whimbrel that wrote it, or a later one; going back is not possible".to_string()
            }
            StateError::NotInitialised { path } => {
                format!("make it one with `whimbrel host init --state {}`", path.display())
            }
            StateError::NotEmpty { .. } => "choose an empty or a new directory with --state".to_string(),
            StateError::Locked { .. } => {
                "use the running daemon, stop it first, or give this one its own --state".to_string()
            }
            StateError::NoSuch { kind: RecordKind::Migration, .. } => {
                "list what there is with `whimbrel status`".to_string()
            }
            StateError::NoSuch { kind, .. } => format!("list what there is with `whimbrel {kind} ls`"),
            StateError::Exists { kind, .. } => {
                format!("choose another name, or remove the old {kind} first")
            }
            StateError::Spec(error) => error.next_step().to_string(),
        }
    }

    fn code(&self) -> ErrorCode {
        match self {
            StateError::Io { .. } => ErrorCode::Io,
            StateError::Damaged { .. } | StateError::DamagedToml { .. } => ErrorCode::Damaged,
            StateError::NewerFormat { .. }
            | StateError::NotInitialised { .. }
            | StateError::NotEmpty { .. } => ErrorCode::WrongState,
            StateError::Locked { .. } => ErrorCode::Busy,
            StateError::NoSuch { .. } => ErrorCode::NotFound,
            StateError::Exists { .. } => ErrorCode::Exists,
            StateError::Spec(_) => ErrorCode::Invalid,
        }
    }
}

fn repair(path: &Path) -> String {
    format!(
        "put {} back from a backup or correct it by hand, then try again; do not delete it, it may hold the only word on who owns a machine",
        path.display()
    )
}

impl From<StateError> for ApiError {
    fn from(error: StateError) -> ApiError {
        ApiError::from(&error)
    }
}

impl From<&StateError> for ApiError {
    fn from(error: &StateError) -> ApiError {
        ApiError::new(error.code(), error.to_string())
            .at(error.place().map(|p| p.display().to_string()))
            .machine_state(error.state_now())
            .next_step(error.next_step())
    }
}

/// The name of a record's folder that is not a name.
pub(super) fn not_a_record(kind: RecordKind, path: &Path) -> StateError {
    StateError::Damaged {
        path: path.to_path_buf(),
        problem: format!("its name is not the name of a {kind}"),
    }
}

/// A record that says it is another's.
pub(super) fn misplaced(path: &Path, folder: &Name, inside: &Name) -> StateError {
    StateError::Damaged {
        path: path.to_path_buf(),
        problem: format!("it lies in the folder of `{folder}` but calls itself `{inside}`"),
    }
}
