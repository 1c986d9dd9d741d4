//! What has become of a destination QEMU, for a daemon that did not see it happen.

use std::time::Duration;

use crate::qmp::Qmp;
use crate::source::{migration_status, run_status};
use crate::{Error, Result};

/// Time the main thread gets to answer. Each question that times out stays in QEMU's queue, which has
/// eight places and then stops the monitor: one that was blocked should not be asked again and again.
const ANSWER: Duration = Duration::from_secs(2);

/// What has become of a destination QEMU. In brackets: what `query-status` and `query-migrate` say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationState {
    /// Nothing of the guest has run here (`inmigrate`; no status, `setup` or `active`): the switch never
    /// reached this QEMU. It may be refused and ended.
    NeverRan,
    /// In post-copy with its socket open (`postcopy-active`, `postcopy-recover`): it has a feeder, or has
    /// not noticed yet that it lost it.
    Fed,
    /// In post-copy without a feeder (`postcopy-paused`): [`recover`](super::PostcopySink::recover).
    Paused,
    /// All of the guest is here (`completed`): nothing to do.
    Complete,
    /// QEMU lives and its main thread does not answer: it waits for a page, so the switch has reached it.
    /// To be recovered, if the guest ran; which shows by trying.
    Blocked,
    /// It lost its feeder after the switch had reached it and before the guest ran, while it was loading
    /// its devices. QEMU does not survive that: it exits, or hangs as this one does. The guest has not
    /// run here. Only [`recover`](super::PostcopySink::recover) tells this from [`Blocked`](Self::Blocked).
    LostLoading,
    /// QEMU gave the migration up (`failed`).
    Failed { reason: String },
    /// QEMU has exited. It does so itself when its stream ends before the guest runs.
    Gone,
    /// Not a destination (no incoming migration, and not `inmigrate`).
    NotIncoming { status: String },
}

impl std::fmt::Display for DestinationState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DestinationState::NeverRan => f.write_str("the guest never ran here"),
            DestinationState::Fed => f.write_str("it is being fed"),
            DestinationState::Paused => f.write_str("it waits for a feeder"),
            DestinationState::Complete => f.write_str("it is complete"),
            DestinationState::Blocked => f.write_str("QEMU waits for a page and does not answer"),
            DestinationState::LostLoading => {
                f.write_str("it lost its feeder before the guest ran, and hangs")
            }
            DestinationState::Failed { reason } => write!(f, "its migration failed: {reason}"),
            DestinationState::Gone => f.write_str("QEMU is gone"),
            DestinationState::NotIncoming { status } => {
                write!(f, "it is no destination, its guest is {status}")
            }
        }
    }
}

/// Asks a QEMU started with `-incoming`. Errors are only those of QMP itself.
pub async fn destination_state(qmp: &Qmp) -> Result<DestinationState> {
    let asked = async { Ok((migration_status(qmp).await?, run_status(qmp).await?)) };
    let ((migration, info), status) = match tokio::time::timeout(ANSWER, asked).await {
        Ok(Ok(answers)) => answers,
        Ok(Err(Error::Disconnected { .. })) => return Ok(DestinationState::Gone),
        Ok(Err(error)) => return Err(error),
        Err(_) => return Ok(DestinationState::Blocked),
    };
    Ok(match migration.as_str() {
        "postcopy-paused" => DestinationState::Paused,
        "postcopy-active" | "postcopy-recover" | "postcopy-recover-setup" => DestinationState::Fed,
        "completed" => DestinationState::Complete,
        "failed" => DestinationState::Failed {
            reason: info["error-desc"].as_str().unwrap_or("").to_owned(),
        },
        _ if status == "inmigrate" => DestinationState::NeverRan,
        _ => DestinationState::NotIncoming { status },
    })
}
