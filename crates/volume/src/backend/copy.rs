//! Copying a whole disk: holes are asked for and never read, zeroes are never written.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::Backend;
use crate::pool::{Lane, Pool};
use crate::{Operation, VolumeError};

/// Bytes read and written at a time; two of them are in memory.
const PIECE: u64 = 1 << 20;

/// What is looked at for zeroes at a time: what a file system's block and a sparse image can leave out.
const GRAIN: usize = 64 << 10;

/// How a copy went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes read, holes left out.
    pub read: u64,
    /// Bytes written: zeroes left out as well.
    pub written: u64,
}

/// Copies `from` into `to`, which is as large or larger and reads as zeroes, and makes it durable.
/// `progress` is told how many of `from`'s bytes are done, holes included.
pub async fn copy(
    from: &Backend,
    to: &Backend,
    mut progress: impl FnMut(u64),
) -> Result<Copied, VolumeError> {
    let total = from.size();
    if to.size() < total {
        return Err(VolumeError::TooSmall {
            path: to.path().to_path_buf(),
            found: to.size(),
            needed: total,
        });
    }
    let mut copied = Copied::default();
    let mut at = 0;
    while at < total {
        for run in from.data_extents(at, total - at).await? {
            let end = run.offset + run.len;
            at = run.offset;
            while run.data && at < end {
                let len = PIECE.min(end - at);
                let bytes = from.read(at, len as usize).await?;
                copied.read += len;
                // A stretch of grains that hold something is written at once.
                let mut done = 0;
                while done < bytes.len() {
                    let zero = |grain: &[u8]| is_zero(grain);
                    let mut grains = bytes[done..].chunks(GRAIN);
                    let skipped: usize = grains
                        .by_ref()
                        .take_while(|g| zero(g))
                        .map(<[u8]>::len)
                        .sum();
                    done += skipped;
                    let full: usize = bytes[done..]
                        .chunks(GRAIN)
                        .take_while(|g| !zero(g))
                        .map(<[u8]>::len)
                        .sum();
                    if full > 0 {
                        to.write(at + done as u64, bytes.slice(done..done + full))
                            .await?;
                        copied.written += full as u64;
                        done += full;
                    }
                }
                at += len;
                progress(at);
            }
            at = end;
            progress(at);
        }
    }
    to.sync().await?;
    Ok(copied)
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // In blocks, so that the compiler can use wide registers and a non-zero block still ends it early.
    bytes
        .chunks(128)
        .all(|block| block.iter().fold(0, |all, b| all | b) == 0)
}

/// Makes `to`, a new file, share all of `from`'s room, where the file system can; `false` where it cannot,
/// and then `to` does not exist.
pub async fn clone_file(pool: &Pool, from: &Path, to: &Path) -> Result<bool, VolumeError> {
    let (from, to): (PathBuf, PathBuf) = (from.into(), to.into());
    let job = move || {
        let fail = |path: &Path, op| {
            let path = path.to_path_buf();
            move |e| VolumeError::io(&path, op, 0, 0, e)
        };
        let source = File::open(&from).map_err(fail(&from, Operation::Open))?;
        let target = File::options()
            .write(true)
            .create_new(true)
            .open(&to)
            .map_err(fail(&to, Operation::Create))?;
        if rustix::fs::ioctl_ficlone(&target, &source).is_ok() {
            target.sync_all().map_err(fail(&to, Operation::Sync))?;
            return Ok(true);
        }
        drop(target);
        std::fs::remove_file(&to).map_err(fail(&to, Operation::Remove))?;
        Ok(false)
    };
    pool.run(Lane::Slow, job).await?
}
