//! Latencies, counted by their size: fixed memory, a few nanoseconds a sample, added up and sent on cheaply.
//!
//! A bucket is a quarter of an octave of microseconds, so a quantile is exact to within 19 %:
//!
//! ```text
//!   bucket 0    0..2 us      (what is faster than the clock is worth measuring)
//!   bucket n    2^(1 + (n-1)/4) us and up to the next
//!   bucket 107  more than two minutes
//! ```

/// Buckets there are.
pub const BUCKETS: usize = 108;

/// How often each size was met.
#[derive(Clone, PartialEq, Eq)]
pub struct Latencies {
    counts: [u32; BUCKETS],
    total: u64,
}

impl std::fmt::Debug for Latencies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.counts()).finish()
    }
}

impl Default for Latencies {
    fn default() -> Latencies {
        Latencies {
            counts: [0; BUCKETS],
            total: 0,
        }
    }
}

/// The bucket of a latency in microseconds.
fn bucket(us: u64) -> usize {
    if us < 2 {
        return 0;
    }
    let octave = u64::from(us.ilog2());
    // The two bits after the highest one.
    let quarter = if octave >= 2 {
        us >> (octave - 2) & 3
    } else {
        (us << (2 - octave)) & 3
    };
    ((octave - 1) * 4 + quarter + 1).min(BUCKETS as u64 - 1) as usize
}

/// The largest latency of a bucket, in microseconds.
fn top(bucket: usize) -> u64 {
    if bucket == 0 {
        return 1;
    }
    let (octave, quarter) = ((bucket as u64 - 1) / 4 + 1, (bucket as u64 - 1) % 4);
    // Before the next quarter begins; the narrowest octave's quarters are half a microsecond wide.
    ((5 + quarter) << octave).div_ceil(4) - 1
}

impl Latencies {
    /// Counts one.
    pub fn record(&mut self, us: u64) {
        self.add(bucket(us), 1);
    }

    fn add(&mut self, bucket: usize, count: u32) {
        // A counter that is full loses samples of which it has four thousand millions.
        let counter = &mut self.counts[bucket];
        let room = u32::MAX - *counter;
        *counter += count.min(room);
        self.total += u64::from(count.min(room));
    }

    /// How many were counted.
    pub fn len(&self) -> u64 {
        self.total
    }

    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// Adds what another counted.
    pub fn merge(&mut self, other: &Latencies) {
        for (bucket, count) in other.counts() {
            self.add(usize::from(bucket), count);
        }
    }

    /// Nearest rank, rounded up to the end of its bucket, in microseconds; `None` of nothing.
    /// `part` is between 0 and 1.
    pub fn quantile(&self, part: f64) -> Option<u64> {
        let rank = (part * self.total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        (self.total > 0).then(|| {
            let at = self.counts.iter().position(|&count| {
                seen += u64::from(count);
                seen >= rank
            });
            top(at.unwrap_or(BUCKETS - 1))
        })
    }

    /// How many were certainly longer than `us`.
    pub fn over(&self, us: u64) -> u64 {
        let from = bucket(us) + 1;
        let longer = self.counts.iter().skip(from);
        longer.map(|&count| u64::from(count)).sum()
    }

    /// The buckets that are not empty, ascending, with their counts.
    pub fn counts(&self) -> impl Iterator<Item = (u8, u32)> {
        let counts = self.counts.iter().enumerate();
        counts.filter_map(|(bucket, &count)| (count > 0).then_some((bucket as u8, count)))
    }

    /// From what [`counts`](Self::counts) gave; `None` if a bucket does not exist or comes twice.
    pub fn from_counts(counts: &[(u8, u32)]) -> Option<Latencies> {
        let ascending = counts.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let mut latencies = Latencies::default();
        for &(bucket, count) in counts {
            let bucket = usize::from(bucket);
            (bucket < BUCKETS && ascending).then_some(())?;
            latencies.add(bucket, count);
        }
        Some(latencies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_latency_is_in_the_bucket_that_ends_at_or_after_it(us in 0u64..200_000_000) {
            let at = bucket(us);
            prop_assert!(us <= top(at) || at == BUCKETS - 1);
            prop_assert!(at == 0 || top(at - 1) < us, "{} is above {us}", top(at - 1));
            // 19 % and what whole microseconds cost.
            prop_assert!(top(at) <= us + us / 4 + 1 || at == BUCKETS - 1);
        }

        #[test]
        fn counts_carry_everything(samples in prop::collection::vec(0u64..u64::MAX, 0..50)) {
            let mut latencies = Latencies::default();
            samples.iter().for_each(|&us| latencies.record(us));
            let counts: Vec<_> = latencies.counts().collect();
            prop_assert_eq!(Latencies::from_counts(&counts), Some(latencies));
        }
    }

    #[test]
    fn quantiles_are_nearest_ranks() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.quantile(0.99), None);
        for _ in 0..98 {
            latencies.record(100);
        }
        latencies.record(1_000_000);
        latencies.record(1_000_000);
        let at = |part| latencies.quantile(part).expect("not empty");
        assert!((100..128).contains(&at(0.5)), "{}", at(0.5));
        assert!((100..128).contains(&at(0.98)));
        assert!(at(0.99) >= 1_000_000);
        assert_eq!(latencies.over(500_000), 2);
        assert_eq!(latencies.over(50), 100);
    }

    #[test]
    fn foreign_counts_are_checked() {
        for bad in [
            &[(BUCKETS as u8, 1)][..],
            &[(3, 1), (3, 1)],
            &[(4, 1), (3, 1)],
        ] {
            assert_eq!(Latencies::from_counts(bad), None);
        }
    }
}
