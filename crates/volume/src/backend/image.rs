//! A disk in a qcow2 image with its backing files, or (to read) in a flat VMDK.
//!
//! The format is `imago`'s work; what is added here is what a volume is trusted for: writes reach the disk
//! in an order that a power cut cannot hurt (`ordered`), an image that was not closed has
//! its reference counts made anew before it is written (`tree`), what cannot be written
//! safely is refused when it is opened, two writers keep out of each other's way by a lock, and room that a
//! guest gives back goes back to the file system.
//!
//! Everything blocks, and so runs on the [pool](crate::pool). Reads and writes go side by side; a discard
//! has the image for itself, since it takes away clusters that others may be about to read.
//!
//! Memory: the library caches 128 L2 tables and 32 blocks of counts, 10 MiB at 64 KiB clusters.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use bytes::Bytes;
use imago::format::PreallocateMode;
use imago::{
    FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping, PermissiveImplicitOpenGate,
    qcow2::Qcow2, vmdk::Vmdk,
};
use rustix::fs::FlockOperation;

use super::ordered::Store;
use super::tree::{self, Header};
use crate::pool::{Lane, Pool};
use crate::raw::{Access, DataExtent, Zeroes};
use crate::turns::Turns;
use crate::{Operation, VolumeError};

type Result<T> = std::result::Result<T, VolumeError>;

/// Runs a single answer holds at most.
const EXTENTS: usize = 65_536;

/// Bytes discarded at a time: the image is locked, and the runs to be given back are kept, for no more.
const DISCARD: u64 = 256 << 20;

/// An open image; clones share it.
#[derive(Clone)]
pub struct Image {
    pool: Pool,
    inner: Arc<Inner>,
    syncs: Arc<Turns>,
}

/// The image as seen from a pool thread.
pub(crate) struct Inner {
    format: RwLock<FormatAccess<Store>>,
    store: Store,
    path: PathBuf,
    size: u64,
    chain: Vec<PathBuf>,
    writable: bool,
    sync_failed: Mutex<Option<Arc<io::Error>>>,
}

impl Image {
    /// Opens a qcow2 image with its chain of backing files.
    pub async fn open(pool: &Pool, path: impl Into<PathBuf>, access: Access) -> Result<Image> {
        let path = path.into();
        let open = move || open_qcow2(path, access);
        Ok(Image::of(pool, pool.run(Lane::Slow, open).await??))
    }

    /// Opens a flat VMDK, to read.
    pub async fn open_vmdk(pool: &Pool, path: impl Into<PathBuf>) -> Result<Image> {
        let path = path.into();
        let open = move || {
            let fail = |e| VolumeError::io(&path, Operation::Open, 0, 0, e);
            let store = Store::new(File::open(&path).map_err(fail)?, &path, None).map_err(fail)?;
            let vmdk = Vmdk::<Store>::builder(store.clone())
                .open(PermissiveImplicitOpenGate::default())
                .map_err(fail)?;
            let format = FormatAccess::new(vmdk);
            Ok::<_, VolumeError>(Inner {
                size: format.size(),
                format: RwLock::new(format),
                store,
                path,
                chain: Vec::new(),
                writable: false,
                sync_failed: Mutex::new(None),
            })
        };
        Ok(Image::of(pool, pool.run(Lane::Slow, open).await??))
    }

    /// Makes a new image of `size` bytes without content; refuses an existing file. Its name is durable
    /// when this returns.
    pub async fn create(pool: &Pool, path: impl Into<PathBuf>, size: u64) -> Result<Image> {
        let path = path.into();
        let create = move || {
            let made = format_new(&path, size);
            made.map_err(|e| VolumeError::io(&path, Operation::Create, 0, size, e))?;
            open_qcow2(path, Access::ReadWrite)
        };
        Ok(Image::of(pool, pool.run(Lane::Slow, create).await??))
    }

    fn of(pool: &Pool, inner: Inner) -> Image {
        Image {
            pool: pool.clone(),
            inner: Arc::new(inner),
            syncs: Arc::default(),
        }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.inner.size
    }

    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The files below it, the nearest first.
    pub fn chain(&self) -> &[PathBuf] {
        &self.inner.chain
    }

    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn inner(&self) -> Arc<Inner> {
        Arc::clone(&self.inner)
    }

    async fn run<T: Send + 'static>(
        &self,
        lane: Lane,
        job: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        self.pool.run(lane, move || job(&inner)).await?
    }

    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes> {
        self.inner.test(Operation::Read, offset, len as u64)?;
        self.run(Lane::Quick, move |inner| {
            inner.read(offset, len).map(Bytes::from)
        })
        .await
    }

    pub async fn write(&self, offset: u64, bytes: Bytes) -> Result<()> {
        self.inner
            .test(Operation::Write, offset, bytes.len() as u64)?;
        self.run(Lane::Quick, move |inner| {
            let len = bytes.len() as u64;
            let done = inner.format().write(&bytes[..], offset);
            done.map_err(|e| inner.error(Operation::Write, offset, len, e))
        })
        .await
    }

    /// As [`RawFile::write_zeroes`](crate::raw::RawFile::write_zeroes); an image can always do it fast, but
    /// for the parts of clusters at both ends.
    pub async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        self.zero(Operation::WriteZeroes, offset, len, how.no_hole)
            .await
    }

    /// Gives the range's room back to the file system; it reads as zeroes.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.zero(Operation::Discard, offset, len, false).await
    }

    async fn zero(&self, op: Operation, offset: u64, len: u64, keep: bool) -> Result<()> {
        self.inner.test(op, offset, len)?;
        let mut at = offset;
        let end = offset + len;
        while at < end {
            // On a boundary, so that no cluster is seen in two parts and kept.
            let next = (at + DISCARD) / DISCARD * DISCARD;
            let piece = next.min(end) - at;
            self.run(Lane::Quick, move |inner| {
                let done = if keep {
                    inner.format().write_zeroes(at, piece)
                } else {
                    inner.discard(at, piece)
                };
                done.map_err(|e| inner.error(op, at, piece, e))
            })
            .await?;
            at += piece;
        }
        Ok(())
    }

    /// Makes everything written before the call durable, and what says where it lies. Concurrent callers
    /// share.
    pub async fn sync(&self) -> Result<()> {
        self.syncs
            .once(self.run(Lane::Slow, |inner| inner.sync()))
            .await
    }

    /// As [`RawFile::data_extents`](crate::raw::RawFile::data_extents), looking through all layers.
    pub async fn data_extents(&self, offset: u64, len: u64) -> Result<Vec<DataExtent>> {
        self.inner.test(Operation::FindData, offset, len)?;
        self.run(Lane::Quick, move |inner| inner.data_extents(offset, len))
            .await
    }

    /// Bytes the image's own file takes on its file system.
    pub async fn allocated(&self) -> Result<u64> {
        self.run(Lane::Quick, |inner| {
            let meta = inner.store.file().metadata();
            let meta = meta.map_err(|e| inner.error(Operation::Stat, 0, 0, e))?;
            Ok(meta.blocks() * 512)
        })
        .await
    }
}

/// Changes the disk's size in an image that nobody has open.
pub(super) fn resize(path: &Path, size: u64) -> Result<()> {
    let inner = open_qcow2(path.to_path_buf(), Access::ReadWrite)?;
    let fail = |e| VolumeError::io(path, Operation::Resize, 0, size, e);
    if size < inner.size {
        // The last cluster stays if only a part of it goes: growing again must not bring that back.
        inner.discard(size, inner.size - size).map_err(fail)?;
    }
    let mut format = inner.format.write().unwrap_or_else(PoisonError::into_inner);
    format.resize(size, PreallocateMode::None).map_err(fail)?;
    drop(format);
    inner.sync()
}

fn format_new(path: &Path, size: u64) -> io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    let options = imago::StorageOpenOptions::new().filename(path).write(true);
    let store = imago::file::File::from_open_file(file.try_clone()?, options)?;
    Qcow2::<imago::file::File>::create_builder(store)
        .size(size)
        .create()?;
    file.sync_all()?;
    super::sync_folder_of(path)
}

fn open_qcow2(path: PathBuf, access: Access) -> Result<Inner> {
    let fail = |e: io::Error| super::image_error(&path, e);
    let writable = access == Access::ReadWrite;
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .open(&path)
        .map_err(fail)?;
    let lock = if writable {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
    rustix::fs::flock(&file, lock).map_err(|e| match e {
        rustix::io::Errno::WOULDBLOCK => VolumeError::InUse { path: path.clone() },
        e => VolumeError::io(&path, Operation::Lock, 0, 0, e.into()),
    })?;
    let mut header = Header::read(&file).map_err(fail)?;
    if writable {
        header
            .check_writable()
            .map_err(|fault| VolumeError::Image {
                path: path.clone(),
                fault,
            })?;
        header.clear_autoclear(&file).map_err(fail)?;
        if header.is_dirty() {
            let found = tree::check(&file, true).map_err(fail)?;
            tracing::warn!(
                image = %path.display(),
                missing = found.missing,
                leaked = found.leaked,
                "the image was not closed; its reference counts were made anew"
            );
            header = Header::read(&file).map_err(fail)?;
        }
    } else if header.is_dirty() {
        // Its tree is whole all the same, and the counts matter to writers only; but the library refuses
        // the mark, and the file is not ours to change.
        return Err(VolumeError::Image {
            path: path.clone(),
            fault: tree::ImageFault::Dirty,
        });
    }
    let chain = tree::backing_chain(&path).map_err(fail)?;
    let store = Store::new(file, &path, writable.then_some(header)).map_err(fail)?;
    // The chain was followed: it ends, and every link of it says what it is.
    let qcow2 = Qcow2::<Store>::builder(store.clone())
        .write(writable)
        .open(PermissiveImplicitOpenGate::default())
        .map_err(fail)?;
    let format = FormatAccess::new(qcow2);
    Ok(Inner {
        size: format.size(),
        format: RwLock::new(format),
        store,
        path,
        chain,
        writable,
        sync_failed: Mutex::new(None),
    })
}

impl Inner {
    fn format(&self) -> RwLockReadGuard<'_, FormatAccess<Store>> {
        self.format.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, op: Operation, offset: u64, len: u64, e: io::Error) -> VolumeError {
        VolumeError::io(&self.path, op, offset, len, e)
    }

    fn test(&self, op: Operation, offset: u64, len: u64) -> Result<()> {
        VolumeError::test_range(&self.path, op, offset, len, self.size)
    }

    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let done = self.format().read(&mut bytes[..], offset);
        done.map_err(|e| self.error(Operation::Read, offset, len as u64, e))?;
        Ok(bytes)
    }

    pub fn data_extents(&self, offset: u64, len: u64) -> Result<Vec<DataExtent>> {
        let end = offset + len;
        let format = self.format();
        let mut runs: Vec<DataExtent> = Vec::new();
        let mut at = offset;
        // Whether there was room for it.
        let mut add = |offset: u64, len: u64, data: bool| {
            let full = runs.len() == EXTENTS;
            match runs.last_mut() {
                _ if len == 0 => {}
                Some(last) if last.data == data => last.len += len,
                _ if full => return false,
                _ => runs.push(DataExtent { offset, len, data }),
            }
            true
        };
        'range: while at < end {
            let (mapping, len) = format
                .get_mapping(at, end - at)
                .map_err(|e| self.error(Operation::FindData, at, end - at, e))?;
            let len = len.min(end - at);
            match mapping {
                Mapping::Raw {
                    storage, offset, ..
                } => {
                    // What is allocated in the format may still be a hole in the file.
                    let mut done = 0;
                    while done < len {
                        let (from, to) = storage.next_data(offset + done, offset + len);
                        let (hole, data) = (from - offset - done, to - from);
                        if !add(at + done, hole, false) || !add(at + done + hole, data, true) {
                            break 'range;
                        }
                        done += hole + data;
                    }
                }
                Mapping::Zero { .. } | Mapping::Eof { .. } => {
                    let len = if len == 0 { end - at } else { len };
                    if !add(at, len, false) {
                        break;
                    }
                    at += len;
                    continue;
                }
                _ => {
                    if !add(at, len, true) {
                        break;
                    }
                }
            }
            at += len.max(1);
        }
        Ok(runs)
    }

    /// Zeroes the range and gives its clusters back, to the image and to the file system.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut format = self.format.write().unwrap_or_else(PoisonError::into_inner);
        let cluster = format.inner().zero_granularity().unwrap_or(1);
        let (first, last) = (
            offset.next_multiple_of(cluster),
            (offset + len) / cluster * cluster,
        );
        // Which places in the file will belong to nobody. A mapping that is not writable is another
        // layer's, or shared.
        let mut freed = Vec::new();
        let mut at = first;
        while at < last {
            let (mapping, run) = format.get_mapping(at, last - at)?;
            if let Mapping::Raw {
                storage,
                offset,
                writable: true,
                ..
            } = mapping
                && storage.is(&self.store)
            {
                freed.push((offset, run));
            }
            at += run.max(1);
        }
        format.discard_to_zero(offset, len)?;
        // Still alone: no writer can have been given these clusters yet.
        for (offset, len) in freed {
            self.store.punch(offset, len);
        }
        Ok(())
    }

    /// Content first, then the tables that name it: each of the syncs in between is the store's.
    pub fn sync(&self) -> Result<()> {
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
        if !self.writable {
            return Ok(());
        }
        let done = self
            .format()
            .flush()
            .and_then(|()| self.store.make_durable());
        done.map_err(|e| {
            *failed = Some(Arc::new(io::Error::new(e.kind(), e.to_string())));
            self.error(Operation::Sync, 0, self.size, e)
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Closed in order, so that the next opening need not count. Whatever fails leaves the mark.
        if self.writable
            && self.sync().is_ok()
            && let Err(error) = self.store.unmark()
        {
            tracing::warn!(image = %self.path.display(), %error, "the image keeps its mark of being in use");
        }
    }
}
