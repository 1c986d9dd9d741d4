//! A record of echo requests and what can be read from it. Pure.
//!
//! Two gaps are told apart. The *echo gap* lies between the send times of consecutive requests that were
//! answered: how long requests went into the void. The *reply gap* lies between consecutive arrivals of
//! answers: how long nothing was heard. A guest that stops with requests waiting in its network queue
//! and answers them all when it runs again has no echo gap, but a reply gap.

use std::time::{Duration, Instant};

/// One echo request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    pub sent: Instant,
    /// When the answer came, if it has.
    pub answered: Option<Instant>,
}

impl Probe {
    pub fn rtt(&self) -> Option<Duration> {
        Some(self.answered?.saturating_duration_since(self.sent))
    }
}

/// A stretch of time in which something was missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    pub start: Instant,
    pub length: Duration,
    /// Whether the series ends inside the gap; its true length is then unknown.
    pub open: bool,
}

impl Gap {
    /// Seconds from `event` to the gap's start; negative if it began earlier.
    pub fn start_after(&self, event: Instant) -> f64 {
        let after = self.start.saturating_duration_since(event).as_secs_f64();
        after - event.saturating_duration_since(self.start).as_secs_f64()
    }
}

/// The requests sent during one stretch of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub start: Instant,
    pub sent: usize,
    pub lost: usize,
    /// Of the answered ones; `None` if there are none.
    pub p50: Option<Duration>,
    pub p99: Option<Duration>,
    pub max: Option<Duration>,
}

/// Requests in the order of sending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EchoSeries {
    pub probes: Vec<Probe>,
}

impl EchoSeries {
    /// The requests sent in `from..to`.
    pub fn between(&self, from: Instant, to: Instant) -> EchoSeries {
        let first = self.probes.partition_point(|probe| probe.sent < from);
        let end = self.probes.partition_point(|probe| probe.sent < to);
        EchoSeries {
            probes: self.probes[first..end.max(first)].to_vec(),
        }
    }

    pub fn sent(&self) -> usize {
        self.probes.len()
    }

    /// Requests without an answer. The last round trip's worth may just be on their way.
    pub fn lost(&self) -> usize {
        self.probes
            .iter()
            .filter(|probe| probe.answered.is_none())
            .count()
    }

    /// The longest echo gap; `None` if nothing was sent.
    pub fn echo_gap(&self) -> Option<Gap> {
        self.echo_gaps().max_by_key(|gap| gap.length)
    }

    /// Echo gaps longer than `threshold`, in order.
    pub fn echo_gaps_over(&self, threshold: Duration) -> Vec<Gap> {
        self.echo_gaps()
            .filter(|gap| gap.length > threshold)
            .collect()
    }

    /// The longest reply gap; `None` without two answers. An open end is not looked at: see the echo gap.
    pub fn reply_gap(&self) -> Option<Gap> {
        let mut arrivals: Vec<Instant> = self
            .probes
            .iter()
            .filter_map(|probe| probe.answered)
            .collect();
        arrivals.sort_unstable();
        arrivals
            .windows(2)
            .map(|pair| Gap {
                start: pair[0],
                length: pair[1] - pair[0],
                open: false,
            })
            .max_by_key(|gap| gap.length)
    }

    /// The longest time in which the prober itself sent nothing: no gap up to this long says anything
    /// about the guest.
    pub fn longest_send_pause(&self) -> Duration {
        self.probes
            .windows(2)
            .map(|pair| pair[1].sent - pair[0].sent)
            .max()
            .unwrap_or_default()
    }

    /// The smallest round trip that at least `share` (0 to 1) of the answered requests did not exceed.
    pub fn rtt(&self, share: f64) -> Option<Duration> {
        percentile(&self.sorted_rtts(), share)
    }

    /// The series in windows of `width` from its first request; windows without a request are there too,
    /// up to the last request. No windows for a width of zero.
    pub fn windows(&self, width: Duration) -> Vec<Window> {
        let (Some(first), Some(last)) = (self.probes.first(), self.probes.last()) else {
            return Vec::new();
        };
        if width.is_zero() {
            return Vec::new();
        }
        let mut windows = Vec::new();
        let mut start = first.sent;
        while start <= last.sent {
            let part = self.between(start, start + width);
            let rtts = part.sorted_rtts();
            windows.push(Window {
                start,
                sent: part.sent(),
                lost: part.lost(),
                p50: percentile(&rtts, 0.5),
                p99: percentile(&rtts, 0.99),
                max: rtts.last().copied(),
            });
            start += width;
        }
        windows
    }

    /// Between consecutive answered requests, from the first request, and (open) to the last.
    fn echo_gaps(&self) -> impl Iterator<Item = Gap> + '_ {
        let first = self.probes.first().map(|probe| (probe.sent, false));
        let answered = self.probes.iter().filter(|probe| probe.answered.is_some());
        let last = self.probes.last().filter(|probe| probe.answered.is_none());
        let ends = answered
            .map(|probe| (probe.sent, false))
            .chain(last.map(|probe| (probe.sent, true)));
        let starts = first.into_iter().chain(ends.clone());
        starts.zip(ends).map(|((start, _), (end, open))| Gap {
            start,
            length: end - start,
            open,
        })
    }

    fn sorted_rtts(&self) -> Vec<Duration> {
        let mut rtts: Vec<Duration> = self.probes.iter().filter_map(Probe::rtt).collect();
        rtts.sort_unstable();
        rtts
    }
}

fn percentile(sorted: &[Duration], share: f64) -> Option<Duration> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    let index = rank.clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// A request every 5 ms; those with a number got their answer after so many ms.
    fn series(origin: Instant, answers: &[Option<u64>]) -> EchoSeries {
        let probes = answers.iter().enumerate().map(|(index, answer)| {
            let sent = origin + ms(5) * index as u32;
            Probe {
                sent,
                answered: answer.map(|rtt| sent + ms(rtt)),
            }
        });
        EchoSeries {
            probes: probes.collect(),
        }
    }

    #[test]
    fn a_gap_runs_from_the_last_answered_request_to_the_next() {
        let origin = Instant::now();
        let series = series(origin, &[Some(1), Some(1), None, None, Some(1), Some(1)]);
        let gap = series.echo_gap().unwrap();
        assert_eq!((gap.length, gap.open), (ms(15), false));
        assert_eq!(gap.start_after(origin), 0.005);
        assert_eq!(gap.start_after(origin + ms(10)), -0.005);
        assert_eq!(series.echo_gaps_over(ms(5)), [gap]);
        assert_eq!((series.sent(), series.lost()), (6, 2));
        assert_eq!(series.longest_send_pause(), ms(5));
    }

    #[test]
    fn a_guest_that_never_comes_back_leaves_an_open_gap() {
        let origin = Instant::now();
        let gap = series(origin, &[Some(1), None, None, None])
            .echo_gap()
            .unwrap();
        assert_eq!((gap.start, gap.length, gap.open), (origin, ms(15), true));
        let silent = series(origin, &[None, None, None]).echo_gap().unwrap();
        assert_eq!(
            (silent.start, silent.length, silent.open),
            (origin, ms(10), true)
        );
    }

    #[test]
    fn a_guest_that_comes_late_leaves_a_gap_before_it() {
        let origin = Instant::now();
        let gap = series(origin, &[None, None, Some(1), Some(1)])
            .echo_gap()
            .unwrap();
        assert_eq!((gap.start, gap.length, gap.open), (origin, ms(10), false));
    }

    #[test]
    fn requests_answered_late_show_in_the_reply_gap_only() {
        let origin = Instant::now();
        let series = series(origin, &[Some(1), Some(50), Some(45), Some(40), Some(35)]);
        assert_eq!(series.echo_gap().unwrap().length, ms(5));
        assert_eq!(series.reply_gap().unwrap().length, ms(54));
    }

    #[test]
    fn windows_tell_loss_and_round_trips_apart_in_time() {
        let origin = Instant::now();
        let series = series(origin, &[Some(1), Some(3), None, None, Some(2)]);
        let windows = series.windows(ms(10));
        let seen: Vec<_> = windows
            .iter()
            .map(|w| (w.sent, w.lost, w.p50, w.max))
            .collect();
        assert_eq!(
            seen,
            [
                (2, 0, Some(ms(1)), Some(ms(3))),
                (2, 2, None, None),
                (1, 0, Some(ms(2)), Some(ms(2)))
            ]
        );
        assert_eq!(series.rtt(0.0), Some(ms(1)));
        assert_eq!(series.rtt(0.67), Some(ms(3)));
        assert_eq!(EchoSeries::default().rtt(0.5), None);
        assert_eq!(EchoSeries::default().echo_gap(), None);
    }
}
