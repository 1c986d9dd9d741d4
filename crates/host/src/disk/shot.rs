//! A disk as it was at one instant, while its guest goes on writing.
//!
//! The instant is when no write is under way: the mode's lock is held on all disks of the machine. Which
//! extents are wanted is set then, and from then on whoever is about to change one that is wanted puts its
//! old content aside first. Whoever reads takes it from the volume, or from what was put aside:
//!
//! | extent | content of the instant |
//! |---|---|
//! | wanted | in the volume |
//! | not wanted any more, empty | zeroes |
//! | not wanted any more | put aside in the scratch file, or read already |
//!
//! Reading from the volume and putting aside exclude each other by extent (by one of `TURNS` locks), so a
//! guest's write waits for one local read, and for one local write at most, the first time it comes to an
//! extent. It never waits for the repository. The scratch file takes as much as is wanted at most; when room
//! becomes scarce, or the volume cannot be read, the shot is given up and the guest goes on.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::sync::Mutex;
use whimbrel_engine::set::UnitSet;
use whimbrel_repository::EXTENT;
use whimbrel_volume::VolumeError;
use whimbrel_volume::backend::{Backend, is_zero};
use whimbrel_volume::pool::{Lane, Pool};

use super::bits::{Bits, touched};

/// Locks for extents: so many can be read or put aside at once.
const TURNS: usize = 64;

/// Room that is left to others on the scratch file's file system: a twentieth of it, this at most, bytes.
const LEFT_FREE: u64 = 1 << 30;

/// A disk as it was.
pub struct Shot {
    file: Arc<Backend>,
    size: u64,
    pool: Pool,
    scratch: Arc<File>,
    wanted: Bits,
    empty: Bits,
    turns: Vec<Mutex<()>>,
    put_aside: AtomicU64,
    given_up: OnceLock<GivenUp>,
}

/// Why a shot was given up. The guest was not disturbed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GivenUp {
    #[error("what the guest overwrites cannot be put aside: {0}")]
    PutAside(String),
    #[error("there is too little room to put aside what the guest overwrites")]
    NoRoom,
    #[error("the volume cannot be read: {0}")]
    Read(VolumeError),
}

impl Shot {
    /// Of a disk that is still; nothing is wanted yet. What is put aside goes to a file without a name in
    /// `folder`.
    pub fn new(pool: &Pool, file: Arc<Backend>, size: u64, folder: &Path) -> std::io::Result<Shot> {
        Ok(Shot {
            file,
            size,
            pool: pool.clone(),
            scratch: Arc::new(nameless(folder)?),
            wanted: Bits::none(size),
            empty: Bits::none(size),
            turns: (0..TURNS).map(|_| Mutex::new(())).collect(),
            put_aside: AtomicU64::new(0),
            given_up: OnceLock::new(),
        })
    }

    /// Says what is wanted. While the disk is still, and before the shot is any disk's.
    pub fn want(&self, extents: &UnitSet) {
        self.wanted.set_all(extents);
    }

    /// Extents that were put aside.
    pub fn put_aside(&self) -> u64 {
        self.put_aside.load(Ordering::Relaxed)
    }

    /// Whether the range touches what is still wanted of the volume.
    pub fn wants(&self, offset: u64, len: u64) -> bool {
        self.given_up.get().is_none() && touched(offset, len).any(|extent| self.wanted.get(extent))
    }

    /// To be waited for before a change: what is wanted of the range is put aside.
    pub async fn before_change(&self, offset: u64, len: u64) {
        for extent in touched(offset, len) {
            if !self.wanted.get(extent) || self.given_up.get().is_some() {
                continue;
            }
            let _turn = self.turn(extent).lock().await;
            if !self.wanted.get(extent) {
                continue;
            }
            match self.save(extent).await {
                Ok(()) => self.wanted.clear(extent),
                Err(why) => {
                    tracing::warn!(volume = %self.file.path().display(), error = %why, "a snapshot is given up");
                    // Only the first reason is told.
                    let _ = self.given_up.set(why);
                }
            }
        }
    }

    /// An extent's content at the instant; none if it is all zero. `is_hole`: the volume was asked, after the
    /// instant, and has none there now.
    pub async fn read(&self, extent: u64, is_hole: bool) -> Result<Option<Bytes>, GivenUp> {
        if self.wanted.get(extent) {
            let _turn = self.turn(extent).lock().await;
            if self.wanted.get(extent) {
                let content = match is_hole {
                    // Nobody has changed it since the instant, or it would have been put aside.
                    true => None,
                    false => Some(self.read_volume(extent).await?),
                };
                self.wanted.clear(extent);
                return Ok(content);
            }
        }
        if let Some(why) = self.given_up.get() {
            return Err(why.clone());
        }
        if self.empty.get(extent) {
            return Ok(None);
        }
        let (scratch, len) = (self.scratch.clone(), self.len_of(extent));
        let job = move || {
            let mut bytes = vec![0; len];
            let read = scratch.read_exact_at(&mut bytes, extent * EXTENT);
            read.map(|()| Bytes::from(bytes))
        };
        let read = self.pool.run(Lane::Quick, job).await;
        let read = read.map_err(GivenUp::Read)?;
        read.map(Some).map_err(|e| GivenUp::PutAside(e.to_string()))
    }

    fn turn(&self, extent: u64) -> &Mutex<()> {
        &self.turns[(extent % TURNS as u64) as usize]
    }

    fn len_of(&self, extent: u64) -> usize {
        EXTENT.min(self.size - extent * EXTENT) as usize
    }

    async fn read_volume(&self, extent: u64) -> Result<Bytes, GivenUp> {
        let read = self.file.read(extent * EXTENT, self.len_of(extent)).await;
        read.map_err(GivenUp::Read)
    }

    async fn save(&self, extent: u64) -> Result<(), GivenUp> {
        let content = self.read_volume(extent).await?;
        if is_zero(&content) {
            self.empty.set(extent);
            return Ok(());
        }
        let scratch = self.scratch.clone();
        let job = move || {
            let space = rustix::fs::fstatvfs(&*scratch)?;
            let left = (space.f_blocks * space.f_frsize / 20).min(LEFT_FREE);
            if space.f_bavail * space.f_frsize < left + EXTENT {
                return Ok(false);
            }
            scratch.write_all_at(&content, extent * EXTENT)?;
            std::io::Result::Ok(true)
        };
        let saved = self.pool.run(Lane::Quick, job).await;
        match saved.map_err(GivenUp::Read)? {
            Ok(true) => {
                self.put_aside.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Ok(false) => Err(GivenUp::NoRoom),
            Err(e) => Err(GivenUp::PutAside(e.to_string())),
        }
    }
}

/// A file that is gone when it is closed, however that comes about.
fn nameless(folder: &Path) -> std::io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // Not every file system can.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            let path = folder.join(format!(".scratch-{}", std::process::id()));
            let mut options = File::options();
            let file = options.read(true).write(true).create(true).truncate(true);
            let file = file.open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_engine::space::Extent;
    use whimbrel_volume::backend::Format;
    use whimbrel_volume::pool::PoolSize;

    const SIZE: u64 = 20 * EXTENT - 512;

    async fn disk(folder: &Path) -> (Pool, Arc<Backend>) {
        let pool = Pool::start(PoolSize::default()).expect("threads");
        let file = Backend::create(&pool, folder.join("disk"), Format::Raw, SIZE).await;
        (pool, Arc::new(file.expect("room")))
    }

    fn all() -> UnitSet {
        UnitSet::full(20)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_overwritten_while_it_is_read_is_had_as_it_was() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (pool, file) = disk(folder.path()).await;
        for extent in (0..20).step_by(2) {
            let len = EXTENT.min(SIZE - extent * EXTENT) as usize;
            let content = Bytes::from(vec![extent as u8 + 1; len]);
            file.write(extent * EXTENT, content).await.expect("written");
        }
        let shot = Arc::new(Shot::new(&pool, file.clone(), SIZE, folder.path()).expect("a shot"));
        shot.want(&all());
        let writer = {
            let (shot, file) = (shot.clone(), file.clone());
            tokio::spawn(async move {
                // Downwards, so that the two meet; over the seam of two extents.
                for extent in (1..20u64).rev() {
                    let at = extent * EXTENT - 100;
                    shot.before_change(at, 200).await;
                    let content = Bytes::from_static(&[0xee; 200]);
                    file.write(at, content).await.expect("written");
                }
            })
        };
        for extent in 0..20 {
            let content = shot.read(extent, false).await.expect("not given up");
            let wanted = if extent % 2 == 0 { extent as u8 + 1 } else { 0 };
            let content = content.unwrap_or_default();
            assert!(
                content.iter().all(|byte| *byte == wanted),
                "extent {extent}"
            );
        }
        writer.await.expect("it writes");
        assert!(!shot.wants(0, SIZE));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn only_what_is_wanted_is_put_aside_and_only_once() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (pool, file) = disk(folder.path()).await;
        file.write(0, Bytes::from(vec![7; 3 * EXTENT as usize]))
            .await
            .expect("written");
        let shot = Shot::new(&pool, file.clone(), SIZE, folder.path()).expect("a shot");
        let mut wanted = UnitSet::empty(20);
        wanted.insert(Extent::new(1, 1));
        wanted.insert(Extent::new(10, 1));
        shot.want(&wanted);
        for _ in 0..3 {
            shot.before_change(0, 12 * EXTENT).await;
        }
        // The tenth was empty, and takes no room.
        assert_eq!(shot.put_aside(), 1);
        file.write(0, Bytes::from(vec![8; 12 * EXTENT as usize]))
            .await
            .expect("written");
        let one = shot
            .read(1, false)
            .await
            .expect("there")
            .expect("not empty");
        assert!(one.iter().all(|byte| *byte == 7));
        assert_eq!(shot.read(10, false).await.expect("there"), None);
    }
}
