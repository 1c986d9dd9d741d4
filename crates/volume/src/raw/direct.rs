//! A volume past the page cache.
//!
//! Reads and writes go through a second descriptor with `O_DIRECT`, to and from aligned buffers. The
//! first descriptor stays for what has no content: holes, syncs, discards.
//!
//! # Requests that are not made of whole blocks
//! A block is what the file system says direct I/O must be aligned to; 4 KiB where it does not say.
//! Reads are widened. A write is done as read, change and write back of the blocks it touches, *all of
//! it past the page cache and alone*: such a write holds the volume's gate exclusively, while writes of
//! whole blocks share it. The other way, to write the odd bytes through the page cache, is not open: the
//! kernel would read the whole page, and its later write-back of that page could undo a direct write to
//! the page's other blocks that was acknowledged in between. So nothing of the volume is ever dirty in the
//! page cache. Guests write whole blocks of 512 bytes or more, which most file systems can do directly;
//! the gate costs them two atomic operations.
//!
//! Zeroing is done by the file system for whole pages, with the gate shared; the rest are writes.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{AtFlags, OFlags, StatxFlags};
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

use super::{Access, Inner, RawFile, Result, Zeroes, lane_of_zeroes, size_of};
use crate::buffers::ALIGN;
use crate::pool::{Lane, Pool};
use crate::{Operation, VolumeError, lent, ring};

/// A page of the page cache: what is zeroed by the file system touches no part of one.
const PAGE: u64 = 4096;

pub(super) struct Direct {
    file: Arc<File>,
    /// A power of two, 512 to 4096.
    block: u64,
    gate: Arc<RwLock<()>>,
}

impl RawFile {
    /// Opens an existing file or block device to be read and written past the page cache; through it all
    /// the same, as [`is_direct`](Self::is_direct) tells, where the file system has no direct I/O or the
    /// size is not one of whole blocks.
    pub async fn open_direct(
        pool: &Pool,
        path: impl Into<PathBuf>,
        access: Access,
    ) -> Result<RawFile> {
        let path = path.into();
        let open = move || {
            let fail = |op| {
                let path = path.clone();
                move |e| VolumeError::io(&path, op, 0, 0, e)
            };
            let mut options = OpenOptions::new();
            options.read(true).write(access == Access::ReadWrite);
            let file = options.open(&path).map_err(fail(Operation::Open))?;
            let size = size_of(&file).map_err(fail(Operation::Stat))?;
            let block = block_of(&file);
            let direct = options
                .custom_flags(OFlags::DIRECT.bits() as i32)
                .open(&path);
            let direct = match direct {
                Ok(direct) if size.is_multiple_of(block) => Some(Direct {
                    file: Arc::new(direct),
                    block,
                    gate: Arc::default(),
                }),
                Ok(_) => None,
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "no direct I/O");
                    None
                }
            };
            if direct.is_none() {
                tracing::warn!(path = %path.display(), "served through the page cache");
            }
            Ok(Inner {
                direct,
                ..Inner::new(file, path, size)
            })
        };
        let inner = pool.run(Lane::Slow, open).await??;
        Ok(RawFile::of(pool, inner))
    }

    /// Whether reads and writes go past the page cache.
    pub fn is_direct(&self) -> bool {
        self.inner.direct.is_some()
    }

    pub(super) async fn read_direct(
        &self,
        direct: &Direct,
        offset: u64,
        len: usize,
    ) -> Result<Bytes> {
        let (start, end) = direct.widened(offset, len as u64);
        let buffer = self.pool.buffers().take((end - start) as usize);
        let file = Arc::clone(&direct.file);
        let bytes = self.read_waiting(file, start, buffer, 0).await?;
        let from = (offset - start) as usize;
        Ok(bytes.slice(from..from + len))
    }

    pub(super) async fn write_direct(
        &self,
        direct: &Direct,
        offset: u64,
        bytes: Bytes,
    ) -> Result<()> {
        if direct.widened(offset, bytes.len() as u64) != (offset, offset + bytes.len() as u64) {
            return self.write_parts(direct, offset, bytes).await;
        }
        let shared = Arc::clone(&direct.gate).read_owned().await;
        let bytes = if bytes.as_ptr().align_offset(direct.block as usize) == 0 {
            bytes
        } else {
            let mut buffer = self.pool.buffers().take(bytes.len());
            buffer.as_mut().copy_from_slice(&bytes);
            // Its owner may be waiting to use it again.
            drop(bytes);
            buffer.freeze()
        };
        self.write_waiting(direct, offset, bytes, shared).await
    }

    /// Writes whole blocks from aligned memory, waiting for the disk wherever that is done best.
    async fn write_waiting(
        &self,
        direct: &Direct,
        offset: u64,
        bytes: Bytes,
        shared: OwnedRwLockReadGuard<()>,
    ) -> Result<()> {
        // Shared with the ring, which may be at it when nobody waits here any more.
        let shared = Arc::new(shared);
        if lent::is_lent() {
            let begun = ring::write(&direct.file, offset, bytes.clone(), Arc::clone(&shared));
            if let Some(finished) = begun
                && let Ok((Ok(done), _)) = finished.await
                && done == bytes.len()
            {
                return Ok(());
            }
            // Not taken, short, or an error: the pool does all of it, and finds the error again.
        }
        let (inner, file) = (Arc::clone(&self.inner), Arc::clone(&direct.file));
        let write = move || {
            let _shared = shared;
            inner.write_to(&file, offset, &bytes)
        };
        self.pool.run(Lane::Quick, write).await?
    }

    /// Writes what is not whole blocks.
    async fn write_parts(&self, direct: &Direct, offset: u64, bytes: Bytes) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let alone = Arc::clone(&direct.gate).write_owned().await;
        let (start, end) = direct.widened(offset, bytes.len() as u64);
        let mut buffer = self.pool.buffers().take((end - start) as usize);
        let (inner, file) = (Arc::clone(&self.inner), Arc::clone(&direct.file));
        let block = direct.block as usize;
        let change = move || {
            // Given up when the blocks are back, even if nobody waits for that any more.
            let _alone = alone;
            let content = buffer.as_mut();
            let last = content.len() - block;
            inner.read_rest(&file, start, &mut content[..block], 0)?;
            if last > 0 {
                let at = start + last as u64;
                inner.read_rest(&file, at, &mut content[last..], 0)?;
            }
            let from = (offset - start) as usize;
            content[from..from + bytes.len()].copy_from_slice(&bytes);
            inner.write_to(&file, start, content)
        };
        self.pool.run(Lane::Quick, change).await?
    }

    pub(super) async fn zero_direct(
        &self,
        direct: &Direct,
        op: Operation,
        offset: u64,
        len: u64,
        how: Zeroes,
    ) -> Result<()> {
        let end = offset + len;
        let (from, to) = (offset.next_multiple_of(PAGE), end / PAGE * PAGE);
        let middle = from..to.max(from);
        if !middle.is_empty() {
            let shared = Arc::clone(&direct.gate).read_owned().await;
            let inner = Arc::clone(&self.inner);
            let whole = middle.clone();
            let zero = move || {
                let _shared = shared;
                inner.zero(op, whole.start, whole.end - whole.start, how)
            };
            self.pool.run(lane_of_zeroes(len), zero).await??;
        }
        let edges = if middle.is_empty() {
            [(offset, end), (end, end)]
        } else {
            [(offset, middle.start), (middle.end, end)]
        };
        for (from, to) in edges {
            // Less than two pages: as fast as anything.
            if from < to {
                let zeroes = Bytes::from(vec![0; (to - from) as usize]);
                self.write_direct(direct, from, zeroes).await?;
            }
        }
        Ok(())
    }
}

impl Direct {
    /// The blocks that a range touches, from where to where.
    fn widened(&self, offset: u64, len: u64) -> (u64, u64) {
        (
            offset / self.block * self.block,
            (offset + len).next_multiple_of(self.block),
        )
    }
}

/// What direct I/O must be aligned to, in the file and in memory.
fn block_of(file: &File) -> u64 {
    let stat = rustix::fs::statx(file.as_fd(), "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let told = stat.ok().filter(|stat| {
        // Kernels before 6.1 do not tell.
        stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && stat.stx_dio_offset_align > 0
    });
    let block = told.map_or(0, |stat| {
        stat.stx_dio_offset_align.max(stat.stx_dio_mem_align)
    });
    if block.is_power_of_two() && block as usize <= ALIGN {
        u64::from(block).max(512)
    } else {
        ALIGN as u64
    }
}
