//! The parts of a session that both sides share: saying messages, hearing frames, timing the link.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use whimbrel_peer::connection::{FrameReceiver, FrameSender};
use whimbrel_peer::error::PeerError;
use whimbrel_peer::rtt::Rtt;
use whimbrel_wire::frame::Kind;
use whimbrel_wire::kept::Table;
use whimbrel_wire::message::{Message, MessageError};
use whimbrel_wire::units::{Parcel, Units, UnitsError};

/// Messages that wait to be said. Who says more waits.
const OUTBOX: usize = 256;

/// How often the link is timed: often enough to steer by.
pub const PING_EVERY: Duration = Duration::from_millis(50);

/// Silence after which the link is called down for a person and for policy. The connection is kept: an
/// outage alone does not break it.
pub const SILENCE: Duration = Duration::from_millis(1500);

/// What the link costs at its worst is the longest round trip of so long a time, or twice that.
const WORST_OF: Duration = Duration::from_secs(5);

/// A disk of the destination's that cannot be written to for longer is told of again.
pub const TOLD_AGAIN: Duration = Duration::from_secs(60);

/// Why a session's connections were given up.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error("the peer said what is no message: {0}")]
    Message(#[from] MessageError),
    #[error("the peer sent what are no units: {0}")]
    Units(#[from] UnitsError),
    #[error("{0}")]
    Flow(#[from] super::flow::FlowError),
    #[error("{0}")]
    Arrival(#[from] super::arrivals::ArrivalError),
    #[error("the peer said {said}, which has no place here")]
    OutOfPlace { said: &'static str },
    #[error("a newer connection took over")]
    Replaced,
    #[error("closed by this side")]
    Closed,
}

/// What a session tells its driver.
#[derive(Debug)]
pub enum LinkEvent {
    /// Connected, again or for the first time; the peer has said what it holds.
    Up,
    Heard(Box<Message>),
    /// Content of a disk came, or was sent, that the destination cannot store, for this reason.
    Unstored(String),
    /// The connections broke; the session will try again by itself.
    Down(LaneError),
}

/// Where a session's messages go in. While there is no connection they go nowhere: what matters is said
/// again by the state machines when there is one.
#[derive(Clone, Default)]
pub struct Mouth {
    now: Arc<Mutex<Option<Outbox>>>,
}

#[derive(Clone)]
struct Outbox {
    sender: mpsc::Sender<Message>,
    features: u64,
}

impl Mouth {
    /// Opens a new outbox for a connection with the features agreed on, voiding what the last one still
    /// held.
    pub fn open(&self, features: u64) -> mpsc::Receiver<Message> {
        let (sender, receiver) = mpsc::channel(OUTBOX);
        let outbox = Outbox { sender, features };
        *self.now.lock().expect("no holder of this lock panics") = Some(outbox);
        receiver
    }

    /// What the peer of this connection knows beyond the protocol's version; nothing without one.
    pub fn features(&self) -> u64 {
        let now = self.now.lock().expect("no holder of this lock panics");
        now.as_ref().map_or(0, |outbox| outbox.features)
    }

    pub fn close(&self) {
        *self.now.lock().expect("no holder of this lock panics") = None;
    }

    /// Says it if there is a connection, and the peer knows such messages; waits while the outbox is full.
    pub async fn say(&self, message: Message) {
        let outbox = self
            .now
            .lock()
            .expect("no holder of this lock panics")
            .clone();
        let needed = message.feature();
        if let Some(outbox) = outbox.filter(|outbox| outbox.features & needed == needed) {
            // An outbox whose connection broke meanwhile takes nothing, which is as good as no outbox.
            let _ = outbox.sender.send(message).await;
        }
    }
}

/// What is known of the link's health.
#[derive(Default)]
pub struct Pulse {
    inner: Mutex<PulseInner>,
}

#[derive(Default)]
struct PulseInner {
    rtt: Rtt,
    heard: Option<Instant>,
    up: bool,
    worst: Worst,
}

/// The longest round trip of the last one to two times [`WORST_OF`].
#[derive(Default)]
struct Worst {
    since: Option<Instant>,
    now: Duration,
    before: Duration,
}

impl Worst {
    fn take_in(&mut self, took: Duration, now: Instant) {
        let since = *self.since.get_or_insert(now);
        let age = now.saturating_duration_since(since);
        if age >= WORST_OF {
            // What was before is forgotten as well if nothing came for so long.
            self.before = if age < 2 * WORST_OF { self.now } else { took };
            self.now = took;
            self.since = Some(now);
        }
        self.now = self.now.max(took);
    }

    fn get(&self) -> Duration {
        self.now.max(self.before)
    }
}

impl Pulse {
    fn inner(&self) -> std::sync::MutexGuard<'_, PulseInner> {
        self.inner.lock().expect("no holder of this lock panics")
    }

    pub fn up(&self) {
        let mut inner = self.inner();
        inner.up = true;
        inner.rtt.reconnected();
        inner.heard = Some(Instant::now());
    }

    pub fn down(&self) {
        self.inner().up = false;
    }

    pub fn heard(&self) {
        self.inner().heard = Some(Instant::now());
    }

    pub fn ping(&self) -> Bytes {
        Bytes::copy_from_slice(&self.inner().rtt.ping(Instant::now()))
    }

    /// The round trip, if the pong answers a ping of this connection.
    pub fn pong(&self, payload: &[u8]) -> Option<Duration> {
        let mut inner = self.inner();
        let now = Instant::now();
        let took = inner.rtt.pong(payload, now)?;
        inner.worst.take_in(took, now);
        Some(took)
    }

    /// The smallest round trip seen: the link's own, without queues.
    pub fn least_rtt(&self) -> Option<Duration> {
        self.inner().rtt.least()
    }

    /// The longest round trip of late, with what was lost and sent again, and with queues.
    pub fn worst_rtt(&self) -> Duration {
        self.inner().worst.get()
    }

    pub fn rtt(&self) -> Option<Duration> {
        self.inner().rtt.smoothed()
    }

    /// Connected, and something was heard lately.
    pub fn is_alive(&self) -> bool {
        let inner = self.inner();
        inner.up && inner.heard.is_some_and(|at| at.elapsed() < SILENCE)
    }
}

/// What came in a frame.
pub enum Heard {
    Message(Message),
    Units {
        units: Units,
        /// Of the frame, its header included.
        bytes: u64,
    },
    Ping(Bytes),
    /// The answer to a ping of ours, and after what time if the ping was still waited for.
    Pong(Option<Duration>),
}

/// The next frame, decoded. Pongs have been noted.
pub async fn hear(receiver: &mut FrameReceiver, pulse: &Pulse) -> Result<Heard, LaneError> {
    hear_with(receiver, pulse, None).await
}

/// As [`hear`], on a connection whose frames fill a table.
pub async fn hear_with(
    receiver: &mut FrameReceiver,
    pulse: &Pulse,
    table: Option<&mut Table>,
) -> Result<Heard, LaneError> {
    let frame = receiver.recv().await?;
    pulse.heard();
    match frame.kind {
        Kind::Control => Ok(Heard::Message(Message::decode(&frame.payload)?)),
        Kind::Units => Ok(Heard::Units {
            bytes: frame.wire_len() as u64,
            units: Units::decode_with(frame.payload, table)?,
        }),
        Kind::Ping => Ok(Heard::Ping(frame.payload)),
        Kind::Pong => {
            let rtt = pulse.pong(&frame.payload);
            Ok(Heard::Pong(rtt))
        }
        Kind::Hello => Err(LaneError::OutOfPlace {
            said: "a greeting in mid-session",
        }),
    }
}

pub async fn say(sender: &mut FrameSender, message: &Message) -> Result<(), LaneError> {
    sender
        .send(Kind::Control, &message.encode(), Bytes::new())
        .await?;
    Ok(())
}

/// Sends units and returns the bytes of the frame.
pub async fn send_units(sender: &mut FrameSender, parcel: Parcel) -> Result<u64, LaneError> {
    let bytes = parcel.wire_len();
    sender.send(Kind::Units, &parcel.head, parcel.body).await?;
    Ok(bytes)
}

/// Runs the tasks of one life of a session until the first of them ends, then ends the others, and waits
/// for all: when this returns nothing of that life is at work any more.
pub async fn until_first_ends(
    mut tasks: tokio::task::JoinSet<Result<(), LaneError>>,
    stop: CancellationToken,
) -> LaneError {
    let first = tasks.join_next().await;
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    match first {
        Some(Ok(Err(error))) => error,
        Some(Ok(Ok(()))) | None => LaneError::Closed,
        Some(Err(panic)) => {
            tracing::error!(%panic, "a task of the session panicked");
            LaneError::Closed
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_engine::space::SpaceId;
    use whimbrel_wire::message::FEATURE_HEAT;

    #[test]
    fn the_worst_round_trip_is_remembered_for_a_while() {
        let ms = Duration::from_millis;
        let (mut worst, begin) = (Worst::default(), Instant::now());
        worst.take_in(ms(300), begin);
        worst.take_in(ms(40), begin + WORST_OF);
        assert_eq!(worst.get(), ms(300));
        worst.take_in(ms(41), begin + 2 * WORST_OF);
        assert_eq!(worst.get(), ms(41));
    }

    #[tokio::test]
    async fn a_peer_is_not_told_what_it_does_not_know() {
        let heat = Message::Heat {
            space: SpaceId(0),
            first: 0,
            extents: 0,
            packed: Vec::new(),
        };
        let mouth = Mouth::default();
        for (features, heard) in [
            (0, vec![Message::HaveEnd]),
            (FEATURE_HEAT, vec![heat.clone(), Message::HaveEnd]),
        ] {
            let mut outbox = mouth.open(features);
            mouth.say(heat.clone()).await;
            mouth.say(Message::HaveEnd).await;
            for message in heard {
                assert_eq!(outbox.try_recv(), Ok(message));
            }
        }
    }
}
