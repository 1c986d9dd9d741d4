//! The stopped guest's image against what it must hold.
//!
//! The file system is checked by `e2fsck -fn` and read by `debugfs rdump` into a temporary folder, never
//! mounted and never written. After a power cut its journal has to be replayed first, which is done on a
//! copy. Then:
//! - every file of the manifest has its length and checksum;
//! - every log slot and every random block holds a whole cell that is not older than the last fsync the
//!   client was told of (see [`whimbrel_workload::replay`] for why one number says that of each).
//!
//! After a power cut the cells that were in flight, those of the writes between the last fsync and the
//! next, may be torn: they are excused, and counted. After an orderly end there are none.

use super::{Ack, GuestError, Manifest, copy_sparse, tool};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
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
/// Needs room for the files in the temporary folder, and for a copy of the image after a power cut.
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
    let root = work.path().join("root");
    std::fs::create_dir(&root).map_err(GuestError::io("create", &root))?;
    let dump = format!("rdump / \"{}\"", root.display());
    // It says nothing by its status; what it could not read is missing below.
    tool::output(
        "debugfs",
        &["-R".as_ref(), dump.as_ref(), image.as_os_str()],
    )?;

    check_files(&root, manifest, &mut report)?;
    check_work(&root, acknowledged, &mut report)?;
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
    root: &Path,
    manifest: &Manifest,
    report: &mut VerifyReport,
) -> Result<(), GuestError> {
    let inside = std::fs::read(root.join(MANIFEST_PATH)).unwrap_or_default();
    if serde_json::from_slice::<Manifest>(&inside).ok().as_ref() != Some(manifest) {
        report.fail(Failure::ManifestDiffers);
    }
    for entry in &manifest.files {
        let path = root.join(FILES_DIR).join(&entry.path);
        let Some(file) = open(&path)? else {
            report.fail(Failure::FileMissing {
                path: entry.path.clone(),
            });
            continue;
        };
        let (size, xxh3) = hash_content(file).map_err(GuestError::io("read", &path))?;
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

fn check_work(root: &Path, acknowledged: Ack, report: &mut VerifyReport) -> Result<(), GuestError> {
    let dir = root.join(WORK_DIR);
    let path = dir.join(GEOMETRY_FILE);
    let geometry: Option<Geometry> = match open(&path)? {
        None => None,
        Some(file) => serde_json::from_reader(file).ok(),
    };
    let Some(geometry) = geometry else {
        if acknowledged != Ack::default() {
            report.fail(Failure::NoGeometry);
        }
        return Ok(());
    };
    check_log(&dir, geometry, acknowledged.seq, report)?;
    check_random(&dir, geometry, acknowledged.generation, report)
}

fn open(path: &Path) -> Result<Option<File>, GuestError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(GuestError::io("open", path)(error)),
    }
}

/// Reads cells `0..count` of `len` bytes.
fn read_cells(
    path: &Path,
    len: usize,
    count: u64,
    place: impl Fn(u64) -> Place,
) -> Result<Vec<Found>, GuestError> {
    let Some(file) = open(path)? else {
        return Ok(vec![Found::Nothing; count as usize]);
    };
    let mut bytes = vec![0; len];
    let mut cells = Vec::with_capacity(count as usize);
    for index in 0..count {
        cells.push(match file.read_exact_at(&mut bytes, index * len as u64) {
            Ok(()) => match place(index).open(&bytes) {
                Ok(generation) => Found::Generation(generation),
                Err(broken) => Found::Broken(broken),
            },
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Found::Nothing,
            Err(error) => return Err(GuestError::io("read", path)(error)),
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

fn check_log(
    dir: &Path,
    geometry: Geometry,
    acknowledged: u64,
    report: &mut VerifyReport,
) -> Result<(), GuestError> {
    let len = geometry.record_bytes as usize;
    let slots = geometry.log_slots;
    let cells = read_cells(&dir.join(LOG_FILE), len, slots, |s| geometry.log_place(s))?;
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
    Ok(())
}

fn check_random(
    dir: &Path,
    geometry: Geometry,
    acknowledged: u64,
    report: &mut VerifyReport,
) -> Result<(), GuestError> {
    let blocks = geometry.random_blocks;
    let cells = read_cells(&dir.join(RANDOM_FILE), BLOCK, blocks, |b| {
        geometry.random_place(b)
    })?;
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
    Ok(())
}
