//! A disk as its guest sees it: an NBD export over a volume, in whatever state the volume is.
//!
//! | mode | reads | writes | when |
//! |---|---|---|---|
//! | `Open` | from the file | to the file | the machine is ours and all content is here |
//! | `Noted` | from the file | to the file, and where is noted | the same, while the content goes ahead of a switchover |
//! | `Frozen` | from the file | refused (`EPERM`) | the guest was stopped to move away, or has moved |
//! | `Arriving` | looked up at the source, nothing kept | refused | an incoming QEMU probes its disks before it owns them |
//! | `Filling` | resident units from the file, others wait for the source | to the file | the machine is ours, its content is on the way |
//!
//! The mode is the fence of invariant I5: a write is admitted only in the two modes in which this host
//! owns the machine, under a lock whose other side changes the mode. When [`Disk::freeze`] returns, every
//! write that was acknowledged is in the file, noted if it was to be, and none will follow.

mod behind;
mod bits;
mod changes;
mod export;
mod felt;
mod filling;
mod recorder;
mod shot;
mod wants;

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{RwLock, RwLockWriteGuard};
use whimbrel_volume::VolumeError;
use whimbrel_volume::backend::Backend;
use whimbrel_volume::heat::{AccessKind, AccessLog};
use whimbrel_volume::trace::Kind;

use crate::volumes::heat::Heat;
use crate::volumes::tracker::Tracker;

pub use bits::Bits;
pub use changes::Changes;
pub use export::MachineDisks;
pub use filling::{Filling, Soil, Verified, absolute};
pub use recorder::{Recorder, Recording};
pub use shot::{GivenUp, Shot};
pub use wants::{Asked, DemandFigures, Wants};

/// Reads a disk at the other end of a migration, without moving anything.
pub trait Peek: Send + Sync {
    /// `None` if the other end cannot be asked.
    fn peek(
        &self,
        offset: u64,
        len: u32,
    ) -> Pin<Box<dyn Future<Output = Option<Bytes>> + Send + '_>>;
}

/// What a disk's guest may do now. See the module's table.
#[derive(Clone)]
pub enum Mode {
    Open,
    Noted(Arc<Changes>),
    Frozen,
    Arriving(Arc<dyn Peek>),
    Filling(Arc<Filling>),
}

impl Mode {
    /// Notes a change of these bytes, if changes are noted: until what is returned goes.
    fn change(&self, offset: u64, len: u64) -> Option<changes::Change<'_>> {
        match self {
            Mode::Noted(changes) => Some(changes.begin(offset, len)),
            Mode::Open | Mode::Frozen | Mode::Arriving(_) | Mode::Filling(_) => None,
        }
    }
}

/// A volume that is served.
pub struct Disk {
    name: String,
    size: u64,
    file: Arc<Backend>,
    mode: RwLock<Mode>,
    /// Clients are told that they cannot write, whatever the mode.
    read_only: bool,
    /// A guest has written or flushed since the mode last let it: proof that it ran here.
    touched: AtomicBool,
    /// Where the guest's reads and writes are logged, if anywhere.
    heat: Option<Arc<Heat>>,
    /// Where they are written down one by one, while somebody wants that.
    recording: Recording,
    /// Where what the guest changes is remembered for the next snapshot, if anywhere.
    tracker: Option<Arc<Tracker>>,
    /// The instant that a snapshot is being made of.
    shot: Mutex<Option<Arc<Shot>>>,
    /// There is one. Set and looked at under the mode's lock, so that no write misses it.
    has_shot: AtomicBool,
}

/// How long the daemon, when it ends, waits for a write that is under way.
const LAST_WRITES: Duration = Duration::from_secs(2);

impl Disk {
    pub fn new(name: String, size: u64, file: Arc<Backend>, mode: Mode) -> Self {
        Disk {
            name,
            size,
            file,
            mode: RwLock::new(mode),
            read_only: false,
            touched: AtomicBool::new(false),
            heat: None,
            recording: Recording::default(),
            tracker: None,
            shot: Mutex::new(None),
            has_shot: AtomicBool::new(false),
        }
    }

    /// The same disk, of which clients are told that they cannot write.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// The same disk, whose reads and writes are logged.
    pub fn watched(mut self, heat: Arc<Heat>) -> Self {
        self.heat = Some(heat);
        self
    }

    /// The same disk, whose changes are remembered.
    pub fn tracked(mut self, tracker: Arc<Tracker>) -> Self {
        tracker.opened(&self.file);
        if let Mode::Filling(_) | Mode::Arriving(_) = self.mode.get_mut() {
            tracker.lose(FILLED);
        }
        self.tracker = Some(tracker);
        self
    }

    fn log(&self, kind: Kind, offset: u64, len: u64) {
        self.recording.note(kind, offset, len);
        let kind = match kind {
            Kind::Read => AccessKind::Read,
            Kind::Write | Kind::Zero => AccessKind::Write,
            Kind::Trim | Kind::Flush | Kind::Gap => return,
        };
        if let Some(heat) = &self.heat {
            heat.log(kind, offset, len);
        }
    }

    /// The recording of its requests, if there is one.
    pub fn recording(&self) -> &Recording {
        &self.recording
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn file(&self) -> &Arc<Backend> {
        &self.file
    }

    /// What the guest reads and writes of it, if that is logged.
    pub fn heat(&self) -> Option<&AccessLog> {
        self.heat.as_ref().map(|heat| heat.access_log())
    }

    /// Whether the guest has written since the mode was last set.
    pub fn was_touched(&self) -> bool {
        self.touched.load(Ordering::Acquire)
    }

    /// The content being filled, while it is.
    pub async fn filling(&self) -> Option<Arc<Filling>> {
        match &*self.mode.read().await {
            Mode::Filling(filling) => Some(filling.clone()),
            Mode::Open | Mode::Noted(_) | Mode::Frozen | Mode::Arriving(_) => None,
        }
    }

    /// Changes what the guest may do, after the writes under way have ended.
    pub async fn set_mode(&self, mode: Mode) {
        let mut now = self.mode.write().await;
        if let (Mode::Filling(_), Some(tracker)) = (&mode, &self.tracker) {
            tracker.lose(FILLED);
        }
        self.touched.store(false, Ordering::Release);
        *now = mode;
    }

    /// Ends the guest's writes and makes what it wrote durable.
    ///
    /// # Errors
    /// The volume's, if it cannot be synced; the disk is frozen all the same.
    pub async fn freeze(&self) -> Result<(), VolumeError> {
        self.set_mode(Mode::Frozen).await;
        self.file.sync().await
    }

    /// No write is under way, and none begins, while this is held; reads wait as well.
    pub async fn stilled(&self) -> RwLockWriteGuard<'_, Mode> {
        self.mode.write().await
    }

    /// Lets nothing in any more: the daemon ends, and what clients ask for meanwhile they ask its successor for.
    pub async fn stand_still(&self) {
        let Ok(still) = tokio::time::timeout(LAST_WRITES, self.mode.write()).await else {
            return;
        };
        std::mem::forget(still);
        if let Some(tracker) = &self.tracker {
            tracker.sealed(&self.file);
        }
    }

    /// From now on what the shot wants is put aside before it is changed. While the disk is [stilled](Self::stilled).
    pub fn begin_shot(&self, shot: Arc<Shot>) {
        *self.shot() = Some(shot);
        self.has_shot.store(true, Ordering::Release);
    }

    /// Nothing is put aside any more.
    pub fn end_shot(&self) {
        self.has_shot.store(false, Ordering::Release);
        *self.shot() = None;
    }

    fn shot(&self) -> std::sync::MutexGuard<'_, Option<Arc<Shot>>> {
        self.shot.lock().expect("no holder of this lock panics")
    }

    fn shot_now(&self) -> Option<Arc<Shot>> {
        match self.has_shot.load(Ordering::Acquire) {
            true => self.shot().clone(),
            false => None,
        }
    }

    /// Before every change by the guest, under the mode's lock.
    async fn before_change(&self, offset: u64, len: u64) {
        if let Some(tracker) = &self.tracker {
            tracker.mark(offset, len);
        }
        if let Some(shot) = self.shot_now() {
            shot.before_change(offset, len).await;
        }
    }
}

const FILLED: &str = "the volume came here by a migration since";

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(tracker) = &self.tracker {
            tracker.closed(&self.file);
        }
    }
}
