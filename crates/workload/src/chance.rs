//! Seeded randomness: splitmix64, a shuffle, and Zipf ranks.
//!
//! Everything random in the guest comes from here, so that a run can be repeated from its seed, and so
//! that the verifier outside can replay which block the n-th random write went to.

/// Splitmix64's finaliser: spreads every bit of `x` over the result.
pub fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A small generator, good enough for load and never for secrets.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// `stream` keeps generators of one seed apart.
    pub fn new(seed: u64, stream: u64) -> Self {
        Rng(mix(seed ^ mix(stream)))
    }

    pub fn next_u64(&mut self) -> u64 {
        let value = mix(self.0);
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        value
    }

    /// Uniform in `0..n`; 0 for `n` 0. (By multiplication: the bias is below n / 2^64.)
    pub fn below(&mut self, n: u64) -> u64 {
        scale(self.next_u64(), n)
    }

    /// Uniform in `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Fisher and Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// Maps a whole-range random number to `0..n`.
pub fn scale(random: u64, n: u64) -> u64 {
    ((u128::from(random) * u128::from(n)) >> 64) as u64
}

/// Ranks `0..n` with probability proportional to `1 / (rank + 1)^theta`, by the closed approximation
/// of Gray et al., "Quickly generating billion-record synthetic databases" (SIGMOD 1994).
#[derive(Clone, Debug)]
pub struct Zipf {
    n: f64,
    theta: f64,
    alpha: f64,
    zeta: f64,
    eta: f64,
}

impl Zipf {
    /// `theta` is held within `0.01..=0.999`, where the approximation is defined.
    pub fn new(n: u64, theta: f64) -> Self {
        let theta = theta.clamp(0.01, 0.999);
        let n = n.max(1);
        let zeta = |k: u64| (1..=k).map(|i| (i as f64).powf(-theta)).sum::<f64>();
        let whole = zeta(n);
        let eta = if n <= 2 {
            0.0
        } else {
            (1.0 - (2.0 / n as f64).powf(1.0 - theta)) / (1.0 - zeta(2) / whole)
        };
        Zipf {
            n: n as f64,
            theta,
            alpha: 1.0 / (1.0 - theta),
            zeta: whole,
            eta,
        }
    }

    pub fn rank(&self, rng: &mut Rng) -> u64 {
        let u = rng.unit();
        let uz = u * self.zeta;
        if uz < 1.0 {
            return 0;
        }
        if uz < 1.0 + 0.5f64.powf(self.theta) {
            return 1.min(self.n as u64 - 1);
        }
        let rank = self.n * (self.eta * u - self.eta + 1.0).powf(self.alpha);
        (rank as u64).min(self.n as u64 - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_numbers_other_stream_others() {
        let draw = |seed, stream| {
            let mut rng = Rng::new(seed, stream);
            [rng.next_u64(), rng.next_u64(), rng.next_u64()]
        };
        assert_eq!(draw(7, 1), draw(7, 1));
        assert_ne!(draw(7, 1), draw(7, 2));
        assert_ne!(draw(7, 1), draw(8, 1));
    }

    #[test]
    fn zipf_stays_in_range_and_favours_low_ranks() {
        for n in [1, 2, 3, 1000] {
            let zipf = Zipf::new(n, 0.99);
            let mut rng = Rng::new(1, 2);
            let mut first = 0;
            for _ in 0..10_000 {
                let rank = zipf.rank(&mut rng);
                assert!(rank < n);
                first += u64::from(rank < n.div_ceil(10));
            }
            assert!(n < 10 || first > 5_000, "a tenth of {n} ranks drew {first}");
        }
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut items: Vec<u32> = (0..1000).collect();
        Rng::new(3, 3).shuffle(&mut items);
        assert_ne!(items, (0..1000).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..1000).collect::<Vec<_>>());
    }
}
