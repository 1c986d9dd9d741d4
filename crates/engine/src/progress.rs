//! Progress as a person wants it: one bar for everything that moves, which never goes backwards, a rate,
//! and an ETA that is a range, because the future is one.
//!
//! The amount of work may grow while a migration runs (a guest dirties what was copied, a hole map arrives
//! late), so the bar is not `done / total` but the largest value that has ever had.

/// Smoothing of the rate: the share of a new sample after one second.
const RATE_GAIN: f64 = 0.2;

/// Collects samples of `(done, total)` bytes over time.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    permille: u16,
    last: Option<(u64, u64)>,
    rate: f64,
    slowest: f64,
    fastest: f64,
    samples: u32,
}

/// Seconds left, from the fastest and the slowest rate seen lately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eta {
    pub low_s: u64,
    pub high_s: u64,
}

impl Progress {
    /// `now` in microseconds, never going back.
    pub fn sample(&mut self, now: u64, done: u64, total: u64) {
        let permille = if total == 0 {
            0
        } else {
            (done.min(total) as u128 * 1000 / total as u128) as u16
        };
        self.permille = self.permille.max(permille);
        let Some((then, before)) = self.last else {
            self.last = Some((now, done));
            return;
        };
        let seconds = now.saturating_sub(then) as f64 / 1e6;
        if seconds < 0.1 {
            return;
        }
        let rate = done.saturating_sub(before) as f64 / seconds;
        let gain = 1.0 - (1.0 - RATE_GAIN).powf(seconds);
        self.samples += 1;
        if self.samples == 1 {
            self.rate = rate;
            self.slowest = rate;
            self.fastest = rate;
        } else {
            self.rate += (rate - self.rate) * gain;
            self.slowest = rate.min(self.slowest + (self.rate - self.slowest) * gain * 0.3);
            self.fastest = rate.max(self.fastest + (self.rate - self.fastest) * gain * 0.3);
        }
        self.last = Some((now, done));
    }

    /// Nothing is left.
    pub fn finish(&mut self) {
        self.permille = 1000;
    }

    /// 0..=1000, never falling.
    pub fn permille(&self) -> u16 {
        self.permille
    }

    /// Bytes per second, smoothed.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// `None` while there is no telling.
    pub fn eta(&self, left: u64) -> Option<Eta> {
        if left == 0 {
            return Some(Eta {
                low_s: 0,
                high_s: 0,
            });
        }
        if self.samples < 2 || self.rate < 1.0 {
            return None;
        }
        let seconds = |rate: f64| (left as f64 / rate.max(self.rate * 0.1)).ceil() as u64;
        Some(Eta {
            low_s: seconds(self.fastest),
            high_s: seconds(self.slowest),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_never_goes_back_when_work_grows() {
        let mut p = Progress::default();
        p.sample(0, 50, 100);
        p.sample(1_000_000, 60, 1000);
        assert_eq!(p.permille(), 500);
        p.finish();
        assert_eq!(p.permille(), 1000);
    }

    #[test]
    fn a_stalled_link_has_no_eta_of_zero() {
        let mut p = Progress::default();
        for s in 0..20 {
            p.sample(s * 1_000_000, 1000, 2000);
        }
        assert_eq!(p.eta(1000), None);
    }

    #[test]
    fn a_steady_rate_gives_a_narrow_range() {
        let mut p = Progress::default();
        for s in 0..10 {
            p.sample(s * 1_000_000, s * 100, 10_000);
        }
        let eta = p.eta(1000).expect("steady");
        assert!(eta.low_s >= 9 && eta.high_s <= 11, "{eta:?}");
    }
}
