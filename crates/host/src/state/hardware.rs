//! What of a machine's hardware its owner may choose beside how much of it there is.

use serde::{Deserialize, Serialize};

/// How a disk is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bus {
    /// virtio-blk, a PCI device of its own.
    #[default]
    VirtioBlk,
    /// A disk on the machine's one virtio-scsi controller.
    VirtioScsi,
    /// A disk on the chipset's own controller, for guests without virtio drivers: SATA with `q35`, IDE with `pc`.
    Ide,
    /// No disk to the guest: the flash in which its UEFI firmware keeps its variables.
    Flash,
}

impl Bus {
    pub(super) fn is_default(&self) -> bool {
        *self == Bus::default()
    }
}

/// What the guest's memory is made of at its host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryBacking {
    /// Ordinary memory of the QEMU process.
    #[default]
    Private,
    /// A memfd that other processes may map, as vhost-user devices and virtiofs need it.
    Shared,
    /// Huge pages of 2 MiB out of the host's pool, shared. Such memory moves by pre-copy only.
    Huge,
}

impl MemoryBacking {
    pub(super) fn is_default(&self) -> bool {
        *self == MemoryBacking::default()
    }
}
