//! The verifier finds what is wrong: every kind of damage, done to a real image.

mod guest_support;

use guest_support::small_disk;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use whimbrel_lab::guest::{Ack, FAILURES_LISTED, Failure, Found, Manifest, VerifyReport, verify};
use whimbrel_workload::cell::Broken;
use whimbrel_workload::replay::{BLOCK, Geometry};

const GEOMETRY: Geometry = Geometry {
    seed: 9,
    record_bytes: 512,
    log_batch: 1,
    log_slots: 64,
    random_blocks: 32,
    sync_every: 4,
};

/// As far as the test's workloads got: the log has wrapped.
const ACKNOWLEDGED: Ack = Ack {
    seq: 100,
    generation: 200,
};

/// A copy of the small disk, with the two writers' files as a guest would have left them.
struct Fixture {
    dir: TempDir,
    image: PathBuf,
    manifest: Manifest,
    log: Vec<u8>,
    random: Vec<u8>,
}

impl Fixture {
    fn new() -> Fixture {
        let dir = tempfile::tempdir().expect("a folder");
        let disk = small_disk();
        let image = dir.path().join("disk.raw");
        disk.copy_to(&image).expect("copied");
        let mut log = vec![0; 64 * 512];
        for seq in 1..=ACKNOWLEDGED.seq {
            let slot = GEOMETRY.slot(seq);
            let at = slot as usize * 512;
            GEOMETRY.log_place(slot).seal(seq, &mut log[at..at + 512]);
        }
        let mut random = vec![0; 32 * BLOCK];
        for generation in 1..=ACKNOWLEDGED.generation {
            let block = GEOMETRY.target(generation);
            let at = block as usize * BLOCK;
            GEOMETRY
                .random_place(block)
                .seal(generation, &mut random[at..at + BLOCK]);
        }
        Fixture {
            dir,
            image,
            manifest: disk.manifest,
            log,
            random,
        }
    }

    fn verify(&self) -> VerifyReport {
        debugfs(&self.image, "mkdir /wl");
        let geometry = serde_json::to_vec(&GEOMETRY).expect("serialises");
        for (name, content) in [
            ("geometry.json", &geometry),
            ("log", &self.log),
            ("random", &self.random),
        ] {
            let path = self.dir.path().join(name);
            std::fs::write(&path, content).expect("written");
            debugfs(&self.image, &format!("write {} /wl/{name}", path.display()));
        }
        verify(&self.image, &self.manifest, ACKNOWLEDGED).expect("the tools run")
    }
}

fn debugfs(image: &Path, request: &str) -> String {
    let output = Command::new("/usr/sbin/debugfs")
        .args(["-w", "-R", request])
        .arg(image)
        .output()
        .expect("debugfs starts");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn an_undamaged_disk_passes_and_everything_was_looked_at() {
    let fixture = Fixture::new();
    let report = fixture.verify();
    assert_eq!(report.failures, []);
    assert!(report.passed() && !report.journal_replayed);
    assert_eq!(report.files_checked, fixture.manifest.files.len() as u64);
    assert_eq!(report.file_bytes, fixture.manifest.bytes());
    assert!(report.file_bytes >= 40 << 20);
    assert_eq!((report.log_records_checked, report.last_seq), (64, 100));
    assert_eq!(
        (report.random_blocks_checked, report.last_generation),
        (32, 200)
    );
}

#[test]
fn one_flipped_bit_in_a_file_is_found() {
    let fixture = Fixture::new();
    let entry = fixture
        .manifest
        .files
        .iter()
        .max_by_key(|f| f.size)
        .expect("files");
    let block: u64 = debugfs(&fixture.image, &format!("bmap \"/files/{}\" 3", entry.path))
        .trim()
        .parse()
        .expect("a block number");
    let image = File::options()
        .read(true)
        .write(true)
        .open(&fixture.image)
        .expect("the image");
    let mut byte = [0];
    image
        .read_exact_at(&mut byte, block * 4096 + 77)
        .expect("read");
    image
        .write_all_at(&[byte[0] ^ 4], block * 4096 + 77)
        .expect("written");
    let report = fixture.verify();
    assert_eq!(report.failure_count, 1);
    assert!(
        matches!(&report.failures[0], Failure::FileDiffers { path, size, .. }
            if *path == entry.path && *size == entry.size),
        "{:?}",
        report.failures
    );
}

#[test]
fn a_removed_file_is_found() {
    let fixture = Fixture::new();
    let path = fixture.manifest.files[0].path.clone();
    debugfs(&fixture.image, &format!("rm \"/files/{path}\""));
    assert_eq!(fixture.verify().failures, [Failure::FileMissing { path }]);
}

#[test]
fn a_lost_log_record_is_found_even_if_the_older_one_is_whole() {
    let mut fixture = Fixture::new();
    let slot = GEOMETRY.slot(90);
    let at = slot as usize * 512;
    GEOMETRY
        .log_place(slot)
        .seal(90 - 64, &mut fixture.log[at..at + 512]);
    let expected = Failure::LogRecord {
        slot,
        least_seq: 90,
        found: Found::Generation(26),
    };
    assert_eq!(fixture.verify().failures, [expected]);
}

#[test]
fn a_log_that_ends_before_the_acknowledged_record_is_found() {
    let mut fixture = Fixture::new();
    fixture.log.truncate(63 * 512);
    let expected = Failure::LogRecord {
        slot: 63,
        least_seq: 64,
        found: Found::Nothing,
    };
    assert_eq!(fixture.verify().failures, [expected]);
}

#[test]
fn an_older_random_block_is_found() {
    let mut fixture = Fixture::new();
    let block = GEOMETRY.target(200);
    let older = (1..200)
        .rev()
        .find(|&g| GEOMETRY.target(g) == block)
        .expect("each block is written several times");
    let at = block as usize * BLOCK;
    GEOMETRY
        .random_place(block)
        .seal(older, &mut fixture.random[at..at + BLOCK]);
    let expected = Failure::RandomBlock {
        block,
        least_generation: 200,
        found: Found::Generation(older),
    };
    assert_eq!(fixture.verify().failures, [expected]);
}

#[test]
fn a_random_block_that_became_zero_torn_or_another_is_found() {
    let mut fixture = Fixture::new();
    let (first, rest) = fixture.random.split_at_mut(BLOCK);
    first.fill(0);
    rest[..BLOCK][2048] ^= 1;
    let (third, fourth) = rest[BLOCK..].split_at_mut(BLOCK);
    third.copy_from_slice(&fourth[..BLOCK]);
    let found: Vec<Found> = fixture
        .verify()
        .failures
        .into_iter()
        .filter_map(|failure| match failure {
            Failure::RandomBlock { found, .. } => Some(found),
            _ => None,
        })
        .collect();
    let broken = [
        Broken::Zero,
        Broken::Checksum,
        Broken::Misplaced { found: 3 },
    ];
    assert_eq!(found, broken.map(Found::Broken));
}

#[test]
fn damaged_metadata_is_found() {
    let fixture = Fixture::new();
    // A link count that no folder entry stands for.
    let path = &fixture.manifest.files[0].path;
    debugfs(
        &fixture.image,
        &format!("sif \"/files/{path}\" links_count 7"),
    );
    let report = fixture.verify();
    assert!(
        matches!(
            report.failures[..],
            [Failure::FileSystem {
                status: Some(4),
                ..
            }]
        ),
        "{:?}",
        report.failures
    );
}

#[test]
fn a_lost_superblock_is_a_failure_and_not_an_error() {
    let fixture = Fixture::new();
    let image = File::options()
        .write(true)
        .open(&fixture.image)
        .expect("the image");
    image.write_all_at(&[0; 4096], 0).expect("written");
    let report = verify(&fixture.image, &fixture.manifest, ACKNOWLEDGED).expect("the tools run");
    assert!(matches!(report.failures[0], Failure::FileSystem { .. }));
    assert!(report.failure_count > fixture.manifest.files.len() as u64);
    let listed = report.failure_count.min(FAILURES_LISTED as u64);
    assert_eq!(report.failures.len() as u64, listed);
}

#[test]
fn a_disk_no_workload_ran_on_fails_only_if_something_was_acknowledged() {
    let dir = tempfile::tempdir().expect("a folder");
    let disk = small_disk();
    let image = dir.path().join("disk.raw");
    disk.copy_to(&image).expect("copied");
    let check = |ack| {
        verify(&image, &disk.manifest, ack)
            .expect("the tools run")
            .failures
    };
    assert_eq!(check(Ack::default()), []);
    assert_eq!(check(ACKNOWLEDGED), [Failure::NoGeometry]);
}
