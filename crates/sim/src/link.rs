//! The link: connections that keep order, share a rate, wait through outages, and break.
//!
//! A connection is two pipes. A pipe delivers its frames in order; once cut, it delivers what had arrived by
//! then and nothing more, and each end notices in its own time.

use std::collections::{BTreeMap, VecDeque};

use crate::message::Message;
use crate::rng::Rng;

/// Either host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Source,
    Destination,
}

impl Side {
    pub fn other(self) -> Side {
        match self {
            Side::Source => Side::Destination,
            Side::Destination => Side::Source,
        }
    }

    pub fn index(self) -> usize {
        self as usize
    }
}

/// A life of the session: a control connection and its push connections.
pub type LifeId = u32;

/// A connection: lane 0 is control, the others push.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnId {
    pub life: LifeId,
    pub lane: u8,
}

#[derive(Debug, Default)]
struct Pipe {
    under_way: VecDeque<Message>,
    last_arrival: u64,
}

/// What both ends have of one life.
#[derive(Debug)]
pub struct Life {
    /// By lane and sending side.
    pipes: BTreeMap<(u8, Side), Pipe>,
    /// Frames that arrived and wait to be read, by lane and receiving side.
    pub arrived: BTreeMap<(u8, Side), VecDeque<Message>>,
    /// Which side knows that it is over.
    pub ended: [bool; 2],
    /// What a side sent is lost if it did not arrive by then.
    dead_after: [u64; 2],
}

impl Default for Life {
    fn default() -> Self {
        Life {
            pipes: BTreeMap::new(),
            arrived: BTreeMap::new(),
            ended: [false; 2],
            dead_after: [u64::MAX; 2],
        }
    }
}

/// Times in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    pub ns_per_byte: u64,
    pub delay: u64,
    pub jitter: u64,
}

#[derive(Debug)]
pub struct Link {
    pub path: Path,
    pub outage_until: u64,
    pub lives: BTreeMap<LifeId, Life>,
    next_life: LifeId,
    /// When the wire is free, by sending side.
    free: [u64; 2],
}

impl Link {
    pub fn new(path: Path) -> Self {
        Link {
            path,
            outage_until: 0,
            lives: BTreeMap::new(),
            next_life: 0,
            free: [0; 2],
        }
    }

    pub fn new_life(&mut self) -> LifeId {
        self.next_life += 1;
        self.lives.insert(self.next_life, Life::default());
        self.lives.retain(|_, life| {
            life.ended != [true, true] || !life.pipes.values().all(|p| p.under_way.is_empty())
        });
        self.next_life
    }

    pub fn rtt(&self) -> u64 {
        2 * self.path.delay
    }

    pub fn is_out(&self, now: u64) -> bool {
        now < self.outage_until
    }

    /// Puts a frame on its way: when it arrives, and when the wire is free again. `None` without such a life.
    pub fn send(
        &mut self,
        conn: ConnId,
        from: Side,
        message: Message,
        now: u64,
        rng: &mut Rng,
    ) -> Option<(u64, u64)> {
        let life = self.lives.get_mut(&conn.life)?;
        let free = &mut self.free[from.index()];
        let begin = now.max(*free).max(self.outage_until);
        *free = begin + message.bytes() * self.path.ns_per_byte;
        let pipe = life.pipes.entry((conn.lane, from)).or_default();
        let arrival = *free + self.path.delay + rng.below(self.path.jitter + 1);
        pipe.last_arrival = arrival.max(pipe.last_arrival + 1);
        pipe.under_way.push_back(message);
        Some((pipe.last_arrival, *free))
    }

    /// The next frame of a pipe is there; `None` if it was lost.
    pub fn arrive(&mut self, conn: ConnId, from: Side, now: u64) -> Option<()> {
        let life = self.lives.get_mut(&conn.life)?;
        let pipe = life.pipes.get_mut(&(conn.lane, from))?;
        let message = pipe.under_way.pop_front()?;
        let to = from.other();
        if now > life.dead_after[from.index()] || life.ended[to.index()] {
            return None;
        }
        life.arrived
            .entry((conn.lane, to))
            .or_default()
            .push_back(message);
        Some(())
    }

    /// Nothing that this side sent is delivered any more, but for what arrives until `until`.
    pub fn silence(&mut self, life: LifeId, from: Side, until: u64) {
        if let Some(life) = self.lives.get_mut(&life) {
            let dead = &mut life.dead_after[from.index()];
            *dead = until.min(*dead);
        }
    }

    /// Whether a life's connections are cut, noticed or not.
    pub fn is_dead(&self, life: LifeId, now: u64) -> bool {
        let life = self.lives.get(&life);
        life.is_none_or(|life| life.dead_after.iter().any(|&dead| now > dead))
    }

    /// When the last frame under way from a side arrives.
    pub fn last_arrival(&self, life: LifeId, from: Side) -> u64 {
        let life = self.lives.get(&life);
        let pipes = life.into_iter().flat_map(|life| &life.pipes);
        let last = pipes.filter(|(key, _)| key.1 == from);
        last.map(|(_, pipe)| pipe.last_arrival).max().unwrap_or(0)
    }

    /// The next frame to read.
    pub fn next_arrived(&mut self, conn: ConnId, to: Side) -> Option<Message> {
        let life = self.lives.get_mut(&conn.life)?;
        life.arrived.get_mut(&(conn.lane, to))?.pop_front()
    }

    /// Puts a frame back that cannot be taken yet.
    pub fn unread(&mut self, conn: ConnId, to: Side, message: Message) {
        if let Some(life) = self.lives.get_mut(&conn.life) {
            let arrived = life.arrived.entry((conn.lane, to)).or_default();
            arrived.push_front(message);
        }
    }

    pub fn has_ended(&self, life: LifeId, side: Side) -> bool {
        self.lives
            .get(&life)
            .is_none_or(|life| life.ended[side.index()])
    }

    pub fn end(&mut self, life: LifeId, side: Side) {
        if let Some(life) = self.lives.get_mut(&life) {
            life.ended[side.index()] = true;
            life.arrived.retain(|key, _| key.1 != side);
        }
    }
}
