//! What a migration did over time, in a bounded number of stretches however long it takes.
//!
//! Who keeps the record adds a [`Stretch`] every so often: what happened since the one before. Stretches of one
//! slot of time are joined; when there are too many, every two neighbours become one and slots are twice as
//! long from then on:
//!
//! ```text
//!   |.|.|.|.|.|.|.|.|        at the bound
//!   |. .|. .|. .|. .|        thinned: half as many, each twice as long
//!   |. .|. .|. .|. .|....    and on from there
//! ```
//!
//! So nothing is lost but resolution: sums stay the same, of states the last is kept, of extremes the worst. The
//! order of time is kept, and stretches never overlap. There may be time between two: nobody kept the record.
//!
//! Trap. Stretches come at times that are only almost regular. Were they joined while their length fits into a
//! slot, two of half a slot and a millisecond would never be, and thinning would happen again and again; so it is
//! the slot that a stretch begins in that decides.

use serde::{Deserialize, Serialize};

use crate::latency::Latencies;

/// Most stretches that are kept, the one that is still open not counted.
pub const BOUND: usize = 1024;

/// The length of a slot at first, in milliseconds. The bound is reached after four minutes.
pub const FINEST_MS: u64 = 250;

/// What happened from one moment to another. Times are milliseconds since the migration began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stretch {
    pub from_ms: u64,
    pub to_ms: u64,
    /// Bytes of frames with content, as this end sent or received them: RAM that was pushed, disks' content that was
    /// pushed, and what was demanded of either.
    #[serde(skip_serializing_if = "is_zero")]
    pub ram_bytes: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub disk_bytes: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub demand_bytes: u64,
    /// Units sent, by how they were written; deltas count among `plain` or `zstd` as well.
    #[serde(skip_serializing_if = "is_zero")]
    pub plain_units: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub zstd_units: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub zero_units: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub delta_units: u64,
    /// Demands that were answered, and after how long, where that is known.
    #[serde(skip_serializing_if = "is_zero")]
    pub demands: u64,
    #[serde(skip_serializing_if = "Counts::is_empty")]
    pub demand_waits: Counts,
    /// How long the guest's requests to its disks took.
    #[serde(skip_serializing_if = "Counts::is_empty")]
    pub guest: Counts,
    /// Time without a link.
    #[serde(skip_serializing_if = "is_zero")]
    pub down_ms: u64,
    /// Time in which push was held for the sake of the guest's I/O, by the migration's own limit, and by the
    /// host's.
    #[serde(skip_serializing_if = "is_zero")]
    pub guard_ms: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub limit_ms: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub host_ms: u64,
    /// The least that push of disks' content was held to, in bits a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_to: Option<u64>,
    /// The longest round trip, in microseconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub rtt_us: u64,
    /// At its end, by space: units whose current content is at the destination, and units that have to be.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resident: Vec<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub live: Vec<u64>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Stretch {
    /// Milliseconds.
    pub fn len_ms(&self) -> u64 {
        self.to_ms.saturating_sub(self.from_ms)
    }

    /// Bytes of frames with content.
    pub fn bytes(&self) -> u64 {
        self.ram_bytes + self.disk_bytes + self.demand_bytes
    }

    /// Makes it go on to the end of the next one.
    pub fn join(&mut self, next: Stretch) {
        self.to_ms = next.to_ms;
        for (sum, more) in [
            (&mut self.ram_bytes, next.ram_bytes),
            (&mut self.disk_bytes, next.disk_bytes),
            (&mut self.demand_bytes, next.demand_bytes),
            (&mut self.plain_units, next.plain_units),
            (&mut self.zstd_units, next.zstd_units),
            (&mut self.zero_units, next.zero_units),
            (&mut self.delta_units, next.delta_units),
            (&mut self.demands, next.demands),
            (&mut self.down_ms, next.down_ms),
            (&mut self.guard_ms, next.guard_ms),
            (&mut self.limit_ms, next.limit_ms),
            (&mut self.host_ms, next.host_ms),
        ] {
            *sum = sum.saturating_add(more);
        }
        self.demand_waits.merge(&next.demand_waits);
        self.guest.merge(&next.guest);
        self.held_to = match (self.held_to, next.held_to) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.rtt_us = self.rtt_us.max(next.rtt_us);
        if !next.resident.is_empty() {
            self.resident = next.resident;
        }
        if !next.live.is_empty() {
            self.live = next.live;
        }
    }
}

/// [`Latencies`] in as little room as there are sizes that were met: buckets with their counts, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Counts(Vec<(u8, u32)>);

impl From<&Latencies> for Counts {
    fn from(latencies: &Latencies) -> Counts {
        Counts(latencies.counts().collect())
    }
}

impl Counts {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What was counted; nothing if it is not well formed.
    pub fn latencies(&self) -> Latencies {
        Latencies::from_counts(&self.0).unwrap_or_default()
    }

    pub fn merge(&mut self, other: &Counts) {
        if other.is_empty() {
            return;
        }
        let mut both = self.latencies();
        both.merge(&other.latencies());
        *self = Counts::from(&both);
    }
}

/// What became of a stretch that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is, or belongs to, the one that is still open.
    Open,
    /// One was closed: the last of [`Timeline::closed`].
    Closed,
    /// One was closed, and then all were thinned.
    Thinned,
}

/// The stretches of one migration.
#[derive(Clone, Debug)]
pub struct Timeline {
    closed: Vec<Stretch>,
    open: Option<Stretch>,
    slot_ms: u64,
    bound: usize,
}

impl Default for Timeline {
    fn default() -> Timeline {
        Timeline::new(FINEST_MS, BOUND)
    }
}

impl Timeline {
    /// With slots of so many milliseconds, one at least, and never more than `bound` closed stretches, of which two
    /// at least are allowed.
    pub fn new(slot_ms: u64, bound: usize) -> Timeline {
        Timeline {
            closed: Vec::new(),
            open: None,
            slot_ms: slot_ms.max(1),
            bound: bound.max(2),
        }
    }

    /// Goes on with what was kept before. What is not in order is left out.
    pub fn resumed(
        slot_ms: u64,
        bound: usize,
        kept: impl IntoIterator<Item = Stretch>,
    ) -> Timeline {
        let mut timeline = Timeline::new(slot_ms, bound);
        for stretch in kept {
            timeline.close(stretch);
        }
        timeline
    }

    /// The length of a slot now, in milliseconds.
    pub fn slot_ms(&self) -> u64 {
        self.slot_ms
    }

    /// In order of time.
    pub fn closed(&self) -> &[Stretch] {
        &self.closed
    }

    /// What happened since the stretch before. One that begins before the end of that, or ends before it began, is
    /// cut: what it counts stays.
    pub fn add(&mut self, mut stretch: Stretch) -> Added {
        let end = self.open.as_ref().or(self.closed.last());
        let end = end.map_or(0, |s| s.to_ms);
        stretch.from_ms = stretch.from_ms.max(end);
        stretch.to_ms = stretch.to_ms.max(stretch.from_ms);
        match &mut self.open {
            Some(open)
                if open.from_ms / self.slot_ms == stretch.from_ms / self.slot_ms
                    && open.to_ms == stretch.from_ms =>
            {
                open.join(stretch);
                Added::Open
            }
            open => match open.replace(stretch) {
                Some(done) => self.close(done),
                None => Added::Open,
            },
        }
    }

    /// Nothing more comes: closes what is open.
    pub fn finish(&mut self) -> Added {
        match self.open.take() {
            Some(done) => self.close(done),
            None => Added::Open,
        }
    }

    fn close(&mut self, stretch: Stretch) -> Added {
        let end = self.closed.last().map_or(0, |s| s.to_ms);
        if stretch.from_ms < end || stretch.to_ms < stretch.from_ms {
            return Added::Open;
        }
        self.closed.push(stretch);
        if self.closed.len() <= self.bound {
            return Added::Closed;
        }
        self.thin();
        Added::Thinned
    }

    fn thin(&mut self) {
        let mut halved: Vec<Stretch> = Vec::with_capacity(self.bound);
        for (n, stretch) in std::mem::take(&mut self.closed).into_iter().enumerate() {
            match halved.last_mut() {
                Some(last) if n % 2 == 1 => last.join(stretch),
                _ => halved.push(stretch),
            }
        }
        self.closed = halved;
        self.slot_ms = self.slot_ms.saturating_mul(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    prop_compose! {
        fn piece()(gap in prop_oneof![9 => Just(0u64), 1 => 0u64..5000],
                   len in 0u64..600,
                   bytes in 0u64..1_000_000,
                   waits in prop::collection::vec(0u64..10_000_000, 0..4),
                   resident in prop::collection::vec(0u64..1000, 0..3),
                   held_to in prop::option::of(1u64..100),
                   rtt_us in 0u64..1000)
                  -> (u64, u64, Stretch) {
            let mut guest = Latencies::default();
            waits.iter().for_each(|&us| guest.record(us));
            (gap, len, Stretch {
                ram_bytes: bytes,
                disk_bytes: bytes / 3,
                demands: bytes % 7,
                guest: Counts::from(&guest),
                down_ms: len / 2,
                held_to,
                rtt_us,
                resident: resident.clone(),
                live: resident,
                ..Stretch::default()
            })
        }
    }

    /// Stretches one after the other, with gaps between some.
    fn laid(pieces: Vec<(u64, u64, Stretch)>) -> Vec<Stretch> {
        let mut at = 0;
        let lay = |(gap, len, mut stretch): (u64, u64, Stretch)| {
            stretch.from_ms = at + gap;
            stretch.to_ms = stretch.from_ms + len;
            at = stretch.to_ms;
            stretch
        };
        pieces.into_iter().map(lay).collect()
    }

    fn summed(stretches: &[Stretch]) -> Stretch {
        let mut sum = Stretch::default();
        stretches.iter().for_each(|s| sum.join(s.clone()));
        sum
    }

    proptest! {
        #[test]
        fn never_more_than_the_bound_in_order_and_nothing_lost(
            pieces in prop::collection::vec(piece(), 0..200),
            bound in 2usize..40,
        ) {
            let all = laid(pieces);
            let mut timeline = Timeline::new(FINEST_MS, bound);
            for stretch in &all {
                timeline.add(stretch.clone());
                prop_assert!(timeline.closed().len() <= bound);
            }
            timeline.finish();
            let kept = timeline.closed();
            prop_assert!(kept.len() <= bound);
            prop_assert!(kept.iter().all(|s| s.from_ms <= s.to_ms));
            prop_assert!(kept.windows(2).all(|pair| pair[0].to_ms <= pair[1].from_ms));
            prop_assert_eq!(summed(kept), summed(&all));
        }

        #[test]
        fn what_is_kept_can_be_gone_on_with(
            pieces in prop::collection::vec(piece(), 0..60),
            cut in 0usize..60,
        ) {
            let all = laid(pieces);
            let (before, after) = all.split_at(cut.min(all.len()));
            let mut first = Timeline::new(FINEST_MS, 8);
            before.iter().for_each(|s| { first.add(s.clone()); });
            first.finish();
            let mut then = Timeline::resumed(first.slot_ms(), 8, first.closed().to_vec());
            after.iter().for_each(|s| { then.add(s.clone()); });
            then.finish();
            prop_assert_eq!(summed(then.closed()), summed(&all));
        }

        #[test]
        fn a_stretch_reads_back_as_written((_, len, mut stretch) in piece()) {
            stretch.to_ms = len;
            let text = serde_json::to_string(&stretch).unwrap();
            prop_assert_eq!(serde_json::from_str::<Stretch>(&text).unwrap(), stretch);
        }
    }

    #[test]
    fn irregular_ticks_are_joined_all_the_same() {
        let mut timeline = Timeline::new(FINEST_MS, 64);
        for n in 0..10_000 {
            timeline.add(Stretch {
                from_ms: n * 251,
                to_ms: (n + 1) * 251,
                ..Stretch::default()
            });
        }
        // 2510 s in 64: slots of 64 s, reached by thinning eight times and not once for every stretch.
        assert_eq!(timeline.slot_ms(), FINEST_MS << 8);
        assert!(timeline.closed().len() >= 32);
    }

    #[test]
    fn an_hour_is_kept_in_stretches_of_seconds() {
        let mut timeline = Timeline::default();
        for n in 0..4 * 3600 {
            timeline.add(Stretch {
                from_ms: n * 250,
                to_ms: (n + 1) * 250,
                ..Stretch::default()
            });
        }
        assert_eq!(timeline.slot_ms(), 4000);
    }

    #[test]
    fn a_clock_that_goes_back_overlaps_nothing() {
        let mut timeline = Timeline::new(100, 8);
        for (from_ms, to_ms) in [(0, 250), (100, 120), (300, 200), (300, 500)] {
            timeline.add(Stretch {
                from_ms,
                to_ms,
                ram_bytes: 1,
                ..Stretch::default()
            });
        }
        timeline.finish();
        assert!(
            timeline
                .closed()
                .windows(2)
                .all(|p| p[0].to_ms <= p[1].from_ms)
        );
        assert_eq!(summed(timeline.closed()).ram_bytes, 4);
    }
}
