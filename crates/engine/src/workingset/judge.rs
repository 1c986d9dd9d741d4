//! How good an estimator is, on a trace: what it foretells, and what a migration pays that believes it.
//!
//! # Foretelling
//! The trace is cut into windows. At the beginning of each, the estimator knows all accesses before it and names at
//! most `budget` regions for reads and as many for writes: **predicted**. **Touched** are the regions that the window
//! then read, resp. wrote. Over all windows judged, **precision** is the regions that are both, per region predicted;
//! **recall** is the regions that are both, per region touched. A window without a prediction, or without a touch,
//! adds nothing to the one that it would be divided by.
//!
//! # A migration
//! A disk moves as MLLM would move it, over a link of so many bytes a second, which carries nothing else:
//!
//! - It begins at `start_ms`; the estimator has seen all before. **Live** are the units that were touched before, and
//!   those that the trace later reads before it writes them: they must have content. The rest of the disk, which nobody
//!   touches, is left out: it goes in the end, whoever decides.
//! - Until the switch at `switch_ms`, live units go. First the predicted reads, then all others from the disk's
//!   beginning; the predicted writes are **held**: `budget` regions of those that have content. Predictions are made anew every `ask_ms`. A write makes what was sent
//!   of its units stale: each such unit is **sent again**, whether before the switch or after it. It goes again before
//!   the switch once it is not held.
//! - From the switch on, the guest runs at the destination. A write there needs nothing and makes its units resident.
//!   A read of absent units **stalls**, once for the read; the units absent are counted beside that. They come at once,
//!   and take their time on the link from the rest. The rest follows by the same order, nothing held any more.
//! - It ends when nothing is absent, or with the trace.
//!
//! **Cost** is units sent again plus units a read stalled for: both cross the link at a bad time.

use super::{Access, Estimator, Span, Touch, regions};
use crate::set::UnitSet;
use crate::space::{Extent, UNIT};
use serde::Serialize;
use std::collections::BTreeSet;

/// How right predictions were, for one kind of touch, in regions over all windows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Foretold {
    pub predicted: u64,
    pub touched: u64,
    /// Both.
    pub right: u64,
}

impl Foretold {
    /// Right per predicted; none if nothing was predicted.
    pub fn precision(&self) -> Option<f64> {
        (self.predicted > 0).then(|| self.right as f64 / self.predicted as f64)
    }

    /// Right per touched; none if nothing was touched.
    pub fn recall(&self) -> Option<f64> {
        (self.touched > 0).then(|| self.right as f64 / self.touched as f64)
    }
}

/// Judges predictions of each window that begins at `from_ms` or later and lies in the trace as a whole: of reads, of
/// writes. The trace is in order of time; `window_ms` is not 0.
pub fn foretelling(
    trace: &[Access],
    estimator: &mut dyn Estimator,
    window_ms: u64,
    from_ms: u64,
    budget: usize,
) -> [Foretold; 2] {
    let mut told = [Foretold::default(); 2];
    let (Some(first), Some(last)) = (trace.first(), trace.last()) else {
        return told;
    };
    let mut rest = trace;
    let mut window = first.at_ms / window_ms;
    while (window + 1) * window_ms <= last.at_ms {
        let begins = window * window_ms;
        let (now, later) = rest.split_at(rest.partition_point(|a| a.at_ms < begins + window_ms));
        if begins >= from_ms {
            for touch in Touch::BOTH {
                let predicted: BTreeSet<u64> = estimator
                    .predict(touch, begins, Span::new(begins, begins + window_ms), budget)
                    .iter()
                    .map(|ranked| ranked.region)
                    .collect();
                let of_kind = now.iter().filter(|access| access.touch == touch);
                let touched: BTreeSet<u64> =
                    of_kind.flat_map(|access| regions(access.units)).collect();
                let told = &mut told[touch as usize];
                told.predicted += predicted.len() as u64;
                told.touched += touched.len() as u64;
                told.right += predicted.intersection(&touched).count() as u64;
            }
        }
        now.iter().for_each(|access| estimator.access(*access));
        rest = later;
        window += 1;
    }
    told
}

/// When and how a disk moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Move {
    pub start_ms: u64,
    /// Not before `start_ms`.
    pub switch_ms: u64,
    /// How often predictions are made; not 0.
    pub ask_ms: u64,
    /// What is predicted of reads: those of so long from the switch on, and after it from then on.
    pub window_ms: u64,
    pub bytes_per_second: u64,
    /// Regions in each prediction, at most.
    pub budget: usize,
}

/// What a move paid. Units unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Paid {
    /// Live at the start.
    pub live: u64,
    /// Sent before the switch, again or not.
    pub ahead: u64,
    /// Stale after having been sent, each time.
    pub again: u64,
    /// Reads, not units.
    pub stalled_reads: u64,
    pub stalled: u64,
    /// Of the link's time after the switch, until nothing was absent or the trace ended.
    pub drain_ms: u64,
}

impl Paid {
    pub fn cost(&self) -> u64 {
        self.again + self.stalled
    }
}

/// Moves the disk of a trace. The trace is in order of time.
pub fn migration(trace: &[Access], estimator: &mut dyn Estimator, plan: &Move) -> Paid {
    let before = trace.partition_point(|access| access.at_ms < plan.start_ms);
    let (known, rest) = trace.split_at(before);
    known.iter().for_each(|access| estimator.access(*access));
    let mut road = Road::new(known, rest, *plan);
    let mut rest = rest.iter().peekable();
    let mut now = plan.start_ms;
    let mut switched = false;
    loop {
        if !switched && now >= plan.switch_ms {
            switched = true;
        }
        if switched && (road.pending.is_empty() || rest.peek().is_none()) {
            road.paid.drain_ms = now - plan.switch_ms.min(now);
            return road.paid;
        }
        let mut until = now + plan.ask_ms.max(1);
        if !switched {
            until = until.min(plan.switch_ms);
        }
        road.decide(estimator, now, switched);
        while let Some(access) = rest.next_if(|access| access.at_ms < until) {
            road.pass(access.at_ms.saturating_sub(now), switched);
            now = now.max(access.at_ms);
            match switched {
                false => road.at_source(access),
                true => road.at_destination(access),
            }
            estimator.access(*access);
        }
        road.pass(until - now, switched);
        now = until;
    }
}

/// The move under way.
struct Road {
    plan: Move,
    /// What has to go: live and not at the destination, or stale there.
    pending: UnitSet,
    /// Current at the destination.
    arrived: UnitSet,
    held: UnitSet,
    /// What goes first, the next one last.
    first: Vec<Extent>,
    /// Then all else from here.
    cursor: u64,
    /// Bytes times 1000 that the link may carry; below 0 after demands.
    credit: i64,
    paid: Paid,
}

impl Road {
    fn new(known: &[Access], rest: &[Access], plan: Move) -> Road {
        let all = known.iter().chain(rest);
        let units = all.map(|access| access.units.end()).max().unwrap_or(0);
        let mut live = UnitSet::empty(units);
        for access in known {
            live.insert(access.units);
        }
        let mut written = UnitSet::empty(units);
        for access in rest {
            if access.touch == Touch::Write {
                written.insert(access.units);
                continue;
            }
            let unwritten: Vec<_> = written.gaps_within(access.units).collect();
            for gap in unwritten {
                live.insert(gap);
            }
        }
        Road {
            plan,
            paid: Paid {
                live: live.len(),
                ..Paid::default()
            },
            pending: live,
            arrived: UnitSet::empty(units),
            held: UnitSet::empty(units),
            first: Vec::new(),
            cursor: 0,
            credit: 0,
        }
    }

    fn decide(&mut self, estimator: &mut dyn Estimator, now: u64, switched: bool) {
        let all = Extent::new(0, self.pending.capacity());
        let Move {
            switch_ms,
            window_ms,
            budget,
            ..
        } = self.plan;
        let from = now.max(switch_ms);
        let reads = estimator.predict(Touch::Read, now, Span::new(from, from + window_ms), budget);
        self.held = UnitSet::empty(all.len);
        if !switched {
            let span = Span::new(now, switch_ms);
            let written = estimator.predict(Touch::Write, now, span, budget.saturating_mul(2));
            let units = written.iter().map(|ranked| ranked.units().clamp_to(all));
            let held: Vec<_> = units
                .filter(|units| self.has_content(*units))
                .take(budget)
                .collect();
            for units in held {
                self.held.insert(units);
            }
        }
        self.first = reads
            .iter()
            .rev()
            .map(|r| r.units().clamp_to(all))
            .collect();
        self.cursor = 0;
    }

    fn has_content(&self, units: Extent) -> bool {
        let has = |set: &UnitSet| set.runs_within(units).next().is_some();
        has(&self.pending) || has(&self.arrived)
    }

    /// The link works for so long.
    fn pass(&mut self, ms: u64, switched: bool) {
        self.credit += (self.plan.bytes_per_second.saturating_mul(ms)) as i64;
        let unit = (UNIT * 1000) as i64;
        while self.credit >= unit {
            let Some(run) = self.next((self.credit / unit) as u64) else {
                // What the link could have carried while nothing was to go is lost.
                self.credit = 0;
                return;
            };
            self.pending.remove(run);
            self.arrived.insert(run);
            self.credit -= unit * run.len as i64;
            if !switched {
                self.paid.ahead += run.len;
            }
        }
    }

    /// What goes next, at most so many units.
    fn next(&mut self, most: u64) -> Option<Extent> {
        while let Some(wanted) = self.first.last() {
            let ready = self
                .pending
                .runs_within(*wanted)
                .find_map(|run| self.free(run));
            match ready {
                Some(run) => return Some(Extent::new(run.start, run.len.min(most))),
                None => self.first.pop(),
            };
        }
        while let Some(run) = self.pending.next_run(self.cursor, u64::MAX) {
            if let Some(run) = self.free(run) {
                self.cursor = run.start;
                return Some(Extent::new(run.start, run.len.min(most)));
            }
            self.cursor = run.end();
        }
        None
    }

    /// The first part of a run that is not held.
    fn free(&self, run: Extent) -> Option<Extent> {
        self.held.gaps_within(run).next()
    }

    fn at_source(&mut self, access: &Access) {
        if access.touch == Touch::Write {
            self.paid.again += self.arrived.remove(access.units);
            self.pending.insert(access.units);
            // It may lie behind: the next decision finds it.
        }
    }

    fn at_destination(&mut self, access: &Access) {
        let absent: Vec<_> = self.pending.runs_within(access.units).collect();
        let units: u64 = absent.iter().map(|run| run.len).sum();
        for run in absent {
            self.pending.remove(run);
            self.arrived.insert(run);
        }
        if access.touch == Touch::Read && units > 0 {
            self.paid.stalled_reads += 1;
            self.paid.stalled += units;
            self.credit -= (units * UNIT * 1000) as i64;
        }
    }
}
