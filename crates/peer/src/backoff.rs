//! How long to wait before trying again: exponential, with jitter and a ceiling.
//!
//! The n-th wait lies between half of `first * 2^n` and the whole of it, `ceiling` at most. The
//! random half keeps many hosts that lost the same link from coming back in step; the sure half keeps
//! a failing peer from being asked at once. There is no bound on the number of tries: an outage of
//! any length only adds its length, and whoever uses this decides when to give up.

use std::time::Duration;

/// A series of waits; the same seed gives the same series.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    ceiling: Duration,
    tries: u32,
    random: u64,
}

impl Backoff {
    /// Waits of about `first`, then twice that, and so on up to `ceiling`.
    pub fn new(first: Duration, ceiling: Duration, seed: u64) -> Backoff {
        Backoff {
            first,
            ceiling,
            tries: 0,
            random: seed,
        }
    }

    /// The next wait.
    pub fn next_wait(&mut self) -> Duration {
        let doubled = 2_u32.checked_pow(self.tries).unwrap_or(u32::MAX);
        let whole = self.first.saturating_mul(doubled).min(self.ceiling);
        self.tries = self.tries.saturating_add(1);
        let half = whole / 2;
        half + half.mul_f64(self.next_fraction())
    }

    /// Waits given out since the start or the last [`reset`](Self::reset).
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// Begins again with the first wait, after a success. The jitter goes on.
    pub fn reset(&mut self) {
        self.tries = 0;
    }

    /// SplitMix64 (Steele, Lea, Flood 2014), in 0..1.
    fn next_fraction(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_wait_lies_between_half_and_the_whole(first in 1_u64..10_000, ceiling in 1_u64..100_000, seed: u64) {
            let (first, ceiling) = (Duration::from_millis(first), Duration::from_millis(ceiling));
            let mut backoff = Backoff::new(first, ceiling, seed);
            let mut whole = first;
            for _ in 0..80 {
                whole = whole.min(ceiling);
                let wait = backoff.next_wait();
                prop_assert!(wait >= whole / 2 && wait <= whole, "{wait:?} of {whole:?}");
                whole = whole.saturating_mul(2);
            }
        }

        #[test]
        fn the_same_seed_gives_the_same_series(seed: u64) {
            let mut a = Backoff::new(Duration::from_millis(100), Duration::from_secs(5), seed);
            let mut b = a.clone();
            for _ in 0..20 {
                prop_assert_eq!(a.next_wait(), b.next_wait());
            }
        }
    }

    #[test]
    fn a_success_begins_again_with_the_first_wait() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60), 1);
        for _ in 0..10 {
            backoff.next_wait();
        }
        backoff.reset();
        assert!(backoff.next_wait() <= Duration::from_secs(1));
    }

    #[test]
    fn two_seeds_do_not_keep_step() {
        let mut a = Backoff::new(Duration::from_secs(1), Duration::from_secs(60), 1);
        let mut b = Backoff::new(Duration::from_secs(1), Duration::from_secs(60), 2);
        assert_ne!(a.next_wait(), b.next_wait());
    }
}
