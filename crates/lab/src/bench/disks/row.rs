//! What one move came to, and the same of several side by side.

use super::case::{Load, Mover, REFERENCE};
use crate::compare::Theirs;
use crate::demo::{Figures, mib, shown};
use serde::Serialize;
use std::time::Instant;
use whimbrel_lab::guest::Report;
use whimbrel_lab::pair::rates::Rates;

/// Milliseconds; of the slowest read of each report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Slowest {
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

impl Slowest {
    /// Nearest rank; of nothing, nothing. Reports in whose time no read ended say nothing: the read that took so long
    /// is in a later one.
    fn of(reports: &[(Instant, Report)], from: Instant, to: Instant) -> Slowest {
        let within = reports.iter().filter(|(at, _)| *at >= from && *at <= to);
        let mut slowest: Vec<_> = within
            .map(|(_, report)| report.slowest_us.read)
            .filter(|us| *us > 0)
            .collect();
        slowest.sort_unstable();
        let at = |part: f64| {
            let rank = (part * slowest.len() as f64).ceil() as usize;
            let us = slowest.get(rank.max(1) - 1).copied().unwrap_or(0);
            us as f64 / 1e3
        };
        Slowest {
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            max_ms: at(1.0),
        }
    }
}

/// This move's share of the reference's in the same run: below 1 is less.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    pub total: Option<f64>,
    pub switch: Option<f64>,
    pub blackout: Option<f64>,
    pub wan_bytes: Option<f64>,
    pub read_p99: Option<f64>,
}

/// One move. Seconds, milliseconds and bytes, as the names say.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub load: Load,
    pub mover: Mover,
    /// Within the limit.
    pub finished: bool,
    /// Where it stood if not.
    pub note: Option<String>,
    /// Until everything was there.
    pub total_s: Option<f64>,
    /// Until the guest ran at the destination.
    pub switch_s: Option<f64>,
    pub blackout_ms: Option<f64>,
    pub echo_gap_ms: Option<f64>,
    pub brownout_s: Option<f64>,
    pub wan_bytes: u64,
    pub wan_bytes_back: u64,
    /// Of disk and RAM, as Whimbrel counted it; of another move of the same load if this was none of its own.
    pub live_bytes: Option<u64>,
    pub wan_over_live: Option<f64>,
    /// Units, by Whimbrel only: 1 is each once.
    pub sent_over_unique: Option<f64>,
    /// Units of disks and RAM that were asked for after the switch, since they were not there; by Whimbrel only: a mirror
    /// has all of the disk there.
    pub absent_reads: Option<u64>,
    pub reads_before: Slowest,
    pub reads_during: Slowest,
    pub rates_before: Rates,
    pub rates_during: Rates,
    pub rates_after: Rates,
    /// Every page by the guest, its disk from outside, and by Whimbrel the digests of both ends.
    pub verified: bool,
    pub beside_reference: Option<Ratio>,
    pub problems: Vec<String>,
}

pub const HEAD: &str = "mover                       total    switch  blackout  echo gap       WAN  /live   sent absent    reads p50 / p99 / max    during / after  result";

impl Row {
    pub fn new(load: Load, mover: Mover) -> Row {
        Row {
            load,
            mover,
            finished: false,
            note: None,
            total_s: None,
            switch_s: None,
            blackout_ms: None,
            echo_gap_ms: None,
            brownout_s: None,
            wan_bytes: 0,
            wan_bytes_back: 0,
            live_bytes: None,
            wan_over_live: None,
            sent_over_unique: None,
            absent_reads: None,
            reads_before: Slowest::default(),
            reads_during: Slowest::default(),
            rates_before: Rates::default(),
            rates_during: Rates::default(),
            rates_after: Rates::default(),
            verified: false,
            beside_reference: None,
            problems: Vec::new(),
        }
    }

    /// Not finishing is a result.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    pub fn reads(
        &mut self,
        reports: &[(Instant, Report)],
        quiet_from: Instant,
        began: Instant,
        ended: Instant,
    ) {
        self.reads_before = Slowest::of(reports, quiet_from, began);
        self.reads_during = Slowest::of(reports, began, ended);
    }

    pub fn take_ours(&mut self, figures: &Figures) {
        self.total_s = self.finished.then_some(figures.total_s);
        self.blackout_ms = figures.blackout_ms;
        self.echo_gap_ms = figures.echo_gap_ms;
        self.brownout_s = figures.brownout_s;
        self.wan_bytes = figures.wan_bytes;
        self.wan_bytes_back = figures.wan_bytes_back;
        self.live_bytes = (figures.unique_bytes > 0).then_some(figures.unique_bytes);
        self.sent_over_unique = self.finished.then_some(figures.units_sent_over_live);
        self.absent_reads = self.finished.then_some(figures.demands);
        self.rates_before = figures.rates_before;
        self.rates_during = figures.rates_during;
        self.rates_after = figures.rates_after;
        self.verified = figures.verified;
        self.problems.extend(figures.problems.iter().cloned());
    }

    pub fn take_theirs(&mut self, theirs: &Theirs) {
        self.finished = theirs.finished;
        self.note = theirs.stood_at.clone();
        self.total_s = theirs.total_s;
        self.switch_s = theirs.switch_s;
        self.blackout_ms = theirs.blackout_ms;
        self.echo_gap_ms = theirs.echo_gap_ms;
        self.brownout_s = theirs.brownout_s;
        self.wan_bytes = theirs.wan_bytes;
        self.wan_bytes_back = theirs.wan_bytes_back;
        self.rates_before = theirs.rates_before;
        self.rates_during = theirs.rates_during;
        self.rates_after = theirs.rates_after;
        self.verified = theirs.verified;
        self.problems.extend(theirs.problems.iter().cloned());
    }

    fn result(&self) -> String {
        match (self.problems.first(), &self.note) {
            (Some(problem), _) => format!("WRONG: {problem}"),
            (None, Some(note)) => format!("not finished: {note}"),
            (None, None) if self.verified => "verified".to_owned(),
            (None, None) => "not verified".to_owned(),
        }
    }

    pub fn text(&self) -> String {
        let dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let reads = &self.reads_during;
        format!(
            "{:<24} {:>8} {:>9} {:>9} {:>9} {:>9} {:>6} {:>6} {:>6} {:>7.0} / {:>5.0} / {:>5.0} ms {:>6.0} % / {:>3.0} %  {}",
            self.mover,
            shown(self.total_s, "s", 1),
            shown(self.switch_s, "s", 1),
            shown(self.blackout_ms, "ms", 0),
            shown(self.echo_gap_ms, "ms", 0),
            mib(self.wan_bytes),
            dash(self.wan_over_live.map(|ratio| format!("{ratio:.2}"))),
            dash(self.sent_over_unique.map(|ratio| format!("{ratio:.3}"))),
            dash(self.absent_reads.map(|count| count.to_string())),
            reads.p50_ms,
            reads.p99_ms,
            reads.max_ms,
            self.rates_during.share_of(&self.rates_before) * 100.0,
            self.rates_after.share_of(&self.rates_before) * 100.0,
            self.result(),
        )
    }
}

/// Of one load's rows: what follows from several of them.
pub fn compare(rows: &mut [Row]) {
    let live = rows.iter().find_map(|row| row.live_bytes);
    for row in &mut *rows {
        row.live_bytes = row.live_bytes.or(live);
        row.wan_over_live = row
            .live_bytes
            .map(|live| row.wan_bytes as f64 / live as f64);
    }
    let Some(reference) = rows.iter().find(|row| row.mover == REFERENCE).cloned() else {
        return;
    };
    let of = |part: Option<f64>, whole: Option<f64>| Some(part?).zip(whole).map(|(p, w)| p / w);
    for row in rows {
        let both = row.finished && reference.finished;
        row.beside_reference = Some(Ratio {
            total: of(row.total_s, reference.total_s),
            switch: of(row.switch_s, reference.switch_s),
            blackout: of(row.blackout_ms, reference.blackout_ms),
            wan_bytes: both.then(|| row.wan_bytes as f64 / reference.wan_bytes as f64),
            read_p99: of(
                both.then_some(row.reads_during.p99_ms),
                (reference.reads_during.p99_ms > 0.0).then_some(reference.reads_during.p99_ms),
            ),
        });
    }
}

/// Each finished move beside the reference of its load.
pub fn ratios(rows: &[Row]) -> String {
    let mut lines = vec![format!(
        "beside {REFERENCE}:         total  switch  blackout   WAN  reads' p99"
    )];
    let shown = |ratio: Option<f64>| ratio.map_or("-".to_owned(), |r| format!("{r:.2}"));
    for row in rows {
        let Some(ratio) = &row.beside_reference else {
            continue;
        };
        lines.push(format!(
            "{:<12} {:<24} {:>7} {:>7} {:>9} {:>5} {:>11}",
            row.load.name(),
            row.mover,
            shown(ratio.total),
            shown(ratio.switch),
            shown(ratio.blackout),
            shown(ratio.wan_bytes),
            shown(ratio.read_p99),
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_are_measured_by_the_reference_of_their_run() {
        let row = |mover, total_s, wan_bytes| Row {
            finished: true,
            total_s: Some(total_s),
            wan_bytes,
            ..Row::new(Load::Mail, mover)
        };
        let mut rows = [
            Row {
                live_bytes: Some(100),
                ..row(Mover::WhimbrelHybrid, 10.0, 80)
            },
            row(Mover::QemuBackground, 40.0, 160),
            Row {
                finished: false,
                total_s: None,
                ..row(Mover::QemuBlocking, 0.0, 999)
            },
        ];
        compare(&mut rows);
        let ratio = rows[0].beside_reference.expect("a reference");
        assert_eq!((ratio.total, ratio.wan_bytes), (Some(0.25), Some(0.5)));
        assert_eq!(rows[1].wan_over_live, Some(1.6));
        let late = rows[2].beside_reference.expect("a reference");
        assert_eq!((late.total, late.wan_bytes), (None, None));
        assert!(ratios(&rows).contains("0.25"));
    }
}
