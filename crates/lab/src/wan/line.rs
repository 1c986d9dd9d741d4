//! One direction of the emulated wide area: pure, with the time passed in.
//!
//! A packet's way, and where it can end:
//!
//! ```text
//! push --(outage?)--(queue full?)--> queue --served at `rate`--(lost?)--> flight --`delay`+jitter--> pop
//! ```
//!
//! The **queue** is a first-in first-out with tail drop, in front of a server that takes
//! `8 * bytes / rate` seconds for each packet. The **flight** is the cable: whatever left the server
//! arrives `delay` plus a random part of `jitter` later, never before a packet that left earlier.
//! A lost packet is lost *on the cable*: it has used its share of the rate, as on a real line.
//!
//! Nothing happens by itself: each call first brings the state up to its `now` (`Line::advance`),
//! so the times of departure are exact however late the caller comes. The unit of work of the server
//! is the bit-nanosecond (`bits * 10^9`), in which `rate * elapsed` is exact; only the end of a packet
//! is rounded, upwards and by less than 1 ns, so the rate is never exceeded.
//!
//! Traps: `now` must not go backwards between calls (an older `now` counts as the newest seen). With
//! jitter, [`Line::next_due`] is a lower bound: be ready to find nothing due and to ask again.

use std::collections::VecDeque;
use std::time::Duration;

use super::spec::{LineSpec, Queue};

/// Nanoseconds since an origin that the caller chooses.
pub type Nanos = u64;

/// Most bytes on the cable at one time; what would exceed it is dropped as if the queue were full.
/// Seven times the product of 1 Gbit/s and 300 ms.
pub const FLIGHT_BOUND: u64 = 256 << 20;

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// What became of a pushed packet, as far as is known at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Taken,
    QueueFull,
    Outage,
}

/// Running sums since the line was made. Bytes are those given to [`Line::push`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineCounts {
    pub in_packets: u64,
    pub in_bytes: u64,
    pub out_packets: u64,
    pub out_bytes: u64,
    pub lost_packets: u64,
    pub queue_dropped_packets: u64,
    pub outage_dropped_packets: u64,
    pub queue_peak_bytes: u64,
}

/// A packet that has arrived.
#[derive(Debug, PartialEq, Eq)]
pub struct Arrival<T> {
    pub item: T,
    /// When it arrived: at or before the `now` of the call that handed it out.
    pub at: Nanos,
}

#[derive(Debug)]
struct Waiting<T> {
    bytes: u32,
    item: T,
}

#[derive(Debug)]
struct Flying<T> {
    bytes: u32,
    item: T,
    arrives: Nanos,
}

/// One direction. `T` is the packet; the line looks only at the length it is given.
#[derive(Debug)]
pub struct Line<T> {
    spec: LineSpec,
    random: SplitMix,
    now: Nanos,
    queue: VecDeque<Waiting<T>>,
    queue_bytes: u64,
    /// Work left on the head of the queue, in bit-nanoseconds, as of `served_to`.
    head_left: u64,
    served_to: Nanos,
    flight: VecDeque<Flying<T>>,
    flight_bytes: u64,
    last_arrival: Nanos,
    down_until: Nanos,
    counts: LineCounts,
}

impl<T> Line<T> {
    /// An idle line. The seed decides which packets are lost and how much each is jittered.
    pub fn new(spec: LineSpec, seed: u64) -> Self {
        Line {
            spec,
            random: SplitMix(seed),
            now: 0,
            queue: VecDeque::new(),
            queue_bytes: 0,
            head_left: 0,
            served_to: 0,
            flight: VecDeque::new(),
            flight_bytes: 0,
            last_arrival: 0,
            down_until: 0,
            counts: LineCounts::default(),
        }
    }

    pub fn spec(&self) -> &LineSpec {
        &self.spec
    }

    pub fn counts(&self) -> LineCounts {
        self.counts
    }

    /// Bytes in the queue, the packet in service included, as of the newest `now`.
    pub fn queue_bytes(&self) -> u64 {
        self.queue_bytes
    }

    /// Packets held: queued or on the cable.
    pub fn held_packets(&self) -> usize {
        self.queue.len() + self.flight.len()
    }

    /// A packet of `bytes` bytes enters the line.
    pub fn push(&mut self, now: Nanos, bytes: u32, item: T) -> Verdict {
        let now = self.advance(now);
        self.counts.in_packets += 1;
        self.counts.in_bytes += u64::from(bytes);
        if now < self.down_until {
            self.counts.outage_dropped_packets += 1;
            return Verdict::Outage;
        }
        let Some(rate) = self.spec.rate else {
            return self.depart(now, bytes, item);
        };
        // An empty queue takes any packet, else a bound below the packet's length would cut the line.
        if !self.queue.is_empty()
            && self.queue_bytes + u64::from(bytes) > queue_bound(&self.spec.queue, rate)
        {
            self.counts.queue_dropped_packets += 1;
            return Verdict::QueueFull;
        }
        if self.queue.is_empty() {
            self.served_to = now;
            self.head_left = work(bytes);
        }
        self.queue.push_back(Waiting { bytes, item });
        self.queue_bytes += u64::from(bytes);
        self.counts.queue_peak_bytes = self.counts.queue_peak_bytes.max(self.queue_bytes);
        Verdict::Taken
    }

    /// The next packet that has arrived by `now`, in the order of pushing.
    pub fn pop(&mut self, now: Nanos) -> Option<Arrival<T>> {
        let now = self.advance(now);
        let arrived = self.flight.pop_front_if(|packet| packet.arrives <= now)?;
        self.flight_bytes -= u64::from(arrived.bytes);
        self.counts.out_packets += 1;
        self.counts.out_bytes += u64::from(arrived.bytes);
        Some(Arrival {
            item: arrived.item,
            at: arrived.arrives,
        })
    }

    /// When [`pop`](Self::pop) is next worth calling; `None` while the line is empty.
    pub fn next_due(&self) -> Option<Nanos> {
        if let Some(first) = self.flight.front() {
            return Some(first.arrives);
        }
        self.queue.front()?;
        Some(self.head_end() + nanos(self.spec.delay))
    }

    /// Changes the line under way. Packets on the cable arrive when they would have; those queued are
    /// served at the new rate. A queue now longer than its bound is served, not cut.
    pub fn set_spec(&mut self, now: Nanos, spec: LineSpec) {
        self.advance(now);
        self.spec = spec;
        self.advance(now);
    }

    /// Cuts the line until `until`: drops what is queued and on the cable, and all that is pushed
    /// meanwhile. What had arrived by `now` can still be popped. A later call replaces the earlier one;
    /// `until <= now` mends the line.
    pub fn cut(&mut self, now: Nanos, until: Nanos) {
        let now = self.advance(now);
        self.down_until = until;
        if until <= now {
            return;
        }
        let arrived = self.flight.partition_point(|packet| packet.arrives <= now);
        let gone = self.queue.len() + self.flight.len() - arrived;
        self.counts.outage_dropped_packets += gone as u64;
        for packet in self.flight.drain(arrived..) {
            self.flight_bytes -= u64::from(packet.bytes);
        }
        self.queue.clear();
        self.queue_bytes = 0;
        self.head_left = 0;
        // What comes after the outage need not wait for the arrival of what is gone.
        self.last_arrival = self.flight.back().map_or(now, |packet| packet.arrives);
    }

    pub fn is_cut(&self, now: Nanos) -> bool {
        now < self.down_until
    }

    /// Serves the queue up to `now`; returns the newest time seen.
    fn advance(&mut self, now: Nanos) -> Nanos {
        let now = now.max(self.now);
        self.now = now;
        while !self.queue.is_empty() {
            let end = self.head_end();
            if end > now {
                let elapsed = now - self.served_to;
                self.head_left -= self.spec.rate.map_or(0, |rate| rate * elapsed);
                self.served_to = now;
                break;
            }
            let Some(head) = self.queue.pop_front() else {
                break;
            };
            self.queue_bytes -= u64::from(head.bytes);
            self.served_to = end;
            self.head_left = self.queue.front().map_or(0, |next| work(next.bytes));
            self.depart(end, head.bytes, head.item);
        }
        now
    }

    /// When the head of the queue will have been served, at the present rate.
    fn head_end(&self) -> Nanos {
        match self.spec.rate {
            Some(rate) => self.served_to + self.head_left.div_ceil(rate),
            None => self.served_to,
        }
    }

    /// A packet leaves the server for the cable.
    fn depart(&mut self, at: Nanos, bytes: u32, item: T) -> Verdict {
        if self.random.chance(self.spec.loss) {
            self.counts.lost_packets += 1;
            return Verdict::Taken;
        }
        if self.flight_bytes + u64::from(bytes) > FLIGHT_BOUND {
            self.counts.queue_dropped_packets += 1;
            return Verdict::QueueFull;
        }
        let jitter = self.random.up_to(nanos(self.spec.jitter));
        let arrives = (at + nanos(self.spec.delay) + jitter).max(self.last_arrival);
        self.last_arrival = arrives;
        self.flight_bytes += u64::from(bytes);
        self.flight.push_back(Flying {
            bytes,
            item,
            arrives,
        });
        Verdict::Taken
    }
}

/// The work of sending `bytes` bytes, in bit-nanoseconds.
fn work(bytes: u32) -> u64 {
    u64::from(bytes) * 8 * NANOS_PER_SECOND
}

fn queue_bound(queue: &Queue, rate: u64) -> u64 {
    match *queue {
        Queue::Bytes(bytes) => bytes,
        Queue::Time(time) => {
            let bytes = u128::from(rate) * time.as_nanos() / u128::from(8 * NANOS_PER_SECOND);
            u64::try_from(bytes).unwrap_or(u64::MAX)
        }
    }
}

fn nanos(time: Duration) -> Nanos {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, seedable, and good enough to lose packets by.
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn chance(&mut self, probability: f64) -> bool {
        // 53 bits are what an f64 holds exactly.
        probability > 0.0 && ((self.next() >> 11) as f64) < probability * (1u64 << 53) as f64
    }

    /// Uniform in `0..=bound`, near enough: the bias is `bound / 2^64`.
    fn up_to(&mut self, bound: u64) -> u64 {
        if bound == 0 {
            return 0;
        }
        ((u128::from(self.next()) * (u128::from(bound) + 1)) >> 64) as u64
    }
}

#[cfg(test)]
#[path = "line_tests.rs"]
mod tests;
