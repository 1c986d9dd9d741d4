//! One estimator on one trace with one budget, over all links and starts.

use serde::Serialize;
use std::collections::BTreeMap;
use whimbrel_engine::workingset::judge::{Foretold, Move, Paid};

/// What was foretold, with its shares.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Shares {
    #[serde(flatten)]
    told: Foretold,
    precision: Option<f64>,
    recall: Option<f64>,
}

impl From<Foretold> for Shares {
    fn from(told: Foretold) -> Shares {
        Shares {
            told,
            precision: told.precision(),
            recall: told.recall(),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
struct Moved {
    mbits: u64,
    plan: Move,
    paid: Paid,
}

#[derive(Clone, Debug, Serialize)]
pub struct Row {
    trace: String,
    pub estimator: String,
    budget_mib: u64,
    reads: Shares,
    writes: Shares,
    /// Sums over all moves, in units; the next in reads.
    again: u64,
    stalled: u64,
    stalled_reads: u64,
    ahead: u64,
    pub cost: u64,
    /// By how much of sliding windows' cost it is less.
    less: Option<f64>,
    /// To tell it an access.
    pub nanoseconds: f64,
    /// Bytes.
    pub memory: usize,
    moves: Vec<Moved>,
}

pub const HEAD: &str = "estimator  budget     reads P    R     writes P    R   sent ahead     again  stalled (reads)      cost  to windows  ns/access  memory";

fn share(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |s| format!("{s:.3}"))
}

fn percent(less: Option<f64>) -> String {
    less.map_or("-".to_owned(), |less| {
        format!("{:+.1} %", 0.0 - less * 100.0)
    })
}

impl Row {
    pub fn new(
        trace: &str,
        estimator: &str,
        budget_mib: u64,
        reads: Foretold,
        writes: Foretold,
    ) -> Row {
        Row {
            trace: trace.to_owned(),
            estimator: estimator.to_owned(),
            budget_mib,
            reads: reads.into(),
            writes: writes.into(),
            again: 0,
            stalled: 0,
            stalled_reads: 0,
            ahead: 0,
            cost: 0,
            less: None,
            nanoseconds: 0.0,
            memory: 0,
            moves: Vec::new(),
        }
    }

    pub fn moved(&mut self, mbits: u64, plan: Move, paid: Paid) {
        self.again += paid.again;
        self.stalled += paid.stalled;
        self.stalled_reads += paid.stalled_reads;
        self.ahead += paid.ahead;
        self.cost += paid.cost();
        self.moves.push(Moved { mbits, plan, paid });
    }

    pub fn compare(&mut self, plain: Option<u64>) {
        let plain = plain.filter(|plain| *plain > 0);
        self.less = plain.map(|plain| 1.0 - self.cost as f64 / plain as f64);
    }

    pub fn text(&self) -> String {
        format!(
            "{:<9} {:4} MiB   {:>7} {:>7}   {:>7} {:>7} {:>11} {:>9} {:>8} {:>7} {:>9} {:>11} {:>10.0} {:>4} KiB",
            self.estimator,
            self.budget_mib,
            share(self.reads.precision),
            share(self.reads.recall),
            share(self.writes.precision),
            share(self.writes.recall),
            self.ahead,
            self.again,
            self.stalled,
            format!("({})", self.stalled_reads),
            self.cost,
            percent(self.less),
            self.nanoseconds,
            self.memory >> 10,
        )
    }
}

/// Over traces, each of the same weight.
#[derive(Clone, Debug, Serialize)]
pub struct Average {
    estimator: String,
    budget_mib: u64,
    traces: usize,
    less: f64,
}

impl Average {
    pub fn text(&self) -> String {
        format!(
            "{:<9} {:4} MiB: {} over {} traces",
            self.estimator,
            self.budget_mib,
            percent(Some(self.less)),
            self.traces
        )
    }
}

/// A trace on which sliding windows paid nothing is left out: nothing can be less.
pub fn averages(rows: &[Row]) -> Vec<Average> {
    let mut by: BTreeMap<(u64, &str), Vec<f64>> = BTreeMap::new();
    for row in rows {
        if let Some(less) = row.less {
            by.entry((row.budget_mib, &row.estimator))
                .or_default()
                .push(less);
        }
    }
    let average = |((budget_mib, estimator), all): ((u64, &str), Vec<f64>)| Average {
        estimator: estimator.to_owned(),
        budget_mib,
        traces: all.len(),
        less: all.iter().sum::<f64>() / all.len() as f64,
    };
    by.into_iter().map(average).collect()
}
