//! Sliding windows, as MLLM (INFOCOM 2019) estimates working sets.
//!
//! Time is cut into windows. A region's score is the number of the latest [`DEPTH`] windows in which it was touched,
//! the newest worth [`DEPTH`], the oldest 1. What was touched in one window only was a burst, and is dropped. The
//! paper's internals beyond that are not public: weights and depth are a reconstruction.

use super::tracked::{Dated, Tracked};
use super::{Access, Estimator, Ranked, Span, Touch, rank};

/// Windows that count.
pub const DEPTH: u32 = 8;

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Bit n: touched n windows before `as_of`. Reads, writes.
    masks: [u8; 2],
    /// Window number.
    as_of: u64,
}

impl Seen {
    fn at(&self, touch: Touch, window: u64) -> u8 {
        match window.saturating_sub(self.as_of) {
            gone @ 0..8 => self.masks[touch as usize] << gone,
            _ => 0,
        }
    }
}

impl Dated for Seen {
    fn last(&self) -> u64 {
        self.as_of
    }
}

#[derive(Clone, Debug)]
pub struct SlidingWindows {
    regions: Tracked<Seen>,
    window_ms: u64,
    now_ms: u64,
}

impl SlidingWindows {
    /// `window_ms` is at least 1; remembers at most `most` regions.
    pub fn new(window_ms: u64, most: usize) -> Self {
        SlidingWindows {
            regions: Tracked::new(most),
            window_ms: window_ms.max(1),
            now_ms: 0,
        }
    }
}

impl Estimator for SlidingWindows {
    fn access(&mut self, access: Access) {
        self.now_ms = self.now_ms.max(access.at_ms);
        let window = self.now_ms / self.window_ms;
        for region in self.regions.within(access.units) {
            let seen = self.regions.entry(region);
            seen.masks = Touch::BOTH.map(|touch| seen.at(touch, window));
            seen.as_of = window;
            seen.masks[access.touch as usize] |= 1;
        }
    }

    fn predict(&mut self, touch: Touch, now_ms: u64, _: Span, most: usize) -> Vec<Ranked> {
        let window = self.now_ms.max(now_ms) / self.window_ms;
        let hot = self.regions.iter().filter_map(|(region, seen)| {
            let mask = seen.at(touch, window);
            let weight = |n: u32| (mask >> n & 1) as u32 * (DEPTH - n);
            (mask.count_ones() > 1).then(|| Ranked {
                region,
                score: (0..DEPTH).map(weight).sum::<u32>() as f32,
            })
        });
        rank(hot.collect(), most)
    }

    fn memory(&self) -> usize {
        self.regions.memory()
    }
}
