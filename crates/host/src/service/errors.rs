//! Errors of the daemon's parts, in the API's words.

use crate::api::{ApiError, ErrorCode};
use crate::machine::MachineError;
use crate::machines::OpenDiskError;
use crate::migration::record::RecordError;
use crate::state::{MigrationId, Name};

impl From<OpenDiskError> for ApiError {
    fn from(error: OpenDiskError) -> ApiError {
        let what = error.to_string();
        match error {
            OpenDiskError::State(error) => error.into(),
            OpenDiskError::Volume(_) | OpenDiskError::Size { .. } => {
                ApiError::new(ErrorCode::Io, what)
                    .next_step("look at the volume's data file with `volume show`")
            }
            OpenDiskError::Claimed { .. } => {
                ApiError::new(ErrorCode::Busy, what).next_step("try again when that is over")
            }
            OpenDiskError::NotLocal { .. } | OpenDiskError::OtherMachine { .. } => {
                ApiError::new(ErrorCode::WrongState, what)
                    .next_step("see `volume ls` for what is where")
            }
        }
    }
}

impl From<MachineError> for ApiError {
    fn from(error: MachineError) -> ApiError {
        use whimbrel_qemu::Error as Qemu;
        let what = error.to_string();
        let (code, next) = match &error {
            MachineError::Qemu(Qemu::NoBinary { .. }) => (
                ErrorCode::Unsupported,
                "install QEMU (Debian: qemu-system-x86) or name it under `qemu` in the configuration",
            ),
            MachineError::Qemu(Qemu::TooOld { .. }) => {
                (ErrorCode::Unsupported, "install QEMU 7.2 or newer")
            }
            MachineError::Qemu(Qemu::UnknownMachine { .. }) => (
                ErrorCode::Unsupported,
                "use a machine type this QEMU has (`qemu-system-x86_64 -machine help`)",
            ),
            MachineError::Qemu(_) => (ErrorCode::Qemu, "see qemu.log in the machine's folder"),
            MachineError::NoNetwork { .. } => (
                ErrorCode::Invalid,
                "add the network under [networks] in the configuration",
            ),
            MachineError::Tap(_) => (ErrorCode::Io, "see that the bridge exists and try again"),
            MachineError::Socket { .. }
            | MachineError::SocketPath { .. }
            | MachineError::File { .. } => (ErrorCode::Io, "put right what the message names"),
            MachineError::Mismatch { .. } | MachineError::DiskElsewhere { .. } => (
                ErrorCode::WrongState,
                "correct the description or the running QEMU, then adopt again",
            ),
            MachineError::Gone { .. } => (ErrorCode::WrongState, "start the machine"),
        };
        ApiError::new(code, what).next_step(next)
    }
}

impl From<RecordError> for ApiError {
    fn from(error: RecordError) -> ApiError {
        let code = match error {
            RecordError::Io { .. } => ErrorCode::Io,
            RecordError::Damaged { .. } => ErrorCode::Damaged,
        };
        ApiError::new(code, error.to_string())
    }
}

pub fn no_machine(name: &Name) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is no machine `{name}`"))
        .next_step("list the machines with `whimbrel machine ls`")
}

pub fn volume_error(error: whimbrel_volume::VolumeError) -> ApiError {
    use whimbrel_volume::VolumeError as Volume;
    let (code, next) = match &error {
        e if e.is_no_space() => (ErrorCode::StorageFull, "make room and try again"),
        Volume::InUse { .. } => (
            ErrorCode::Busy,
            "see what mounts or has opened it (`lsblk`, `lsof`), then try again",
        ),
        Volume::NotADevice { .. } => (
            ErrorCode::Invalid,
            "name a block device, or import the file with `volume import`",
        ),
        Volume::TooSmall { .. } => (ErrorCode::Invalid, "use a larger one, or less of it"),
        Volume::Image { .. } => (
            ErrorCode::Unsupported,
            "do as the message says, or see docs/volumes.md",
        ),
        _ => (
            ErrorCode::Io,
            "put right what the message names and try again",
        ),
    };
    ApiError::new(code, error.to_string())
        .machine_state("no volume was made or changed")
        .next_step(next)
}

pub fn no_migration(id: &MigrationId) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is no migration `{id}`"))
        .next_step("list migrations with `whimbrel status`")
}

pub fn busy_migrating(name: &Name) -> ApiError {
    ApiError::new(ErrorCode::Busy, format!("machine `{name}` is migrating"))
        .next_step("watch it with `whimbrel watch`, or give it up with `whimbrel cancel`")
}

pub fn only_at_source() -> ApiError {
    ApiError::new(
        ErrorCode::WrongState,
        "a migration is steered at its source",
    )
    .next_step("say it on the host the machine comes from")
}
