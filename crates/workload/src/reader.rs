//! The file reader: the manifest's files in a random order, or by Zipf, each against its checksum.

use crate::gate::{Gate, Shared};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use whimbrel_workload::chance::{Rng, Zipf};
use whimbrel_workload::manifest::{ContentHash, FILES_DIR, FileEntry, MANIFEST_PATH, Manifest};
use whimbrel_workload::report::{Fault, Operation, Workload};

const PIECE_KIB: usize = 64;
const AFTER_FAULT: Duration = Duration::from_millis(500);

/// Reads until the guest stops. `may_drop`: the page cache is this program's to drop, as in a guest.
pub fn run(shared: &Shared, may_drop: bool) {
    if let Some(manifest) = load(shared) {
        passes(shared, manifest, may_drop);
    }
    shared.stage(Workload::Read).park();
}

fn load(shared: &Shared) -> Option<Manifest> {
    let path = shared.params.dir.join(MANIFEST_PATH);
    let json = match std::fs::read(path) {
        Ok(json) => json,
        // A disk without files: nothing to read.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            shared.io_fault(Workload::Read, Operation::Open, &error);
            return None;
        }
    };
    let manifest: Option<Manifest> = serde_json::from_slice(&json).ok();
    if manifest.is_none() {
        shared.fault(Fault::FileDiffers {
            path: MANIFEST_PATH.into(),
            size: json.len() as u64,
            xxh3: String::new(),
        });
    }
    manifest.filter(|m| !m.files.is_empty())
}

fn passes(shared: &Shared, manifest: Manifest, may_drop: bool) {
    let root = shared.params.dir.join(FILES_DIR);
    let drop_every = Duration::from_secs(u64::from(shared.params.read.drop_s));
    let mut rng = Rng::new(shared.params.seed, 4);
    let mut gate = Gate::new(shared, Workload::Read);
    let mut files = manifest.files;
    let mut dropped = Instant::now();
    let theta = shared.params.read.zipf;
    let zipf = (theta > 0.0).then(|| Zipf::new(files.len() as u64, theta));
    let mut is_mixed = false;
    loop {
        // By Zipf once, so that the ranks are scattered and stay.
        if zipf.is_none() || !is_mixed {
            rng.shuffle(&mut files);
            is_mixed = true;
        }
        for turn in 0..files.len() {
            let chosen = zipf.as_ref().map(|zipf| zipf.rank(&mut rng) as usize);
            let entry = &files[chosen.unwrap_or(turn)];
            // Also when every file is empty, so that no pass goes without a turn.
            if !gate.pass(0) {
                return;
            }
            match read(shared, &mut gate, &root, entry) {
                Ok(true) => shared.stage(Workload::Read).also.fetch_add(1, Relaxed),
                Ok(false) => return,
                Err(error) => {
                    shared.io_fault(Workload::Read, Operation::Read, &error);
                    shared.sleep(AFTER_FAULT);
                    continue;
                }
            };
            if may_drop && !drop_every.is_zero() && dropped.elapsed() >= drop_every {
                if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "1") {
                    shared.io_fault(Workload::Read, Operation::Sync, &error);
                }
                dropped = Instant::now();
            }
        }
    }
}

/// Reads and checks one file; `false` if the guest is stopping before its end.
fn read(
    shared: &Shared,
    gate: &mut Gate<'_>,
    root: &Path,
    entry: &FileEntry,
) -> std::io::Result<bool> {
    let stage = shared.stage(Workload::Read);
    let mut file = File::open(root.join(&entry.path))?;
    let mut hash = ContentHash::new();
    let mut piece = vec![0; PIECE_KIB * 1024];
    let mut size = 0;
    loop {
        let began = Instant::now();
        let n = file.read(&mut piece)?;
        stage.took(began);
        if n == 0 {
            break;
        }
        hash.update(&piece[..n]);
        size += n as u64;
        stage.done.fetch_add(n as u64, Relaxed);
        if !gate.pass(n.div_ceil(1024) as u64) {
            return Ok(false);
        }
    }
    let xxh3 = hash.finish();
    if size != entry.size || xxh3 != entry.xxh3 {
        shared.fault(Fault::FileDiffers {
            path: entry.path.clone(),
            size,
            xxh3,
        });
    }
    Ok(true)
}
