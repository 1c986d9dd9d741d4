//! The memory of a stopped QEMU, read where it lies.
//!
//! QEMU tells where in its own address space each RAM block is (`info ramblock` of QEMU 10; an older one may not),
//! and the kernel lets a process of the same user, or one with CAP_SYS_PTRACE, read it through
//! `/proc/PID/mem`. The open file stays bound to the memory it was opened on: once that QEMU is gone a
//! read fails, and never reaches another process that has got its number.
//!
//! Nothing is copied beforehand and nothing has to have been taken before the stop, so this is what a
//! restarted daemon reads from: after its local hand-over had completed (`postmigrate`), in the middle
//! of it (`finish-migrate`), or from a guest that was simply paused. It works as long as the guest stays
//! stopped: that is checked when it is opened, and a RESUME event ends it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::{CancellationToken, DropGuard};
use whimbrel_engine::space::UNIT;

use crate::qmp::{Events, Qmp};
use crate::source::run_status;
use crate::stream::StreamLayout;
use crate::{Error, Result};

/// States of `query-status` in which neither the guest nor a device of it writes to its memory.
const STOPPED: [&str; 9] = [
    "finish-migrate",
    "guest-panicked",
    "internal-error",
    "io-error",
    "paused",
    "postmigrate",
    "prelaunch",
    "shutdown",
    "watchdog",
];

/// The RAM of a stopped QEMU, by the blocks of a layout.
#[derive(Debug)]
pub struct PausedRam {
    memory: File,
    path: PathBuf,
    blocks: Vec<Place>,
    /// The guest has run since: what would be read is no snapshot any more.
    ran: Arc<AtomicBool>,
    /// Ends the listening with this.
    _watch: DropGuard,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Address in QEMU's address space.
    host: u64,
    units: u64,
}

impl PausedRam {
    /// Finds the layout's blocks in the QEMU with that process id. [`Error::NotStopped`] if its guest
    /// may write to its memory, [`Error::NoHostAddresses`] from a QEMU that does not tell where its
    /// blocks are, [`Error::BlockDiffers`] if the layout is not this QEMU's.
    pub async fn open(qmp: &Qmp, pid: u32, layout: &StreamLayout) -> Result<Arc<PausedRam>> {
        // Listening comes before asking, so that no RESUME falls between the two.
        let events = qmp.events();
        let status = run_status(qmp).await?;
        if !STOPPED.contains(&status.as_str()) {
            return Err(Error::NotStopped { status });
        }
        let text = qmp.human("info ramblock").await?;
        let listed = list(&text).ok_or(Error::NoHostAddresses {
            version: qmp.version(),
        })?;
        let blocks = places(&listed, layout)?;
        let path = PathBuf::from(format!("/proc/{pid}/mem"));
        let memory = File::open(&path).map_err(|source| Error::Io {
            what: "open",
            path: path.clone(),
            source,
        })?;
        let ran = Arc::new(AtomicBool::new(false));
        let watch = CancellationToken::new();
        let watching = watch_resume(events, ran.clone());
        tokio::spawn(watch.clone().run_until_cancelled_owned(watching));
        Ok(Arc::new(PausedRam {
            memory,
            path,
            blocks,
            ran,
            _watch: watch.drop_guard(),
        }))
    }

    /// Number of RAM blocks.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Appends the content of `units` units to `out`. [`Error::NotStopped`] once the guest has run or
    /// the monitor's connection was lost, since nobody would tell then. On any error `out` is as before.
    pub fn read(&self, block: usize, unit: u64, units: u64, out: &mut Vec<u8>) -> Result<()> {
        let place = self.blocks.get(block).ok_or(Error::NoSuchBlock {
            block,
            blocks: self.blocks.len(),
        })?;
        let end = unit.saturating_add(units);
        if end > place.units {
            return Err(Error::OutOfBlock {
                block,
                start: unit,
                end,
                units: place.units,
            });
        }
        let before = out.len();
        out.resize(before + (units * UNIT) as usize, 0);
        let read = self
            .memory
            .read_exact_at(&mut out[before..], place.host + unit * UNIT)
            .map_err(|source| Error::Io {
                what: "read",
                path: self.path.clone(),
                source,
            });
        // Looked at afterwards, so that what was read while it ran is not given out.
        let read = match self.ran.load(Ordering::Acquire) {
            true => Err(Error::NotStopped {
                status: "not known to be stopped any more".into(),
            }),
            false => read,
        };
        if read.is_err() {
            out.truncate(before);
        }
        read
    }
}

async fn watch_resume(mut events: Events, ran: Arc<AtomicBool>) {
    // A lost event may have been the one.
    let _ = events.next_named("RESUME").await;
    ran.store(true, Ordering::Release);
}

#[derive(Debug, PartialEq, Eq)]
struct Listed {
    name: String,
    used: u64,
    host: u64,
}

/// Lines of `info ramblock`: name, page size ("4 KiB"), offset, used and total length, host address,
/// `rw` or `ro`. `None` without the column of host addresses.
fn list(text: &str) -> Option<Vec<Listed>> {
    let mut lines = text.lines();
    let has_host = lines.next()?.split_whitespace().any(|word| word == "HVA");
    has_host.then(|| lines.filter_map(listed).collect())
}

fn listed(line: &str) -> Option<Listed> {
    let words: Vec<&str> = line.split_whitespace().collect();
    // A name may have spaces, all that follows it is seven words.
    let (name, rest) = words.split_at_checked(words.len().checked_sub(7)?)?;
    let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    Some(Listed {
        name: name.join(" "),
        used: number(rest[3])?,
        host: number(rest[5])?,
    })
}

/// The part of a block that is in use is what migrates; more may be mapped.
fn places(listed: &[Listed], layout: &StreamLayout) -> Result<Vec<Place>> {
    let place = |block: &crate::stream::RamBlock| {
        let found = listed.iter().find(|l| l.name == block.name);
        match found {
            Some(found) if found.used == block.len => Ok(Place {
                host: found.host,
                units: block.units(),
            }),
            _ => Err(Error::BlockDiffers {
                name: block.name.clone(),
                len: block.len,
                used: found.map(|l| l.used),
            }),
        }
    };
    layout.blocks.iter().map(place).collect()
}

/// Names and used lengths of QEMU's RAM blocks; the host addresses are not needed for this.
pub(crate) async fn used_lengths(qmp: &Qmp) -> Result<Vec<(String, u64)>> {
    let text = qmp.human("info ramblock").await?;
    let listed = list(&text).ok_or(Error::NoHostAddresses {
        version: qmp.version(),
    })?;
    Ok(listed.into_iter().map(|l| (l.name, l.used)).collect())
}

/// The first RAM block of a QEMU, whose guest may run, that is not in pages of 4 KiB, and how large they are.
pub(crate) async fn large_pages(qmp: &Qmp) -> Result<Option<(String, u64)>> {
    let text = qmp.human("info ramblock").await?;
    Ok(text.lines().skip(1).find_map(large))
}

/// `name  2 MiB  0x...`: the words before the first number in hexadecimal.
fn large(line: &str) -> Option<(String, u64)> {
    let (before, _) = line.split_once(" 0x")?;
    let words: Vec<&str> = before.split_whitespace().collect();
    let [name @ .., count, unit] = words.as_slice() else {
        return None;
    };
    let unit = match *unit {
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    let size = count.parse::<u64>().ok()?.checked_mul(unit)?;
    (size != UNIT).then(|| (name.join(" "), size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::RamBlock;

    const LISTING: &str = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x000000000c000000 0x000000000c000000 0x00007fb20fe00000  rw
    /rom@etc/acpi/tables    4 KiB  0x000000000d100000 0x0000000000020000 0x0000000000200000 0x00007fb20e800000  ro
0000:00:02.0/virtio-net-pci.rom    4 KiB  0x000000000d0c0000 0x0000000000040000 0x0000000000040000 0x00007fb268200000  ro
";

    fn layout(name: &str, len: u64) -> StreamLayout {
        StreamLayout {
            configuration: Vec::new(),
            ram_section: 2,
            ram_instance: 0,
            blocks: vec![RamBlock {
                name: name.into(),
                len,
                page_size: UNIT,
            }],
        }
    }

    #[test]
    fn the_used_length_counts_and_not_the_reserved_one() {
        let listed = list(LISTING).expect("has addresses");
        assert_eq!(listed.len(), 3);
        let tables = layout("/rom@etc/acpi/tables", 0x20000);
        let found = places(&listed, &tables).expect("found");
        assert_eq!(
            found,
            [Place {
                host: 0x7fb2_0e80_0000,
                units: 32
            }]
        );
        let reserved = layout("/rom@etc/acpi/tables", 0x20_0000);
        let differs = places(&listed, &reserved);
        assert!(matches!(
            differs,
            Err(Error::BlockDiffers {
                used: Some(0x20000),
                ..
            })
        ));
    }

    #[test]
    fn a_block_of_another_machine_is_named() {
        let listed = list(LISTING).expect("has addresses");
        match places(&listed, &layout("mem1", UNIT)) {
            Err(Error::BlockDiffers {
                name, used: None, ..
            }) => assert_eq!(name, "mem1"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn memory_in_huge_pages_is_found() {
        assert_eq!(LISTING.lines().skip(1).find_map(large), None);
        let huge =
            "  pc.ram    2 MiB  0x0000000000000000 0x000000000c000000 0x000000000c000000  rw";
        assert_eq!(large(huge), Some(("pc.ram".into(), 2 << 20)));
    }

    #[test]
    fn a_listing_without_addresses_is_told_apart() {
        let old = "Block Name    PSize  Offset Used Total\npc.ram 4 KiB 0x0 0x1000 0x1000\n";
        assert_eq!(list(old), None);
    }
}
