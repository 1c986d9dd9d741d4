//! Push yields to the guest: joins what the destination's guest feels with how much may be pushed to disks.
//!
//! The destination tells in [`Message::Felt`](whimbrel_wire::message::Message::Felt) how long its guest's
//! requests took, and in [`Message::Backlog`](whimbrel_wire::message::Message::Backlog) how far its disk is
//! behind with the copies; the source gathers that for a period and asks the engine's [`Guard`] what push may
//! bring to disks. Both the decision and the operator's bound are the source's, as everything is that steers
//! a move.
//!
//! Push of disk content waits for its turn *before* it is taken ([`disks_wait`](Easing::disks_wait)): RAM, what
//! is demanded and what is zero go past it. Counted is content, whatever it is packed to on the link: that is
//! what disks feel.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use whimbrel_engine::guard::{Guard, GuardFigures, PERIOD_US};
use whimbrel_engine::latency::Latencies;
use whimbrel_engine::space::SpaceId;

use crate::state::LatencyBound;

/// How often the guard is asked, and the destination tells.
pub const PERIOD: Duration = Duration::from_micros(PERIOD_US);

/// What was not used is kept for so long: late wake-ups cost no bandwidth, and no disk feels it.
const BURST: f64 = 0.02;

/// A disk that could not be written to is left alone for so long at first, and at most.
const FIRST_HOLD: Duration = Duration::from_secs(1);
const LONGEST_HOLD: Duration = Duration::from_secs(10);

/// The guest's share of one migration.
pub struct Easing {
    inner: Mutex<Inner>,
}

struct Inner {
    guard: Guard,
    heard: Latencies,
    /// The same, for whoever keeps the record.
    unrecorded: Latencies,
    /// How long a flush would have waited at the destination, at most.
    backlog_us: u64,
    /// Bytes that push brought to disks in this period, and when that began.
    used: u64,
    begun: Option<Instant>,
    /// Push had to wait in it: it would have used more.
    waited: bool,
    /// Bytes that may go to disks, as of a moment; below zero what went ahead of its time.
    balance: f64,
    at: Option<Instant>,
    /// The destination cannot store what comes, by disk.
    unstored: BTreeMap<SpaceId, Unstored>,
}

/// A disk that cannot be written to: nothing is pushed to it for a while, longer each time in a row.
struct Unstored {
    until: Instant,
    wait: Duration,
}

impl Inner {
    fn refill(&mut self, cap: u64, now: Instant) {
        let before = self.at.replace(now).unwrap_or(now);
        let earned = now.saturating_duration_since(before).as_secs_f64() * cap as f64;
        self.balance = (self.balance + earned).min(cap as f64 * BURST);
    }
}

impl Easing {
    pub fn new(bound: LatencyBound) -> Easing {
        let us = bound.0.map(|bound| bound.as_micros() as u64);
        Easing {
            inner: Mutex::new(Inner {
                guard: Guard::new(us),
                heard: Latencies::default(),
                unrecorded: Latencies::default(),
                backlog_us: 0,
                used: 0,
                begun: None,
                waited: false,
                balance: 0.0,
                at: None,
                unstored: BTreeMap::new(),
            }),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }

    /// What the guest felt of late.
    pub fn heard(&self, felt: &Latencies) {
        let mut inner = self.inner();
        inner.heard.merge(felt);
        inner.unrecorded.merge(felt);
    }

    /// What the guest felt since this was asked last, for the record.
    pub fn take_unrecorded(&self) -> Latencies {
        std::mem::take(&mut self.inner().unrecorded)
    }

    /// How long a flush of the guest's would have to wait at the destination.
    pub fn heard_backlog(&self, us: u64) {
        let mut inner = self.inner();
        inner.backlog_us = inner.backlog_us.max(us);
    }

    /// The destination could not store what came for this disk. The answer: whether that is news, and not the rest of
    /// what was on its way when it was told last.
    pub fn unstored(&self, space: SpaceId, now: Instant) -> bool {
        let mut inner = self.inner();
        let before = inner.unstored.get(&space);
        if before.is_some_and(|before| now < before.until) {
            return false;
        }
        let wait = match before {
            Some(before) if now < before.until + before.wait + FIRST_HOLD => {
                (before.wait * 2).min(LONGEST_HOLD)
            }
            _ => FIRST_HOLD,
        };
        let until = now + wait;
        inner.unstored.insert(space, Unstored { until, wait });
        true
    }

    /// How long nothing may be pushed to this disk, because the destination cannot store it.
    pub fn held(&self, space: SpaceId, now: Instant) -> Duration {
        let inner = self.inner();
        let until = inner.unstored.get(&space).map(|unstored| unstored.until);
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    /// How long push has to wait before it may bring anything to disks; at most a period, by when the answer may
    /// be another one.
    pub fn disks_wait(&self, now: Instant) -> Duration {
        let mut inner = self.inner();
        let Some(cap) = inner.guard.cap() else {
            return Duration::ZERO;
        };
        inner.refill(cap, now);
        if inner.balance >= 0.0 {
            return Duration::ZERO;
        }
        inner.waited = true;
        // The guard never holds push altogether.
        let wait = Duration::from_secs_f64(-inner.balance / cap as f64);
        wait.clamp(Duration::from_millis(1), PERIOD)
    }

    /// Push takes so many bytes for disks. May be more than there is room for: then the next wait longer.
    pub fn to_disk(&self, bytes: u64, now: Instant) {
        let mut inner = self.inner();
        inner.used += bytes;
        if let Some(cap) = inner.guard.cap() {
            inner.refill(cap, now);
            inner.balance -= bytes as f64;
        }
    }

    /// A period is over. A link that does not live says nothing about disks.
    pub fn period(&self, now: Instant, link_lives: bool) {
        let mut inner = self.inner();
        let heard = std::mem::take(&mut inner.heard);
        let backlog = std::mem::take(&mut inner.backlog_us);
        let used = std::mem::take(&mut inner.used);
        let begun = inner.begun.replace(now);
        // Of the disk the backlog tells, whatever the link does.
        let heard = if link_lives {
            heard
        } else {
            Latencies::default()
        };
        if !link_lives && backlog == 0 {
            inner.guard.forget();
            return;
        }
        let used = begun.map_or(0, |begun| {
            let over = now.saturating_duration_since(begun).as_secs_f64();
            (used as f64 / over.max(1e-3)) as u64
        });
        let waited = std::mem::take(&mut inner.waited);
        let used = match inner.guard.cap() {
            Some(cap) => {
                // At the old rate until now.
                inner.refill(cap, now);
                // A frame may be more than a period's worth, and the next period's then nothing.
                if waited { used.max(cap) } else { used }
            }
            None => used,
        };
        let (p99, requests) = (heard.quantile(0.99), heard.len());
        inner.guard.period(heard, backlog, used);
        let cap = inner.guard.cap();
        tracing::trace!(cap, used, backlog, p99, requests, "push beside the guest");
    }

    /// What push to disks is held to now, if it is.
    pub fn held_to(&self) -> Option<u64> {
        self.inner().guard.held_to()
    }

    pub fn bound(&self) -> LatencyBound {
        LatencyBound(self.inner().guard.bound_us().map(Duration::from_micros))
    }

    pub fn figures(&self) -> GuardFigures {
        self.inner().guard.figures()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_engine::guard::FIRST;

    fn slow() -> Latencies {
        let mut felt = Latencies::default();
        (0..10).for_each(|_| felt.record(900_000));
        felt
    }

    /// A period in which push takes what it may, a frame at a time.
    fn pushing(easing: &Easing, begun: Instant) -> u64 {
        let mut pushed = 0;
        for ms in 0..PERIOD.as_millis() as u64 {
            let now = begun + Duration::from_millis(ms);
            while easing.disks_wait(now).is_zero() {
                easing.to_disk(64 << 10, now);
                pushed += 64 << 10;
            }
        }
        pushed
    }

    #[test]
    fn push_brings_to_disks_what_the_guard_allows() {
        let easing = Easing::new(LatencyBound::default());
        let begun = Instant::now();
        easing.period(begun, true);
        let quarter = FIRST as i64 / 4;
        let pushed = pushing(&easing, begun) as i64;
        assert!((pushed - quarter).abs() < 192 << 10, "{pushed}");
        easing.heard(&slow());
        easing.period(begun + PERIOD, true);
        let pushed = pushing(&easing, begun + PERIOD) as i64;
        assert!((pushed - quarter / 4).abs() < 192 << 10, "{pushed}");
    }

    #[test]
    fn a_disk_that_cannot_be_written_to_is_left_alone_for_longer_each_time_and_others_are_not() {
        let easing = Easing::new(LatencyBound::default());
        let (sick, well) = (SpaceId(0), SpaceId(1));
        let mut now = Instant::now();
        let mut holds = Vec::new();
        for _ in 0..6 {
            assert!(easing.unstored(sick, now));
            // What else was on its way then.
            assert!(!easing.unstored(sick, now));
            let hold = easing.held(sick, now);
            holds.push(hold.as_secs());
            assert!(easing.held(well, now).is_zero());
            now += hold;
            assert!(easing.held(sick, now).is_zero());
        }
        assert_eq!(holds, [1, 2, 4, 8, 10, 10]);
        now += 2 * LONGEST_HOLD;
        easing.unstored(sick, now);
        assert_eq!(easing.held(sick, now), FIRST_HOLD);
    }

    #[test]
    fn a_wait_is_enough_and_never_for_ever() {
        let easing = Easing::new(LatencyBound::default());
        let mut now = Instant::now();
        easing.to_disk(1 << 30, now);
        let mut waited = Duration::ZERO;
        loop {
            let wait = easing.disks_wait(now);
            if wait.is_zero() {
                break;
            }
            assert!(wait <= PERIOD);
            now += wait;
            waited += wait;
        }
        let exact = (1_u64 << 30) as f64 / FIRST as f64;
        assert!((waited.as_secs_f64() - exact).abs() < 0.3, "{waited:?}");
    }

    #[test]
    fn without_a_bound_it_only_counts() {
        let easing = Easing::new(LatencyBound(None));
        let begun = Instant::now();
        for n in 0..8 {
            easing.heard(&slow());
            easing.to_disk(1 << 30, begun);
            easing.period(begun + PERIOD * n, true);
            assert_eq!(easing.disks_wait(begun), Duration::ZERO);
        }
        assert_eq!(easing.figures().requests, 80);
        assert_eq!(easing.bound(), LatencyBound(None));
    }

    #[test]
    fn what_came_through_an_outage_does_not_count() {
        let easing = Easing::new(LatencyBound::default());
        let begun = Instant::now();
        let cap = || easing.inner().guard.cap();
        easing.heard(&slow());
        easing.period(begun, false);
        assert_eq!(cap(), Some(FIRST));
        easing.heard(&slow());
        easing.period(begun + PERIOD, true);
        assert_eq!(cap(), Some(FIRST), "still the outage's");
    }
}
