//! Kinds of data for disks: what packs not at all, well, very well, and by turns.

use super::noise;
use crate::pair::PairError;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// What [`write()`] knows.
pub const KINDS: [&str; 4] = ["noise", "programs", "text", "mixed"];

/// Writes so many bytes of a kind of data; what this machine has of it is repeated if need be.
pub fn write(kind: &str, path: &Path, bytes: u64) -> Result<(), PairError> {
    match kind {
        "noise" => noise(path, bytes),
        "programs" => gather(path, bytes, &["/usr/bin", "/usr/sbin", "/usr/lib"]),
        "text" => gather(path, bytes, &["/usr/share", "/usr/include", "/etc"]),
        _ => {
            let (random, programs) = (path.with_extension("n"), path.with_extension("p"));
            noise(&random, bytes / 2)?;
            gather(&programs, bytes / 2, &["/usr/bin", "/usr/sbin", "/usr/lib"])?;
            interleave(path, &random, &programs)
        }
    }
}

/// Stretches of 2 MiB of one, then of the other.
fn interleave(path: &Path, one: &Path, other: &Path) -> Result<(), PairError> {
    let io = |what| PairError::io(what, path);
    let mut out = File::create(path).map_err(io("create"))?;
    let mut files = [one, other].map(File::open);
    let mut stretch = vec![0; 2 << 20];
    loop {
        let mut all = 0;
        for file in files.iter_mut().flatten() {
            let got = read_whole(file, &mut stretch).map_err(io("read"))?;
            out.write_all(&stretch[..got]).map_err(io("write"))?;
            all += got;
        }
        if all == 0 {
            break;
        }
    }
    for part in [one, other] {
        let _ = std::fs::remove_file(part);
    }
    Ok(())
}

fn read_whole(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read(&mut buffer[got..])? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

/// The files below these folders one after the other, in the order of their names, as often as it takes.
fn gather(path: &Path, bytes: u64, folders: &[&str]) -> Result<(), PairError> {
    let io = |what| PairError::io(what, path);
    let mut files = Vec::new();
    for folder in folders {
        list(Path::new(folder), &mut files);
    }
    let mut out = File::create(path).map_err(io("create"))?;
    let mut left = bytes;
    let mut got_some = true;
    while left > 0 && got_some {
        got_some = false;
        for file in &files {
            let Ok(file) = File::open(file) else { continue };
            let copied = std::io::copy(&mut file.take(left), &mut out).map_err(io("write"))?;
            got_some |= copied > 0;
            left -= copied;
            if left == 0 {
                break;
            }
        }
    }
    // A machine without any such file has zeroes.
    out.set_len(bytes).map_err(io("write"))
}

/// Regular files, depth first; links are not followed.
fn list(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => list(&entry.path(), files),
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
}
