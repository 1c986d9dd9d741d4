//! Snapshots of machines, into a repository and back.
//!
//! | module | idea |
//! |---|---|
//! | `take` | the instant, and what follows it |
//! | `storing` | from the disks as they were into the repository |
//! | `restore` | a volume of a snapshot as a volume of this host |

mod restore;
mod storing;
mod take;

pub use restore::{RestoreError, SnapshotSource};

use crate::api::{ApiError, ErrorCode};
use whimbrel_repository::RepositoryError;

/// A repository's error in the API's words; what the machine or volume is then is the caller's to say.
pub fn repository_error(error: RepositoryError) -> ApiError {
    use RepositoryError as Repository;
    let (code, next) = match &error {
        e if e.is_no_space() => (
            ErrorCode::StorageFull,
            "make room, or remove a snapshot: whimbrel snapshot rm DIR SNAPSHOT",
        ),
        Repository::Io { .. } => (
            ErrorCode::Io,
            "put right what the message names and try again",
        ),
        Repository::NotARepository { .. } | Repository::NoSnapshot { .. } => (
            ErrorCode::NotFound,
            "see what is there: whimbrel snapshot ls DIR",
        ),
        Repository::NoVolume { .. } => (ErrorCode::NotFound, "name one of those"),
        Repository::Foreign { .. } => (ErrorCode::Invalid, "name an empty or a new folder"),
        Repository::Unknown { .. } => (
            ErrorCode::Unsupported,
            "use a version of whimbrel that knows it",
        ),
        Repository::Busy { .. } => (ErrorCode::Busy, "try again when that is over"),
        Repository::Exists { .. } => (ErrorCode::Exists, "choose another --name"),
        Repository::Manifest { .. } | Repository::Missing { .. } | Repository::Damaged { .. } => (
            ErrorCode::Damaged,
            "see what is damaged: whimbrel snapshot verify DIR; another snapshot may have it whole",
        ),
        Repository::Unfit(_) => (ErrorCode::Invalid, "see docs/snapshots.md for what can be"),
        Repository::OutOfTurn { .. } | Repository::Crash => (
            ErrorCode::Internal,
            "this is a fault of the program: please report it",
        ),
    };
    ApiError::new(code, error.to_string()).next_step(next)
}

/// Runs what waits for a repository.
async fn blocking<T: Send + 'static>(
    job: impl FnOnce() -> Result<T, RepositoryError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(job).await {
        Ok(done) => done.map_err(repository_error),
        Err(panic) => Err(broken(&panic)),
    }
}

fn broken(panic: &tokio::task::JoinError) -> ApiError {
    let what = format!("the work on the repository broke off: {panic}");
    ApiError::new(ErrorCode::Internal, what).next_step("look into the daemon's log")
}
