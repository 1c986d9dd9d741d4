//! How long a guest's requests take while its disks fill, for whoever decides how much push may go beside
//! them.
//!
//! What the link costs is no disk's fault: of a request that has to fetch something, the least round trip is
//! not counted. A request that has not ended yet is counted each time the counts are taken, with its age: a
//! guest that stands still behind a single flush ends no request for seconds, which is when it matters most.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use whimbrel_engine::latency::Latencies;

/// A request that is younger than this is not late.
const YOUNG: Duration = Duration::from_millis(10);

/// Where requests are counted until somebody takes the counts.
#[derive(Default)]
pub struct Felt {
    inner: Mutex<Inner>,
    round_trip_us: AtomicU64,
}

#[derive(Default)]
struct Inner {
    counted: Latencies,
    /// The same, for whoever keeps the record; without what goes on.
    unrecorded: Latencies,
    /// Requests that have not ended; as many as the guest may have in flight.
    open: BTreeMap<u64, Open>,
    next: u64,
}

struct Open {
    begun: Instant,
    fetches: bool,
}

/// A request of the guest; it is counted when this goes.
pub struct Request<'a> {
    felt: &'a Felt,
    number: u64,
}

impl Request<'_> {
    /// It has to wait for the source.
    pub fn fetches(&self) {
        if let Some(open) = self.felt.inner().open.get_mut(&self.number) {
            open.fetches = true;
        }
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        let link = self.felt.link();
        let mut inner = self.felt.inner();
        if let Some(open) = inner.open.remove(&self.number) {
            let age = open.age(link);
            inner.counted.record(age);
            inner.unrecorded.record(age);
        }
    }
}

impl Open {
    fn age(&self, link: u64) -> u64 {
        let us = self.begun.elapsed().as_micros() as u64;
        us.saturating_sub(if self.fetches { link } else { 0 })
    }
}

impl Felt {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }

    fn link(&self) -> u64 {
        self.round_trip_us.load(Ordering::Relaxed)
    }

    /// A request begins.
    pub fn request(&self) -> Request<'_> {
        let mut inner = self.inner();
        let number = inner.next;
        inner.next += 1;
        let open = Open {
            begun: Instant::now(),
            fetches: false,
        };
        inner.open.insert(number, open);
        Request { felt: self, number }
    }

    /// The link's own part of what is fetched.
    pub fn set_round_trip(&self, rtt: Duration) {
        self.round_trip_us
            .store(rtt.as_micros() as u64, Ordering::Relaxed);
    }

    /// How long requests took that ended since this was asked last, whatever the link did; for the record.
    pub fn take_unrecorded(&self) -> Latencies {
        std::mem::take(&mut self.inner().unrecorded)
    }

    /// What was counted since the last call, and what goes on for a while already.
    pub fn take(&self) -> Latencies {
        let link = self.link();
        let mut inner = self.inner();
        let mut taken = std::mem::take(&mut inner.counted);
        let late = inner.open.values().map(|open| open.age(link));
        late.filter(|&us| us > YOUNG.as_micros() as u64)
            .for_each(|us| taken.record(us));
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_when_it_ends_and_while_it_does_not() {
        let felt = Felt::default();
        drop(felt.request());
        assert_eq!(felt.take().len(), 1);
        let stuck = felt.request();
        std::thread::sleep(2 * YOUNG);
        for _ in 0..3 {
            assert_eq!(felt.take().over(YOUNG.as_micros() as u64 / 2), 1);
        }
        drop(stuck);
        assert_eq!(felt.take().len(), 1);
        assert!(felt.take().is_empty());
    }

    #[test]
    fn what_the_link_costs_is_not_counted() {
        let felt = Felt::default();
        felt.set_round_trip(Duration::from_secs(60));
        let fetched = felt.request();
        fetched.fetches();
        std::thread::sleep(2 * YOUNG);
        assert!(felt.take().is_empty());
        drop(fetched);
        assert_eq!(felt.take().over(1000), 0);
    }
}
