//! Keeps push from filling the link's queue.
//!
//! Whatever lies in a queue on the way is ahead of the next demand. TCP fills that queue: with loss-based
//! congestion control to its end, with BBR up to a round trip's worth. So push is paced a little below what
//! the link takes, and what the link takes is found by watching the round trip of pings on the control
//! connection: more than the smallest ever seen means that something queues.
//!
//! ```text
//!   queue  = least of the last few round trips - smallest ever seen
//!   error  = (TARGET - queue - DAMPING * growth of queue) / TARGET, within -1..1
//!   rate  += rate * GAIN * error                              each ping
//! ```
//!
//! The queue is itself the sum of past excess, so a rate steered by the queue alone swings: too much until
//! the queue is seen, too little until it is gone. The damping steers by where the queue is going.
//!
//! The least of the last few, because a ping may wait behind a demand or for a busy CPU, and neither is a
//! queue. A small standing queue is the aim, not none: an empty one means that the link idles.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use whimbrel_engine::space::UNIT;
use whimbrel_peer::pace::{Pace, Rate};
use whimbrel_wire::units::MAX_UNITS;

/// The standing queue aimed at.
const TARGET: Duration = Duration::from_millis(10);

/// Pings looked back on.
const WINDOW: usize = 4;

/// Largest change of the rate by one ping; larger at the beginning, until the link's rate was met.
const GAIN: f64 = 0.03;
const GAIN_FIRST: f64 = 0.08;

/// How much the queue's growth from one ping to the next counts.
const DAMPING: f64 = 6.0;

/// Bytes a second to begin with, and never less.
const FIRST: f64 = 500e3;
const LEAST: f64 = 125e3;

/// A frame of push takes this long at the rate, within limits: frames leave whole, and one that took longer
/// would itself be the queue.
const FRAME: f64 = 0.006;

/// Never more: by then no queue forms that anybody would notice.
const MOST: f64 = 5e9;

/// The pace of one migration's push, under what the operator allows.
pub struct Governor {
    pace: Pace,
    inner: Mutex<Inner>,
}

struct Inner {
    rate: f64,
    least: Option<Duration>,
    window: VecDeque<Duration>,
    /// Seconds of queue at the last ping.
    queue: f64,
    /// The link's rate was met once.
    met: bool,
    /// Bytes admitted at the last ping: a rate that is not used must not grow.
    admitted: u64,
}

impl Governor {
    pub fn under(limit: &Pace) -> Self {
        Governor {
            pace: limit.under(Rate::PerSecond(FIRST as u64)),
            inner: Mutex::new(Inner {
                rate: FIRST,
                least: None,
                window: VecDeque::with_capacity(WINDOW),
                queue: 0.0,
                met: false,
                admitted: 0,
            }),
        }
    }

    /// What push waits for and demand is charged to.
    pub fn pace(&self) -> &Pace {
        &self.pace
    }

    /// Units that a frame of push may have now.
    pub fn frame_units(&self) -> u64 {
        let rate = self
            .inner
            .lock()
            .expect("no holder of this lock panics")
            .rate;
        ((rate * FRAME / UNIT as f64) as u64).clamp(1, MAX_UNITS)
    }

    /// A ping came back after `rtt`; the one before it `since` ago.
    pub fn pong(&self, rtt: Duration, since: Duration) {
        let mut inner = self.inner.lock().expect("no holder of this lock panics");
        let admitted = self.pace.admitted();
        let used = admitted.saturating_sub(inner.admitted) as f64;
        inner.admitted = admitted;
        let least = inner.least.map_or(rtt, |least| least.min(rtt));
        inner.least = Some(least);
        if inner.window.len() == WINDOW {
            inner.window.pop_front();
        }
        inner.window.push_back(rtt);
        let lately = inner.window.iter().min().copied().unwrap_or(rtt);
        let queue = lately.saturating_sub(least).as_secs_f64();
        let growth = queue - inner.queue;
        inner.queue = queue;
        let target = TARGET.as_secs_f64();
        let error = ((target - queue - DAMPING * growth) / target).clamp(-1.0, 1.0);
        let idle = used < inner.rate * since.as_secs_f64() * 0.5;
        if error > 0.0 && idle {
            return;
        }
        inner.met |= queue > target;
        let gain = if inner.met { GAIN } else { GAIN_FIRST };
        inner.rate = (inner.rate * (1.0 + gain * error)).clamp(LEAST, MOST);
        self.pace.set_rate(Rate::PerSecond(inner.rate as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link of a fixed rate with a queue, push as fast as the governor lets it.
    fn drive(link: f64, rtt: Duration, seconds: f64) -> (f64, f64) {
        let limit = Pace::new(Rate::Unlimited);
        let governor = Governor::under(&limit);
        let step = 0.05;
        let (mut queue, mut carried, mut worst) = (0.0f64, 0.0, 0.0f64);
        let mut time = 0.0;
        while time < seconds {
            let Rate::PerSecond(rate) = governor.pace().rate() else {
                panic!("a governor always has a rate");
            };
            let sent = rate as f64 * step;
            governor.pace().charge(sent as u64);
            let left = (queue + sent - link * step).max(0.0);
            carried += queue + sent - left;
            queue = left;
            let seen = rtt + Duration::from_secs_f64(queue / link);
            governor.pong(seen, Duration::from_secs_f64(step));
            if time > 5.0 {
                worst = worst.max(queue / link);
            }
            time += step;
        }
        (carried / (link * seconds), worst)
    }

    #[test]
    fn the_link_is_filled_and_its_queue_stays_short() {
        for (link, rtt) in [(1.25e6, 300), (12.5e6, 40), (125e6, 10)] {
            let (used, worst) = drive(link, Duration::from_millis(rtt), 60.0);
            assert!(used > 0.93, "{link} B/s: only {used:.3} of the link used");
            assert!(worst < 0.04, "{link} B/s: {worst:.3} s queued");
        }
    }
}
