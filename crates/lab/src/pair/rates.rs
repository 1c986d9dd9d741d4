//! How fast the guest works, from the counters in its reports. Pure.
//!
//! The counters are the guest's, the clock is the client's: a guest that stands still is slow, whatever
//! its own clock says. Between two reports a counter is taken to grow evenly.

use crate::guest::Report;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How long the guest must work as before for the brownout to count as over.
pub const STEADY: Duration = Duration::from_secs(2);

/// The share of the earlier speed that counts as working as before.
pub const RECOVERED: f64 = 0.9;

/// What a guest did per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Self-checking pages written.
    pub ram_pages: f64,
    /// Records appended, each with its fsync.
    pub log_records: f64,
    /// Random blocks written.
    pub random_writes: f64,
    /// Bytes of files read.
    pub read_bytes: f64,
}

impl Rates {
    fn all(&self) -> [f64; 4] {
        [
            self.ram_pages,
            self.log_records,
            self.random_writes,
            self.read_bytes,
        ]
    }

    /// The share of `before` that the slowest workload reaches. Workloads that did nothing before do not
    /// count; 1 if none did anything.
    pub fn share_of(&self, before: &Rates) -> f64 {
        let pairs = self.all().into_iter().zip(before.all());
        let shares = pairs.filter(|(_, b)| *b > 0.0).map(|(now, b)| now / b);
        shares
            .fold(None, |least: Option<f64>, share| {
                Some(least.map_or(share, |l| l.min(share)))
            })
            .unwrap_or(1.0)
    }

    /// Half a line for people, per second each.
    pub fn short(&self) -> String {
        format!(
            "RAM {:4.0}, log {:2.0}, random {:2.0}, files {:.1} MiB",
            self.ram_pages,
            self.log_records,
            self.random_writes,
            self.read_bytes / f64::from(1 << 20)
        )
    }

    /// One line for people.
    pub fn line(&self) -> String {
        format!(
            "RAM {:5.0} pages/s, log {:4.1} fsyncs/s, random {:4.1} writes/s, files {:4.2} MiB/s",
            self.ram_pages,
            self.log_records,
            self.random_writes,
            self.read_bytes / f64::from(1 << 20)
        )
    }
}

/// The counters at a time: those of the reports around it, in proportion. `None` before the first report
/// and after the last.
fn counters_at(reports: &[(Instant, Report)], time: Instant) -> Option<[f64; 4]> {
    let counters = |report: &Report| {
        let t = report.totals;
        [t.ram_pages, t.log_records, t.random_writes, t.read_bytes].map(|n| n as f64)
    };
    let next = reports.partition_point(|(at, _)| *at < time);
    let (at_b, b) = reports.get(next)?;
    if *at_b == time {
        return Some(counters(b));
    }
    let (at_a, a) = reports.get(next.checked_sub(1)?)?;
    let share = (time - *at_a).as_secs_f64() / (*at_b - *at_a).as_secs_f64();
    let (a, b) = (counters(a), counters(b));
    Some(std::array::from_fn(|i| a[i] + (b[i] - a[i]) * share))
}

/// The mean rates over `from..to`, as far as reports cover it; zero if they do not.
pub fn between(reports: &[(Instant, Report)], from: Instant, to: Instant) -> Rates {
    let (Some((first, _)), Some((last, _))) = (reports.first(), reports.last()) else {
        return Rates::default();
    };
    let (from, to) = (from.max(*first), to.min(*last));
    let seconds = to.saturating_duration_since(from).as_secs_f64();
    let (Some(a), Some(b)) = (counters_at(reports, from), counters_at(reports, to)) else {
        return Rates::default();
    };
    if seconds <= 0.0 {
        return Rates::default();
    }
    let rate = |i: usize| (b[i] - a[i]) / seconds;
    Rates {
        ram_pages: rate(0),
        log_records: rate(1),
        random_writes: rate(2),
        read_bytes: rate(3),
    }
}

/// As [`between`], for times beyond the last report: since then the guest counts as standing still.
pub fn lately(reports: &[(Instant, Report)], from: Instant, to: Instant) -> Rates {
    let mut rates = between(reports, from, to);
    let heard = reports.last().map_or(from, |(at, _)| *at).clamp(from, to);
    let share = (heard - from).as_secs_f64() / (to - from).as_secs_f64().max(1e-9);
    // Reports come twice a second: a guest that just has not come to its next is not slow.
    if share < 0.7 {
        for rate in [
            &mut rates.ram_pages,
            &mut rates.log_records,
            &mut rates.random_writes,
            &mut rates.read_bytes,
        ] {
            *rate *= share;
        }
    }
    rates
}

/// The brownout: from `resumed` to the first report from which on, for [`STEADY`], every workload works
/// at [`RECOVERED`] of its rate before. `None` if that did not come.
///
/// Its grain is the interval between reports.
pub fn brownout(
    reports: &[(Instant, Report)],
    before: &Rates,
    resumed: Instant,
) -> Option<Duration> {
    let last = reports.last()?.0;
    let starts = reports
        .iter()
        .map(|(at, _)| *at)
        .filter(|at| *at >= resumed);
    let recovered = |start: &Instant| {
        let end = *start + STEADY;
        end <= last && between(reports, *start, end).share_of(before) >= RECOVERED
    };
    let start = starts.into_iter().find(recovered)?;
    Some(start - resumed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Line;

    /// A report that has counted so much of everything.
    fn report(count: u64) -> Report {
        let json = format!(
            r#"{{"kind":"report","t":0,"seq":1,"ram_pages_per_s":0,"ram_checks_per_s":0,
            "disk_records_per_s":0,"disk_random_per_s":0,"read_bytes_per_s":0,"errors":0,
            "last_fsynced_seq":0,"last_fsynced_generation":0,
            "slowest_us":{{"ram":0,"log":0,"random":0,"read":0,"tick":0}},
            "totals":{{"ram_pages":{count},"ram_checks":0,"log_records":{count},
            "random_writes":{count},"random_checks":0,"files_read":0,"read_bytes":{count},
            "echoes":0,"unsent":0}}}}"#
        );
        match Line::find(&json) {
            Some(Line::Report(report)) => report,
            other => panic!("{other:?}"),
        }
    }

    /// A report a second, each having counted so much more.
    fn series(origin: Instant, steps: &[u64]) -> Vec<(Instant, Report)> {
        let mut count = 0;
        (0u64..)
            .zip(steps)
            .map(|(second, step)| {
                count += step;
                (origin + Duration::from_secs(second), report(count))
            })
            .collect()
    }

    #[test]
    fn rates_are_the_clients_seconds_not_the_guests() {
        let origin = Instant::now();
        let reports = series(origin, &[0, 10, 10, 30]);
        let half = Duration::from_millis(500);
        let rates = between(
            &reports,
            origin + half,
            origin + Duration::from_secs(2) + half,
        );
        assert_eq!(rates.ram_pages, (5 + 10 + 15) as f64 / 2.0);
        let outside = between(&reports, origin + Duration::from_secs(9), origin);
        assert_eq!(outside, Rates::default());
    }

    #[test]
    fn the_brownout_ends_when_the_guest_is_steadily_fast_again() {
        let origin = Instant::now();
        // Before: 10 a second. After second 5: slow, a lonely fast second, slow, then as before.
        let reports = series(origin, &[0, 10, 10, 10, 10, 10, 2, 12, 3, 9, 9, 9, 9]);
        let before = between(&reports, origin, origin + Duration::from_secs(5));
        assert_eq!(before.log_records, 10.0);
        let resumed = origin + Duration::from_secs(5);
        let brownout = brownout(&reports, &before, resumed);
        assert_eq!(brownout, Some(Duration::from_secs(3)));
    }

    #[test]
    fn a_guest_that_stays_slow_has_no_end_of_its_brownout() {
        let origin = Instant::now();
        let reports = series(origin, &[0, 10, 10, 5, 5, 5, 5]);
        let before = between(&reports, origin, origin + Duration::from_secs(2));
        assert_eq!(
            brownout(&reports, &before, origin + Duration::from_secs(2)),
            None
        );
    }

    #[test]
    fn a_workload_that_is_off_does_not_count() {
        let before = Rates {
            ram_pages: 100.0,
            ..Rates::default()
        };
        let now = Rates {
            ram_pages: 95.0,
            ..Rates::default()
        };
        assert_eq!(now.share_of(&before), 0.95);
        assert_eq!(now.share_of(&Rates::default()), 1.0);
    }
}
