//! What the machine must have: each Debian package, the sign by which its presence is seen, and why it is needed.
//!
//! Presence is judged by files, never by asking the package system: that takes a millisecond instead of a second,
//! and tools that were put there by other means (or on another distribution) count as well. QEMU alone is started and
//! asked for its version, see [`crate::qemu`].

use std::fs;
use std::path::Path;

use crate::process::find_program;
use crate::qemu;

pub struct Need {
    pub package: &'static str,
    pub why: &'static str,
    sign: Sign,
}

enum Sign {
    Program(&'static str),
    /// A program that runs where no library is: inside the guests.
    StaticProgram(&'static str),
    /// One of these files.
    File(&'static [&'static str]),
    /// A QEMU that the laboratory can use.
    Qemu,
}

/// The two packages that must be of one version, see [`crate::apt`].
pub const QEMU_SYSTEM: &str = "qemu-system-x86";
pub const QEMU_UTILS: &str = "qemu-utils";

const fn need(package: &'static str, sign: Sign, why: &'static str) -> Need {
    Need { package, why, sign }
}

static NEEDS: &[Need] = &[
    need(
        QEMU_SYSTEM,
        Sign::Qemu,
        "runs the machines that are moved; 8.0 or newer",
    ),
    need(
        QEMU_UTILS,
        Sign::Program("qemu-img"),
        "qemu-img, qemu-io and qemu-nbd check our exports from outside",
    ),
    need(
        "nbdkit",
        Sign::Program("nbdkit"),
        "an independent NBD server, to measure ours against",
    ),
    need(
        "libnbd-bin",
        Sign::Program("nbdinfo"),
        "nbdinfo and nbdcopy: an independent NBD client for the tests",
    ),
    need(
        "python3-libnbd",
        Sign::File(&["/usr/lib/python3/dist-packages/nbd.py"]),
        "nbdsh: single NBD requests, the odd ones too, sent by tests",
    ),
    need(
        "fio",
        Sign::Program("fio"),
        "disk load with verification, for tests and benchmarks",
    ),
    need(
        "busybox-static",
        Sign::StaticProgram("busybox"),
        "the whole userland of the test guests",
    ),
    need(
        "iproute2",
        Sign::Program("ip"),
        "ip: hosts as network namespaces",
    ),
    need(
        "e2fsprogs",
        Sign::Program("mkfs.ext4"),
        "file systems on the guests' disks, and their check afterwards",
    ),
    need("cpio", Sign::Program("cpio"), "packs the guests' initramfs"),
    need(
        "zstd",
        Sign::Program("zstd"),
        "compresses the guests' initramfs and images",
    ),
    need(
        "gcc",
        Sign::Program("cc"),
        "links everything; compiles the C parts of TLS and zstd",
    ),
    need(
        "g++",
        Sign::Program("c++"),
        "builds libFuzzer for the fuzz targets",
    ),
    need(
        "libc6-dev",
        Sign::File(&[
            "/usr/lib/x86_64-linux-gnu/libc.a",
            "/usr/lib64/libc.a",
            "/usr/lib/libc.a",
        ]),
        "links the guests' workload statically",
    ),
];

/// What this machine lacks, in the order of the table.
pub fn missing() -> Vec<&'static Need> {
    NEEDS.iter().filter(|need| !need.is_present()).collect()
}

impl Need {
    pub fn is_present(&self) -> bool {
        match self.sign {
            Sign::Program(name) => find_program(name).is_some(),
            Sign::StaticProgram(name) => find_program(name).is_some_and(|file| is_static(&file)),
            Sign::Qemu => qemu::will_do(qemu::installed()),
            Sign::File(files) => files.iter().any(|file| Path::new(file).exists()),
        }
    }
}

/// Whether a 64-bit little-endian ELF file names no interpreter (ELF specification, "Program Header": PT_INTERP).
fn is_static(file: &Path) -> bool {
    const PT_INTERP: u32 = 3;
    let Ok(image) = fs::read(file) else {
        return false;
    };
    let number = |at: usize, len: usize| -> Option<u64> {
        let bytes = image.get(at..at.checked_add(len)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte)),
        )
    };
    let interpreter = || -> Option<bool> {
        if number(0, 6)? != 0x0102_464c_457f {
            return None;
        }
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        for index in 0..count {
            let entry = usize::try_from(table.checked_add(index * size)?).ok()?;
            if number(entry, 4)? == u64::from(PT_INTERP) {
                return Some(true);
            }
        }
        Some(false)
    };
    interpreter() == Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_told_from_a_static_one() {
        let dynamic = std::env::current_exe().unwrap();
        assert!(
            !is_static(&dynamic),
            "this test program needs a dynamic linker"
        );

        let folder = std::env::temp_dir().join(format!("whimbrel-needs-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("program");
        // An ELF header whose program header table holds one PT_LOAD entry.
        let mut image = vec![0u8; 64 + 56];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[32] = 64;
        image[54] = 56;
        image[56] = 1;
        image[64] = 1;
        fs::write(&file, &image).unwrap();
        assert!(is_static(&file));
        fs::write(&file, b"#!/bin/sh\n").unwrap();
        assert!(!is_static(&file), "a script is no static program");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn no_package_is_named_twice_and_each_has_a_reason() {
        for (index, need) in NEEDS.iter().enumerate() {
            assert!(!need.why.is_empty(), "{}", need.package);
            assert!(
                NEEDS[..index]
                    .iter()
                    .all(|other| other.package != need.package),
                "{}",
                need.package
            );
        }
    }
}
