//! The file under an image format, with the order of writes that a power cut needs.
//!
//! `imago` hands its writes to the file in an order that survives the death of the process, but syncs
//! nothing in between: after a power cut any of them may be missing. What must never be seen is a table
//! that names what is not there yet, so this file puts a sync before
//!
//! - a write to an L2 table, if content was written since the last sync (its entries may name it);
//! - a write to the L1 table or the header, if content or an L2 table was written since.
//!
//! All else is content to it: guest data, new tables nobody names yet, and the reference counts, which are
//! rebuilt after every unclean end (see [`tree`](super::tree)) and so need no order. Table writes are rare
//! (an eviction from the cache, a flush), so the syncs are too.
//!
//! Trap: a snapshot of an L2 table is taken before it gets here, and an entry is entered only after the
//! write of its content returned. So whatever a table names was noted as written before the table came.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageOpenOptions};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::tree::Header;

/// A file that an image format lies in; clones are the same file.
#[derive(Clone, Debug)]
pub struct Store(Arc<Kept>);

#[derive(Debug)]
struct Kept {
    io: imago::file::File,
    file: File,
    path: PathBuf,
    /// `None` where nothing is ever written.
    order: Option<Order>,
}

#[derive(Debug)]
struct Order {
    /// Content was written since the last sync.
    content: AtomicBool,
    tables: Mutex<Tables>,
    dirty_mark: AtomicBool,
}

#[derive(Debug)]
struct Tables {
    header: Header,
    /// Where L2 tables lie or lay, ascending: bytes. 16 bytes per GiB of disk at 64 KiB clusters.
    l2: std::collections::BTreeSet<u64>,
    /// An L2 table was written since the last sync.
    written: bool,
    /// The first sync that failed: from then on nothing is promised.
    failed: Option<io::ErrorKind>,
}

impl Order {
    fn tables(&self) -> io::Result<MutexGuard<'_, Tables>> {
        let tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        match tables.failed {
            Some(kind) => Err(io::Error::new(
                kind,
                "an earlier sync failed, so what was written before it may be lost",
            )),
            None => Ok(tables),
        }
    }
}

impl Store {
    /// Wraps an open file; `ordered` for an image that is written, whose header is given.
    pub fn new(file: File, path: &Path, ordered: Option<Header>) -> io::Result<Store> {
        let order = match ordered {
            None => None,
            Some(header) => {
                let mut l2 = std::collections::BTreeSet::new();
                header.l2_tables(&file, 0, header.l1_bytes(), &mut l2)?;
                Some(Order {
                    content: AtomicBool::new(false),
                    tables: Mutex::new(Tables {
                        header,
                        l2,
                        written: false,
                        failed: None,
                    }),
                    dirty_mark: AtomicBool::new(false),
                })
            }
        };
        let options = StorageOpenOptions::new()
            .filename(path)
            .write(order.is_some());
        Ok(Store(Arc::new(Kept {
            io: imago::file::File::from_open_file(file.try_clone()?, options)?,
            file,
            path: path.to_path_buf(),
            order,
        })))
    }

    pub fn file(&self) -> &File {
        &self.0.file
    }

    /// Where the next data at or after `at` begins and ends, at most to `end`.
    pub fn next_data(&self, at: u64, end: u64) -> (u64, u64) {
        let start = match rustix::fs::seek(&self.0.file, SeekFrom::Data(at)) {
            Ok(start) => start.clamp(at, end),
            Err(Errno::NXIO) => return (end, end),
            // It does not tell: all is data.
            Err(_) => return (at, end),
        };
        match rustix::fs::seek(&self.0.file, SeekFrom::Hole(start)) {
            Ok(hole) => (start, hole.clamp(start, end)),
            Err(_) => (start, end),
        }
    }

    /// Gives room back. What cannot be given back stays taken, which is no error.
    pub fn punch(&self, offset: u64, len: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = rustix::fs::fallocate(&self.0.file, flags, offset, len);
    }

    pub fn is(&self, other: &Store) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn sync_now(&self, order: &Order, tables: &mut Tables) -> io::Result<()> {
        order.content.store(false, Ordering::Release);
        tables.written = false;
        self.0.file.sync_data().inspect_err(|e| {
            tables.failed = Some(e.kind());
        })
    }

    /// Makes all that was written durable.
    pub fn make_durable(&self) -> io::Result<()> {
        let Some(order) = &self.0.order else {
            return Ok(());
        };
        let mut tables = order.tables()?;
        self.sync_now(order, &mut tables)
    }

    /// Marks the image as in use, durably, before the first write to it.
    fn mark(&self, order: &Order) -> io::Result<()> {
        if order.dirty_mark.load(Ordering::Acquire) {
            return Ok(());
        }
        let tables = order.tables()?;
        if !order.dirty_mark.load(Ordering::Acquire) {
            tables.header.set_dirty(&self.0.file, true)?;
            order.dirty_mark.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The image is complete on disk: takes the mark away, durably. The next write sets it again.
    pub fn unmark(&self) -> io::Result<()> {
        let Some(order) = &self.0.order else {
            return Ok(());
        };
        let mut tables = order.tables()?;
        if order.dirty_mark.load(Ordering::Acquire) {
            self.sync_now(order, &mut tables)?;
            tables.header.set_dirty(&self.0.file, false)?;
            order.dirty_mark.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// Runs a write in its order.
    fn ordered(
        &self,
        offset: u64,
        len: u64,
        write: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let order = self.0.order.as_ref().ok_or_else(read_only)?;
        self.mark(order)?;
        let mut tables = order.tables()?;
        let in_header = offset < tables.header.cluster_size();
        let (l1, l1_end) = (
            tables.header.l1_offset,
            tables.header.l1_offset + tables.header.l1_bytes(),
        );
        let in_l1 = offset < l1_end && offset + len > l1;
        if in_header || in_l1 {
            if order.content.load(Ordering::Acquire) || tables.written {
                self.sync_now(order, &mut tables)?;
            }
            write()?;
            if in_header {
                // The L1 table may have moved. From the file: the mark is in it as well.
                tables.header = Header::read(&self.0.file)?;
                let (header, mut l2) = (tables.header, std::mem::take(&mut tables.l2));
                header.l2_tables(&self.0.file, 0, header.l1_bytes(), &mut l2)?;
                tables.l2 = l2;
            } else {
                let (header, mut l2) = (tables.header, std::mem::take(&mut tables.l2));
                let from = offset.max(l1) - l1;
                header.l2_tables(&self.0.file, from, (offset + len).min(l1_end) - l1, &mut l2)?;
                tables.l2 = l2;
            }
            // The roots themselves: whatever is written below them next must find them in order.
            tables.written = true;
            return Ok(());
        }
        let cluster = offset - offset % tables.header.cluster_size();
        if tables.l2.contains(&cluster) {
            if order.content.load(Ordering::Acquire) {
                self.sync_now(order, &mut tables)?;
            }
            tables.written = true;
            return write();
        }
        drop(tables);
        let result = write();
        order.content.store(true, Ordering::Release);
        result
    }
}

fn read_only() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "the image is read-only")
}

impl std::fmt::Display for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.path.display())
    }
}

impl Storage for Store {
    /// For backing files: never written.
    fn open(options: StorageOpenOptions) -> io::Result<Self> {
        let path = options
            .get_filename()
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let file = OpenOptions::new().read(true).open(path)?;
        Store::new(file, path, None)
    }

    fn size(&self) -> io::Result<u64> {
        self.0.io.size()
    }

    fn zero_align(&self) -> usize {
        self.0.io.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.0.io.discard_align()
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        self.0.io.resolve_relative_path(relative)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        Some(self.0.path.clone())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the caller's promises are those that the inner file asks for.
        unsafe { self.0.io.pure_readv(bufv, offset) }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let len = bufv.len();
        // SAFETY: the caller's promises are those that the inner file asks for.
        self.ordered(offset, len, || unsafe {
            self.0.io.pure_writev(bufv, offset)
        })
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: the caller's promises are those that the inner file asks for.
        self.ordered(offset, length, || unsafe {
            self.0.io.pure_write_zeroes(offset, length)
        })
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: the caller's promises are those that the inner file asks for.
        self.ordered(offset, length, || unsafe {
            self.0.io.pure_write_allocated_zeroes(offset, length)
        })
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: the caller's promises are those that the inner file asks for.
        self.ordered(offset, length, || unsafe {
            self.0.io.pure_discard(offset, length)
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.0.io.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.make_durable()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: the caller's promises are those that the inner file asks for.
        unsafe { self.0.io.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.0.io.get_storage_helper()
    }

    fn resize(&self, new_size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.0.io.resize(new_size, mode)
    }
}

/// Reads exactly, from a file that may end early: what is missing reads as zeroes, as to the format.
pub fn read_padded(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => {
                buffer[done..].fill(0);
                return Ok(());
            }
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
