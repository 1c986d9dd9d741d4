//! Recency-decayed heat: each access counts for its region, half as much for each half-life since.
//!
//! What the access log's counters are, per MiB and halved at once, and [`crate::write_heat`] per page and epoch.

use super::tracked::{Dated, Tracked};
use super::{Access, Estimator, Ranked, Span, Touch, rank};

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// Accesses, decayed to `as_of`: reads, writes.
    heat: [f32; 2],
    as_of: u64,
}

impl Counts {
    fn at(&self, touch: Touch, now_ms: u64, half_life_ms: u64) -> f32 {
        let age = now_ms.saturating_sub(self.as_of) as f32 / half_life_ms as f32;
        self.heat[touch as usize] * (-age).exp2()
    }
}

impl Dated for Counts {
    fn last(&self) -> u64 {
        self.as_of
    }
}

/// Below this a region is cold: a single access, five half-lives ago.
const COLD: f32 = 1.0 / 32.0;

#[derive(Clone, Debug)]
pub struct DecayedHeat {
    regions: Tracked<Counts>,
    half_life_ms: u64,
    now_ms: u64,
}

impl DecayedHeat {
    /// `half_life_ms` is at least 1; remembers at most `most` regions.
    pub fn new(half_life_ms: u64, most: usize) -> Self {
        DecayedHeat {
            regions: Tracked::new(most),
            half_life_ms: half_life_ms.max(1),
            now_ms: 0,
        }
    }
}

impl Estimator for DecayedHeat {
    fn access(&mut self, access: Access) {
        self.now_ms = self.now_ms.max(access.at_ms);
        for region in self.regions.within(access.units) {
            let (now, half_life) = (self.now_ms, self.half_life_ms);
            let counts = self.regions.entry(region);
            counts.heat = Touch::BOTH.map(|touch| counts.at(touch, now, half_life));
            counts.as_of = now;
            counts.heat[access.touch as usize] += 1.0;
        }
    }

    fn predict(&mut self, touch: Touch, now_ms: u64, _: Span, most: usize) -> Vec<Ranked> {
        let now = self.now_ms.max(now_ms);
        let hot = self.regions.iter().map(|(region, counts)| Ranked {
            region,
            score: counts.at(touch, now, self.half_life_ms),
        });
        rank(hot.filter(|r| r.score >= COLD).collect(), most)
    }

    fn memory(&self) -> usize {
        self.regions.memory()
    }
}
