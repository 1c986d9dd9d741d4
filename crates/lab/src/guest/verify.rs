//! The stopped guest's image against what it must hold.
//!
//! The file system is checked by `e2fsck -fn` and its files are read from the image, which is never
//! mounted and never written. After a power cut its journal has to be replayed first, which is done on a
//! copy. Then:
//! - every file of the manifest has its length and checksum;
//! - every log slot and every random block holds a whole cell that is not older than the last fsync the
//!   client was told of (see [`whimbrel_workload::replay`] for why one number says that of each).
//!
//! After a power cut the cells that were in flight, those of the writes between the last fsync and the
//! next, may be torn: they are excused, and counted. After an orderly end there are none.

use super::image::{Image, Layout};
use super::{Ack, GuestError, Manifest, copy_sparse, tool};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io::{self, BufReader, Read};
use std::path::Path;
use whimbrel_workload::cell::{Broken, Place};
use whimbrel_workload::manifest::{FILES_DIR, MANIFEST_PATH, hash_content};
use whimbrel_workload::replay::{BLOCK, GEOMETRY_FILE, Geometry, LOG_FILE, RANDOM_FILE, WORK_DIR};

/// Failures listed in a report; all are counted.
pub const FAILURES_LISTED: usize = 1000;

/// What was looked at, and what was wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// The guest did not unmount; the journal was replayed on a copy.
    pub journal_replayed: bool,
    pub files_checked: u64,
    pub file_bytes: u64,
    pub log_records_checked: u64,
    /// The highest record in the log.
    pub last_seq: u64,
    pub random_blocks_checked: u64,
    /// The last random write on the disk.
    pub last_generation: u64,
    /// Torn cells of writes in flight at a power cut.
    pub excused: u64,
    pub failure_count: u64,
    /// The first [`FAILURES_LISTED`].
    pub failures: Vec<Failure>,
}

impl VerifyReport {
    pub fn passed(&self) -> bool {
        self.failure_count == 0
    }

    fn fail(&mut self, failure: Failure) {
        self.failure_count += 1;
        if self.failures.len() < FAILURES_LISTED {
            self.failures.push(failure);
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// `e2fsck -fn` is not content.
    FileSystem {
        status: Option<i32>,
        /// What it said, the first 2000 bytes.
        said: String,
    },
    FileMissing {
        path: String,
    },
    FileDiffers {
        path: String,
        /// What is there.
        size: u64,
        xxh3: String,
    },
    /// The manifest inside the image is not the one outside.
    ManifestDiffers,
    /// The workloads' layout is not there, though something was acknowledged.
    NoGeometry,
    /// A log slot holds no record, or an older one than was acknowledged.
    LogRecord {
        slot: u64,
        least_seq: u64,
        found: Found,
    },
    /// A random block is not whole, or older than was acknowledged.
    RandomBlock {
        block: u64,
        least_generation: u64,
        found: Found,
    },
}

/// What lay where a cell should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Found {
    /// The file does not reach so far.
    Nothing,
    Generation(u64),
    Broken(Broken),
}

/// Verifies a raw image whose guest has stopped. `acknowledged` is the highest the client heard, or what
/// `poweroff` answered.
///
/// After a power cut it needs room in the temporary folder for a sparse copy of the image.
pub fn verify(
    image: &Path,
    manifest: &Manifest,
    acknowledged: Ack,
) -> Result<VerifyReport, GuestError> {
    let work = tempfile::tempdir().map_err(GuestError::io("create", std::env::temp_dir()))?;
    let mut report = VerifyReport::default();
    let replayed = work.path().join("replayed.raw");
    let mut image = image;
    if needs_replay(image)? {
        copy_sparse(image, &replayed)?;
        let args = ["-fy".as_ref(), "-E".as_ref(), "journal_only".as_ref()];
        let args: Vec<&std::ffi::OsStr> = [&args[..], &[replayed.as_os_str()]].concat();
        // Its status says that it changed something; what is still wrong the next check finds.
        tool::output("e2fsck", &args)?;
        image = &replayed;
        report.journal_replayed = true;
    }
    let check = tool::output("e2fsck", &["-fn".as_ref(), image.as_os_str()])?;
    if check.status.code() != Some(0) {
        let said = [check.stdout, check.stderr].concat();
        report.fail(Failure::FileSystem {
            status: check.status.code(),
            said: String::from_utf8_lossy(&said[..said.len().min(2000)]).into_owned(),
        });
    }
    let image = Image::open(image)?;
    check_files(&image, manifest, &mut report)?;
    check_work(&image, acknowledged, &mut report)?;
    Ok(report)
}

fn needs_replay(image: &Path) -> Result<bool, GuestError> {
    let header = tool::output("dumpe2fs", &["-h".as_ref(), image.as_os_str()])?;
    let header = String::from_utf8_lossy(&header.stdout);
    Ok(header
        .lines()
        .any(|l| l.starts_with("Filesystem features:") && l.contains("needs_recovery")))
}

fn check_files(
    image: &Image,
    manifest: &Manifest,
    report: &mut VerifyReport,
) -> Result<(), GuestError> {
    let paths = std::iter::once(format!("/{MANIFEST_PATH}")).chain(
        manifest
            .files
            .iter()
            .map(|entry| format!("/{FILES_DIR}/{}", entry.path)),
    );
    let paths: Vec<String> = paths.collect();
    let mut layouts = image.find(&paths)?.into_iter();

    let inside: Option<Manifest> = match layouts.next().flatten() {
        None => None,
        Some(layout) => serde_json::from_slice(&read_all(image, &layout, &paths[0])?).ok(),
    };
    if inside.as_ref() != Some(manifest) {
        report.fail(Failure::ManifestDiffers);
    }
    for (entry, layout) in manifest.files.iter().zip(layouts) {
        let Some(layout) = layout else {
            report.fail(Failure::FileMissing {
                path: entry.path.clone(),
            });
            continue;
        };
        let (size, xxh3) =
            hash_content(image.read(&layout)).map_err(GuestError::io("read", &entry.path))?;
        report.files_checked += 1;
        report.file_bytes += size;
        if (size, &xxh3) != (entry.size, &entry.xxh3) {
            report.fail(Failure::FileDiffers {
                path: entry.path.clone(),
                size,
                xxh3,
            });
        }
    }
    Ok(())
}

fn read_all(image: &Image, layout: &Layout, path: &str) -> Result<Vec<u8>, GuestError> {
    let mut bytes = Vec::new();
    image
        .read(layout)
        .read_to_end(&mut bytes)
        .map_err(GuestError::io("read", path))?;
    Ok(bytes)
}

fn check_work(
    image: &Image,
    acknowledged: Ack,
    report: &mut VerifyReport,
) -> Result<(), GuestError> {
    let paths = [GEOMETRY_FILE, LOG_FILE, RANDOM_FILE].map(|name| format!("/{WORK_DIR}/{name}"));
    let mut layouts = image.find(&paths)?.into_iter();
    let geometry: Option<Geometry> = match layouts.next().flatten() {
        None => None,
        Some(layout) => serde_json::from_slice(&read_all(image, &layout, &paths[0])?).ok(),
    };
    let Some(geometry) = geometry else {
        if acknowledged != Ack::default() {
            report.fail(Failure::NoGeometry);
        }
        return Ok(());
    };

    let log = layouts.next().flatten().unwrap_or_default();
    let len = geometry.record_bytes as usize;
    let cells = read_cells(image.read(&log), len, geometry.log_slots, |slot| {
        geometry.log_place(slot)
    });
    let cells = cells.map_err(GuestError::io("read", &paths[1]))?;
    check_log(cells, geometry, acknowledged.seq, report);

    let random = layouts.next().flatten().unwrap_or_default();
    let cells = read_cells(
        image.read(&random),
        BLOCK,
        geometry.random_blocks,
        |block| geometry.random_place(block),
    );
    let cells = cells.map_err(GuestError::io("read", &paths[2]))?;
    check_random(cells, geometry, acknowledged.generation, report);
    Ok(())
}

/// Reads cells `0..count` of `len` bytes.
fn read_cells(
    content: impl Read,
    len: usize,
    count: u64,
    place: impl Fn(u64) -> Place,
) -> io::Result<Vec<Found>> {
    let mut content = BufReader::with_capacity(1 << 20, content);
    let mut bytes = vec![0; len];
    let mut cells = Vec::with_capacity(count as usize);
    for index in 0..count {
        cells.push(match content.read_exact(&mut bytes) {
            Ok(()) => match place(index).open(&bytes) {
                Ok(generation) => Found::Generation(generation),
                Err(broken) => Found::Broken(broken),
            },
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Found::Nothing,
            Err(error) => return Err(error),
        });
    }
    Ok(cells)
}

fn highest(cells: &[Found]) -> u64 {
    let generations = cells.iter().map(|found| match found {
        Found::Generation(generation) => *generation,
        _ => 0,
    });
    generations.max().unwrap_or(0)
}

/// The writes that may have been in flight at a power cut: the guest's last fsync was at most `window`
/// writes before the last one found, and at most `window` writes followed it.
fn in_flight(
    report: &VerifyReport,
    acknowledged: u64,
    last: u64,
    window: u32,
) -> std::ops::Range<u64> {
    let window = u64::from(window);
    let end = last + window + 1;
    if report.journal_replayed {
        acknowledged.max(last.saturating_sub(window)) + 1..end
    } else {
        end..end
    }
}

fn check_log(cells: Vec<Found>, geometry: Geometry, acknowledged: u64, report: &mut VerifyReport) {
    report.last_seq = highest(&cells);
    let torn: BTreeSet<u64> = in_flight(report, acknowledged, report.last_seq, geometry.log_batch)
        .map(|seq| geometry.slot(seq))
        .collect();
    for (slot, found) in (0..).zip(cells) {
        let Some(least_seq) = geometry.least_seq(slot, acknowledged) else {
            continue;
        };
        report.log_records_checked += 1;
        match found {
            Found::Generation(seq) if seq >= least_seq && geometry.slot(seq) == slot => {}
            Found::Broken(_) if torn.contains(&slot) => report.excused += 1,
            found => report.fail(Failure::LogRecord {
                slot,
                least_seq,
                found,
            }),
        }
    }
}

fn check_random(
    cells: Vec<Found>,
    geometry: Geometry,
    acknowledged: u64,
    report: &mut VerifyReport,
) {
    report.last_generation = highest(&cells);
    let torn: BTreeSet<u64> = in_flight(
        report,
        acknowledged,
        report.last_generation,
        geometry.sync_every,
    )
    .map(|generation| geometry.target(generation))
    .collect();
    let least = geometry.random_generations(acknowledged);
    for ((block, found), least_generation) in (0..).zip(cells).zip(least) {
        report.random_blocks_checked += 1;
        match found {
            Found::Generation(generation)
                if generation >= least_generation && geometry.target(generation) == block => {}
            // Never written: the file is preallocated, or not yet there.
            Found::Broken(Broken::Zero) | Found::Nothing if least_generation == 0 => {}
            Found::Broken(_) if torn.contains(&block) => report.excused += 1,
            found => report.fail(Failure::RandomBlock {
                block,
                least_generation,
                found,
            }),
        }
    }
}
