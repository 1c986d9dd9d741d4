//! The life of a volume apart from any machine: made, brought in, copied, resized, looked into, checked.
//!
//! | module | idea |
//! |---|---|
//! | `claims` | whoever works on a volume has it alone |
//! | `make` | a new volume: empty, or a device adopted as it is |
//! | `bring`, `nbd`, `convert` | a volume from an image, a disk behind a URI, a format only QEMU reads |
//! | `take` | a volume's content as a file or as another volume |
//! | `serve`, `papers` | a volume as an NBD export over TCP, and the certificates for that |
//! | [`drive`] | requests of all kinds to an export elsewhere, many at a time |
//! | `record` | a trace of what a guest asks of a disk |
//! | `resize`, `check` | what their names say |
//! | `tracker` | what changed since the last snapshot |
//! | `heat`, `picture` | what the guest reads and writes, kept; and shown with what is here |
//!
//! Everything new is made under a draft's name, made durable, and only then named: whoever is killed or
//! cancelled half-way leaves no volume and no file under the name that was asked for.

mod bring;
mod check;
pub mod claims;
mod convert;
pub mod drive;
pub mod heat;
mod make;
pub mod nbd;
mod papers;
mod picture;
mod record;
mod resize;
mod serve;
mod take;
pub mod tracker;

use crate::api::{ApiError, ErrorCode};
use crate::daemon::Daemon;
use crate::state::{Name, Ownership, VolumeRecord};
use claims::Claim;

impl Daemon {
    /// Has the volume alone: this host's, used by no machine that runs, and by no other work.
    async fn alone(&self, name: &Name) -> Result<(VolumeRecord, Claim), ApiError> {
        let record = self.host.state.volume(name)?;
        let claim = self.host.claims.take(name).ok_or_else(|| {
            ApiError::new(
                ErrorCode::Busy,
                format!("volume `{name}` is being copied, served, resized or checked"),
            )
            .machine_state("the volume was not touched")
            .next_step("try again when that is over")
        })?;
        if record.state != Ownership::Local {
            return Err(ApiError::new(
                ErrorCode::WrongState,
                format!("volume `{name}` is {}", record.state),
            )
            .machine_state("the volume was not touched")
            .next_step("see `whimbrel volume ls` for what is where"));
        }
        // After the claim: a machine that starts now sees it and does not.
        if let Some(machine) = record.machine.as_ref().and_then(|m| self.machines.get(m)) {
            let standing = machine.lock().await;
            if standing.running.as_ref().is_some_and(|r| !r.has_ended()) {
                return Err(ApiError::new(
                    ErrorCode::Busy,
                    format!("machine `{}` runs on volume `{name}`", machine.name),
                )
                .machine_state("the machine runs on, the volume was not touched")
                .next_step(format!(
                    "stop it first: whimbrel machine stop {}",
                    machine.name
                )));
            }
        }
        Ok((record, claim))
    }
}
