//! Copying a whole disk: holes are asked for and never read, zeroes are never written.

use std::fs::File;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::Backend;
use crate::pool::{Lane, Pool};
use crate::raw::DataExtent;
use crate::{Operation, VolumeError};

/// Bytes read and written at a time; two of them are in memory.
const PIECE: u64 = 1 << 20;

/// What is looked at for zeroes at a time: what a file system's block and a sparse image can leave out.
const GRAIN: usize = 64 << 10;

/// Where a disk's content can be had from.
pub trait Source: Sync {
    type Error: From<VolumeError> + Send;

    /// Bytes.
    fn size(&self) -> u64;

    /// Bytes worth reading at a time.
    fn piece(&self) -> u64 {
        PIECE
    }

    /// As [`Backend::data_extents`]: at least one run, from `offset` on.
    fn extents(
        &self,
        offset: u64,
        len: u64,
    ) -> impl Future<Output = Result<Vec<DataExtent>, Self::Error>> + Send;

    /// Reads exactly `len` bytes.
    fn read(
        &self,
        offset: u64,
        len: usize,
    ) -> impl Future<Output = Result<Bytes, Self::Error>> + Send;
}

impl Source for Backend {
    type Error = VolumeError;

    fn size(&self) -> u64 {
        Backend::size(self)
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<DataExtent>, VolumeError> {
        self.data_extents(offset, len).await
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Bytes, VolumeError> {
        Backend::read(self, offset, len).await
    }
}

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
pub async fn copy<S: Source>(
    from: &S,
    to: &Backend,
    mut progress: impl FnMut(u64) + Send,
) -> Result<Copied, S::Error> {
    let total = from.size();
    if to.size() < total {
        return Err(VolumeError::TooSmall {
            path: to.path().to_path_buf(),
            found: to.size(),
            needed: total,
        }
        .into());
    }
    let mut copied = Copied::default();
    let mut at = 0;
    while at < total {
        for run in from.extents(at, total - at).await? {
            let end = run.offset + run.len;
            at = run.offset;
            while run.data && at < end {
                let len = from.piece().min(end - at);
                let bytes = from.read(at, len as usize).await?;
                copied.read += len;
                copied.written += write_all(to, at, &bytes).await?;
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

/// Writes what is not zero, stretches of full grains at once; how many bytes that was.
async fn write_all(to: &Backend, at: u64, bytes: &Bytes) -> Result<u64, VolumeError> {
    let mut written = 0;
    let mut done = 0;
    while done < bytes.len() {
        let run = |zero: bool| -> usize {
            bytes[done..]
                .chunks(GRAIN)
                .take_while(|grain| is_zero(grain) == zero)
                .map(<[u8]>::len)
                .sum()
        };
        let (empty, full) = (run(true), run(false));
        if full > 0 {
            to.write(at + done as u64, bytes.slice(done..done + full))
                .await?;
            written += full as u64;
        }
        done += empty + full;
    }
    Ok(written)
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
