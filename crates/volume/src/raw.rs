//! A raw volume: a sparse file, or a block device.
//!
//! # How it does I/O
//! Buffered, through the page cache, unless it was opened to go past it: QEMU's own cache modes
//! are kept by the flushes it sends. A read that the page cache can answer is done on the caller's thread
//! (`preadv2` with `RWF_NOWAIT` fails with `EAGAIN` rather than wait for a disk); all else goes to the
//! pool, so that a slow or dead disk stalls its own requests and never the runtime. Writes
//! try the same where the file system can (XFS, btrfs; ext4 refuses, and is not asked again). Writes that
//! go to the pool are done by one of its threads at a time per volume: a file system lets only one writer
//! into a file anyway, and eight threads queueing for its lock were measured to cost more than the writing.
//!
//! On a lent thread, which serves one client and no runtime of others, reads that must wait
//! go to the thread's ring, and writes into the page cache are done on the spot, as far as
//! its patience goes.
//!
//! # Traps
//! - Requests in flight together are not ordered. As on a disk, whoever needs an order awaits the first.
//! - A future dropped half way leaves its request running: the bytes may still be written.
//! - After one failed sync every later one fails, see `VolumeError::SyncLost`.

mod direct;
mod patience;
mod settle;

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::buffers::Buffer;
use crate::journal::DataSync;
use crate::pool::{Lane, Pool};
use crate::turns::Turns;
use crate::{Operation, VolumeError, lent, ring};
use direct::Direct;
use patience::Patience;

type Result<T> = std::result::Result<T, VolumeError>;

/// Reads and writes up to this many bytes are tried on the caller's thread; copying more would keep the
/// runtime from others for longer than a hand-over costs.
const INLINE: usize = 64 << 10;

/// The same on a lent thread, where others are only requests of the same client.
const INLINE_LENT: usize = 1 << 20;

/// Zeroes written at a time where the file system cannot zero by itself.
const ZEROES: usize = 1 << 20;

/// At most this much is read ahead per request; more would push out what is needed.
const PREFETCH: u64 = 32 << 20;

/// Runs a single [`data_extents`](RawFile::data_extents) answers at most.
const EXTENTS: usize = 65_536;

/// Writes of one volume waiting for the pool at most; past it, callers wait for room.
const WRITES: usize = 256;

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// How zeroes may be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zeroes {
    /// The range must stay (or become) allocated.
    pub no_hole: bool,
    /// Fail with [`VolumeError::NotFast`] rather than write zeroes out.
    pub fast_only: bool,
}

/// A run of bytes that holds data, or reads as zeroes and takes no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataExtent {
    pub offset: u64,
    pub len: u64,
    pub data: bool,
}

/// An open raw volume; clones share it.
#[derive(Clone)]
pub struct RawFile {
    pool: Pool,
    inner: Arc<Inner>,
    syncs: Arc<Turns>,
}

struct Inner {
    file: Arc<File>,
    /// Reads and writes go past the page cache.
    direct: Option<Direct>,
    path: PathBuf,
    size: u64,
    /// What the file system was found able to do; tried until refused once.
    nowait_read: AtomicBool,
    nowait_write: AtomicBool,
    punch: AtomicBool,
    zero_range: AtomicBool,
    patience: Patience,
    writes: Mutex<Writes>,
    write_room: Arc<Semaphore>,
    sync_failed: Mutex<Option<Arc<io::Error>>>,
}

/// Writes on their way to the pool.
#[derive(Default)]
struct Writes {
    waiting: Vec<WaitingWrite>,
    /// A pool thread is at it, or about to be.
    draining: bool,
}

struct WaitingWrite {
    offset: u64,
    bytes: Bytes,
    done: oneshot::Sender<Result<()>>,
    /// Held until the write is done, even if its caller has gone.
    _room: OwnedSemaphorePermit,
}

impl RawFile {
    /// Opens an existing file or block device at its present size.
    pub async fn open(pool: &Pool, path: impl Into<PathBuf>, access: Access) -> Result<RawFile> {
        let path = path.into();
        let open = move || {
            let file = OpenOptions::new()
                .read(true)
                .write(access == Access::ReadWrite)
                .open(&path)
                .map_err(|e| VolumeError::io(&path, Operation::Open, 0, 0, e))?;
            let size =
                size_of(&file).map_err(|e| VolumeError::io(&path, Operation::Stat, 0, 0, e))?;
            Ok(Inner::new(file, path, size))
        };
        let inner = pool.run(Lane::Slow, open).await??;
        Ok(RawFile::of(pool, inner))
    }

    /// Makes a new file of `size` bytes, all hole; refuses an existing one. Its name is durable when this
    /// returns.
    pub async fn create(pool: &Pool, path: impl Into<PathBuf>, size: u64) -> Result<RawFile> {
        let path = path.into();
        let create = move || {
            let fail = |e| VolumeError::io(&path, Operation::Create, 0, size, e);
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)
                .map_err(fail)?;
            file.set_len(size).map_err(fail)?;
            file.sync_all().map_err(fail)?;
            if let Some(dir) = path.parent() {
                let dir = if dir.as_os_str().is_empty() {
                    Path::new(".")
                } else {
                    dir
                };
                File::open(dir).and_then(|d| d.sync_all()).map_err(fail)?;
            }
            Ok(Inner::new(file, path, size))
        };
        let inner = pool.run(Lane::Slow, create).await??;
        Ok(RawFile::of(pool, inner))
    }

    /// A file opened elsewhere, of `size` bytes.
    pub(crate) fn from_open(pool: &Pool, file: File, path: PathBuf, size: u64) -> RawFile {
        RawFile::of(pool, Inner::new(file, path, size))
    }

    fn of(pool: &Pool, inner: Inner) -> RawFile {
        RawFile {
            pool: pool.clone(),
            inner: Arc::new(inner),
            syncs: Arc::default(),
        }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.inner.size
    }

    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Reads exactly `len` bytes.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes> {
        self.inner.test(Operation::Read, offset, len as u64)?;
        if let Some(direct) = &self.inner.direct {
            return self.read_direct(direct, offset, len).await;
        }
        let mut buffer = self.pool.buffers().take(len);
        let mut done = 0;
        if len <= inline_most() && self.inner.nowait_read.load(Ordering::Relaxed) {
            done = self.inner.read_nowait(offset, buffer.as_mut());
            if done == len {
                return Ok(buffer.freeze());
            }
        }
        self.read_waiting(Arc::clone(&self.inner.file), offset, buffer, done)
            .await
    }

    /// Fills the buffer from its byte `done` on, waiting for the disk wherever that is done best.
    async fn read_waiting(
        &self,
        file: Arc<File>,
        offset: u64,
        mut buffer: Buffer,
        mut done: usize,
    ) -> Result<Bytes> {
        let len = buffer.as_ref().len();
        if lent::is_lent() {
            match ring::read(&file, offset + done as u64, buffer, done) {
                Ok(finished) => match finished.await {
                    Ok((Ok(got), Some(back))) if got == len - done => return Ok(back.freeze()),
                    // Short, or an error: the pool goes on from there, and finds the error again.
                    Ok((got, Some(back))) => {
                        done += got.unwrap_or(0);
                        buffer = back;
                    }
                    Ok((_, None)) | Err(_) => {
                        done = 0;
                        buffer = self.pool.buffers().take(len);
                    }
                },
                Err(back) => buffer = back,
            }
        }
        let inner = Arc::clone(&self.inner);
        self.pool
            .run(Lane::Quick, move || {
                inner.read_rest(&file, offset, buffer.as_mut(), done)?;
                Ok(buffer.freeze())
            })
            .await?
    }

    /// Writes all the bytes into the page cache; [`sync`](Self::sync) makes them durable.
    pub async fn write(&self, offset: u64, bytes: Bytes) -> Result<()> {
        self.inner
            .test(Operation::Write, offset, bytes.len() as u64)?;
        if let Some(direct) = &self.inner.direct {
            return self.write_direct(direct, offset, bytes).await;
        }
        if lent::is_lent()
            && bytes.len() <= INLINE_LENT
            && let Some(begun) = self.inner.patience.begin()
        {
            let result = self.inner.write_blocking(offset, &bytes);
            self.inner.patience.ended(begun);
            return result;
        }
        let mut done = 0;
        if bytes.len() <= INLINE && self.inner.nowait_write.load(Ordering::Relaxed) {
            done = self.inner.write_nowait(offset, &bytes);
            if done == bytes.len() {
                return Ok(());
            }
        }
        let room = Arc::clone(&self.inner.write_room).acquire_owned().await;
        let (done_to, answered) = oneshot::channel();
        self.queue_write(WaitingWrite {
            offset: offset + done as u64,
            bytes: bytes.slice(done..),
            done: done_to,
            _room: room.map_err(|_| VolumeError::PoolStopped)?,
        });
        answered.await.map_err(|_| VolumeError::PoolStopped)?
    }

    fn queue_write(&self, write: WaitingWrite) {
        let mut writes = self.inner.writes();
        writes.waiting.push(write);
        if !std::mem::replace(&mut writes.draining, true) {
            drop(writes);
            let inner = Arc::clone(&self.inner);
            self.pool
                .hand_over(Lane::Quick, move || inner.drain_writes());
        }
    }

    /// Makes the range read as zeroes: a hole, or allocated zeroes where `no_hole` is set, if need be by
    /// writing them.
    pub async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        self.zero(Operation::WriteZeroes, offset, len, how).await
    }

    /// Gives the range's room back; it reads as zeroes. Zeroes are written where the file system cannot
    /// punch holes, so that what is read afterwards is the same everywhere.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let how = Zeroes::default();
        self.zero(Operation::Discard, offset, len, how).await
    }

    async fn zero(&self, op: Operation, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        self.inner.test(op, offset, len)?;
        if let Some(direct) = &self.inner.direct {
            return self.zero_direct(direct, op, offset, len, how).await;
        }
        let inner = Arc::clone(&self.inner);
        let zero = move || inner.zero(op, offset, len, how);
        self.pool.run(lane_of_zeroes(len), zero).await?
    }

    /// Makes everything written before the call durable. Concurrent callers share.
    pub async fn sync(&self) -> Result<()> {
        self.syncs
            .once(async {
                let inner = Arc::clone(&self.inner);
                self.pool
                    .run(Lane::Slow, move || inner.sync_blocking())
                    .await?
            })
            .await
    }

    /// Which parts of the range hold data, ascending, without a gap, neighbours differing. All data where
    /// the file system does not tell. At most 65,536 runs: if the last one ends before the range does, ask
    /// again from there.
    pub async fn data_extents(&self, offset: u64, len: u64) -> Result<Vec<DataExtent>> {
        self.inner.test(Operation::FindData, offset, len)?;
        let inner = Arc::clone(&self.inner);
        self.pool
            .run(Lane::Quick, move || inner.data_extents(offset, len))
            .await?
    }

    /// Bytes the file takes on its file system (a block device: 0).
    pub async fn allocated(&self) -> Result<u64> {
        let inner = Arc::clone(&self.inner);
        let stat = move || {
            let meta = inner.file.metadata();
            let meta = meta.map_err(|e| inner.error(Operation::Stat, 0, 0, e))?;
            Ok(meta.blocks() * 512)
        };
        self.pool.run(Lane::Quick, stat).await?
    }

    /// Asks the kernel to read the range (its first 32 MiB) into the page cache; does not wait for that.
    pub async fn prefetch(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.test(Operation::Prefetch, offset, len)?;
        if self.inner.direct.is_some() {
            // Nobody would read it from there.
            return Ok(());
        }
        let inner = Arc::clone(&self.inner);
        let advise = move || {
            let wanted = std::num::NonZeroU64::new(len.min(PREFETCH));
            if wanted.is_none() {
                // To the kernel a length of 0 means "to the end".
                return Ok(());
            }
            rustix::fs::fadvise(&inner.file, offset, wanted, Advice::WillNeed)
                .map_err(|e| inner.error(Operation::Prefetch, offset, len, e.into()))
        };
        self.pool.run(Lane::Slow, advise).await?
    }

    /// Writes the range out of the page cache and waits until the disk has it; not durable by that alone.
    pub async fn write_out(&self, offset: u64, len: u64) -> Result<()> {
        if self.inner.direct.is_some() {
            return Ok(());
        }
        let inner = Arc::clone(&self.inner);
        let out = move || {
            settle::write_out(&inner.file, offset, len)
                .map_err(|e| inner.error(Operation::Sync, offset, len, e))
        };
        self.pool.run(Lane::Slow, out).await?
    }

    /// For jobs that themselves run on the pool.
    pub(crate) fn blocking(&self) -> Blocking {
        Blocking(Arc::clone(&self.inner))
    }
}

/// The volume as seen from a pool thread.
pub(crate) struct Blocking(Arc<Inner>);

impl Blocking {
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.0.read_rest(&self.0.file, offset, &mut bytes, 0)?;
        Ok(bytes)
    }

    pub fn data_extents(&self, offset: u64, len: u64) -> Result<Vec<DataExtent>> {
        self.0.data_extents(offset, len)
    }
}

impl DataSync for RawFile {
    fn sync(&self) -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>> {
        Box::pin(RawFile::sync(self))
    }
}

/// A lane for what may take long: where zeroes must be written, this can be gigabytes.
fn lane_of_zeroes(len: u64) -> Lane {
    if len <= 32 << 20 {
        Lane::Quick
    } else {
        Lane::Slow
    }
}

fn inline_most() -> usize {
    if lent::is_lent() { INLINE_LENT } else { INLINE }
}

fn size_of(file: &File) -> io::Result<u64> {
    let meta = file.metadata()?;
    if meta.file_type().is_block_device() {
        return Ok(rustix::fs::seek(file, SeekFrom::End(0))?);
    }
    Ok(meta.len())
}

impl Inner {
    fn new(file: File, path: PathBuf, size: u64) -> Inner {
        Inner {
            file: Arc::new(file),
            direct: None,
            path,
            size,
            nowait_read: AtomicBool::new(true),
            nowait_write: AtomicBool::new(true),
            punch: AtomicBool::new(true),
            zero_range: AtomicBool::new(true),
            patience: Patience::default(),
            writes: Mutex::default(),
            write_room: Arc::new(Semaphore::new(WRITES)),
            sync_failed: Mutex::new(None),
        }
    }

    fn writes(&self) -> MutexGuard<'_, Writes> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On a pool thread: does writes until none waits.
    fn drain_writes(&self) {
        loop {
            let mut writes = self.writes();
            let batch = std::mem::take(&mut writes.waiting);
            if batch.is_empty() {
                writes.draining = false;
                return;
            }
            drop(writes);
            let results: Vec<_> = batch
                .iter()
                .map(|write| self.write_blocking(write.offset, &write.bytes))
                .collect();
            // All answers at the end: one by one, each would wake its caller, who would take this
            // thread's core to queue a single write.
            for (write, result) in batch.into_iter().zip(results) {
                // Nobody may be waiting any more; written is written.
                let _ = write.done.send(result);
            }
        }
    }

    fn error(&self, op: Operation, offset: u64, len: u64, e: io::Error) -> VolumeError {
        VolumeError::io(&self.path, op, offset, len, e)
    }

    fn test(&self, op: Operation, offset: u64, len: u64) -> Result<()> {
        VolumeError::test_range(&self.path, op, offset, len, self.size)
    }

    /// Bytes read without waiting, from the start; errors are left to the blocking way to find again.
    fn read_nowait(&self, offset: u64, bytes: &mut [u8]) -> usize {
        let slice = &mut [IoSliceMut::new(bytes)];
        match rustix::io::preadv2(&self.file, slice, offset, ReadWriteFlags::NOWAIT) {
            Ok(done) => done,
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                self.nowait_read.store(false, Ordering::Relaxed);
                0
            }
            Err(_) => 0,
        }
    }

    fn write_nowait(&self, offset: u64, bytes: &[u8]) -> usize {
        match rustix::io::pwritev2(
            &self.file,
            &[IoSlice::new(bytes)],
            offset,
            ReadWriteFlags::NOWAIT,
        ) {
            Ok(done) => done,
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                self.nowait_write.store(false, Ordering::Relaxed);
                0
            }
            Err(_) => 0,
        }
    }

    /// Fills the bytes, of which the first `done` are there.
    fn read_rest(&self, file: &File, offset: u64, bytes: &mut [u8], mut done: usize) -> Result<()> {
        while done < bytes.len() {
            let at = offset + done as u64;
            let room = (bytes.len() - done) as u64;
            match rustix::io::pread(file, &mut bytes[done..], at) {
                Ok(0) => {
                    // Shorter than it was when it was opened.
                    let e = io::ErrorKind::UnexpectedEof.into();
                    return Err(self.error(Operation::Read, at, room, e));
                }
                Ok(got) => done += got,
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.error(Operation::Read, at, room, e.into())),
            }
        }
        Ok(())
    }

    fn write_blocking(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.write_to(&self.file, offset, bytes)
    }

    fn write_to(&self, file: &File, offset: u64, bytes: &[u8]) -> Result<()> {
        file.write_all_at(bytes, offset)
            .map_err(|e| self.error(Operation::Write, offset, bytes.len() as u64, e))
    }

    fn zero(&self, op: Operation, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let ways = [
            (!how.no_hole, FallocateFlags::PUNCH_HOLE, &self.punch),
            (true, FallocateFlags::ZERO_RANGE, &self.zero_range),
        ];
        for (wanted, flags, known) in ways {
            if !wanted || !known.load(Ordering::Relaxed) {
                continue;
            }
            match self.allocate(flags | FallocateFlags::KEEP_SIZE, offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => known.store(false, Ordering::Relaxed),
                // A block device refuses a range that is not a multiple of its blocks.
                Err(Errno::INVAL) => {}
                Err(e) => return Err(self.error(op, offset, len, e.into())),
            }
        }
        if how.fast_only {
            return Err(VolumeError::NotFast {
                path: self.path.clone(),
            });
        }
        let zeroes = vec![0; ZEROES.min(len as usize)];
        let mut at = offset;
        while at < offset + len {
            let piece = zeroes.len().min((offset + len - at) as usize);
            self.file
                .write_all_at(&zeroes[..piece], at)
                .map_err(|e| self.error(op, at, piece as u64, e))?;
            at += piece as u64;
        }
        Ok(())
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> rustix::io::Result<()> {
        loop {
            match rustix::fs::fallocate(&self.file, flags, offset, len) {
                Err(Errno::INTR) => {}
                result => return result,
            }
        }
    }

    fn sync_blocking(&self) -> Result<()> {
        let mut failed = self
            .sync_failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = &*failed {
            return Err(VolumeError::SyncLost {
                path: self.path.clone(),
                first: Arc::clone(first),
            });
        }
        self.file.sync_data().map_err(|e| {
            let copy = match e.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::from(e.kind()),
            };
            *failed = Some(Arc::new(copy));
            self.error(Operation::Sync, 0, self.size, e)
        })
    }

    fn data_extents(&self, offset: u64, len: u64) -> Result<Vec<DataExtent>> {
        let end = offset + len;
        let mut runs: Vec<DataExtent> = Vec::new();
        let mut at = offset;
        while at < end && runs.len() < EXTENTS {
            let (data_at, data_end) = match self.next_data(at) {
                Ok(found) => found,
                Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => (at, end),
                Err(e) => return Err(self.error(Operation::FindData, at, end - at, e.into())),
            };
            for (to, data) in [(data_at, false), (data_end, true)] {
                let to = to.min(end);
                if to > at {
                    runs.push(DataExtent {
                        offset: at,
                        len: to - at,
                        data,
                    });
                    at = to;
                }
            }
        }
        Ok(runs)
    }

    /// Where the next data begins and ends; both the file's end if there is none.
    fn next_data(&self, at: u64) -> rustix::io::Result<(u64, u64)> {
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => return Ok((self.size, self.size)),
            start => start?,
        };
        // Writers may change the map between the two calls: never go backwards, always forwards.
        match rustix::fs::seek(&self.file, SeekFrom::Hole(start)) {
            Err(Errno::NXIO) => Ok((start, start.max(at + 1))),
            end => Ok((start, end?.max(start + 1))),
        }
    }
}

#[cfg(test)]
mod tests;
