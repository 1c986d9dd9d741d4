//! The sockets in a machine's folder.

use std::path::{Path, PathBuf};

/// QEMU's monitor.
pub fn qmp_socket(folder: &Path) -> PathBuf {
    folder.join("qmp.sock")
}

/// The machine's disks, served by the daemon.
pub fn disk_socket(folder: &Path) -> PathBuf {
    folder.join("nbd.sock")
}

/// Where QEMU sends its memory when the machine moves away.
pub fn ram_out_socket(folder: &Path) -> PathBuf {
    folder.join("ram-out.sock")
}

/// Where QEMU is given its memory when the machine arrives.
pub fn ram_in_socket(folder: &Path) -> PathBuf {
    folder.join("ram.sock")
}
