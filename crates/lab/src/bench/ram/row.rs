//! What one move came to, and the same of several moves side by side.

use super::case::{Cell, Mover};
use super::cpu::Cpu;
use super::stream::Streamed;
use crate::demo::shown;
use serde::Serialize;
use std::time::{Duration, Instant};
use whimbrel_lab::guest::Report;
use whimbrel_lab::pair::rates::{self, Rates, STEADY};
use whimbrel_lab::probe::EchoSeries;

/// The share of the earlier rate that counts as working as before.
pub const RECOVERED: f64 = 0.8;

/// One move. Seconds, milliseconds and bytes, as the names say.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub cell: Cell,
    pub mover: Mover,
    pub round: u32,
    /// Within the limit.
    pub finished: bool,
    /// Where it stood if not, and what else is to be known.
    pub note: Option<String>,
    pub total_s: Option<f64>,
    /// QEMU's STOP at the source to its RESUME at the destination.
    pub blackout_ms: Option<f64>,
    /// The client's longest time between two answered echo requests.
    pub echo_gap_ms: Option<f64>,
    /// The longest time in which no chunk of the guest's stream came.
    pub stream_gap_ms: Option<f64>,
    /// From RESUME until the guest does [`RECOVERED`] of what it did before, and goes on so.
    pub brownout_s: Option<f64>,
    pub wan_bytes: u64,
    pub wan_bytes_back: u64,
    pub cpu_daemons_s: f64,
    /// The guest's own included: without KVM it is the most of it.
    pub cpu_qemus_s: f64,
    /// Over memory: as QEMU counts them; of Whimbrel, units of RAM sent per live one.
    pub passes: Option<f64>,
    pub pages_per_s_before: f64,
    pub pages_per_s_during: f64,
    /// The guest checked all its pages in the end, and its disk was looked at from outside.
    pub checked: bool,
    pub problems: Vec<String>,
}

/// The time line of one move.
pub struct Seen<'s> {
    pub quiet_from: Instant,
    pub began: Instant,
    /// Its end, or that of the limit.
    pub ended: Instant,
    pub resumed: Option<Instant>,
    pub reports: &'s [(Instant, Report)],
    pub echo: &'s EchoSeries,
    pub streamed: Option<&'s Streamed>,
    pub cpu: Cpu,
}

impl Row {
    pub fn new(cell: Cell, mover: Mover, round: u32) -> Row {
        Row {
            cell,
            mover,
            round,
            finished: false,
            note: None,
            total_s: None,
            blackout_ms: None,
            echo_gap_ms: None,
            stream_gap_ms: None,
            brownout_s: None,
            wan_bytes: 0,
            wan_bytes_back: 0,
            cpu_daemons_s: 0.0,
            cpu_qemus_s: 0.0,
            passes: None,
            pages_per_s_before: 0.0,
            pages_per_s_during: 0.0,
            checked: false,
            problems: Vec::new(),
        }
    }

    pub fn cpu_s(&self) -> f64 {
        self.cpu_daemons_s + self.cpu_qemus_s
    }

    /// What the guest wrote during the move, of what it wrote before in such a time.
    fn work_share(&self) -> Option<f64> {
        let before = self.pages_per_s_before;
        (before > 0.0).then(|| self.pages_per_s_during / before)
    }

    /// Not finishing is a result; only what is wrong, or kept a figure from being taken, is none.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    pub fn measured(&mut self, seen: &Seen<'_>) {
        let before = rates::between(seen.reports, seen.quiet_from, seen.began);
        // A guest that stands still reports nothing, and that counts.
        let during = rates::lately(seen.reports, seen.began, seen.ended);
        self.pages_per_s_before = before.ram_pages;
        self.pages_per_s_during = during.ram_pages;
        self.cpu_daemons_s = seen.cpu.daemons;
        self.cpu_qemus_s = seen.cpu.qemus;
        if self.finished {
            self.total_s = Some((seen.ended - seen.began).as_secs_f64());
        }
        // A gap that the end of a pre-copy leaves is over only after it.
        let until = seen.ended + Duration::from_secs(1);
        let gap = seen.echo.between(seen.began, until).echo_gap();
        self.echo_gap_ms = gap.map(|gap| ms(gap.length));
        if let Some(streamed) = seen.streamed {
            self.stream_gap_ms = longest(&streamed.arrivals, seen.began, until).map(ms);
            self.problems.extend(streamed.problem.clone());
        }
        let Some(resumed) = seen.resumed else { return };
        let brownout = if before.ram_pages > 0.0 {
            brownout(seen.reports, &before, resumed)
        } else {
            let heard = match seen.streamed {
                Some(streamed) => streamed.arrivals.clone(),
                None => answers(seen.echo),
            };
            brownout_of(&heard, seen.quiet_from, seen.began, resumed)
        };
        self.brownout_s = brownout.map(|time| time.as_secs_f64());
    }

    pub fn text(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        format!(
            "{:<20} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8.1} {:>7.1} {:>5.1} + {:<5.1} {:>6} {:>5}  {}",
            self.mover,
            shown(self.total_s, "s", 1),
            shown(self.blackout_ms, "ms", 0),
            shown(self.echo_gap_ms, "ms", 0),
            shown(self.stream_gap_ms, "ms", 0),
            shown(self.brownout_s, "s", 1),
            mib(self.wan_bytes),
            mib(self.wan_bytes_back),
            self.cpu_daemons_s,
            self.cpu_qemus_s,
            self.passes
                .map_or("-".to_owned(), |passes| format!("{passes:.2}")),
            shown(self.work_share().map(|share| share * 100.0), "%", 0),
            self.state(),
        )
    }

    fn state(&self) -> String {
        if let Some(problem) = self.problems.first() {
            return format!("WRONG: {problem}");
        }
        let checked = match (self.finished, self.checked) {
            (true, true) => "ok",
            (false, true) => "not finished, guest checked",
            _ => "not checked",
        };
        match &self.note {
            Some(note) => format!("{checked}; {note}"),
            None => checked.to_owned(),
        }
    }
}

pub const HEAD: &str = "mover                    total  blackout  echo gap    stream  brownout  MiB out    back        CPU s passes  work  result";

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The longest time in `from..to` without one of these moments.
fn longest(moments: &[Instant], from: Instant, to: Instant) -> Option<Duration> {
    let within = moments.iter().copied().filter(|at| (from..to).contains(at));
    let ends: Vec<Instant> = std::iter::once(from).chain(within).chain([to]).collect();
    ends.windows(2).map(|pair| pair[1] - pair[0]).max()
}

/// When answers came, in order.
fn answers(echo: &EchoSeries) -> Vec<Instant> {
    let mut answers: Vec<_> = echo.probes.iter().filter_map(|p| p.answered).collect();
    answers.sort_unstable();
    answers
}

/// From `resumed` to the first report from which on, for [`STEADY`], the guest does its share of before.
fn brownout(reports: &[(Instant, Report)], before: &Rates, resumed: Instant) -> Option<Duration> {
    let last = reports.last()?.0;
    let recovered = |start: &Instant| {
        let end = *start + STEADY;
        end <= last && rates::between(reports, *start, end).share_of(before) >= RECOVERED
    };
    let starts = reports.iter().map(|(at, _)| *at);
    let start = starts.filter(|at| *at >= resumed).find(recovered)?;
    Some(start - resumed)
}

/// The same of a guest that counts nothing, by what the client heard of it.
fn brownout_of(
    heard: &[Instant],
    quiet_from: Instant,
    began: Instant,
    resumed: Instant,
) -> Option<Duration> {
    const STEP: Duration = Duration::from_millis(50);
    let count = |from: Instant, to: Instant| {
        heard.partition_point(|at| *at < to) - heard.partition_point(|at| *at < from)
    };
    let quiet = began.saturating_duration_since(quiet_from);
    let before = count(quiet_from, began) as f64 / quiet.as_secs_f64().max(1e-3);
    let last = *heard.last()?;
    let mut start = resumed;
    while start + STEADY <= last {
        let rate = count(start, start + STEADY) as f64 / STEADY.as_secs_f64();
        if rate >= RECOVERED * before {
            return Some(start - resumed);
        }
        start += STEP;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_at_either_end_is_a_gap_too() {
        let origin = Instant::now();
        let at = |n: u64| origin + Duration::from_millis(n);
        let moments = [at(5), at(20), at(22)];
        assert_eq!(
            longest(&moments, at(10), at(100)),
            Some(Duration::from_millis(78))
        );
        assert_eq!(
            longest(&moments, at(0), at(23)),
            Some(Duration::from_millis(15))
        );
        assert_eq!(longest(&[], at(0), at(9)), Some(Duration::from_millis(9)));
    }

    #[test]
    fn a_client_that_hears_as_much_as_before_says_that_the_brownout_is_over() {
        let origin = Instant::now();
        let at = |n: u64| origin + Duration::from_millis(n);
        // Ten a second; nothing from 5 s to 8 s, then as before.
        let heard: Vec<_> = (0..200)
            .map(|n| n * 100)
            .filter(|n| !(5000..8000).contains(n))
            .map(at)
            .collect();
        let over = brownout_of(&heard, at(0), at(5000), at(6000)).expect("over");
        // Four fifths of the two seconds must have been heard.
        assert!((1500..=2000).contains(&over.as_millis()), "{over:?}");
    }
}
