//! When a write is done on the thread that asks for it, and when it is sent to the pool.
//!
//! A write into the page cache is a copy, a few microseconds; but it waits when the cache is full of what
//! the disk has not taken yet, when the file system's journal is, or when part of a page must be read
//! first. Whether it will cannot be asked (ext4 refuses `RWF_NOWAIT` for such writes), only found out: a
//! write that took long sends those of the next [`REST`] to the pool. So a slow disk holds a lent thread
//! up for one write of ten or so, and a dead one for the one that found it dead.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longer than a copy takes, and than losing the processor to a neighbour usually does.
const LONG: Duration = Duration::from_millis(10);
const REST: Duration = Duration::from_millis(100);

pub(super) struct Patience {
    since: Instant,
    /// Microseconds from `since`.
    resting_until: AtomicU64,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            since: Instant::now(),
            resting_until: AtomicU64::new(0),
        }
    }
}

impl Patience {
    /// The time at which a write may begin here; `None` if it is to go to the pool.
    pub fn begin(&self) -> Option<Instant> {
        let now = Instant::now();
        (self.at(now) >= self.resting_until.load(Ordering::Relaxed)).then_some(now)
    }

    /// A write that began then has ended.
    pub fn ended(&self, begun: Instant) {
        self.judge(begun, Instant::now());
    }

    fn judge(&self, begun: Instant, now: Instant) {
        if now.duration_since(begun) >= LONG {
            let until = self.at(now) + REST.as_micros() as u64;
            self.resting_until.store(until, Ordering::Relaxed);
        }
    }

    fn at(&self, now: Instant) -> u64 {
        now.duration_since(self.since).as_micros() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_write_sends_the_next_ones_away_for_a_while() {
        let patience = Patience::default();
        let begun = patience.begin().unwrap();
        patience.judge(begun, begun + Duration::from_millis(1));
        assert!(patience.begin().is_some());
        patience.judge(begun, begun + LONG);
        let rest_ends = patience.resting_until.load(Ordering::Relaxed);
        assert_eq!(rest_ends, patience.at(begun + LONG + REST));
        patience.resting_until.store(u64::MAX, Ordering::Relaxed);
        assert!(patience.begin().is_none());
    }
}
