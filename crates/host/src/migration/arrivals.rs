//! What arrives at the destination, and where it goes: disks into their files, RAM into QEMU.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;
use whimbrel_engine::inflow::{FillPlan, SpaceIn};
use whimbrel_engine::outflow::Class;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId, UNIT};
use whimbrel_qemu::sink::{PostcopySink, PrecopySink};
use whimbrel_volume::VolumeError;
use whimbrel_wire::units::{Encoding, Units};

use crate::disk::{Filling, Wants};
use crate::wakers::Wakers;

/// Content that could not be stored.
#[derive(Debug, thiserror::Error)]
pub enum ArrivalError {
    #[error("storing {space}: {source}")]
    Disk { space: SpaceId, source: VolumeError },
    #[error("giving {space} to QEMU: {source}")]
    Ram {
        space: SpaceId,
        source: whimbrel_qemu::Error,
    },
    #[error("the peer sent {extent} of {space}, which does not exist")]
    NoSuchUnits { space: SpaceId, extent: Extent },
    #[error("the peer sent {space} before the machine was handed over")]
    TooEarly { space: SpaceId },
}

/// How RAM reaches the destination's QEMU.
pub enum RamSink {
    Postcopy(PostcopySink),
    Precopy(PrecopySink),
    /// No QEMU lacks memory: the guest has it all, or is gone. What comes all the same is thrown away.
    Sated,
}

#[derive(Default)]
struct Blocks {
    spaces: Vec<SpaceIn>,
    /// One for each block: tickets are numbered by space.
    wakers: Vec<Wakers>,
}

/// The RAM blocks, all going to one QEMU.
pub struct RamIn {
    /// Space id of block 0; block `i` is the `i`th after it.
    first: u16,
    sink: RamSink,
    blocks: Mutex<Blocks>,
    wants: Arc<Wants>,
    clock: Instant,
    complete: watch::Sender<bool>,
}

impl RamIn {
    pub fn new(spaces: Vec<SpaceIn>, sink: RamSink, wants: Arc<Wants>, clock: Instant) -> Self {
        let complete = spaces.iter().all(SpaceIn::is_complete);
        RamIn {
            first: spaces.first().map_or(0, |s| s.info().id.0),
            sink,
            blocks: Mutex::new(Blocks {
                wakers: spaces.iter().map(|_| Wakers::default()).collect(),
                spaces,
            }),
            wants,
            clock,
            complete: watch::Sender::new(complete),
        }
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().expect("no holder of this lock panics")
    }

    fn now(&self) -> u64 {
        self.clock.elapsed().as_micros() as u64
    }

    pub fn sink(&self) -> &RamSink {
        &self.sink
    }

    fn block_of(&self, space: SpaceId) -> Option<usize> {
        let block = usize::from(space.0.checked_sub(self.first)?);
        (block < self.blocks().spaces.len()).then_some(block)
    }

    fn space_of(&self, block: usize) -> SpaceId {
        SpaceId(self.first + block as u16)
    }

    /// QEMU asks for pages: those that nobody has asked for yet are demanded.
    pub fn request(&self, block: usize, extent: Extent) {
        let now = self.now();
        let demands = match self.blocks().spaces.get_mut(block) {
            Some(space) => space.want(extent, now),
            None => return,
        };
        self.wants.demand(self.space_of(block), &demands);
    }

    /// Units in place, by block.
    pub fn resident(&self) -> Vec<(SpaceId, u64)> {
        let first = self.first;
        let blocks = self.blocks();
        let of = |(i, b): (usize, &SpaceIn)| (SpaceId(first + i as u16), b.resident().len());
        blocks.spaces.iter().enumerate().map(of).collect()
    }

    pub fn held(&self) -> Vec<(SpaceId, UnitSet)> {
        let first = self.first;
        let blocks = self.blocks();
        let of = |(i, b): (usize, &SpaceIn)| (SpaceId(first + i as u16), b.resident().clone());
        blocks.spaces.iter().enumerate().map(of).collect()
    }

    pub fn outstanding(&self) -> Vec<(SpaceId, Vec<Extent>)> {
        let first = self.first;
        let blocks = self.blocks();
        let of = |(i, b): (usize, &SpaceIn)| (SpaceId(first + i as u16), b.outstanding());
        blocks.spaces.iter().enumerate().map(of).collect()
    }

    pub fn late_copies(&self) -> u64 {
        self.blocks().spaces.iter().map(SpaceIn::late_copies).sum()
    }

    /// These units, a set for each block, are not what the guest will need: they are absent again.
    pub fn evict(&self, stale: &[UnitSet]) {
        let mut blocks = self.blocks();
        for (space, stale) in blocks.spaces.iter_mut().zip(stale) {
            space.evict(stale);
        }
        let complete = blocks.spaces.iter().all(SpaceIn::is_complete);
        self.complete.send_replace(complete);
    }

    /// Resolves when every page is in place.
    pub async fn completed(&self) {
        // The sender is this object, so the wait cannot fail while somebody waits on it.
        let _ = self.complete.subscribe().wait_for(|&done| done).await;
    }

    async fn place(
        &self,
        block: usize,
        extent: Extent,
        bytes: Option<Bytes>,
    ) -> Result<(), whimbrel_qemu::Error> {
        match (&self.sink, bytes) {
            (RamSink::Postcopy(sink), Some(bytes)) => sink.place(block, extent.start, bytes).await,
            (RamSink::Postcopy(sink), None) => sink.place_zero(block, extent).await,
            (RamSink::Precopy(sink), Some(bytes)) => sink.place(block, extent.start, bytes).await,
            (RamSink::Precopy(sink), None) => sink.place_zero(block, extent).await,
            (RamSink::Sated, _) => Ok(()),
        }
    }

    /// `bytes` is `None` for zero pages. A page that comes `again` is newer. Must run to its end: units being
    /// filled belong to this call.
    async fn fill(
        &self,
        block: usize,
        extent: Extent,
        bytes: Option<Bytes>,
        again: bool,
    ) -> Result<(), whimbrel_qemu::Error> {
        if again {
            self.place(block, extent, bytes.clone()).await?;
        }
        let grant = loop {
            let wait = {
                let mut blocks = self.blocks();
                match blocks.spaces[block].begin_fill(extent) {
                    FillPlan::Go(grant) => break grant,
                    FillPlan::Wait(ticket) => blocks.wakers[block].register(ticket),
                }
            };
            let _ = wait.await;
        };
        let mut result = Ok(());
        if !again {
            for run in &grant.store {
                let part = bytes.as_ref().map(|bytes| {
                    let from = ((run.start - extent.start) * UNIT) as usize;
                    bytes.slice(from..from + run.byte_len() as usize)
                });
                result = self.place(block, *run, part).await;
                if result.is_err() {
                    break;
                }
            }
        }
        let now = self.now();
        let mut blocks = self.blocks();
        let done = blocks.spaces[block].end_fill(grant, result.is_ok(), now);
        blocks.wakers[block].wake(&done.wake);
        if blocks.spaces.iter().all(SpaceIn::is_complete) {
            self.complete.send_replace(true);
        }
        drop(blocks);
        self.wants.answered(&done.answered);
        result
    }
}

/// Where arriving content goes.
#[derive(Default)]
pub struct Arrivals {
    disks: Mutex<Vec<Arc<Filling>>>,
    /// How many disks there will be: spaces of lower numbers are theirs.
    disks_expected: AtomicUsize,
    /// Disks may be filled now: from the hand-over on, and while they are sent ahead of that.
    disk_gate: watch::Sender<bool>,
    ram: Mutex<Option<Arc<RamIn>>>,
    /// RAM may be placed now: always for a pre-copy, from the hand-over on for a post-copy, and while it is
    /// sent ahead of that.
    ram_gate: watch::Sender<bool>,
    /// Units frames stored so far.
    frames: watch::Sender<u64>,
    /// Bytes of frames that came, by class.
    received: Received,
    /// The machine does not come here: what is still sent is thrown away. Were it an error, the connection
    /// would break before the source could hear the refusal on it.
    refused: AtomicBool,
    /// The grant has been heard: nothing is held any more that the source says is stale.
    evicted: AtomicBool,
    seeds: Mutex<BTreeSet<SpaceId>>,
    /// Fills at work. They run to their end whatever becomes of the connection that brought them.
    at_work: TaskTracker,
}

/// Bytes of frames with units that came, headers included.
#[derive(Debug, Default)]
struct Received {
    ram: AtomicU64,
    disk: AtomicU64,
    demand: AtomicU64,
}

impl Arrivals {
    /// A frame came, of so many bytes.
    pub fn count(&self, units: &Units, bytes: u64) {
        let is_disk = usize::from(units.space.0) < self.disks_expected.load(Ordering::Acquire);
        let counter = match units.class {
            Class::Demand => &self.received.demand,
            Class::Push if is_disk => &self.received.disk,
            Class::Push => &self.received.ram,
        };
        counter.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of frames that came so far: RAM and disks' content that were pushed, and what was demanded.
    pub fn received(&self) -> [u64; 3] {
        let received = &self.received;
        [&received.ram, &received.disk, &received.demand].map(|n| n.load(Ordering::Relaxed))
    }

    /// Nothing is stored any more, whatever comes.
    pub fn refuse(&self) {
        self.refused.store(true, Ordering::Release);
        self.disk_gate.send_replace(true);
        self.ram_gate.send_replace(true);
    }

    /// The disks, which may be filled from now on: the machine is this host's, or they come ahead.
    pub fn set_disks(&self, disks: Vec<Arc<Filling>>) {
        *self.disks.lock().expect("no holder of this lock panics") = disks;
        self.disk_gate.send_replace(true);
    }

    /// Makes durable what of the disks came ahead, so that the guest's first flush here finds little to do. Not by
    /// pre-copy: there the guest stands still meanwhile.
    pub async fn settle_disks(&self) {
        if !self.is_postcopy() {
            return;
        }
        for disk in self.disks() {
            // What cannot be made durable now will be told of at that flush.
            if let Err(error) = disk.make_durable().await {
                tracing::warn!(%error, disk = disk.name(), "what came ahead cannot be made durable yet");
            }
        }
    }

    /// There will be so many disks.
    pub fn expect_disks(&self, count: usize) {
        self.disks_expected.store(count, Ordering::Release);
    }

    pub fn disks(&self) -> Vec<Arc<Filling>> {
        self.disks
            .lock()
            .expect("no holder of this lock panics")
            .clone()
    }

    pub fn set_ram(&self, ram: Arc<RamIn>) {
        *self.ram.lock().expect("no holder of this lock panics") = Some(ram);
    }

    pub fn ram(&self) -> Option<Arc<RamIn>> {
        self.ram
            .lock()
            .expect("no holder of this lock panics")
            .clone()
    }

    pub fn open_ram(&self) {
        self.ram_gate.send_replace(true);
    }

    /// RAM comes ahead of the switchover.
    pub fn open_ram_ahead(&self) {
        if self.is_postcopy() {
            self.open_ram();
        }
    }

    /// Nothing more comes before the switchover.
    pub fn close_ahead(&self) {
        if self.has_evicted() {
            return;
        }
        self.disk_gate.send_replace(false);
        if self.is_postcopy() {
            self.ram_gate.send_replace(false);
        }
    }

    fn is_postcopy(&self) -> bool {
        let ram = self.ram();
        ram.is_some_and(|ram| matches!(ram.sink, RamSink::Postcopy(_)))
    }

    /// What the source named as stale is not held any more, or never was.
    pub fn set_evicted(&self) {
        self.evicted.store(true, Ordering::Release);
    }

    pub fn has_evicted(&self) -> bool {
        self.evicted.load(Ordering::Acquire)
    }

    /// Whether frames of this space must be stored in the order in which they came: pages may come again, newer.
    pub fn keeps_order(&self, space: SpaceId) -> bool {
        self.ram()
            .is_some_and(|ram| self.comes_again(&ram) && ram.block_of(space).is_some())
    }

    /// Whether the guest does not run here yet, so that its pages may be replaced.
    fn comes_again(&self, ram: &RamIn) -> bool {
        match ram.sink {
            RamSink::Precopy(_) => true,
            RamSink::Postcopy(_) => !self.has_evicted(),
            RamSink::Sated => false,
        }
    }

    /// A life of the session begins: no frame of it was stored yet.
    pub fn begin_life(&self) {
        self.frames.send_replace(0);
    }

    /// Resolves when this many units frames of this life have been stored.
    pub async fn frames_stored(&self, count: u64) {
        let _ = self.frames.subscribe().wait_for(|&n| n >= count).await;
    }

    /// Resolves when no fill is at work. No connection may be reading meanwhile.
    pub async fn idle(&self) {
        self.at_work.close();
        self.at_work.wait().await;
        self.at_work.reopen();
    }

    /// Stores one frame. Waits while the frame is early: that holds up its connection, which is the
    /// bound on what waits.
    pub async fn take(&self, units: Units) -> Result<(), ArrivalError> {
        let space = units.space;
        let target = self.target(space).await?;
        for &extent in &units.runs {
            target.check(space, extent)?;
        }
        let storing = self.at_work.spawn(async move {
            for (extent, bytes) in units.pieces() {
                let content = match units.encoding {
                    Encoding::Raw => Some(bytes),
                    Encoding::Zero => None,
                };
                target.fill(space, extent, content).await?;
            }
            Ok(())
        });
        finished(storing).await?;
        self.frames.send_modify(|n| *n += 1);
        Ok(())
    }

    /// Stores what this host has of a disk itself.
    pub async fn take_own(
        &self,
        disk: Arc<Filling>,
        extent: Extent,
        bytes: Bytes,
    ) -> Result<(), ArrivalError> {
        let space = disk.id();
        let storing = self.at_work.spawn(async move {
            let stored = disk.fill(extent, bytes).await;
            stored.map_err(|source| ArrivalError::Disk { space, source })
        });
        finished(storing).await
    }

    /// The disks of which this host has an older copy that is not compared yet.
    pub fn seeded(&self) -> BTreeSet<SpaceId> {
        self.seeds().clone()
    }

    /// This host has an older copy of a disk; or all of it has been compared.
    pub fn set_seeded(&self, space: SpaceId, is: bool) {
        let mut seeds = self.seeds();
        if is {
            seeds.insert(space);
        } else {
            seeds.remove(&space);
        }
    }

    fn seeds(&self) -> MutexGuard<'_, BTreeSet<SpaceId>> {
        self.seeds.lock().expect("no holder of this lock panics")
    }

    /// The source says that these units are zero.
    pub async fn zeroes(
        &self,
        space: SpaceId,
        first: u64,
        set: UnitSet,
    ) -> Result<(), ArrivalError> {
        let target = self.target(space).await?;
        let whole = Extent::new(first, set.capacity());
        target.check(space, whole)?;
        let storing = self.at_work.spawn(async move {
            for run in set.runs() {
                let extent = Extent::new(first + run.start, run.len);
                target.fill(space, extent, None).await?;
            }
            Ok(())
        });
        finished(storing).await
    }

    /// Who takes the content of a space, once it may be taken.
    async fn target(&self, space: SpaceId) -> Result<Target, ArrivalError> {
        match self.expected(space).await {
            // Also if it was refused while this waited.
            _ if self.refused.load(Ordering::Acquire) => Ok(Target::Nowhere),
            expected => expected,
        }
    }

    async fn expected(&self, space: SpaceId) -> Result<Target, ArrivalError> {
        if usize::from(space.0) < self.disks_expected.load(Ordering::Acquire) {
            // The sender is this object, so the wait cannot fail while somebody waits on it.
            let _ = self.disk_gate.subscribe().wait_for(|&open| open).await;
            let disk = self.disks().into_iter().find(|d| d.id() == space);
            return disk
                .map(Target::Disk)
                .ok_or(ArrivalError::TooEarly { space });
        }
        let ram = self.ram().ok_or(ArrivalError::TooEarly { space })?;
        let block = ram
            .block_of(space)
            .ok_or(ArrivalError::TooEarly { space })?;
        let _ = self.ram_gate.subscribe().wait_for(|&open| open).await;
        // What is let in before the switch is stored before it: the source waits for that.
        let again = self.comes_again(&ram);
        Ok(Target::Ram(ram, block, again))
    }

    /// What is held, by space, for a source that reconnects.
    pub fn held(&self) -> Vec<(SpaceId, UnitSet)> {
        let mut held: Vec<_> = self.disks().iter().map(|d| (d.id(), d.held())).collect();
        held.extend(self.ram().map(|ram| ram.held()).unwrap_or_default());
        held
    }

    /// Demands that were made and not answered.
    pub fn outstanding(&self) -> Vec<(SpaceId, Vec<Extent>)> {
        let disks = self.disks();
        let mut all: Vec<_> = disks.iter().map(|d| (d.id(), d.outstanding())).collect();
        all.extend(self.ram().map(|ram| ram.outstanding()).unwrap_or_default());
        all
    }

    /// How long a guest's flush would have waited for copies, at most, since this was last asked.
    pub fn backlog(&self) -> std::time::Duration {
        let disks = self.disks();
        disks.iter().map(|d| d.backlog()).max().unwrap_or_default()
    }

    pub fn late_copies(&self) -> u64 {
        let disks: u64 = self.disks().iter().map(|d| d.late_copies()).sum();
        disks + self.ram().map_or(0, |ram| ram.late_copies())
    }
}

enum Target {
    Disk(Arc<Filling>),
    /// With its block, and whether pages may come again.
    Ram(Arc<RamIn>, usize, bool),
    /// The machine was refused.
    Nowhere,
}

impl Target {
    fn check(&self, space: SpaceId, extent: Extent) -> Result<(), ArrivalError> {
        let units = match self {
            Target::Disk(disk) => disk.units(),
            Target::Ram(ram, block, _) => ram.blocks().spaces[*block].info().units(),
            Target::Nowhere => return Ok(()),
        };
        let fits = extent
            .start
            .checked_add(extent.len)
            .is_some_and(|end| end <= units);
        if fits {
            Ok(())
        } else {
            Err(ArrivalError::NoSuchUnits { space, extent })
        }
    }

    /// `content` is `None` for zeroes.
    async fn fill(
        &self,
        space: SpaceId,
        extent: Extent,
        content: Option<Bytes>,
    ) -> Result<(), ArrivalError> {
        match self {
            Target::Disk(disk) => match content {
                Some(bytes) => disk.fill(extent, bytes).await,
                None => disk.zeroes(extent).await,
            }
            .map_err(|source| ArrivalError::Disk { space, source }),
            Target::Ram(ram, block, again) => ram
                .fill(*block, extent, content, *again)
                .await
                .map_err(|source| ArrivalError::Ram { space, source }),
            Target::Nowhere => Ok(()),
        }
    }
}

/// The result of a fill, whose task is never cancelled and whose panic is this task's.
async fn finished(
    storing: tokio::task::JoinHandle<Result<(), ArrivalError>>,
) -> Result<(), ArrivalError> {
    match storing.await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => unreachable!("fills are not cancelled while the daemon's runtime lives"),
        },
    }
}
