//! What a volume's content lies in, whatever that is: one type with the same operations for all.
//!
//! | format | allocation | room given back | bound to |
//! |---|---|---|---|
//! | [`Raw`](Format::Raw): a sparse file | asked of the file system | holes in the file | one file |
//! | [`Device`](Format::Device): a block device, in place | all of it | the device's own way of zeroing | the device |
//! | [`Qcow2`](Format::Qcow2): an image, with backing files | asked of the image, layer by layer | clusters, and holes in the file | the image and its chain |
//!
//! All operations take byte ranges, are cancelled by dropping them (what was begun may still be done), and
//! do their waiting on the [pool](crate::pool).

mod copy;
mod device;
mod image;
mod ordered;
mod tree;

use std::fs::File;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use copy::{Copied, Source, clone_file, copy, is_zero};
pub use device::Device;
pub use image::Image;
pub use tree::{Counted, ImageFault};

use crate::journal::DataSync;
use crate::pool::{Lane, Pool};
use crate::raw::{Access, Blocking, DataExtent, RawFile, Zeroes};
use crate::{Operation, VolumeError};

type Result<T> = std::result::Result<T, VolumeError>;

/// How a volume's content is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A sparse file, byte for byte the disk.
    #[default]
    Raw,
    /// A qcow2 image, version 3, with or without backing files.
    Qcow2,
    /// A block device, byte for byte the disk.
    Device,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Device => "device",
        })
    }
}

/// An open disk; clones share it.
#[derive(Clone)]
pub struct Backend {
    kind: Kind,
    /// Bytes that count, of what may be more.
    size: u64,
}

#[derive(Clone)]
enum Kind {
    Raw(RawFile),
    Device(Device),
    Image(Image),
}

impl Backend {
    /// Opens what exists.
    pub async fn open(
        pool: &Pool,
        path: impl Into<PathBuf>,
        format: Format,
        access: Access,
    ) -> Result<Backend> {
        Ok(Backend::of(match format {
            Format::Raw => Kind::Raw(RawFile::open(pool, path, access).await?),
            Format::Device => Kind::Device(Device::open(pool, path, access).await?),
            Format::Qcow2 => Kind::Image(Image::open(pool, path, access).await?),
        }))
    }

    /// Opens a flat VMDK, to read.
    pub async fn open_vmdk(pool: &Pool, path: impl Into<PathBuf>) -> Result<Backend> {
        Ok(Backend::of(Kind::Image(
            Image::open_vmdk(pool, path).await?,
        )))
    }

    fn of(kind: Kind) -> Backend {
        let size = match &kind {
            Kind::Raw(raw) => raw.size(),
            Kind::Device(device) => device.raw().size(),
            Kind::Image(image) => image.size(),
        };
        Backend { kind, size }
    }

    /// The same disk, of which only the first `size` bytes count: a device may be larger than the disk.
    ///
    /// # Errors
    /// [`VolumeError::TooSmall`] if it has fewer.
    pub fn narrowed(self, size: u64) -> Result<Backend> {
        if self.size < size {
            return Err(VolumeError::TooSmall {
                path: self.path().to_path_buf(),
                found: self.size,
                needed: size,
            });
        }
        Ok(Backend { size, ..self })
    }

    /// Makes a new disk of `size` bytes without content, durably named; refuses an existing file. A device
    /// is not made but opened, and must have `size` bytes at least; what it holds stays.
    pub async fn create(
        pool: &Pool,
        path: impl Into<PathBuf>,
        format: Format,
        size: u64,
    ) -> Result<Backend> {
        Ok(Backend::of(match format {
            Format::Raw => Kind::Raw(RawFile::create(pool, path, size).await?),
            Format::Qcow2 => Kind::Image(Image::create(pool, path, size).await?),
            Format::Device => {
                let device = Device::open(pool, path, Access::ReadWrite).await?;
                return Backend::of(Kind::Device(device)).narrowed(size);
            }
        }))
    }

    pub fn format(&self) -> Format {
        match &self.kind {
            Kind::Raw(_) => Format::Raw,
            Kind::Device(_) => Format::Device,
            Kind::Image(_) => Format::Qcow2,
        }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn path(&self) -> &Path {
        match &self.kind {
            Kind::Raw(raw) => raw.path(),
            Kind::Device(device) => device.raw().path(),
            Kind::Image(image) => image.path(),
        }
    }

    /// Reads exactly `len` bytes.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes> {
        match &self.kind {
            Kind::Raw(raw) => raw.read(offset, len).await,
            Kind::Device(device) => device.raw().read(offset, len).await,
            Kind::Image(image) => image.read(offset, len).await,
        }
    }

    /// Writes all the bytes; [`sync`](Self::sync) makes them durable.
    pub async fn write(&self, offset: u64, bytes: Bytes) -> Result<()> {
        match &self.kind {
            Kind::Raw(raw) => raw.write(offset, bytes).await,
            Kind::Device(device) => device.raw().write(offset, bytes).await,
            Kind::Image(image) => image.write(offset, bytes).await,
        }
    }

    /// Makes the range read as zeroes.
    pub async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        match &self.kind {
            Kind::Raw(raw) => raw.write_zeroes(offset, len, how).await,
            Kind::Device(device) => device.write_zeroes(offset, len, how).await,
            Kind::Image(image) => image.write_zeroes(offset, len, how).await,
        }
    }

    /// Gives the range's room back. It reads as zeroes, or (a device that cannot zero, parts of blocks of
    /// a device) as before.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        match &self.kind {
            Kind::Raw(raw) => raw.discard(offset, len).await,
            Kind::Device(device) => device.discard(offset, len).await,
            Kind::Image(image) => image.discard(offset, len).await,
        }
    }

    /// Makes everything written before the call durable. Concurrent callers share.
    pub async fn sync(&self) -> Result<()> {
        match &self.kind {
            Kind::Raw(raw) => raw.sync().await,
            Kind::Device(device) => device.raw().sync().await,
            Kind::Image(image) => image.sync().await,
        }
    }

    /// Writes the range out of the page cache and waits until the disk has it; not durable by that alone. An image
    /// is left to its own.
    pub async fn write_out(&self, offset: u64, len: u64) -> Result<()> {
        match &self.kind {
            Kind::Raw(raw) => raw.write_out(offset, len).await,
            Kind::Device(device) => device.raw().write_out(offset, len).await,
            Kind::Image(_) => Ok(()),
        }
    }

    /// Which parts of the range hold data, ascending, without a gap, neighbours differing. At most 65,536
    /// runs: if the last one ends before the range does, ask again from there.
    pub async fn data_extents(&self, offset: u64, len: u64) -> Result<Vec<DataExtent>> {
        match &self.kind {
            Kind::Raw(raw) => raw.data_extents(offset, len).await,
            Kind::Device(device) => device.data_extents(offset, len),
            Kind::Image(image) => image.data_extents(offset, len).await,
        }
    }

    /// Bytes taken on the file system: the whole of a device, and the image's own file without those below.
    pub async fn allocated(&self) -> Result<u64> {
        match &self.kind {
            Kind::Raw(raw) => raw.allocated().await,
            Kind::Device(device) => Ok(device.raw().size()),
            Kind::Image(image) => image.allocated().await,
        }
    }

    /// Has the range (its first 32 MiB) read ahead, where that can be had for nothing.
    pub async fn prefetch(&self, offset: u64, len: u64) -> Result<()> {
        match &self.kind {
            Kind::Raw(raw) => raw.prefetch(offset, len).await,
            Kind::Device(device) => device.raw().prefetch(offset, len).await,
            Kind::Image(_) => Ok(()),
        }
    }

    /// Makes the first `size` bytes read as zeroes, whatever was there.
    pub async fn blank(&self, size: u64) -> Result<()> {
        /// At a time, so that no one call takes long.
        const PIECE: u64 = 1 << 30;
        for at in (0..size).step_by(PIECE as usize) {
            let len = PIECE.min(size - at);
            self.write_zeroes(at, len, Zeroes::default()).await?;
        }
        self.sync().await
    }

    pub(crate) fn pool(&self) -> &Pool {
        match &self.kind {
            Kind::Raw(raw) => raw.pool(),
            Kind::Device(device) => device.raw().pool(),
            Kind::Image(image) => image.pool(),
        }
    }

    /// For jobs that themselves run on the pool.
    pub(crate) fn blocking(&self) -> OnPool {
        match &self.kind {
            Kind::Raw(raw) => OnPool::Raw(raw.blocking()),
            Kind::Device(device) => OnPool::Device(device.clone(), device.raw().blocking()),
            Kind::Image(image) => OnPool::Image(image.inner()),
        }
    }
}

impl From<RawFile> for Backend {
    fn from(raw: RawFile) -> Backend {
        Backend::of(Kind::Raw(raw))
    }
}

impl DataSync for Backend {
    fn sync(&self) -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>> {
        Box::pin(Backend::sync(self))
    }
}

/// A disk as seen from a pool thread.
pub(crate) enum OnPool {
    Raw(Blocking),
    Device(Device, Blocking),
    Image(std::sync::Arc<image::Inner>),
}

impl OnPool {
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        match self {
            OnPool::Raw(raw) | OnPool::Device(_, raw) => raw.read(offset, len),
            OnPool::Image(image) => image.read(offset, len),
        }
    }

    pub fn data_extents(&self, offset: u64, len: u64) -> Result<Vec<DataExtent>> {
        match self {
            OnPool::Raw(raw) => raw.data_extents(offset, len),
            OnPool::Device(device, _) => device.data_extents(offset, len),
            OnPool::Image(image) => image.data_extents(offset, len),
        }
    }
}

/// Changes the size of a disk that nobody has open: what is added reads as zeroes, what is cut off is gone.
/// A device's size is not ours to change.
pub async fn resize(pool: &Pool, path: PathBuf, format: Format, size: u64) -> Result<()> {
    let job = move || match format {
        Format::Raw => {
            let fail = |e| VolumeError::io(&path, Operation::Resize, 0, size, e);
            let file = File::options().write(true).open(&path).map_err(fail)?;
            file.set_len(size).map_err(fail)?;
            file.sync_all().map_err(fail)
        }
        Format::Qcow2 => image::resize(&path, size),
        Format::Device => {
            let found = device::size_of(&path)
                .map_err(|e| VolumeError::io(&path, Operation::Stat, 0, 0, e))?;
            if found < size {
                return Err(VolumeError::TooSmall {
                    path,
                    found,
                    needed: size,
                });
            }
            Ok(())
        }
    };
    pool.run(Lane::Slow, job).await?
}

/// Looks through an image that nobody writes; with `repair` makes its reference counts right.
pub async fn check_image(pool: &Pool, path: PathBuf, repair: bool) -> Result<Counted> {
    let job = move || {
        let fail = |e: io::Error| image_error(&path, e);
        let file = File::options()
            .read(true)
            .write(repair)
            .open(&path)
            .map_err(fail)?;
        let lock = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        if rustix::fs::flock(&file, lock) == Err(rustix::io::Errno::WOULDBLOCK) {
            return Err(VolumeError::InUse { path });
        }
        tree::check(&file, repair).map_err(fail)
    };
    pool.run(Lane::Slow, job).await?
}

/// What an existing file is, by its first bytes: an image is told from a raw disk only by them.
pub async fn looks_like_qcow2(pool: &Pool, path: PathBuf) -> Result<bool> {
    let job = move || {
        let fail = |e| VolumeError::io(&path, Operation::Open, 0, 0, e);
        tree::is_qcow2(&File::open(&path).map_err(fail)?).map_err(fail)
    };
    pool.run(Lane::Slow, job).await?
}

/// Faults found by the format's own checks come as the source of an I/O error.
fn image_error(path: &Path, e: io::Error) -> VolumeError {
    match e.get_ref().and_then(|e| e.downcast_ref::<ImageFault>()) {
        Some(fault) => VolumeError::Image {
            path: path.to_path_buf(),
            fault: fault.clone(),
        },
        None => VolumeError::io(path, Operation::Open, 0, 0, e),
    }
}

/// Makes the name of a new file durable.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}
