//! The state directory: what this host must still know after a crash.
//!
//! ```text
//! STATE/
//!   VERSION                       the format's number, alone on a line
//!   lock                          held by the daemon; its process id inside
//!   host.toml                     the host's name
//!   host-key.pem                  the host's identity
//!   peers.toml                    which other hosts' keys are trusted
//!   invitations.toml              by which others may come to be trusted
//!   volumes/<name>/volume.toml    and `data` beside it
//!   machines/<name>/machine.toml  what the machine is
//!   machines/<name>/runtime.toml  its epoch, owner and process
//!   migrations/<id>/              one migration's journal
//! ```
//!
//! Every record is replaced whole, durably, or not at all (see `durable`). A record that cannot be
//! understood is an error that names it and is never overwritten: it may be the only word on who owns a
//! machine. Calls here block on the disk (an fsync or two each).

mod durable;
mod error;
mod folder;
mod hardware;
mod host;
mod latency;
mod lock;
mod machine;
mod machines;
mod migrations;
mod name;
mod peers;
mod quantity;
mod timestamp;
pub(crate) mod toml_text;
mod volume;
mod volumes;

#[cfg(test)]
mod tests;

pub use error::{RecordKind, StateError};
pub use folder::{FORMAT, Listing, StateDir};
pub use hardware::{Bus, MemoryBacking};
pub use host::{HostRecord, default_host_name};
pub use latency::{LatencyBound, LatencyError};
pub use lock::StateLock;
pub use machine::{
    Accel, DiskSpec, MAX_DEVICES, MAX_VCPUS, Mac, MacError, MachineRuntime, MachineSpec, NicSpec,
    OnDiskError, QemuProcess, SpecError, start_ticks,
};
pub use name::{MAX_NAME, MigrationId, Name, NameError};
pub use peers::trust;
pub use quantity::{ByteSize, QuantityError, Rate, RateLimit};
pub use timestamp::Timestamp;
pub use toml_text::TomlError;
pub use volume::{DATA_FILE, NotAUuid, Ownership, VolumeRecord, VolumeUuid};
pub use volumes::VolumeDraft;
