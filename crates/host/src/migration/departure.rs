//! The source's session: it dials, and keeps dialling, and lets content flow when the peer has said what
//! it holds.
//!
//! A life of the session is one control connection and the push connections, up together and down
//! together. Whatever breaks one ends the life; the next begins with a new dial. Each life begins with
//! the destination's `Have` and `HaveEnd`: only then may content flow, so nothing that arrived is sent
//! again and nothing that was lost is forgotten.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use whimbrel_engine::codec::{Codec, Policy};
use whimbrel_engine::latency::Latencies;
use whimbrel_engine::outflow::Class as CopyClass;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId, UNIT};
use whimbrel_peer::backoff::Backoff;
use whimbrel_peer::connection::{Connection, FrameReceiver, FrameSender};
use whimbrel_peer::gauge::Gauge;
use whimbrel_peer::hello::Class;
use whimbrel_peer::pace::Pace;
use whimbrel_wire::frame::Kind;
use whimbrel_wire::message::{
    FEATURE_DELTA, FEATURE_DISKS_AHEAD, FEATURE_ZSTD, MAX_BITMAP_UNITS, MAX_PEEK, Message,
    pack_bitmap, unpack_bitmap,
};
use whimbrel_wire::pack::Packer;
use whimbrel_wire::units::{Encoding, MAX_UNITS, Units};

use super::deltas::Kind as BatchKind;
use super::easing::{Easing, PERIOD};
use super::flow::{Answer, Content, Flow, Since};
use super::governor::{Governor, on_link};
use super::lane::{
    Heard, LaneError, LinkEvent, Mouth, Pulse, hear, say, send_units, until_first_ends,
};
use super::packing::{self, Form, Frame, PackJob, Packing};
use crate::disk::absolute;
use crate::peers::Dialler;

/// Longest wait between two tries to reach the peer.
const BACKOFF_CEILING: Duration = Duration::from_secs(10);
const BACKOFF_FIRST: Duration = Duration::from_millis(200);

/// A connection that stood so long was a success: waits begin anew after it.
const LIVED: Duration = Duration::from_secs(1);

/// Events that wait for the driver; the control connection is not read meanwhile.
const EVENTS: usize = 256;

/// Stretches that are compared with what the peer has at once, twice what a destination asks about; their content is
/// in memory: 4 MiB each.
const COMPARING: usize = 32;

/// Side jobs of the control reader (peeks and digests) at once; more wait in the connection.
const SIDE_JOBS: usize = 16;

/// What a unit of a demand takes on the link at most, and how soon a window that is in use is looked at again.
const UNIT_ON_LINK: u64 = UNIT + 200;
const ROOM_AGAIN: Duration = Duration::from_millis(4);

/// The source's session.
pub struct Departure {
    pub mouth: Mouth,
    pub pulse: Arc<Pulse>,
    pub events: mpsc::Receiver<LinkEvent>,
    stop: CancellationToken,
}

/// What a session works with.
#[derive(Clone)]
pub struct Gear {
    pub dialler: Arc<Dialler>,
    pub flow: Arc<Flow>,
    pub pace: Pace,
    /// Push connections.
    pub pushes: u16,
    pub easing: Arc<Easing>,
    /// How content is written.
    pub compress: Policy,
    /// RAM that goes again may go as what changed of it.
    pub delta: bool,
    /// By a daemon that takes the move up, and does not know what of RAM went ahead in vain.
    pub taken_up: bool,
    /// RAM's content still changes here: set until the stop.
    pub ram_changes: watch::Receiver<bool>,
}

impl Departure {
    /// Starts with a connection that was dialled already, so that the first failure is an error to whoever
    /// asked for the migration.
    pub fn start(first: Connection, gear: Gear) -> Self {
        Self::begin(Some(first), gear)
    }

    /// Starts by dialling: for a migration that a restarted daemon takes up again.
    pub fn redial(gear: Gear) -> Self {
        Self::begin(None, gear)
    }

    fn begin(first: Option<Connection>, gear: Gear) -> Self {
        let (sender, events) = mpsc::channel(EVENTS);
        let departure = Departure {
            mouth: Mouth::default(),
            pulse: Arc::new(Pulse::default()),
            events,
            stop: CancellationToken::new(),
        };
        let life = Life {
            governor: Arc::new(Governor::under(&gear.pace)),
            packing: Arc::new(Packing::new(gear.compress)),
            gear,
            mouth: departure.mouth.clone(),
            pulse: departure.pulse.clone(),
            events: sender,
        };
        tokio::spawn(run(first, life, departure.stop.clone()));
        departure
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[derive(Clone)]
struct Life {
    gear: Gear,
    mouth: Mouth,
    pulse: Arc<Pulse>,
    events: mpsc::Sender<LinkEvent>,
    governor: Arc<Governor>,
    packing: Arc<Packing>,
}

impl Life {
    fn kind_of(&self, space: SpaceId) -> BatchKind {
        let changes = *self.gear.ram_changes.borrow();
        match self.gear.flow.content(space) {
            Some(Content::Ram { .. }) => BatchKind::Ram {
                changes,
                warm: self.gear.flow.written_of(space),
            },
            _ => BatchKind::Disk {
                ram_changes: changes,
            },
        }
    }
}

async fn run(mut first: Option<Connection>, life: Life, stop: CancellationToken) {
    let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_CEILING, 1);
    loop {
        let dialled = match first.take() {
            Some(connection) => Ok(connection),
            None => tokio::select! {
                dialled = life.gear.dialler.dial(Class::Control) => dialled,
                () = stop.cancelled() => return,
            },
        };
        let error = match dialled {
            Ok(connection) => {
                let began = Instant::now();
                let ended = live(connection, &life, &stop).await;
                // A peer that ends every connection at once is not helped by more of them.
                if began.elapsed() >= LIVED {
                    backoff.reset();
                }
                life.pulse.down();
                life.mouth.close();
                ended
            }
            Err(error) => LaneError::Peer(error),
        };
        if stop.is_cancelled() {
            return;
        }
        // Even what seems final, a changed key say, may be put right by a person; who waits is told why.
        if life.events.send(LinkEvent::Down(error)).await.is_err() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next_wait()) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// One life of the session, to its end.
async fn live(connection: Connection, life: &Life, stop: &CancellationToken) -> LaneError {
    let end = stop.child_token();
    let mut tasks = JoinSet::new();
    life.gear.flow.begin_life();
    let (told, _) = watch::channel(None);
    let told = Arc::new(told);
    let outbox = life.mouth.open(connection.agreed().features);
    let (pongs, pong_queue) = mpsc::channel(8);
    let (sender, receiver) = connection.split();
    life.pulse.up();
    tasks.spawn(guard(
        end.clone(),
        control_out(sender, outbox, pong_queue, life.clone()),
    ));
    tasks.spawn(guard(
        end.clone(),
        control_in(receiver, pongs, life.clone(), told.clone()),
    ));
    for n in 0..life.gear.pushes {
        tasks.spawn(guard(
            end.clone(),
            push_out(n, life.clone(), told.subscribe()),
        ));
    }
    tasks.spawn(guard(
        end.clone(),
        demand_out(life.gear.pushes, life.clone(), told.subscribe()),
    ));
    until_first_ends(tasks, end).await
}

async fn guard(
    end: CancellationToken,
    work: impl Future<Output = Result<(), LaneError>>,
) -> Result<(), LaneError> {
    tokio::select! {
        result = work => result,
        () = end.cancelled() => Err(LaneError::Closed),
    }
}

/// Messages, and pings when it is time. Content never goes here: whoever answers demands and push wait on
/// content, and a message does not wait for them.
async fn control_out(
    mut sender: FrameSender,
    mut outbox: mpsc::Receiver<Message>,
    mut pongs: mpsc::Receiver<bytes::Bytes>,
    life: Life,
) -> Result<(), LaneError> {
    let ping = tokio::time::sleep(Duration::ZERO);
    tokio::pin!(ping);
    let mut period = tokio::time::interval(PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            message = outbox.recv() => match message {
                Some(message) => say(&mut sender, &message).await?,
                None => return Err(LaneError::Closed),
            },
            Some(payload) = pongs.recv() => sender.send(Kind::Pong, &payload, bytes::Bytes::new()).await?,
            () = &mut ping => {
                let payload = life.pulse.ping();
                sender.send(Kind::Ping, &payload, bytes::Bytes::new()).await?;
                let next = tokio::time::Instant::now() + life.governor.ping_every();
                ping.as_mut().reset(next);
            }
            _ = period.tick() => {
                let now = Instant::now();
                let lives = life.pulse.is_alive() && !life.governor.has_long_queue(now);
                life.gear.easing.period(now, lives);
            }
        }
    }
}

/// One push connection's way out.
struct Pusher {
    sender: FrameSender,
    life: Life,
    /// The peer reads packed units.
    can_unpack: bool,
    /// The peer keeps the content of so many units of this connection.
    granted: u32,
    /// For demands, which are packed in between.
    packer: Packer,
}

impl Pusher {
    async fn answer_demand(&mut self, answer: Answer) -> Result<(), LaneError> {
        let flow = &self.life.gear.flow;
        let (units, _) = content_of(answer, CopyClass::Demand, flow).await?;
        let space = units.space;
        let codec = match self.can_unpack {
            true => self.life.packing.for_demand(self.life.governor.allowed()),
            false => Codec::Plain,
        };
        let frames = packing::frames(units, codec, MAX_UNITS, &mut self.packer).frames;
        flow.framed(frames.len() as u64);
        for frame in frames {
            self.life
                .governor
                .pace()
                .charge(on_link(frame.parcel.wire_len()));
            self.send(space, CopyClass::Demand, frame).await?;
        }
        Ok(())
    }

    async fn send(
        &mut self,
        space: SpaceId,
        class: CopyClass,
        mut frame: Frame,
    ) -> Result<(), LaneError> {
        let parcel = std::mem::take(&mut frame.parcel);
        let bytes = send_units(&mut self.sender, parcel).await?;
        self.life.gear.flow.count(space, class, &frame, bytes);
        Ok(())
    }

    /// Whoever waits at the destination does not wait for something of push: demands go in between.
    async fn answering<T>(&mut self, work: impl Future<Output = T>) -> Result<T, LaneError> {
        let flow = self.life.gear.flow.clone();
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                answer = flow.next_demand() => self.answer_demand(answer).await?,
                done = &mut work => return Ok(done),
            }
        }
    }

    async fn run(&mut self) -> Result<(), LaneError> {
        let (flow, life) = (self.life.gear.flow.clone(), self.life.clone());
        let governor = &life.governor;
        // What does not change any more goes once.
        let granted = match life.gear.delta && *life.gear.ram_changes.borrow() {
            true => self.granted,
            false => 0,
        };
        let mut job = PackJob::new(life.packing.clone(), self.can_unpack, granted);
        loop {
            let most = || governor.frame_units(job.left());
            let (class, answer) = flow.next_push(most, &life.gear.easing).await;
            if class == CopyClass::Demand {
                self.answer_demand(answer).await?;
                continue;
            }
            let frame_units = governor.frame_units(1.0);
            let packed = self.answering(async {
                let (units, read) = content_of(answer, class, &flow).await?;
                let space = units.space;
                let kind = life.kind_of(space);
                let allowed = governor.allowed();
                let packed = job.pack(units, kind, frame_units, allowed).await;
                Ok::<_, LaneError>((space, read, packed))
            });
            let (space, read, packed) = packed.await??;
            flow.framed(packed.frames.len() as u64);
            let mut took = packed.took(read);
            for frame in packed.frames {
                let of_content = frame.form != Form::Zero;
                let began = Instant::now();
                let turn = governor.pace().acquire(on_link(frame.parcel.wire_len()));
                self.answering(turn).await?;
                let turned = Instant::now();
                self.send(space, class, frame).await?;
                if of_content {
                    took.turn += turned - began;
                    took.handing += turned.elapsed();
                }
            }
            // While push yields to the guest, what it waits for is not the link.
            if life.gear.easing.held_to().is_none() {
                life.packing.sent(took, governor.allowed());
            }
        }
    }
}

/// What to send, and how long reading it took.
async fn content_of(
    answer: Answer,
    class: CopyClass,
    flow: &Flow,
) -> Result<(Units, Duration), LaneError> {
    let began = Instant::now();
    let units = match answer {
        Answer::Zero(space, run) => Units {
            space,
            class,
            encoding: Encoding::Zero,
            runs: vec![run],
            body: bytes::Bytes::new(),
        },
        Answer::Batch(batch) => flow.load(&batch).await?,
    };
    Ok((units, began.elapsed()))
}

/// A connection for content, and whatever looks after it.
async fn content_out<F>(
    number: u16,
    life: &Life,
    mut told: watch::Receiver<Option<u32>>,
    work: impl FnOnce(Pusher, Option<Gauge>) -> F,
) -> Result<(), LaneError>
where
    F: Future<Output = Result<(), LaneError>>,
{
    let connection = life.gear.dialler.dial(Class::Push(number)).await?;
    tracing::debug!(push = number, sockets = ?connection.sockets(), "push connection");
    // Without it the governor goes by what it let go.
    let gauge = connection.gauge().ok();
    let features = connection.agreed().features;
    let (sender, mut receiver) = connection.split();
    let mut pusher = Pusher {
        sender,
        life: life.clone(),
        can_unpack: features & FEATURE_ZSTD != 0,
        granted: 0,
        packer: Packer::default(),
    };
    let sending = async {
        let Ok(slots) = told.wait_for(Option::is_some).await.map(|slots| *slots) else {
            return Err(LaneError::Closed);
        };
        // The peer keeps content of one connection only.
        if number == 0 && features & FEATURE_DELTA != 0 {
            pusher.granted = slots.unwrap_or_default();
        }
        life.gear.flow.opened().await;
        work(pusher, gauge).await
    };
    // Nothing is said on the way back; reading is how a broken connection is noticed at once.
    let listening = async {
        loop {
            receiver.recv().await?;
        }
    };
    tokio::select! {
        result = sending => result,
        result = listening => result,
    }
}

async fn push_out(
    number: u16,
    life: Life,
    told: watch::Receiver<Option<u32>>,
) -> Result<(), LaneError> {
    let governor = life.governor.clone();
    content_out(number, &life, told, async |mut pusher, gauge| {
        let _watched = gauge.map(|gauge| governor.watch(gauge));
        pusher.run().await
    })
    .await
}

/// The demands' own connection: one of push by its class, on which nothing is pushed. So a demand waits neither
/// behind what push has in the kernel, nor, on a link that loses packets, for push's to be sent again. Its
/// window is small, because it mostly idles; what there is no room for goes ahead of push on the others.
async fn demand_out(
    number: u16,
    life: Life,
    told: watch::Receiver<Option<u32>>,
) -> Result<(), LaneError> {
    let governor = life.governor.clone();
    content_out(number, &life, told, async |mut pusher, gauge| {
        let Some(mut gauge) = gauge else {
            return std::future::pending().await;
        };
        gauge.unpaced();
        let watched = governor.watch(gauge);
        let flow = pusher.life.gear.flow.clone();
        loop {
            // A kernel that does not tell has no room. After losses the window may be less than a unit, and it
            // grows only by being used.
            let reading = watched.reading();
            flow.lane_has_room(
                reading.map_or(0, |r| (r.room / UNIT_ON_LINK).max(r.is_idle.into())),
            );
            let fills = async {
                match reading.is_some_and(|r| !r.is_idle) {
                    true => tokio::time::sleep(ROOM_AGAIN).await,
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = flow.next_in_lane() => pusher.answer_demand(answer).await?,
                () = fills => {}
            }
        }
    })
    .await
}

/// What the peer has said of one space since the connection was made.
#[derive(Default)]
struct Holdings(BTreeMap<SpaceId, UnitSet>);

impl Holdings {
    fn note(
        &mut self,
        flow: &Flow,
        space: SpaceId,
        first: u64,
        units: u64,
        packed: &[u8],
    ) -> Result<(), LaneError> {
        let part = unpack_bitmap(units, packed)?;
        let Some(capacity) = flow.units_of(space) else {
            return Ok(());
        };
        let set = self
            .0
            .entry(space)
            .or_insert_with(|| UnitSet::empty(capacity));
        for run in part.runs() {
            set.insert(Extent::new(first.saturating_add(run.start), run.len));
        }
        Ok(())
    }
}

async fn control_in(
    mut receiver: FrameReceiver,
    pongs: mpsc::Sender<bytes::Bytes>,
    life: Life,
    told: Arc<watch::Sender<Option<u32>>>,
) -> Result<(), LaneError> {
    let flow = life.gear.flow.clone();
    let mut holdings = Holdings::default();
    let (mut evicted, mut slots) = (false, 0);
    let jobs = Arc::new(tokio::sync::Semaphore::new(SIDE_JOBS));
    let comparing = Arc::new(tokio::sync::Semaphore::new(COMPARING));
    let mut running = JoinSet::new();
    loop {
        while running.try_join_next().is_some() {}
        match hear(&mut receiver, &life.pulse).await? {
            Heard::Ping(payload) => {
                // Full only if the peer pings faster than it reads answers.
                let _ = pongs.try_send(payload);
            }
            Heard::Pong(Some(rtt)) => life.governor.pong(rtt, Instant::now()),
            Heard::Pong(None) => {}
            Heard::Units { .. } => return Err(LaneError::OutOfPlace { said: "units" }),
            Heard::Message(Message::Demand { space, runs }) => flow.demand(space, &runs),
            Heard::Message(Message::Forget { space, runs }) => flow.forget(space, &runs),
            Heard::Message(Message::Unstored { space, runs, why }) => {
                // First of all, so that nothing of it goes at once.
                let is_news = life.gear.easing.unstored(space, Instant::now());
                flow.unstored(space, &runs);
                if is_news && life.events.send(LinkEvent::Unstored(why)).await.is_err() {
                    return Err(LaneError::Closed);
                }
            }
            Heard::Message(Message::Seeded { space }) => flow.seeded(space),
            Heard::Message(Message::SeedEnd { space }) => {
                flow.seed_ended(space);
                // To be told of.
                let event = LinkEvent::Heard(Box::new(Message::SeedEnd { space }));
                if life.events.send(event).await.is_err() {
                    return Err(LaneError::Closed);
                }
            }
            Heard::Message(Message::SeedHashes {
                space,
                first,
                units,
                packed,
                hashes,
            }) => {
                let included = unpack_bitmap(units, &packed)?;
                // Not waited for: what is demanded comes by this connection too.
                let Ok(permit) = comparing.clone().try_acquire_owned() else {
                    return Err(LaneError::OutOfPlace {
                        said: "more stretches to compare than may be open at once",
                    });
                };
                let (flow, mouth) = (flow.clone(), life.mouth.clone());
                running.spawn(async move {
                    let stretch = Extent::new(first, units);
                    let alike = flow.compare(stretch, space, &included, &hashes).await;
                    let packed = pack_bitmap(&alike);
                    let said = Message::SeedAlike {
                        space,
                        first,
                        units,
                        packed,
                    };
                    mouth.say(said).await;
                    drop(permit);
                });
            }
            Heard::Message(Message::Have {
                space,
                first,
                units,
                packed,
            }) => holdings.note(&flow, space, first, units, &packed)?,
            Heard::Message(Message::Evicted) => evicted = true,
            Heard::Message(Message::Slots { slots: granted }) => slots = granted,
            Heard::Message(Message::Backlog { us }) => life.gear.easing.heard_backlog(us),
            Heard::Message(Message::Felt { counts }) => {
                // Decoding has checked them.
                if let Some(felt) = Latencies::from_counts(&counts) {
                    life.gear.easing.heard(&felt);
                }
            }
            Heard::Message(Message::HaveEnd) => {
                let changing = *life.gear.ram_changes.borrow();
                let mut said = std::mem::take(&mut holdings.0);
                for info in flow.infos() {
                    // A space that the peer did not speak of is one of which it holds nothing.
                    let held = said
                        .remove(&info.id)
                        .unwrap_or_else(|| UnitSet::empty(info.units()));
                    let is_ram = matches!(flow.content(info.id), Some(Content::Ram { .. }));
                    let ahead = is_ram || life.mouth.features() & FEATURE_DISKS_AHEAD != 0;
                    // What of it is about to be evicted, only the daemon before knew.
                    let held = if ahead && life.gear.taken_up && !evicted {
                        UnitSet::empty(info.units())
                    } else {
                        held
                    };
                    let since = match (ahead && changing, evicted) {
                        (true, _) => Since::Copy,
                        (false, false) => Since::Stop,
                        (false, true) => Since::Grant,
                    };
                    flow.peer_has(info.id, held, since);
                }
                told.send_replace(Some(slots));
                if life.events.send(LinkEvent::Up).await.is_err() {
                    return Err(LaneError::Closed);
                }
            }
            Heard::Message(Message::Peek {
                id,
                space,
                offset,
                len,
            }) => {
                let permit = jobs.clone().acquire_owned().await;
                let (flow, mouth) = (flow.clone(), life.mouth.clone());
                running.spawn(async move {
                    let bytes = peek(&flow, space, offset, len).await;
                    mouth.say(Message::Peeked { id, bytes }).await;
                    drop(permit);
                });
            }
            Heard::Message(Message::Digest {
                space,
                first,
                units,
                packed,
                digest,
            }) => {
                let included = unpack_bitmap(units, &packed)?;
                let permit = jobs.clone().acquire_owned().await;
                let (flow, mouth) = (flow.clone(), life.mouth.clone());
                running.spawn(async move {
                    if let Some(same) = same_digest(&flow, space, first, &included, digest).await {
                        let answer = Message::DigestAnswer { space, first, same };
                        mouth.say(answer).await;
                    }
                    drop(permit);
                });
            }
            Heard::Message(message) => {
                let event = LinkEvent::Heard(Box::new(message));
                if life.events.send(event).await.is_err() {
                    return Err(LaneError::Closed);
                }
            }
        }
    }
}

async fn peek(flow: &Flow, space: SpaceId, offset: u64, len: u32) -> Option<Vec<u8>> {
    let Some(Content::Disk(file)) = flow.content(space) else {
        return None;
    };
    if len > MAX_PEEK || offset.checked_add(u64::from(len))? > file.size() {
        return None;
    }
    match file.read(offset, len as usize).await {
        Ok(bytes) => Some(bytes.to_vec()),
        Err(error) => {
            tracing::warn!(%error, "the destination looked at a disk that cannot be read");
            None
        }
    }
}

/// `None` where there is nothing to compare with: a source whose move is complete has let go of its disks,
/// and that is no difference.
async fn same_digest(
    flow: &Flow,
    space: SpaceId,
    first: u64,
    included: &UnitSet,
    digest: u128,
) -> Option<bool> {
    let Some(Content::Disk(file)) = flow.content(space) else {
        return None;
    };
    let stretch = Extent::new(first, included.capacity().min(MAX_BITMAP_UNITS));
    if flow
        .units_of(space)
        .is_none_or(|units| stretch.end() > units)
    {
        return Some(false);
    }
    let ours = whimbrel_volume::digest::digest(&file, stretch, &absolute(stretch, included)).await;
    Some(match ours {
        Ok(ours) => ours.hash == digest,
        Err(error) => {
            tracing::warn!(%error, "a stretch cannot be read for verification");
            false
        }
    })
}
