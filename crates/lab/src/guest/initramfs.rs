//! The initramfs: a cpio archive (newc, as the kernel's `buffer-format.rst` gives it) of busybox, the
//! virtio modules and the workload as `/init`.
//!
//! It is not compressed: QEMU copies it into the guest at memory speed, while unpacking would run on the
//! emulated processor.

use super::kernel::{Kernel, read_module};
use super::{GuestError, program};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_128;

const BUSYBOX: &str = "/bin/busybox";

/// Disks, network and balloon, and ext4 where it is not built in.
const MODULES: [&str; 8] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_scsi",
    "ata_piix",
    "sd_mod",
    "virtio_balloon",
    "ext4",
];

/// Builds the initramfs into `cache` unless it is there; its path.
pub fn build(kernel: &Kernel, cache: &Path) -> Result<PathBuf, GuestError> {
    let program = program::workload_program()?;
    let busybox = Path::new(BUSYBOX);
    if !busybox.exists() {
        return Err(GuestError::NoBusybox {
            path: busybox.into(),
        });
    }
    let read = |path: &Path| std::fs::read(path).map_err(GuestError::io("read", path));
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "proc", "sys", "disk", "modules"] {
        archive.dir(dir);
    }
    archive.console();
    archive.file("bin/busybox", &read(busybox)?);
    let mut order = String::new();
    for (number, module) in kernel.modules(&MODULES)?.iter().enumerate() {
        let name = format!("{number:02}.ko");
        archive.file(&format!("modules/{name}"), &read_module(module)?);
        order = order + &name + "\n";
    }
    archive.file("modules/order", order.as_bytes());
    archive.file("init", &read(&program)?);
    let bytes = archive.finish();

    let path = cache.join(format!("initramfs-{:032x}.cpio", xxh3_128(&bytes)));
    if !path.exists() {
        std::fs::create_dir_all(cache).map_err(GuestError::io("create", cache))?;
        // Renamed into place, so that nobody boots half of it.
        let new =
            tempfile::NamedTempFile::new_in(cache).map_err(GuestError::io("create", cache))?;
        std::fs::write(new.path(), &bytes).map_err(GuestError::io("write", new.path()))?;
        new.persist(&path)
            .map_err(|e| GuestError::io("rename", &path)(e.error))?;
    }
    Ok(path)
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn dir(&mut self, path: &str) {
        self.entry(path, 0o040_755, (0, 0), &[]);
    }

    fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, 0o100_755, (0, 0), content);
    }

    /// The kernel opens this for process 1's input and output before anything is mounted.
    fn console(&mut self) {
        self.entry("dev/console", 0o020_600, (5, 1), &[]);
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries,         // inode
            mode,                 //
            0,                    // uid
            0,                    // gid
            1,                    // links
            0,                    // mtime
            content.len() as u32, //
            0,                    // device of the file: major
            0,                    // and minor
            device.0,             // device that the node is: major
            device.1,             // and minor
            path.len() as u32 + 1,
            0, // checksum, unused in newc
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_end_with_a_trailer() {
        let mut archive = Archive::default();
        archive.dir("bin");
        archive.file("init", b"#!x");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let second = (110 + 4usize).next_multiple_of(4);
        assert_eq!(&bytes[second..second + 6], b"070701");
        assert_eq!(&bytes[second + 54..second + 62], b"00000003", "its size");
        assert!(bytes.windows(11).any(|w| w == b"TRAILER!!!\0"));
    }
}
