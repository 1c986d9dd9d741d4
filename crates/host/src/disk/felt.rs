//! How long a guest's requests take while its disks fill, for whoever decides how much push may go beside
//! them.
//!
//! What the link costs is no disk's fault: of a request that had to fetch something, the least round trip
//! is not counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use whimbrel_engine::latency::Latencies;

/// Where requests are counted until somebody takes the counts.
#[derive(Default)]
pub struct Felt {
    counted: Mutex<Latencies>,
    round_trip_us: AtomicU64,
}

impl Felt {
    fn counted(&self) -> MutexGuard<'_, Latencies> {
        self.counted.lock().expect("no holder of this lock panics")
    }

    /// A request that began at `begun` has ended; `fetched`: it had to wait for the source.
    pub fn request(&self, begun: Instant, fetched: bool) {
        let us = begun.elapsed().as_micros() as u64;
        let link = if fetched {
            self.round_trip_us.load(Ordering::Relaxed)
        } else {
            0
        };
        self.counted().record(us.saturating_sub(link));
    }

    /// The link's own part of what is fetched.
    pub fn set_round_trip(&self, rtt: Duration) {
        self.round_trip_us
            .store(rtt.as_micros() as u64, Ordering::Relaxed);
    }

    /// What was counted since the last call.
    pub fn take(&self) -> Latencies {
        std::mem::take(&mut *self.counted())
    }
}
