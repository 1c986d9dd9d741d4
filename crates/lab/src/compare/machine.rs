//! A QEMU as one would start it by hand, with the devices that Whimbrel gives its machines.

use super::CompareError;
use super::qmp::Qmp;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use whimbrel_lab::net::{Host, Lab};
use whimbrel_lab::pair::Guest;
use whimbrel_lab::process::Process;

const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x77, 0x00, 0x01];

/// The disk's node in both QEMUs.
pub const DISK: &str = "disk0";

/// The card's device on the host.
const TAP: &str = "cmp0";

/// A QEMU; ended when dropped.
pub struct Machine {
    pub qmp: Qmp,
    pub image: PathBuf,
    process: Process,
}

impl Machine {
    /// Starts it on `host` with the disk `image`; `folder` takes its socket and logs.
    pub fn start(
        lab: &Lab,
        host: Host,
        guest: &Guest,
        folder: &Path,
        image: PathBuf,
        incoming: bool,
    ) -> Result<Machine, CompareError> {
        std::fs::create_dir_all(folder).map_err(|source| CompareError::Io {
            path: folder.display().to_string(),
            source,
        })?;
        lab.tap(host, TAP)?;
        let spec = guest.spec();
        let socket = folder.join("qmp");
        let log = folder.join("qemu.log");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args([
                "-machine", "q35", "-accel", "tcg", "-cpu", "qemu64", "-smp", "1",
            ])
            .args(["-name", &format!("guest={}", spec.name)])
            .args(["-m", &format!("{}M", spec.memory_mib)])
            .args(guest.boot_files().qemu_args(&spec.params));
        let blockdev = json!({
            "driver": "raw", "node-name": DISK, "discard": "unmap",
            "file": {
                "driver": "file", "filename": image, "discard": "unmap", "aio": "threads",
            },
        });
        let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
        command
            .args(["-blockdev", &blockdev.to_string()])
            .args(["-device", &format!("virtio-blk-pci,drive={DISK}")])
            .args([
                "-netdev",
                &format!("tap,id=n0,ifname={TAP},script=no,downscript=no"),
            ])
            .args(["-device", &format!("virtio-net-pci,netdev=n0,mac={mac}")])
            .args([
                "-serial",
                &format!("file:{}", folder.join("serial.log").display()),
            ])
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", socket.display()),
            ]);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let process = lab.spawn_in(host, "qemu", command, &log)?;
        Ok(Machine {
            qmp: Qmp::connect(&socket, &log)?,
            image,
            process,
        })
    }

    pub fn is_running(&mut self) -> Result<bool, CompareError> {
        Ok(self.process.is_running()?)
    }
}

/// Takes the cards' devices away, once both QEMUs have ended.
pub fn remove_taps(lab: &Lab) {
    for host in Host::BOTH {
        // Gone with its namespace anyway.
        let _ = lab.remove_tap(host, TAP);
    }
}
