//! A file that is there to be deleted, so that a test has something to trim.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use whimbrel_workload::chance::Rng;

const FILE: &str = "ballast";

/// Makes a durable file of `mib` MiB that nothing can compress.
pub fn fill(dir: &Path, mib: u32) -> io::Result<()> {
    let mut file = File::create(dir.join(FILE))?;
    let mut rng = Rng::new(u64::from(mib), 1);
    let mut piece = vec![0; 1 << 20];
    for _ in 0..mib {
        for word in piece.chunks_exact_mut(8) {
            word.copy_from_slice(&rng.next_u64().to_le_bytes());
        }
        file.write_all(&piece)?;
    }
    file.sync_all()
}

/// Deletes the file and tells the disk of everything that the file system does not use.
pub fn trim(dir: &Path) -> io::Result<()> {
    std::fs::remove_file(dir.join(FILE))?;
    // Blocks are free once the deletion is written down.
    rustix::fs::sync();
    let busybox = Command::new("/bin/busybox")
        .arg("fstrim")
        .arg(dir)
        .output()?;
    if busybox.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&busybox.stderr);
    Err(io::Error::other(said.into_owned()))
}
