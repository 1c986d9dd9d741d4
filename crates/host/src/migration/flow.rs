//! What flows out of the source: the engine's [`Outflow`], joined with where the content is.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Notify, watch};
use whimbrel_engine::disks_ahead::DisksAhead;
use whimbrel_engine::outflow::{Batch, Class as CopyClass, Outflow, Tally};
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId, SpaceInfo, UNIT};
use whimbrel_qemu::content::RamContent;
use whimbrel_volume::backend::Backend;
use whimbrel_volume::digest::{Hashed, hash_units};
use whimbrel_wire::message::UNIT_HASH;
use whimbrel_wire::units::{Encoding, MAX_ZERO_UNITS, Units};

use super::deltas::DeltaCount;
use super::easing::Easing;
use super::packing::{Form, Frame};

/// Units of one demanded frame: small, so that several demands take turns.
pub const DEMAND_UNITS: u64 = 8;

/// Most answers "that is zero" that wait to be said; the destination demands again what it misses after
/// a reconnect, so dropping the oldest loses nothing but time.
const MAX_ZERO_ANSWERS: usize = 4096;

/// A peer that has not been heard of comparing for so long compares no more.
const PATIENCE_WITH_SEEDS: Duration = Duration::from_secs(30);

/// Looks at a frozen disk's holes that are waited for, 20 ms each; then it counts as different.
const RELEASED_WITHIN: u32 = 500;

/// Where a space's content is read from.
#[derive(Clone)]
pub enum Content {
    Disk(Arc<Backend>),
    Ram { ram: RamContent, block: usize },
}

/// Content that could not be read at the source.
#[derive(Debug, thiserror::Error)]
pub enum FlowError {
    #[error("reading {space} for the copy: {source}")]
    Disk {
        space: SpaceId,
        source: whimbrel_volume::VolumeError,
    },
    #[error("reading {space} for the copy: {source}")]
    Ram {
        space: SpaceId,
        source: whimbrel_qemu::Error,
    },
}

/// Bytes and units handed to the link for one space. Bytes count frames with their headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    pub demand_bytes: u64,
    pub push_bytes: u64,
    pub units: u64,
    /// The same units, by how they were written.
    pub plain: u64,
    pub zstd: u64,
    pub zero: u64,
    pub delta: DeltaCount,
}

impl Sent {
    pub fn bytes(&self) -> u64 {
        self.demand_bytes + self.push_bytes
    }
}

struct Inner {
    out: Outflow,
    contents: Vec<Content>,
    sent: Vec<Sent>,
    /// By space: what the peer has old copies of, unless it says that it has evicted them.
    outdated: Vec<Option<UnitSet>>,
    /// By space: units whose content changed since they were offered first.
    written: Vec<Arc<UnitSet>>,
    zero_answers: VecDeque<(SpaceId, Extent)>,
    /// Zeroes that go the way of push, in order with it.
    zero_pushes: VecDeque<(SpaceId, Extent)>,
    /// Units frames handed to the connections of this life of the session.
    frames: u64,
    /// Answers handed out of which it is not known yet how many frames they are.
    in_hand: u64,
    /// Units that the demands' own connection has room for now: push connections leave those to it.
    lane_units: u64,
    /// When the peer was heard last of comparing a disk with its own copy, while nothing else is left to push.
    compared: Option<Instant>,
    /// The lives of the session, counted.
    life: u64,
}

/// What flows out of the source.
pub struct Flow {
    inner: Mutex<Inner>,
    /// Wakes the demands' own connection.
    laned: Notify,
    demanded: Notify,
    pushable: Notify,
    /// Whether content may leave at all: policy opens it, at the latest with the grant.
    open: watch::Sender<bool>,
}

impl Default for Flow {
    fn default() -> Self {
        Flow {
            inner: Mutex::new(Inner {
                out: Outflow::new(Vec::new()),
                contents: Vec::new(),
                sent: Vec::new(),
                outdated: Vec::new(),
                written: Vec::new(),
                zero_answers: VecDeque::new(),
                zero_pushes: VecDeque::new(),
                frames: 0,
                in_hand: 0,
                lane_units: 0,
                compared: None,
                life: 0,
            }),
            laned: Notify::new(),
            demanded: Notify::new(),
            pushable: Notify::new(),
            open: watch::Sender::new(false),
        }
    }
}

impl Flow {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }

    /// Adds the next space.
    pub fn add(&self, info: SpaceInfo, content: Content) {
        let mut inner = self.inner();
        inner.written.push(Arc::new(UnitSet::empty(info.units())));
        inner.out.add(info);
        inner.contents.push(content);
        inner.sent.push(Sent::default());
        inner.outdated.push(None);
    }

    /// Lets content leave.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// Nothing more leaves: the migration is over.
    pub fn close(&self) {
        self.open.send_replace(false);
    }

    /// Resolves while content may leave.
    pub async fn opened(&self) {
        // The sender is this object, so the wait cannot fail while somebody waits on it.
        let _ = self.open.subscribe().wait_for(|&open| open).await;
    }

    /// Changes what there is to send, then wakes whoever sends.
    pub fn change<T>(&self, f: impl FnOnce(&mut Outflow) -> T) -> T {
        let result = f(&mut self.inner().out);
        self.laned.notify_one();
        self.demanded.notify_one();
        self.pushable.notify_waiters();
        self.pushable.notify_one();
        result
    }

    /// The destination waits for these. Spaces and units that do not exist are ignored: the peer is told
    /// nothing new by an error, and the guest's own bounds were checked there.
    pub fn demand(&self, space: SpaceId, runs: &[Extent]) {
        let mut inner = self.inner();
        if inner.out.info(space).is_none() {
            return;
        }
        for &run in runs {
            let outcome = inner.out.demand(space, run);
            for empty in outcome.empty {
                if inner.zero_answers.len() == MAX_ZERO_ANSWERS {
                    inner.zero_answers.pop_front();
                }
                inner.zero_answers.push_back((space, empty));
            }
        }
        drop(inner);
        // All: whichever connection has room first takes it.
        self.laned.notify_one();
        self.demanded.notify_one();
        self.pushable.notify_one();
    }

    /// The demands' own connection has room for so many units. What it leaves is the push connections'.
    pub fn lane_has_room(&self, units: u64) {
        let before = std::mem::replace(&mut self.inner().lane_units, units);
        if units == 0 && before > 0 {
            self.demanded.notify_one();
            self.pushable.notify_one();
        }
    }

    /// The next demanded units for the demands' own connection, as many as it has room for. Waits.
    pub async fn next_in_lane(&self) -> Answer {
        loop {
            {
                let mut inner = self.inner();
                let units = inner.lane_units;
                if let Some(answer) = take_demand(&mut inner, units) {
                    inner.lane_units = units.saturating_sub(answer.units());
                    let is_full = inner.lane_units == 0;
                    drop(inner);
                    if is_full {
                        self.demanded.notify_one();
                        self.pushable.notify_one();
                    }
                    return answer;
                }
            }
            self.laned.notified().await;
        }
    }

    pub fn forget(&self, space: SpaceId, runs: &[Extent]) {
        let mut inner = self.inner();
        if inner.out.info(space).is_some() {
            for &run in runs {
                inner.out.forget(space, run);
            }
        }
    }

    /// These units of a space were written to: they will go again, or for the first time, and perhaps often.
    pub fn written(&self, space: SpaceId, units: &UnitSet) {
        Arc::make_mut(&mut self.inner().written[usize::from(space.0)]).union_with(units);
    }

    /// Units of a space that were written to since it is known.
    pub fn written_of(&self, space: SpaceId) -> Arc<UnitSet> {
        self.inner().written[usize::from(space.0)].clone()
    }

    /// The number of units of a space, if there is such a space.
    pub fn units_of(&self, space: SpaceId) -> Option<u64> {
        self.inner().out.info(space).map(SpaceInfo::units)
    }

    pub fn infos(&self) -> Vec<SpaceInfo> {
        self.inner().out.infos().cloned().collect()
    }

    pub fn content(&self, space: SpaceId) -> Option<Content> {
        self.inner().contents.get(usize::from(space.0)).cloned()
    }

    pub fn tally(&self, space: SpaceId) -> Tally {
        self.inner().out.tally(space)
    }

    pub fn sent(&self, space: SpaceId) -> Sent {
        self.inner().sent[usize::from(space.0)]
    }

    /// The peer could not store these: they will be sent again.
    pub fn unstored(&self, space: SpaceId, runs: &[Extent]) {
        if self.units_of(space).is_none() {
            return;
        }
        let mut empty = Vec::new();
        self.change(|out| {
            for &run in runs {
                empty.extend(out.unstored(space, run));
            }
        });
        self.push_zeroes(space, empty);
    }

    /// The peer has an older copy of a disk: nothing of it is pushed until compared.
    pub fn seeded(&self, space: SpaceId) {
        let mut inner = self.inner();
        if matches!(
            inner.contents.get(usize::from(space.0)),
            Some(Content::Disk(_))
        ) {
            inner.out.unsettle(space);
        }
    }

    /// Whether the peer has an older copy of a disk that is not compared yet.
    pub fn is_seeded(&self) -> bool {
        let inner = self.inner();
        inner
            .out
            .infos()
            .any(|info| inner.out.is_unsettled(info.id))
    }

    /// Nothing more of a disk is compared.
    pub fn seed_ended(&self, space: SpaceId) {
        if self.units_of(space).is_some() {
            self.change(|out| out.settle(space));
        }
    }

    /// Which units of a stretch of disk are the same here as where these hashes are from, one for each unit `included`
    /// by its index in the stretch. They count as sent. All of it may be pushed from then on but for those.
    pub async fn compare(
        &self,
        stretch: Extent,
        space: SpaceId,
        included: &UnitSet,
        hashes: &[u8],
    ) -> UnitSet {
        let mut alike = UnitSet::empty(stretch.len);
        let (file, life) = {
            let inner = self.inner();
            let content = inner.contents.get(usize::from(space.0));
            let units = inner.out.info(space).map(SpaceInfo::units);
            match content {
                Some(Content::Disk(file)) if units.is_some_and(|units| stretch.end() <= units) => {
                    (file.clone(), inner.life)
                }
                _ => return alike,
            }
        };
        // Said right after the grant, it comes while what is empty is still being looked for.
        for _ in 0..RELEASED_WITHIN {
            if !self.inner().out.is_withheld(space) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let pending = self.change(|out| out.begin_compare(space, stretch));
        self.inner().compared = Some(Instant::now());
        let theirs = hashes.chunks_exact(UNIT_HASH);
        let theirs: BTreeMap<u64, &[u8]> = included
            .runs()
            .flat_map(|run| run.iter())
            .zip(theirs)
            .collect();
        let included = pending.iter().flat_map(|run| {
            let within = Extent::new(run.start - stretch.start, run.len);
            let runs = included.runs_within(within);
            runs.map(|run| Extent::new(stretch.start + run.start, run.len))
                .collect::<Vec<_>>()
        });
        let same = match hash_units(&file, included.collect()).await {
            Ok(ours) => same_units(stretch, &ours, &theirs),
            Err(error) => {
                tracing::warn!(%error, "a stretch cannot be read to be compared: it is sent");
                Vec::new()
            }
        };
        let mut inner = self.inner();
        // What is said of a life that is over nobody hears.
        if inner.life == life {
            for run in inner.out.end_compare(space, stretch, &same) {
                alike.insert(Extent::new(run.start - stretch.start, run.len));
            }
        }
        inner.compared = Some(Instant::now());
        drop(inner);
        self.pushable.notify_one();
        alike
    }

    /// The next demanded units for a push connection, when there are any: waits.
    pub async fn next_demand(&self) -> Answer {
        loop {
            if let Some(answer) = take_beside_lane(&mut self.inner()) {
                return answer;
            }
            self.demanded.notified().await;
        }
    }

    /// The next units for a push connection: what is demanded and not yet on its way, else what is to be
    /// pushed, `most` at a time. What goes to disks waits for its turn beside the guest, and nothing waits
    /// behind it. Waits.
    pub async fn next_push(&self, most: impl Fn() -> u64, easing: &Easing) -> (CopyClass, Answer) {
        loop {
            let disks_wait = {
                let mut inner = self.inner();
                if let Some(answer) = take_beside_lane(&mut inner) {
                    return (CopyClass::Demand, answer);
                }
                let now = Instant::now();
                let zero = inner.zero_pushes.front().map(|zero| zero.0);
                if zero.is_some_and(|space| easing.held(space, now).is_zero())
                    && let Some((space, run)) = inner.zero_pushes.pop_front()
                {
                    inner.in_hand += 1;
                    return (CopyClass::Push, Answer::Zero(space, run));
                }
                let wait = easing.disks_wait(now);
                let Inner {
                    out,
                    contents,
                    compared,
                    ..
                } = &mut *inner;
                let is_disk =
                    |space: SpaceId| matches!(contents[usize::from(space.0)], Content::Disk(_));
                let wait_of = |space| {
                    if is_disk(space) {
                        wait.max(easing.held(space, now))
                    } else {
                        Duration::ZERO
                    }
                };
                if let Some(batch) = out.next_push_among(most(), |space| wait_of(space).is_zero()) {
                    if is_disk(batch.space) {
                        easing.to_disk(batch.units() * UNIT, now);
                    }
                    inner.in_hand += 1;
                    return (CopyClass::Push, Answer::Batch(batch));
                }
                let spaces: Vec<SpaceId> = out.infos().map(|info| info.id).collect();
                let compares =
                    |&space: &SpaceId| out.is_unsettled(space) && !out.is_withheld(space);
                let patience = spaces.iter().any(compares).then(|| {
                    let silent = now.saturating_duration_since(*compared.get_or_insert(now));
                    PATIENCE_WITH_SEEDS.saturating_sub(silent)
                });
                if patience.is_some_and(|left| left.is_zero()) {
                    tracing::warn!("the destination compares no more: all of its disks is sent");
                    spaces.iter().for_each(|&space| out.settle(space));
                    continue;
                }
                let waiting = spaces.into_iter();
                let waiting = waiting.filter(|&space| is_disk(space) && out.has_pushable(space));
                waiting.chain(zero).map(wait_of).chain(patience).min()
            };
            match disks_wait {
                Some(wait) => {
                    let _ = tokio::time::timeout(wait, self.pushable.notified()).await;
                }
                None => self.pushable.notified().await,
            }
        }
    }

    /// Says by way of push, in order with what was pushed before, that these units are zero. Bounded by
    /// the runs of the spaces' sets of zero units.
    pub fn push_zeroes(&self, space: SpaceId, runs: impl IntoIterator<Item = Extent>) {
        let runs = runs.into_iter();
        let runs = runs.flat_map(|run| run.pieces(MAX_ZERO_UNITS));
        let runs = runs.map(|run| (space, run));
        self.inner().zero_pushes.extend(runs);
        self.pushable.notify_one();
    }

    /// A life of the session begins: no frame was handed to it yet.
    pub fn begin_life(&self) {
        let mut inner = self.inner();
        inner.frames = 0;
        // What the last life had in hand was lost with it.
        inner.in_hand = 0;
        inner.lane_units = 0;
        inner.life += 1;
        inner.compared = None;
        // The peer says it again if it is still so.
        let spaces: Vec<SpaceId> = inner.out.infos().map(|info| info.id).collect();
        spaces.into_iter().for_each(|space| inner.out.settle(space));
    }

    /// An answer that was handed out goes as so many frames: to be said once of each, before it is sent.
    pub fn framed(&self, frames: u64) {
        let mut inner = self.inner();
        inner.frames += frames;
        inner.in_hand = inner.in_hand.saturating_sub(1);
    }

    /// Units frames of this life, all that was handed out so far being counted; `None` while that is not
    /// known: some of it is still being packed.
    pub fn frames(&self) -> Option<u64> {
        let inner = self.inner();
        (inner.in_hand == 0).then_some(inner.frames)
    }

    /// Whether every zero that was to go by way of push has been handed out.
    pub fn zeroes_are_pushed(&self) -> bool {
        self.inner().zero_pushes.is_empty()
    }

    /// A batch that did not leave.
    pub fn put_back(&self, batch: &Batch) {
        self.change(|out| out.put_back(batch));
    }

    /// What a frame cost.
    pub fn count(&self, space: SpaceId, class: CopyClass, frame: &Frame, bytes: u64) {
        let mut inner = self.inner();
        let sent = &mut inner.sent[usize::from(space.0)];
        sent.units += frame.units;
        sent.delta.add(frame.delta);
        *match frame.form {
            Form::Plain => &mut sent.plain,
            Form::Zstd => &mut sent.zstd,
            Form::Zero => &mut sent.zero,
        } += frame.units;
        match class {
            CopyClass::Demand => sent.demand_bytes += bytes,
            CopyClass::Push => sent.push_bytes += bytes,
        }
    }

    /// Reads a batch's content.
    pub async fn load(&self, batch: &Batch) -> Result<Units, FlowError> {
        let space = batch.space;
        let (content, len) = {
            let inner = self.inner();
            let len = inner.out.info(space).map_or(0, |info| info.len);
            (inner.contents[usize::from(space.0)].clone(), len)
        };
        let mut whole = Vec::new();
        let mut single = None;
        match content {
            Content::Ram { ram, block } => {
                whole.reserve((batch.units() * UNIT) as usize);
                for run in &batch.runs {
                    let before = whole.len();
                    loop {
                        match ram.read(block, run.start, run.len, &mut whole) {
                            Ok(()) => break,
                            // The guest was stopped after the batch was taken (pre-copy): QEMU sends
                            // these pages once more, within milliseconds, and only those count.
                            Err(whimbrel_qemu::Error::NotCurrent { .. }) => {
                                whole.truncate(before);
                                ram.wait_current(block, *run).await;
                            }
                            Err(source) => return Err(FlowError::Ram { space, source }),
                        }
                    }
                }
            }
            Content::Disk(file) => {
                for run in &batch.runs {
                    let bytes = (len - run.byte_offset()).min(run.byte_len());
                    let part = file
                        .read(run.byte_offset(), bytes as usize)
                        .await
                        .map_err(|source| FlowError::Disk { space, source })?;
                    if batch.runs.len() == 1 && bytes == run.byte_len() {
                        single = Some(part);
                    } else {
                        whole.extend_from_slice(&part);
                        let short = (run.byte_len() - bytes) as usize;
                        whole.resize(whole.len() + short, 0);
                    }
                }
            }
        }
        Ok(Units {
            space,
            class: batch.class,
            encoding: Encoding::Raw,
            runs: batch.runs.clone(),
            body: single.unwrap_or_else(|| Bytes::from(whole)),
        })
    }

    /// The guest has stopped, and these units of a space have changed since they were offered: what the
    /// peer was sent of them is [outdated](Self::outdated). All of them are as if never offered.
    pub fn outdate(&self, space: SpaceId, units: &UnitSet) {
        let mut inner = self.inner();
        let vain = inner.out.outdate(space, units);
        inner.outdated[usize::from(space.0)] = Some(vain);
    }

    /// The same for the disks that went ahead.
    pub fn settle_disks(&self, ahead: &mut DisksAhead) {
        let mut inner = self.inner();
        for (space, vain) in ahead.settle(&mut inner.out) {
            inner.outdated[usize::from(space.0)] = Some(vain);
        }
    }

    /// Units of a space of which the peer was sent a copy in vain.
    pub fn outdated(&self, space: SpaceId) -> Vec<Extent> {
        let inner = self.inner();
        let outdated = inner.outdated[usize::from(space.0)].iter();
        outdated.flat_map(UnitSet::runs).collect()
    }

    /// After a reconnect: what the peer holds of a space.
    pub fn peer_has(&self, space: SpaceId, mut held: UnitSet, since: Since) {
        if since == Since::Stop
            && let Some(Some(vain)) = self.inner().outdated.get(usize::from(space.0))
        {
            held.subtract(vain);
        }
        self.change(|out| {
            let fits = out
                .info(space)
                .is_some_and(|i| i.units() == held.capacity());
            if fits && since == Since::Copy {
                out.peer_received(space, &held);
            } else if fits {
                out.peer_has(space, &held);
            }
        });
    }
}

fn same_units(stretch: Extent, ours: &[Hashed], theirs: &BTreeMap<u64, &[u8]>) -> Vec<Extent> {
    let ours = ours
        .iter()
        .flat_map(|hashed| hashed.run.iter().zip(&hashed.hashes));
    let same =
        ours.filter(|(unit, hash)| theirs.get(&(unit - stretch.start)) == Some(&hash.as_slice()));
    same.map(|(unit, _)| Extent::unit(unit)).collect()
}

/// What is demanded, if the demands' own connection has no room.
fn take_beside_lane(inner: &mut Inner) -> Option<Answer> {
    match inner.lane_units {
        0 => take_demand(inner, DEMAND_UNITS),
        _ => None,
    }
}

fn take_demand(inner: &mut Inner, most: u64) -> Option<Answer> {
    if most == 0 {
        return None;
    }
    let answer = match inner.zero_answers.pop_front() {
        Some((space, run)) => Answer::Zero(space, run),
        None => Answer::Batch(inner.out.next_demand(most.min(DEMAND_UNITS))?),
    };
    inner.in_hand += 1;
    Some(answer)
}

/// Since when the peer holds what it says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// The content still changes here: what it holds may be old.
    Copy,
    /// The content has stopped to change, but the peer may not have heard yet what of it is old.
    Stop,
    /// The peer holds nothing old.
    Grant,
}

/// What a demand is answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Batch(Batch),
    /// These units are zero.
    Zero(SpaceId, Extent),
}

impl Answer {
    /// Units of content in it.
    pub fn units(&self) -> u64 {
        match self {
            Answer::Batch(batch) => batch.units(),
            Answer::Zero(..) => 0,
        }
    }
}
