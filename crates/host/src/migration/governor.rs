//! Keeps push from filling the link's queue.
//!
//! Whatever lies in a queue on the way is ahead of the next demand. TCP fills that queue: with loss-based
//! congestion control to its end, with BBR up to a round trip's worth. So push is paced to what the link
//! takes, and what the link takes is found by two measures at each ping on the control connection: how much
//! longer a round trip took than the quickest of late, which is the queue, and how many bytes have reached the
//! far side lately, which is what the link carries. A round trip is the lesser of the ping's and of what the
//! kernel knows from push's own segments: pings wait behind one of theirs that was lost, segments do not.
//!
//! ```text
//!   queue     = round trip - least of the last half minute
//!   carries   = acknowledged bytes a second: raised at once; lowered, by an average, only while there is a
//!               queue and the link carried another amount than was sent, a round trip before
//!   rate      = carries * (1 + (TARGET - queue) / horizon)
//! ```
//!
//! The queue is the sum of past excess, so this drains what is above the target within about the horizon,
//! and adds little while the news of it is under way: a rate that is changed by the queue alone swings, too
//! much until the queue is seen, too little until it is gone. A ping may wait for a busy CPU, which is no queue:
//! where the kernel tells of no segments, the lesser of the last two counts. A small standing queue is the aim,
//! not none: an empty one means that the link idles.
//!
//! In the beginning nothing is known. The rate doubles in the time that news takes, with pings often, until a
//! queue is seen: from 4 Mbit/s to 1 Gbit/s in a third of a second on a short link, three on one of 200 ms.
//!
//! BBR below has its own idea of what the link carries, and one of a connection that had little to send is much
//! too low: then what push may send waits in the socket, with no queue on the link. So BBR is begun anew.
//!
//! Traps. Lowered whenever there is a queue, `carries` would follow the rate and the rate follow it, down
//! to nothing, for a delay that is none of our doing. With a queue always there the least round trip is
//! never met, and a route that became longer would look like a queue for ever: so now and then push holds
//! back until the queue must be gone, and what was least before that is forgotten after a few times. And
//! whoever has nothing to send learns nothing about the link: then the rate stays.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use whimbrel_engine::codec::{Allowed, Phase};
use whimbrel_engine::space::UNIT;
use whimbrel_peer::gauge::{Gauge, Reading};
use whimbrel_peer::pace::{Pace, Rate};
use whimbrel_wire::units::MAX_UNITS;

use super::lane::PING_EVERY;

/// The standing queue aimed at, in seconds.
const TARGET: f64 = 0.008;

/// So many times as long it is not to be taken for a slow disk: whoever waits behind it waits for the link.
/// What was asked for meanwhile is answered within the time.
const LONG: f64 = 3.0;
const LONG_FOR: Duration = Duration::from_secs(1);

/// A queue below this may be a mere delay of the measuring.
const NOTHING: f64 = 0.002;

/// How long what is above the target takes to drain: at least the first, and so many times as long as news
/// of a change takes to come back.
const HORIZON: f64 = 0.25;
const HORIZON_NEWS: f64 = 2.5;

/// How late news is besides the round trip: the pings' distance, twice.
const NEWS: f64 = 0.1;

/// Bounds of the correction.
const LEAST_FACTOR: f64 = 0.5;
const MOST_FACTOR: f64 = 1.03;

/// Growth by one ping, on links where news is quick, until the link's rate has been met; and again when
/// push did what it was allowed and pings without a queue were so many more than those with one: the link
/// has become faster.
const GROWTH: f64 = 1.08;
const QUIET: u32 = 30;

/// After so many more pings without a queue it grows twice as fast, and so on.
const FASTER: f64 = 10.0;

/// How much one ping's measure moves the average.
const WEIGHT: f64 = 0.2;

/// What was carried is as much as was sent if they differ by no more than this share.
const SAME: f64 = 0.03;

/// In the beginning: how often the link is timed, at least and as a share of the round trip (so that no more
/// pings are under way than are remembered); over what time it is looked whether push uses what it may, and
/// over what what the link carries when the first queue is seen.
const START_PING: Duration = Duration::from_millis(10);
const START_PINGS: u32 = 8;
const START_USED: f64 = 0.03;
const START_CARRIED: f64 = 0.1;

/// How long news of a queue takes: so many round trips and pings; and pings with a queue at the first rate that
/// end the beginning.
const START_TRIPS: f64 = 1.5;
const START_SURE: u32 = 8;

/// BBR is begun anew if push does less than it may, without a queue on the link and with so much waiting in the
/// socket; not sooner again than it can have found a rate: at least the first, and so many round trips.
const WAITING: u64 = 48 << 10;
const ANEW: Duration = Duration::from_millis(250);
const ANEW_TRIPS: u32 = 8;

/// Push does what it may if it does so much of it; else nothing is learnt from it.
const DOES: f64 = 0.7;

/// Time over which bytes are counted, in seconds: long enough that single acknowledgements, which come in
/// bursts, do not matter.
const WINDOW: f64 = 0.25;

/// Counts kept at most: those of a window and of a round trip of 30 s before it. On a longer one the rate
/// stays as it is.
const COUNTS: usize = 620;

/// How often push holds back for the queue to empty, by how much, and after how many such times a least
/// round trip is forgotten.
const LOOK_EVERY: Duration = Duration::from_secs(10);
const LOOK_FACTOR: f64 = 0.7;
const LOOKS: usize = 3;

/// Of a packet of 1500 bytes TCP carries 1448; and TLS adds 22 to each 16 KiB.
const PACKET_PAYLOAD: u64 = 1448;
const PACKET_HEADERS: u64 = 52;
const RECORD: u64 = 16 << 10;
const RECORD_HEADERS: u64 = 22;

/// What so many bytes of frames are on the link, in whole packets as good as can be known beforehand: what the
/// operator bounds is the link, and it is what the link's rate is told in. What is lost and sent again is not in it.
pub fn on_link(frames: u64) -> u64 {
    in_packets(frames + RECORD_HEADERS * frames.div_ceil(RECORD))
}

fn in_packets(bytes: u64) -> u64 {
    // In proportion: packets are filled across frames.
    bytes + bytes * PACKET_HEADERS / PACKET_PAYLOAD
}

/// Bytes a second to begin with, and never less.
const FIRST: f64 = 500e3;
const LEAST: f64 = 125e3;

/// A frame of push takes this long at the rate, within limits: frames leave whole, and one that took longer
/// would itself be the queue.
const FRAME: f64 = 0.004;

/// Never more: by then no queue forms that anybody would notice.
const MOST: f64 = 5e9;

/// The pace of one migration's push, under what the operator allows.
pub struct Governor {
    pace: Pace,
    inner: Mutex<Inner>,
    gauges: Mutex<Vec<Seen>>,
}

/// A connection, and what had been delivered by it when it was last looked at.
struct Seen {
    gauge: Arc<Gauge>,
    delivered: u64,
    unsent: u64,
}

/// What was counted at a ping.
#[derive(Clone, Copy)]
struct Count {
    at: Instant,
    delivered: u64,
    admitted: u64,
    /// What might have been admitted.
    allowed: f64,
    /// So much waits in a socket that push waits for the kernel.
    is_blocked: bool,
}

struct Inner {
    rate: f64,
    /// No queue has been seen yet.
    is_starting: bool,
    /// Starting, and push does what it may.
    is_growing: bool,
    /// Push does less than it may, and there is no queue.
    is_short: bool,
    /// At the last ping so much waited in a socket that push waits for the kernel.
    is_blocked: bool,
    /// Bytes that the rate would have let go so far.
    allowed: f64,
    /// When a queue was last seen that is longer than any aimed at.
    long_queue: Option<Instant>,
    /// What the link carries, in bytes a second; `None` until it was met.
    carries: Option<f64>,
    /// Least round trips between looks, the newest last; at most `LOOKS`.
    least: VecDeque<Duration>,
    before: Duration,
    counts: VecDeque<Count>,
    /// Pings without a queue, less three times those with one; in the beginning, pings with one.
    quiet: u32,
    looked: Option<Instant>,
    /// Holding back until then.
    looking: Option<Instant>,
}

/// What the last window gave, in bytes a second.
struct Measure {
    carried: f64,
    /// Let go over the window that was carried, a round trip before.
    sent: f64,
    /// Let go over the window itself.
    used: f64,
}

impl Inner {
    fn new() -> Inner {
        Inner {
            rate: FIRST,
            is_starting: true,
            is_growing: false,
            is_short: false,
            is_blocked: false,
            allowed: 0.0,
            long_queue: None,
            carries: None,
            least: VecDeque::with_capacity(LOOKS),
            before: Duration::MAX,
            counts: VecDeque::new(),
            quiet: 0,
            looked: None,
            looking: None,
        }
    }

    /// Seconds of the least round trip and of the queue, by a ping's round trip and the segments' if they tell.
    fn queue(&mut self, ping: Duration, segments: Option<Duration>) -> (f64, f64) {
        let lately = ping.min(segments.unwrap_or(self.before));
        self.before = ping;
        let shortest = ping.min(lately);
        match self.least.back_mut() {
            Some(least) => *least = shortest.min(*least),
            None => self.least.push_back(shortest),
        }
        let least = self.least.iter().min().copied().unwrap_or(shortest);
        let queue = lately.saturating_sub(least).as_secs_f64();
        (least.as_secs_f64(), queue)
    }

    /// The last count made no later than `seconds` before `now`, or the first there is.
    fn count_before(&self, now: Instant, seconds: f64) -> Count {
        let wanted = Duration::from_secs_f64(seconds);
        let is_later = |count: &Count| now.saturating_duration_since(count.at) < wanted;
        let later = self.counts.partition_point(|count| !is_later(count));
        self.counts[later.saturating_sub(1)]
    }

    fn measure(&mut self, count: Count, least: f64) -> Option<Measure> {
        self.counts.push_back(count);
        let enough = Duration::from_secs_f64(least + WINDOW);
        while self.counts.len() > COUNTS
            || (self.counts.get(1))
                .is_some_and(|c| count.at.saturating_duration_since(c.at) >= enough)
        {
            self.counts.pop_front();
        }
        if count.at.saturating_duration_since(self.counts[0].at) < enough {
            return None;
        }
        let first = self.count_before(count.at, WINDOW);
        let over =
            |from: &Count, to: &Count| to.at.saturating_duration_since(from.at).as_secs_f64();
        let window = over(&first, &count);
        let end = self.count_before(count.at, least);
        let begin = self.count_before(count.at, least + window);
        let then = over(&begin, &end);
        if window <= 0.0 || then <= 0.0 {
            return None;
        }
        let bytes = |from: u64, to: u64| to.saturating_sub(from) as f64;
        Some(Measure {
            carried: bytes(first.delivered, count.delivered) / window,
            sent: bytes(begin.admitted, end.admitted) / then,
            used: bytes(first.admitted, count.admitted) / window,
        })
    }

    /// Until a queue is seen.
    fn start(&mut self, least: f64, queue: f64, count: Count) {
        let before = self.counts.back().copied();
        let _ = self.measure(count, least);
        let over = |from: &Count| {
            count
                .at
                .saturating_duration_since(from.at)
                .as_secs_f64()
                .max(1e-3)
        };
        let from = self.count_before(count.at, START_USED);
        let used = count.admitted.saturating_sub(from.admitted) as f64;
        self.is_growing = used >= DOES * (count.allowed - from.allowed);
        // Of one that push had no part in nothing is learnt, and a single one may be a busy CPU. Push that waits for
        // the kernel has its part whatever is allowed: before news of the queue was here, that grew beyond the link.
        self.is_short = !self.is_growing && queue < TARGET / 2.0;
        let is_queue = queue > TARGET && (self.is_growing || count.is_blocked);
        // The first rate is next to nothing, and was not even asked for by much.
        let sure = if self.rate > FIRST { 2 } else { START_SURE };
        if is_queue && self.quiet + 1 >= sure {
            let from = self.count_before(count.at, START_CARRIED);
            let carried = count.delivered.saturating_sub(from.delivered) as f64 / over(&from);
            self.is_starting = false;
            self.is_growing = false;
            self.quiet = 0;
            // What was counted while the rate doubled is no measure of it.
            self.counts.clear();
            self.carries = Some(carried.max(LEAST));
            self.rate = carried.clamp(LEAST, MOST);
            return;
        }
        self.quiet = if is_queue { self.quiet + 1 } else { 0 };
        if is_queue {
            return;
        }
        if let Some(before) = before.filter(|_| self.is_growing) {
            let news = START_TRIPS * (least + 2.0 * self.ping_every().as_secs_f64());
            let doublings = (over(&before) / news).min(1.0);
            self.rate = (self.rate * doublings.exp2()).min(MOST);
        }
    }

    /// How often the link is to be timed.
    fn ping_every(&self) -> Duration {
        let least = self.least.iter().min().copied().unwrap_or_default();
        match self.is_growing {
            true => (least / START_PINGS).clamp(START_PING, PING_EVERY),
            false => PING_EVERY,
        }
    }

    fn steer(&mut self, ping: Duration, segments: Option<Duration>, mut count: Count) {
        let (least, queue) = self.queue(ping, segments);
        if let Some(before) = self.counts.back() {
            let over = count.at.saturating_duration_since(before.at).as_secs_f64();
            self.allowed += over * self.rate;
        }
        count.allowed = self.allowed;
        self.is_blocked = count.is_blocked;
        if queue > LONG * TARGET {
            self.long_queue = Some(count.at);
        }
        self.is_short = false;
        if self.is_starting {
            self.start(least, queue, count);
            return;
        }
        let looked = *self.looked.get_or_insert(count.at);
        match self.looking {
            Some(until) if count.at < until => return,
            Some(_) => {
                self.looking = None;
                // What was held back is no measure of the link.
                self.counts.clear();
            }
            None => {}
        }
        let Some(measure) = self.measure(count, least) else {
            return;
        };
        if measure.used < DOES * self.rate {
            self.is_short = queue < TARGET / 2.0;
            return;
        }
        self.quiet = if queue < TARGET / 2.0 {
            self.quiet + 1
        } else {
            self.quiet.saturating_sub(3)
        };
        let carried = measure.carried;
        let differs = (measure.sent - carried).abs() > SAME * carried;
        match self.carries {
            Some(carries) if queue > NOTHING && differs => {
                self.carries = Some(carries + WEIGHT * (carried - carries));
            }
            Some(carries) => self.carries = Some(carries.max(carried)),
            None if queue > TARGET => {
                self.carries = Some(carried);
                self.quiet = 0;
            }
            None => {}
        }
        let news = least + NEWS;
        let rate = match self.carries {
            Some(carries) if self.quiet < QUIET => {
                let factor = 1.0 + (TARGET - queue) / HORIZON.max(HORIZON_NEWS * news);
                carries * factor.clamp(LEAST_FACTOR, MOST_FACTOR)
            }
            _ => {
                self.carries = None;
                let pings = f64::from(self.quiet.saturating_sub(QUIET));
                let growth = GROWTH.powf((0.15 / news).min(1.0) * (1.0 + pings / FASTER));
                self.rate * growth.min(2.0)
            }
        };
        self.rate = rate.clamp(LEAST, MOST);
        if self.carries.is_some() && count.at.saturating_duration_since(looked) > LOOK_EVERY {
            self.looked = Some(count.at);
            // The queue drains by what is held back, and a ping must see it.
            let empty = queue / (1.0 - LOOK_FACTOR) + least + NEWS;
            self.looking = Some(count.at + Duration::from_secs_f64(empty));
            if self.least.len() == LOOKS {
                self.least.pop_front();
            }
            self.least.push_back(Duration::MAX);
        }
    }

    fn pace(&self) -> Rate {
        let factor = if self.looking.is_some() {
            LOOK_FACTOR
        } else {
            1.0
        };
        Rate::PerSecond((self.rate * factor) as u64)
    }
}

impl Governor {
    pub fn under(limit: &Pace) -> Self {
        let inner = Inner::new();
        Governor {
            pace: limit.under(inner.pace()),
            inner: Mutex::new(inner),
            gauges: Mutex::default(),
        }
    }

    // No code under these locks can panic half-way.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }

    fn gauges(&self) -> MutexGuard<'_, Vec<Seen>> {
        self.gauges.lock().expect("no holder of this lock panics")
    }

    /// What push waits for and demand is charged to.
    pub fn pace(&self) -> &Pace {
        &self.pace
    }

    /// Units that a frame of push may have now, if so much of them is left on the link.
    pub fn frame_units(&self, left: f64) -> u64 {
        let rate = self.inner().rate;
        ((rate * FRAME / (UNIT as f64 * left)) as u64).clamp(1, MAX_UNITS)
    }

    /// What push may send at most.
    pub fn allowed(&self) -> Allowed {
        let inner = self.inner();
        let phase = match (inner.is_starting, inner.looking) {
            (true, _) => Phase::Growing,
            (false, None) => Phase::Met,
            (false, Some(_)) => Phase::Held,
        };
        Allowed {
            rate: inner.rate as u64,
            phase,
            is_behind: inner.is_blocked,
        }
    }

    /// Whether the link has, or just had, a queue that is felt.
    pub fn has_long_queue(&self, now: Instant) -> bool {
        let seen = self.inner().long_queue;
        seen.is_some_and(|at| now.saturating_duration_since(at) < LONG_FOR)
    }

    /// Counts what a push connection carries, until the answer is dropped.
    pub fn watch(&self, gauge: Gauge) -> Watched<'_> {
        let gauge = Arc::new(gauge);
        self.gauges().push(Seen {
            gauge: gauge.clone(),
            delivered: 0,
            unsent: 0,
        });
        self.inner().counts.clear();
        Watched {
            governor: self,
            gauge,
        }
    }

    /// How often the link is to be timed.
    pub fn ping_every(&self) -> Duration {
        self.inner().ping_every()
    }

    /// A ping came back after `rtt`.
    pub fn pong(&self, rtt: Duration, now: Instant) {
        let admitted = self.pace.admitted();
        let (mut delivered, mut segments, mut is_blocked) = (Some(0), None, false);
        for seen in self.gauges().iter_mut() {
            seen.gauge.keep_going(now);
            let reading = seen.gauge.reading();
            delivered = delivered.zip(reading).map(|(sum, r)| sum + r.delivered);
            let Some(reading) = reading else { continue };
            // One that has carried nothing since knows of nothing new.
            let is_news = reading.delivered != seen.delivered && !reading.rtt.is_zero();
            seen.delivered = reading.delivered;
            seen.unsent = reading.unsent;
            is_blocked |= reading.unsent >= WAITING;
            if is_news {
                segments = Some(segments.unwrap_or(reading.rtt).min(reading.rtt));
            }
        }
        let count = Count {
            at: now,
            // A kernel that does not tell leaves what was let go as the measure: less exact, never stuck.
            delivered: delivered.map_or(admitted, in_packets),
            admitted,
            allowed: 0.0,
            is_blocked,
        };
        self.steer(rtt, segments, count);
        let patience = {
            let inner = self.inner();
            let least = inner.least.iter().min().copied();
            let patience = (ANEW_TRIPS * least.unwrap_or_default()).max(ANEW);
            inner.is_short.then_some(patience)
        };
        if let Some(patience) = patience {
            for seen in self.gauges().iter().filter(|seen| seen.unsent >= WAITING) {
                seen.gauge.begin_anew(now, patience);
            }
        }
    }

    fn steer(&self, ping: Duration, segments: Option<Duration>, count: Count) {
        let pace = {
            let mut inner = self.inner();
            inner.steer(ping, segments, count);
            tracing::trace!(
                ?ping,
                ?segments,
                count.delivered,
                count.admitted,
                inner.rate,
                inner.carries,
                inner.quiet,
                "the link is timed"
            );
            inner.pace()
        };
        self.pace.set_rate(pace);
    }
}

/// A push connection that is counted.
pub struct Watched<'a> {
    governor: &'a Governor,
    gauge: Arc<Gauge>,
}

impl Watched<'_> {
    /// How the connection does now.
    pub fn reading(&self) -> Option<Reading> {
        self.gauge.reading()
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.governor
            .gauges()
            .retain(|seen| !Arc::ptr_eq(&seen.gauge, &self.gauge));
        self.governor.inner().counts.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a while on a link gave.
    #[derive(Debug, Default)]
    struct Outcome {
        /// Share of the link that was used.
        used: f64,
        /// Seconds of queue, the longest and the average, once the link's rate had been met.
        worst: f64,
        mean: f64,
    }

    /// A link of a fixed rate with a queue, and pings and acknowledgements that come a round trip late.
    struct Link {
        rate: f64,
        rtt: f64,
        queue: f64,
        time: f64,
        /// `(time, acknowledged, round trip)`, yet to be heard of.
        late: VecDeque<(f64, f64, f64)>,
        carried: f64,
    }

    const STEP: f64 = 0.05;

    impl Link {
        fn new(rate: f64, rtt: f64) -> Link {
            Link {
                rate,
                rtt,
                queue: 0.0,
                time: 0.0,
                late: VecDeque::new(),
                carried: 0.0,
            }
        }

        fn run(&mut self, governor: &Governor, begin: Instant, seconds: f64) -> Outcome {
            let mut outcome = Outcome::default();
            let (carried, until, mut steps) = (self.carried, self.time + seconds, 0.0);
            let settled = self.time + 5.0;
            while self.time < until {
                let Rate::PerSecond(rate) = governor.pace().rate() else {
                    panic!("a governor always has a rate");
                };
                let sent = rate as f64 * STEP;
                governor.pace().charge(sent as u64);
                let left = (self.queue + sent - self.rate * STEP).max(0.0);
                self.carried += self.queue + sent - left;
                self.queue = left;
                self.time += STEP;
                let wait = self.queue / self.rate;
                let rtt = self.rtt + wait;
                self.late.push_back((self.time + rtt, self.carried, rtt));
                while let Some(&(at, acknowledged, rtt)) = self.late.front()
                    && at <= self.time
                {
                    self.late.pop_front();
                    let count = Count {
                        at: begin + Duration::from_secs_f64(self.time),
                        delivered: acknowledged as u64,
                        admitted: governor.pace().admitted(),
                        allowed: 0.0,
                        is_blocked: false,
                    };
                    governor.steer(Duration::from_secs_f64(rtt), None, count);
                }
                if self.time > settled {
                    outcome.worst = outcome.worst.max(wait);
                    outcome.mean += wait;
                    steps += 1.0;
                }
            }
            outcome.used = (self.carried - carried) / (self.rate * seconds);
            outcome.mean /= steps;
            outcome
        }
    }

    fn governor() -> (Governor, Instant) {
        let limit = Pace::new(Rate::Unlimited);
        (Governor::under(&limit), Instant::now())
    }

    #[test]
    fn the_link_is_filled_and_its_queue_stays_short() {
        for (rate, rtt) in [
            (1.25e6, 0.3),
            (12.5e6, 0.04),
            (12.5e6, 0.002),
            (125e6, 0.01),
        ] {
            let (governor, begin) = governor();
            let mut link = Link::new(rate, rtt);
            link.run(&governor, begin, 10.0);
            let outcome = link.run(&governor, begin, 60.0);
            assert!(outcome.used > 0.95, "{rate} B/s, {rtt} s: {outcome:?}");
            assert!(outcome.worst < 0.03, "{rate} B/s, {rtt} s: {outcome:?}");
            assert!(outcome.mean < 0.015, "{rate} B/s, {rtt} s: {outcome:?}");
        }
    }

    /// The rate grew on while news of the queue was under way, and what the kernel takes is not even most of it.
    #[test]
    fn push_that_waits_for_the_kernel_has_met_the_link() {
        let (governor, begin) = governor();
        let (rate, rtt, room) = (125e6, 0.01, 0.02);
        let (mut queue, mut sent, mut time) = (0.0_f64, 0.0, 0.0);
        // As it was when what comes back now was sent: `(time, delivered, queue)`.
        let mut late = VecDeque::new();
        while time < 3.0 {
            let every = governor.ping_every().as_secs_f64();
            let allowed = governor.allowed().rate as f64 * every;
            let taken = allowed.min(rate * (every + room - queue));
            governor.pace().charge(taken as u64);
            (sent, time) = (sent + taken, time + every);
            queue = (queue + taken / rate - every).max(0.0);
            late.push_back((time + rtt + queue, sent - queue * rate, queue));
            while let Some(&(at, delivered, queue)) = late.front()
                && at <= time
            {
                late.pop_front();
                let count = Count {
                    at: begin + Duration::from_secs_f64(time),
                    delivered: delivered as u64,
                    admitted: governor.pace().admitted(),
                    allowed: 0.0,
                    is_blocked: taken < allowed,
                };
                governor.steer(Duration::from_secs_f64(rtt + queue), None, count);
            }
        }
        assert_eq!(governor.allowed().phase, Phase::Met);
        let off = governor.inner().rate / rate;
        assert!((0.9..1.1).contains(&off), "{off} of the link");
        assert!(queue < 2.0 * TARGET, "{queue} s");
    }

    #[test]
    fn a_link_that_becomes_slower_or_faster_is_followed() {
        let (governor, begin) = governor();
        let mut link = Link::new(12.5e6, 0.04);
        link.run(&governor, begin, 20.0);
        link.rate = 4e6;
        link.run(&governor, begin, 10.0);
        let slower = link.run(&governor, begin, 30.0);
        assert!(slower.used > 0.94 && slower.worst < 0.04, "{slower:?}");
        link.rate = 40e6;
        link.run(&governor, begin, 20.0);
        let faster = link.run(&governor, begin, 30.0);
        assert!(faster.used > 0.94 && faster.worst < 0.04, "{faster:?}");
    }

    #[test]
    fn a_route_that_becomes_longer_is_no_queue_for_ever() {
        let (governor, begin) = governor();
        let mut link = Link::new(12.5e6, 0.02);
        link.run(&governor, begin, 20.0);
        link.rtt = 0.08;
        link.run(&governor, begin, 50.0);
        let after = link.run(&governor, begin, 30.0);
        assert!(after.used > 0.9, "{after:?}");
    }

    #[test]
    fn who_sends_little_keeps_the_rate_it_had() {
        let (governor, begin) = governor();
        let mut link = Link::new(12.5e6, 0.04);
        link.run(&governor, begin, 20.0);
        let before = governor.inner().rate;
        for step in 0..1000 {
            let count = Count {
                at: begin + Duration::from_secs_f64(30.0 + f64::from(step) * STEP),
                delivered: link.carried as u64,
                admitted: governor.pace().admitted(),
                allowed: 0.0,
                is_blocked: false,
            };
            governor.steer(Duration::from_millis(40), None, count);
        }
        assert_eq!(governor.inner().rate, before);
    }
}
