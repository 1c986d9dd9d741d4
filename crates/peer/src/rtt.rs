//! Round-trip time, from pings answered.
//!
//! A ping carries a serial number that only its sender understands; the pong brings it back. The
//! estimate keeps the smoothed time and its variation of RFC 6298, and the least time of the last
//! minute or two, which is the path's own length without queues. Time is passed in.
//!
//! Pings wait behind whatever the connection is already sending, so the smoothed time tells what a
//! demand would meet, and the least time what the path takes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use whimbrel_wire::frame::PING_LEN;

/// Pings remembered as unanswered. At the bound the oldest is forgotten and its pong, should it
/// still come, is ignored: after an outage an old ping would tell of the outage, not of the path.
const UNANSWERED: usize = 16;

/// A least time older than one to two of these is forgotten, so that a longer route shows.
const WINDOW: Duration = Duration::from_secs(60);

/// Round-trip time of one connection.
#[derive(Debug, Default)]
pub struct Rtt {
    next: u64,
    unanswered: VecDeque<(u64, Instant)>,
    estimate: Option<Estimate>,
}

#[derive(Debug)]
struct Estimate {
    smoothed: Duration,
    variation: Duration,
    least: Duration,
    least_before: Option<Duration>,
    window_began: Instant,
}

impl Rtt {
    /// The payload of the next ping, which is sent now.
    pub fn ping(&mut self, now: Instant) -> [u8; PING_LEN] {
        if self.unanswered.len() == UNANSWERED {
            self.unanswered.pop_front();
        }
        let serial = self.next;
        self.next += 1;
        self.unanswered.push_back((serial, now));
        serial.to_le_bytes()
    }

    /// Takes in a pong; the time it took, or `None` if it answers no ping that is waited for.
    pub fn pong(&mut self, payload: &[u8], now: Instant) -> Option<Duration> {
        let serial = u64::from_le_bytes(payload.try_into().ok()?);
        let at = self.unanswered.iter().position(|(s, _)| *s == serial)?;
        // Pongs come in the order of their pings: whatever was before has been lost.
        let (_, sent) = self.unanswered.drain(..=at).next_back()?;
        let took = now.saturating_duration_since(sent);
        match &mut self.estimate {
            Some(estimate) => estimate.take_in(took, now),
            none => *none = Some(Estimate::first(took, now)),
        }
        Some(took)
    }

    /// Forgets the pings under way, when the connection they went out on is gone. The estimate stays.
    pub fn reconnected(&mut self) {
        self.unanswered.clear();
    }

    /// How long the oldest unanswered ping has been waiting; `None` if there is none.
    pub fn waiting(&self, now: Instant) -> Option<Duration> {
        let (_, sent) = self.unanswered.front()?;
        Some(now.saturating_duration_since(*sent))
    }

    /// The smoothed round-trip time; `None` before the first pong.
    pub fn smoothed(&self) -> Option<Duration> {
        self.estimate.as_ref().map(|e| e.smoothed)
    }

    /// The smoothed deviation from the smoothed time.
    pub fn variation(&self) -> Option<Duration> {
        self.estimate.as_ref().map(|e| e.variation)
    }

    /// The least round-trip time of the last one to two minutes.
    pub fn least(&self) -> Option<Duration> {
        let estimate = self.estimate.as_ref()?;
        Some(
            estimate
                .least_before
                .map_or(estimate.least, |b| b.min(estimate.least)),
        )
    }
}

impl Estimate {
    fn first(took: Duration, now: Instant) -> Estimate {
        Estimate {
            smoothed: took,
            variation: took / 2,
            least: took,
            least_before: None,
            window_began: now,
        }
    }

    fn take_in(&mut self, took: Duration, now: Instant) {
        self.variation = (self.variation * 3 + self.smoothed.abs_diff(took)) / 4;
        self.smoothed = (self.smoothed * 7 + took) / 8;
        let age = now.saturating_duration_since(self.window_began);
        if age >= WINDOW {
            self.least_before = (age < 2 * WINDOW).then_some(self.least);
            self.least = took;
            self.window_began = now;
        }
        self.least = self.least.min(took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    proptest! {
        #[test]
        fn the_estimates_lie_within_what_was_measured(samples in prop::collection::vec(1_u64..5_000, 1..50)) {
            let mut rtt = Rtt::default();
            let mut now = Instant::now();
            for &sample in &samples {
                let ping = rtt.ping(now);
                prop_assert_eq!(rtt.pong(&ping, now + ms(sample)), Some(ms(sample)));
                now += ms(1);
            }
            let (min, max) = (samples.iter().min().unwrap(), samples.iter().max().unwrap());
            prop_assert_eq!(rtt.least(), Some(ms(*min)));
            let smoothed = rtt.smoothed().unwrap();
            prop_assert!(smoothed + Duration::from_micros(1) >= ms(*min) && smoothed <= ms(*max));
        }

        #[test]
        fn any_bytes_are_a_pong_or_are_ignored(payload: Vec<u8>) {
            let mut rtt = Rtt::default();
            let now = Instant::now();
            rtt.ping(now);
            let _ = rtt.pong(&payload, now);
        }
    }

    #[test]
    fn a_pong_counts_once_and_only_for_a_ping_sent() {
        let mut rtt = Rtt::default();
        let now = Instant::now();
        let ping = rtt.ping(now);
        assert_eq!(rtt.pong(&99_u64.to_le_bytes(), now), None);
        assert_eq!(rtt.pong(&ping, now + ms(30)), Some(ms(30)));
        assert_eq!(rtt.pong(&ping, now + ms(40)), None);
    }

    #[test]
    fn after_an_outage_the_oldest_pings_are_forgotten() {
        let mut rtt = Rtt::default();
        let start = Instant::now();
        let first = rtt.ping(start);
        for i in 1..=UNANSWERED as u64 {
            rtt.ping(start + Duration::from_secs(i));
        }
        assert_eq!(rtt.pong(&first, start + Duration::from_secs(100)), None);
        assert_eq!(
            rtt.waiting(start + Duration::from_secs(3)),
            Some(Duration::from_secs(2))
        );
    }

    #[test]
    fn a_longer_route_shows_in_the_least_time_after_two_windows() {
        let mut rtt = Rtt::default();
        let mut now = Instant::now();
        let ping = rtt.ping(now);
        rtt.pong(&ping, now + ms(10));
        for _ in 0..3 {
            now += WINDOW;
            let ping = rtt.ping(now);
            rtt.pong(&ping, now + ms(80));
        }
        assert_eq!(rtt.least(), Some(ms(80)));
    }
}
