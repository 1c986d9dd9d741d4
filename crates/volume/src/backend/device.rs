//! A whole block device as a disk.
//!
//! Reads, writes and syncs are those of a [`RawFile`]; what differs is
//!
//! - it is opened with `O_EXCL`: the kernel then refuses it while it is mounted, part of another device, or
//!   open for another volume;
//! - zeroes and discards go to the device in whole blocks of its own, and the edges are written;
//! - a device cannot be asked what holds data, so all of it does. Whoever wants to know otherwise reads it
//!   ([`is_zero`](super::is_zero)), which is offered, not done unasked.
//!
//! A discard must read as zeroes afterwards here, since whoever fills a volume relies on it. A device that
//! cannot zero by itself (`write_zeroes_max_bytes` is 0) keeps its content instead: to a guest a discard
//! is a hint, and writing zeroes over a whole disk would be a poor answer to one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{OFlags, SeekFrom};

use crate::pool::{Lane, Pool};
use crate::raw::{Access, DataExtent, RawFile, Zeroes};
use crate::{Operation, VolumeError};

type Result<T> = std::result::Result<T, VolumeError>;

/// A device that was just let go may be held a moment longer by a job of the pool that has answered
/// already; so it is tried again, for at most a quarter of a second.
const TRIES: u32 = 25;
const PAUSE: Duration = Duration::from_millis(10);

/// An open block device; clones share it.
#[derive(Clone)]
pub struct Device {
    raw: RawFile,
    /// Bytes of the blocks that the device zeroes and discards.
    block: u64,
    /// The device zeroes by itself, without being sent zeroes.
    zeroes: bool,
}

impl Device {
    /// Opens a device for this volume alone.
    pub async fn open(pool: &Pool, path: impl Into<PathBuf>, access: Access) -> Result<Device> {
        let path = path.into();
        let opening = path.clone();
        let open = move || {
            let fail = |op| {
                let path = opening.clone();
                move |e: io::Error| match e.kind() {
                    io::ErrorKind::ResourceBusy => VolumeError::InUse { path },
                    _ => VolumeError::io(&path, op, 0, 0, e),
                }
            };
            let meta = std::fs::metadata(&opening).map_err(fail(Operation::Open))?;
            if !meta.file_type().is_block_device() {
                return Err(VolumeError::NotADevice { path: opening });
            }
            let mut tries = 0;
            let file = loop {
                let file = OpenOptions::new()
                    .read(true)
                    .write(access == Access::ReadWrite)
                    .custom_flags(OFlags::EXCL.bits() as i32)
                    .open(&opening);
                match file {
                    Err(e) if tries < TRIES && e.kind() == io::ErrorKind::ResourceBusy => {
                        tries += 1;
                        std::thread::sleep(PAUSE);
                    }
                    file => break file.map_err(fail(Operation::Open))?,
                }
            };
            let size = rustix::fs::seek(&file, SeekFrom::End(0))
                .map_err(|e| fail(Operation::Stat)(e.into()))?;
            let zeroes = queue_limit(meta.rdev(), "write_zeroes_max_bytes").unwrap_or(0) > 0;
            let block = queue_limit(meta.rdev(), "logical_block_size").unwrap_or(4096);
            Ok((file, size, block, zeroes))
        };
        let (file, size, block, zeroes) = pool.run(Lane::Slow, open).await??;
        Ok(Device {
            raw: RawFile::from_open(pool, file, path, size),
            block,
            zeroes,
        })
    }

    pub(super) fn raw(&self) -> &RawFile {
        &self.raw
    }

    /// As [`RawFile::write_zeroes`].
    pub async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        if how.fast_only && !self.zeroes {
            return Err(VolumeError::NotFast {
                path: self.raw.path().to_path_buf(),
            });
        }
        let (first, last) = self.whole_blocks(offset, len);
        if first >= last {
            return self.write_out(offset, len).await;
        }
        self.write_out(offset, first - offset).await?;
        self.raw
            .write_zeroes(
                first,
                last - first,
                Zeroes {
                    fast_only: false,
                    ..how
                },
            )
            .await?;
        self.write_out(last, offset + len - last).await
    }

    /// Gives the range's room back, as whole blocks; what is given back reads as zeroes.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let (first, last) = self.whole_blocks(offset, len);
        if !self.zeroes || first >= last {
            return Ok(());
        }
        self.raw.discard(first, last - first).await
    }

    /// All of it holds data, as far as anybody can tell.
    pub fn data_extents(&self, offset: u64, len: u64) -> Result<Vec<DataExtent>> {
        let (path, size) = (self.raw.path(), self.raw.size());
        VolumeError::test_range(path, Operation::FindData, offset, len, size)?;
        let all = DataExtent {
            offset,
            len,
            data: true,
        };
        Ok(if len == 0 { Vec::new() } else { vec![all] })
    }

    fn whole_blocks(&self, offset: u64, len: u64) -> (u64, u64) {
        (
            offset.next_multiple_of(self.block),
            (offset + len) / self.block * self.block,
        )
    }

    /// Less than two blocks.
    async fn write_out(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.raw
            .write(offset, Bytes::from(vec![0; len as usize]))
            .await
    }
}

/// A number that the kernel tells of a device's queue; a partition's is its disk's.
fn queue_limit(device: u64, what: &str) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let folder = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    [folder.join("queue"), folder.join("../queue")]
        .iter()
        .find_map(|queue| std::fs::read_to_string(queue.join(what)).ok())
        .and_then(|text| text.trim().parse().ok())
}

/// Bytes of a device, without opening it for anybody.
pub(super) fn size_of(path: &Path) -> io::Result<u64> {
    Ok(rustix::fs::seek(File::open(path)?, SeekFrom::End(0))?)
}
