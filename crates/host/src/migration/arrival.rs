//! The destination's session: it waits for the source to dial, stores what comes, and says what it wants.
//!
//! See [`departure`](super::departure) for the lives of a session. A life begins here with the control
//! connection, on which this side first says what it holds. When a newer control connection comes, the
//! life there is gives way: the source has given it up already, or it would not dial.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use whimbrel_engine::delta::SLOTS;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId};
use whimbrel_peer::connection::{Connection, FrameReceiver, FrameSender};
use whimbrel_peer::hello::Class;
use whimbrel_wire::frame::Kind;
use whimbrel_wire::kept::Table;
use whimbrel_wire::message::{
    FEATURE_AHEAD, FEATURE_BACKLOG, FEATURE_DELTA, FEATURE_FELT, FEATURE_SEEDS, MAX_BITMAP_UNITS,
    MAX_RUNS, Message, pack_bitmap, unpack_bitmap,
};

use super::arrivals::Arrivals;
use super::easing::PERIOD;
use super::lane::{
    Heard, LaneError, LinkEvent, Mouth, PING_EVERY, Pulse, hear, hear_with, say, until_first_ends,
};
use super::peeks::Peeks;
use crate::disk::Wants;

/// Events that wait for the driver; the control connection is not read meanwhile.
const EVENTS: usize = 256;

/// Frames of one connection that are being stored at once; more wait in the connection.
const STORING: usize = 64;

/// Connections of a session that wait to be taken up; more are turned away.
const DOORSTEP: usize = 8;

/// A disk that is no further behind is not.
const WORTH_TELLING: Duration = Duration::from_millis(5);

/// Where connections of a session are handed in.
pub type Door = mpsc::Sender<(Class, Connection)>;

/// The destination's session.
pub struct Arrival {
    pub mouth: Mouth,
    pub pulse: Arc<Pulse>,
    pub events: mpsc::Receiver<LinkEvent>,
    door: Door,
    stop: CancellationToken,
}

impl Arrival {
    pub fn start(arrivals: Arc<Arrivals>, wants: Arc<Wants>, peeks: Arc<Peeks>) -> Self {
        let (sender, events) = mpsc::channel(EVENTS);
        let (door, doorstep) = mpsc::channel(DOORSTEP);
        let arrival = Arrival {
            mouth: Mouth::default(),
            pulse: Arc::new(Pulse::default()),
            events,
            door,
            stop: CancellationToken::new(),
        };
        let life = Life {
            mouth: arrival.mouth.clone(),
            pulse: arrival.pulse.clone(),
            events: sender,
            arrivals,
            wants,
            peeks,
        };
        tokio::spawn(run(doorstep, life, arrival.stop.clone()));
        arrival
    }

    pub fn door(&self) -> Door {
        self.door.clone()
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[derive(Clone)]
struct Life {
    mouth: Mouth,
    pulse: Arc<Pulse>,
    events: mpsc::Sender<LinkEvent>,
    arrivals: Arc<Arrivals>,
    wants: Arc<Wants>,
    peeks: Arc<Peeks>,
}

async fn run(
    mut doorstep: mpsc::Receiver<(Class, Connection)>,
    life: Life,
    stop: CancellationToken,
) {
    let mut next = None;
    loop {
        let connection = match next.take() {
            Some(connection) => connection,
            None => tokio::select! {
                come = doorstep.recv() => match come {
                    Some((Class::Control, connection)) => connection,
                    // A push connection that outlived its life.
                    Some((Class::Push(_), _)) => continue,
                    None => return,
                },
                () = stop.cancelled() => return,
            },
        };
        let (error, newer) = live(connection, &mut doorstep, &life, &stop).await;
        // What this life brought is stored before the next says what is held.
        life.arrivals.idle().await;
        life.wants.link_down();
        life.peeks.forget_all();
        life.pulse.down();
        life.mouth.close();
        next = newer;
        if stop.is_cancelled() || life.events.send(LinkEvent::Down(error)).await.is_err() {
            return;
        }
    }
}

/// One life, to its end; and the control connection that ended it, if one did.
async fn live(
    connection: Connection,
    doorstep: &mut mpsc::Receiver<(Class, Connection)>,
    life: &Life,
    stop: &CancellationToken,
) -> (LaneError, Option<Connection>) {
    let end = stop.child_token();
    let mut tasks = JoinSet::new();
    let keeping = Arc::<AtomicBool>::default();
    life.arrivals.begin_life();
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
        control_in(receiver, pongs, life.clone()),
    ));
    loop {
        tokio::select! {
            ended = tasks.join_next() => {
                let error = match ended {
                    Some(Ok(Err(error))) => error,
                    _ => LaneError::Closed,
                };
                end.cancel();
                let _ = until_first_ends(tasks, end).await;
                return (error, None);
            }
            come = doorstep.recv() => match come {
                Some((Class::Push(_), connection)) => {
                    let knows = connection.agreed().features & FEATURE_DELTA != 0;
                    let (_, receiver) = connection.split();
                    let keeping = knows.then(|| keeping.clone());
                    tasks.spawn(guard(end.clone(), push_in(receiver, life.clone(), keeping)));
                }
                Some((Class::Control, connection)) => {
                    end.cancel();
                    let _ = until_first_ends(tasks, end).await;
                    return (LaneError::Replaced, Some(connection));
                }
                None => {
                    end.cancel();
                    let _ = until_first_ends(tasks, end).await;
                    return (LaneError::Closed, None);
                }
            },
        }
    }
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

async fn control_out(
    mut sender: FrameSender,
    mut outbox: mpsc::Receiver<Message>,
    mut pongs: mpsc::Receiver<bytes::Bytes>,
    life: Life,
) -> Result<(), LaneError> {
    for (space, held) in life.arrivals.held() {
        for message in holdings(space, &held) {
            say(&mut sender, &message).await?;
        }
    }
    if life.arrivals.has_evicted() && life.mouth.features() & FEATURE_AHEAD != 0 {
        say(&mut sender, &Message::Evicted).await?;
    }
    if life.mouth.features() & FEATURE_DELTA != 0 {
        say(&mut sender, &Message::Slots { slots: SLOTS }).await?;
    }
    if life.mouth.features() & FEATURE_SEEDS != 0 {
        for space in life.arrivals.seeded() {
            say(&mut sender, &Message::Seeded { space }).await?;
        }
    }
    say(&mut sender, &Message::HaveEnd).await?;
    // From here on everything wanted is gathered; what was wanted before is asked again now.
    life.wants.link_up(life.mouth.features());
    for (space, runs) in life.arrivals.outstanding() {
        for runs in runs.chunks(MAX_RUNS) {
            let runs = runs.to_vec();
            say(&mut sender, &Message::Demand { space, runs }).await?;
        }
    }
    if life.events.send(LinkEvent::Up).await.is_err() {
        return Err(LaneError::Closed);
    }
    let mut ping = tokio::time::interval(PING_EVERY);
    let mut period = tokio::time::interval(PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // What was felt without a link is the outage's.
    life.wants.felt.take();
    loop {
        tokio::select! {
            biased;
            asked = life.wants.take() => {
                for (space, asked) in asked {
                    for runs in asked.unstored.chunks(MAX_RUNS) {
                        let (runs, why) = (runs.to_vec(), asked.why.clone());
                        let unstored = Message::Unstored { space, runs, why };
                        say(&mut sender, &unstored).await?;
                        // To this side's driver too: a person may be asking either host.
                        if life.events.send(LinkEvent::Unstored(asked.why.clone())).await.is_err() {
                            return Err(LaneError::Closed);
                        }
                    }
                    for runs in asked.demands.chunks(MAX_RUNS) {
                        let runs = runs.to_vec();
                        say(&mut sender, &Message::Demand { space, runs }).await?;
                    }
                    for runs in asked.forgets.chunks(MAX_RUNS) {
                        let runs = runs.to_vec();
                        say(&mut sender, &Message::Forget { space, runs }).await?;
                    }
                }
            }
            message = outbox.recv() => match message {
                Some(message) => say(&mut sender, &message).await?,
                None => return Err(LaneError::Closed),
            },
            Some(payload) = pongs.recv() => sender.send(Kind::Pong, &payload, bytes::Bytes::new()).await?,
            _ = ping.tick() => {
                let payload = life.pulse.ping();
                sender.send(Kind::Ping, &payload, bytes::Bytes::new()).await?;
            }
            _ = period.tick() => {
                // A request that fetched something and was slow because the link lost it, or had a queue, is
                // no reason to push less: of the queue the source takes care, of losses nobody can.
                life.wants.felt.set_round_trip(life.pulse.worst_rtt());
                let felt = life.wants.felt.take();
                let backlog = life.arrivals.backlog();
                let hears = life.mouth.features() & FEATURE_BACKLOG != 0;
                if backlog >= WORTH_TELLING && hears && life.pulse.is_alive() {
                    let us = backlog.as_micros() as u64;
                    say(&mut sender, &Message::Backlog { us }).await?;
                }
                let knows = life.mouth.features() & FEATURE_FELT != 0;
                if !felt.is_empty() && knows && life.pulse.is_alive() {
                    let counts = felt.counts().collect();
                    say(&mut sender, &Message::Felt { counts }).await?;
                }
            }
        }
    }
}

/// What is held of a space, in messages. Stretches of which nothing is held are left out.
fn holdings(space: SpaceId, held: &UnitSet) -> Vec<Message> {
    let mut messages = Vec::new();
    let mut first = 0;
    while first < held.capacity() {
        let units = MAX_BITMAP_UNITS.min(held.capacity() - first);
        let mut part = UnitSet::empty(units);
        for run in held.runs_within(Extent::new(first, units)) {
            part.insert(Extent::new(run.start - first, run.len));
        }
        // The first stretch is always said, so that the source knows the space was spoken of.
        if first == 0 || !part.is_empty() {
            messages.push(Message::Have {
                space,
                first,
                units,
                packed: pack_bitmap(&part),
            });
        }
        first += units;
    }
    messages
}

async fn control_in(
    mut receiver: FrameReceiver,
    pongs: mpsc::Sender<bytes::Bytes>,
    life: Life,
) -> Result<(), LaneError> {
    // Frames are counted by lives, so a wait for them ends with this one.
    let mut waiting = JoinSet::new();
    loop {
        match hear(&mut receiver, &life.pulse).await? {
            Heard::Ping(payload) => {
                // Full only if the peer pings faster than it reads answers.
                let _ = pongs.try_send(payload);
            }
            Heard::Pong(_) => {}
            Heard::Units { .. } => {
                return Err(LaneError::OutOfPlace {
                    said: "units on the control connection",
                });
            }
            Heard::Message(Message::Empty {
                space,
                first,
                units,
                packed,
            }) => {
                let set = unpack_bitmap(units, &packed)?;
                tracing::debug!(%space, first, empty = set.len(), "empty at the source");
                life.arrivals.zeroes(space, first, set).await?;
            }
            // In order with each other, whatever the driver is busy with.
            Heard::Message(Message::Ahead) => life.arrivals.open_ram_ahead(),
            Heard::Message(Message::RamEnd { frames }) if is_over(&mut waiting) => {
                let (arrivals, mouth) = (life.arrivals.clone(), life.mouth.clone());
                waiting.spawn(async move {
                    arrivals.frames_stored(frames).await;
                    arrivals.settle_disks().await;
                    arrivals.close_ahead();
                    mouth.say(Message::RamTaken).await;
                });
            }
            // Here and not by the driver, who may itself wait for a QEMU that waits for this.
            Heard::Message(Message::Peeked { id, bytes }) => life.peeks.answer(id, bytes),
            Heard::Message(message) => {
                let event = LinkEvent::Heard(Box::new(message));
                if life.events.send(event).await.is_err() {
                    return Err(LaneError::Closed);
                }
            }
        }
    }
}

/// Whether no barrier is waited for. The one before may have been passed just now.
fn is_over(waiting: &mut JoinSet<()>) -> bool {
    while waiting.try_join_next().is_some() {}
    waiting.is_empty()
}

/// The result of a task that stores; one that was cancelled belongs to a life that is over.
fn ended(stored: Result<Result<(), LaneError>, tokio::task::JoinError>) -> Result<(), LaneError> {
    stored.unwrap_or(Err(LaneError::Closed))
}

/// Stores frames side by side: a page that QEMU waits for must not wait for a disk that is busy with a flush.
/// Only RAM that is pre-copied is stored in order: a page that comes twice must end as the second copy.
///
/// Of one push connection of a life the content is kept, of the first that has some: `keeping` says whether there
/// is one; none where the peer knows nothing of that.
async fn push_in(
    mut receiver: FrameReceiver,
    life: Life,
    keeping: Option<Arc<AtomicBool>>,
) -> Result<(), LaneError> {
    // Decoding is in order, whatever the order of storing: nobody else touches it.
    let mut table = keeping.is_some().then(|| Table::new(SLOTS));
    let mut keeps = false;
    let mut storing: JoinSet<Result<(), LaneError>> = JoinSet::new();
    loop {
        while let Some(stored) = storing.try_join_next() {
            ended(stored)?;
        }
        if storing.len() == STORING
            && let Some(stored) = storing.join_next().await
        {
            ended(stored)?;
        }
        let heard = hear_with(&mut receiver, &life.pulse, table.as_mut()).await?;
        if !keeps && table.as_ref().is_some_and(|table| table.filled() > 0) {
            let others = keeping.as_ref().map(|k| k.swap(true, Ordering::AcqRel));
            if others == Some(true) {
                return Err(LaneError::OutOfPlace {
                    said: "content to keep on a second connection",
                });
            }
            keeps = true;
        }
        match heard {
            Heard::Units { units, bytes } if life.arrivals.keeps_order(units.space) => {
                life.arrivals.count(&units, bytes);
                life.arrivals.take(units).await?;
            }
            Heard::Units { units, bytes } => {
                let arrivals = life.arrivals.clone();
                arrivals.count(&units, bytes);
                storing.spawn(async move { Ok(arrivals.take(units).await?) });
            }
            Heard::Ping(_) | Heard::Pong(_) => {}
            Heard::Message(_) => {
                return Err(LaneError::OutOfPlace {
                    said: "a message on a push connection",
                });
            }
        }
    }
}
