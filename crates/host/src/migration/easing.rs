//! Push yields to the guest: joins what the destination's guest feels with how much may be pushed.
//!
//! The destination tells in [`Message::Felt`](whimbrel_wire::message::Message::Felt) how long its guest's
//! requests took; the source gathers that for a period and asks the engine's
//! [`Guard`] what push may use. Both the decision and the operator's bound are
//! the source's, as everything is that steers a move.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use whimbrel_engine::guard::{Guard, GuardFigures, PERIOD_US};
use whimbrel_engine::latency::Latencies;

use crate::state::LatencyBound;

/// How often the guard is asked, and the destination tells.
pub const PERIOD: Duration = Duration::from_micros(PERIOD_US);

/// A bound that nothing reaches: the guard then only counts.
const UNBOUND: u64 = u64::MAX;

/// The guest's share of one migration.
pub struct Easing {
    inner: Mutex<Inner>,
}

struct Inner {
    guard: Guard,
    heard: Latencies,
    /// How long a flush would have waited at the destination, at most.
    backlog_us: u64,
    /// What content had been sent when the period began, and when that was.
    admitted: Option<(u64, Instant)>,
}

impl Easing {
    pub fn new(bound: LatencyBound) -> Easing {
        let us = bound.0.map_or(UNBOUND, |bound| bound.as_micros() as u64);
        Easing {
            inner: Mutex::new(Inner {
                guard: Guard::new(us),
                heard: Latencies::default(),
                backlog_us: 0,
                admitted: None,
            }),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }

    /// What the guest felt of late.
    pub fn heard(&self, felt: &Latencies) {
        self.inner().heard.merge(felt);
    }

    /// How long a flush of the guest's would have to wait at the destination.
    pub fn heard_backlog(&self, us: u64) {
        let mut inner = self.inner();
        inner.backlog_us = inner.backlog_us.max(us);
    }

    /// A period is over in which the bytes of content that were sent, all told, became `admitted`. Returns what
    /// push may use from now on, in bytes of content a second. A link that does not live says nothing about disks.
    pub fn period(&self, admitted: u64, now: Instant, link_lives: bool) -> Option<u64> {
        let mut inner = self.inner();
        let heard = std::mem::take(&mut inner.heard);
        let backlog = std::mem::take(&mut inner.backlog_us);
        let before = inner.admitted.replace((admitted, now));
        // Of the disk the backlog tells, whatever the link does.
        let heard = if link_lives {
            heard
        } else {
            Latencies::default()
        };
        if !link_lives && backlog == 0 {
            inner.guard.forget();
            return inner.guard.cap();
        }
        let used = before.map_or(0, |(bytes, at)| {
            let over = now.saturating_duration_since(at).as_secs_f64();
            let bytes = admitted.saturating_sub(bytes) as f64;
            (bytes / over.max(1e-3)) as u64
        });
        if inner.guard.period(heard, backlog, used) {
            tracing::debug!(cap = inner.guard.cap(), used, "push yields to the guest");
        }
        inner.guard.cap()
    }

    /// What push may use now; `None`: all that the link takes.
    pub fn cap(&self) -> Option<u64> {
        self.inner().guard.cap()
    }

    pub fn bound(&self) -> LatencyBound {
        let us = self.inner().guard.bound_us();
        LatencyBound((us != UNBOUND).then_some(Duration::from_micros(us)))
    }

    pub fn figures(&self) -> GuardFigures {
        self.inner().guard.figures()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slow() -> Latencies {
        let mut felt = Latencies::default();
        (0..10).for_each(|_| felt.record(900_000));
        felt
    }

    #[test]
    fn a_slow_guest_leaves_push_a_quarter_of_what_it_used() {
        let easing = Easing::new(LatencyBound::default());
        let begun = Instant::now();
        assert_eq!(easing.period(0, begun, true), None);
        easing.heard(&slow());
        let cap = easing.period(1_000_000, begun + PERIOD, true);
        assert_eq!(cap, Some(1_000_000));
    }

    #[test]
    fn without_a_bound_it_only_counts() {
        let easing = Easing::new(LatencyBound(None));
        let begun = Instant::now();
        for n in 0..8 {
            easing.heard(&slow());
            assert_eq!(
                easing.period(n * 1_000_000, begun + PERIOD * n as u32, true),
                None
            );
        }
        assert_eq!(easing.figures().requests, 80);
        assert_eq!(easing.bound(), LatencyBound(None));
    }

    #[test]
    fn what_came_through_an_outage_does_not_count() {
        let easing = Easing::new(LatencyBound::default());
        let begun = Instant::now();
        easing.heard(&slow());
        assert_eq!(easing.period(0, begun, false), None);
        easing.heard(&slow());
        assert_eq!(
            easing.period(0, begun + PERIOD, true),
            None,
            "still the outage's"
        );
    }
}
