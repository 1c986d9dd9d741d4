//! What the destination asks of the source, gathered until the link takes it.
//!
//! Demands, "no longer needed" notes and what could not be stored come from many guests' requests at once; one task of the link
//! takes all that has gathered and says it in one message a space. While the link is down nothing is
//! gathered: after a reconnect the destination says what it holds and demands what it still waits for,
//! which covers everything that was asked or noted meanwhile. So the size is bounded by the requests in
//! flight and by what the guest writes in one round trip.

use std::collections::BTreeMap;
use std::sync::Mutex;

use hdrhistogram::Histogram;
use tokio::sync::Notify;
use whimbrel_engine::latency::Latencies;
use whimbrel_engine::space::{Extent, SpaceId};
use whimbrel_volume::VolumeError;
use whimbrel_wire::message::{FEATURE_UNSTORED, MAX_WHY};

use super::felt::Felt;

/// Most notes of units no longer needed that are kept; further ones are dropped, which costs a copy sent
/// in vain and thrown away on arrival.
const MAX_NOTES: usize = 65536;

/// The longest latency told apart: an hour, in microseconds.
const MAX_LATENCY_US: u64 = 3_600_000_000;

/// What has gathered for one space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// What came and could not be stored, and why; said before what is demanded.
    pub unstored: Vec<Extent>,
    pub why: String,
    pub demands: Vec<Extent>,
    pub forgets: Vec<Extent>,
}

#[derive(Default)]
struct Inner {
    link_up: bool,
    /// The source understands what could not be stored.
    hears_unstored: bool,
    asked: BTreeMap<SpaceId, Asked>,
    notes: usize,
}

/// The gathering place.
pub struct Wants {
    inner: Mutex<Inner>,
    some: Notify,
    latencies: Mutex<Histogram<u64>>,
    /// Waits of answered demands that whoever keeps the record has not taken yet.
    unrecorded: Mutex<Latencies>,
    /// How long the guest's requests took.
    pub felt: Felt,
}

/// Figures of answered demands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DemandFigures {
    pub count: u64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

impl Default for Wants {
    fn default() -> Self {
        Wants {
            inner: Mutex::new(Inner::default()),
            some: Notify::new(),
            latencies: Mutex::new(
                Histogram::new_with_bounds(1, MAX_LATENCY_US, 3)
                    .expect("constant bounds that hdrhistogram accepts"),
            ),
            unrecorded: Mutex::default(),
            felt: Felt::default(),
        }
    }
}

impl Wants {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }

    pub fn demand(&self, space: SpaceId, runs: &[Extent]) {
        let mut inner = self.inner();
        if runs.is_empty() || !inner.link_up {
            return;
        }
        inner.asked.entry(space).or_default().demands.extend(runs);
        drop(inner);
        self.some.notify_one();
    }

    pub fn forget(&self, space: SpaceId, runs: &[Extent]) {
        let mut inner = self.inner();
        if runs.is_empty() || !inner.link_up || inner.notes + runs.len() > MAX_NOTES {
            return;
        }
        inner.notes += runs.len();
        inner.asked.entry(space).or_default().forgets.extend(runs);
        drop(inner);
        self.some.notify_one();
    }

    /// These units came and could not be stored. `false` if there is nobody to be told: then the link must break, so
    /// that the source learns what is held when it is back. As many as arrive in the time that saying it takes.
    pub fn unstored(&self, space: SpaceId, units: Extent, error: &VolumeError) -> bool {
        let mut inner = self.inner();
        if !inner.link_up || !inner.hears_unstored {
            return false;
        }
        let asked = inner.asked.entry(space).or_default();
        if asked.unstored.is_empty() {
            asked.why = error.to_string();
            asked.why.truncate(asked.why.floor_char_boundary(MAX_WHY));
        }
        asked.unstored.push(units);
        drop(inner);
        self.some.notify_one();
        true
    }

    /// From now on what is asked is gathered.
    pub fn link_up(&self, features: u64) {
        let mut inner = self.inner();
        inner.link_up = true;
        inner.hears_unstored = features & FEATURE_UNSTORED != 0;
    }

    /// What had gathered is void.
    pub fn link_down(&self) {
        *self.inner() = Inner::default();
    }

    /// Waits until something has gathered and takes it.
    pub async fn take(&self) -> BTreeMap<SpaceId, Asked> {
        loop {
            let taken = {
                let mut inner = self.inner();
                inner.notes = 0;
                std::mem::take(&mut inner.asked)
            };
            if !taken.is_empty() {
                return taken;
            }
            self.some.notified().await;
        }
    }

    /// Demands that were answered after these times.
    pub fn answered(&self, micros: &[u64]) {
        if micros.is_empty() {
            return;
        }
        let mut latencies = self
            .latencies
            .lock()
            .expect("no holder of this lock panics");
        for &us in micros {
            latencies.saturating_record(us.max(1));
        }
        drop(latencies);
        let mut unrecorded = self.unrecorded();
        micros.iter().for_each(|&us| unrecorded.record(us));
    }

    fn unrecorded(&self) -> std::sync::MutexGuard<'_, Latencies> {
        self.unrecorded
            .lock()
            .expect("no holder of this lock panics")
    }

    /// How long answered demands took since this was asked last, for the record.
    pub fn take_unrecorded(&self) -> Latencies {
        std::mem::take(&mut self.unrecorded())
    }

    pub fn figures(&self) -> DemandFigures {
        let latencies = self
            .latencies
            .lock()
            .expect("no holder of this lock panics");
        if latencies.is_empty() {
            return DemandFigures::default();
        }
        DemandFigures {
            count: latencies.len(),
            p50_us: latencies.value_at_quantile(0.5),
            p99_us: latencies.value_at_quantile(0.99),
            max_us: latencies.max(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_asked_while_the_link_is_down_is_not_kept() {
        let wants = Wants::default();
        wants.demand(SpaceId(0), &[Extent::unit(1)]);
        wants.link_up(0);
        wants.demand(SpaceId(0), &[Extent::unit(2)]);
        wants.forget(SpaceId(1), &[Extent::unit(3)]);
        let asked = wants.take().await;
        assert_eq!(asked[&SpaceId(0)].demands, vec![Extent::unit(2)]);
        assert_eq!(asked[&SpaceId(1)].forgets, vec![Extent::unit(3)]);
    }
}
