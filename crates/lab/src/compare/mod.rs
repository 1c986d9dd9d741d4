//! The same guest moved by QEMU's own means over the same link, as libvirt does it: the disk mirrored to
//! an NBD server of the destination's QEMU, then memory by pre-copy, the mirror ended while the guest is
//! stopped.

pub mod machine;
mod mover;
pub mod qmp;

use crate::demo::Figures;
use crate::link::LinkArgs;
use crate::screen::Screen;
use serde::Serialize;
use std::time::{Duration, Instant};
use whimbrel_lab::guest::{GuestError, Report};
use whimbrel_lab::pair::rates::Rates;
use whimbrel_lab::pair::{GuestSpec, Pair, PairError};
use whimbrel_lab::{LabError, guest};

/// What can keep the comparison from being made.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    #[error(transparent)]
    Lab(#[from] LabError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Pair(#[from] PairError),
    #[error("{path}: {source}")]
    Io {
        path: String,
        source: std::io::Error,
    },
    #[error("QEMU refused `{command}`: {said}")]
    Refused { command: String, said: String },
    #[error("QEMU's monitor is gone while {doing}; its log ends with:\n{log}")]
    Gone { doing: String, log: String },
    #[error("QEMU did not answer `{command}` within {after:?}")]
    Silent { command: String, after: Duration },
    #[error("{0}")]
    Failed(String),
}

/// How QEMU is told to do it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ways {
    /// The mirror makes the guest's writes wait until they are at the destination too; else they follow later.
    pub write_blocking: bool,
    /// Memory by post-copy with preemption, switched at once, when the disk is equal; else by pre-copy.
    pub postcopy: bool,
}

/// What QEMU's own move came to.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Theirs {
    pub finished: bool,
    pub limit_s: u64,
    /// Where it stood when the time was over.
    pub stood_at: Option<String>,
    pub total_s: Option<f64>,
    /// Until the disk was first equal.
    pub disk_s: Option<f64>,
    /// Until the guest ran at the destination.
    pub switch_s: Option<f64>,
    pub blackout_ms: Option<f64>,
    pub echo_gap_ms: Option<f64>,
    pub brownout_s: Option<f64>,
    pub wan_bytes: u64,
    pub wan_bytes_back: u64,
    /// Passes over the guest's memory.
    pub passes: u64,
    pub rates_before: Rates,
    pub rates_during: Rates,
    pub rates_after: Rates,
    #[serde(skip)]
    pub times: Option<Times>,
    pub verified: bool,
    pub problems: Vec<String>,
}

/// The time line of a move: what the guest reported before, and during it.
#[derive(Clone, Debug)]
pub struct Times {
    pub quiet_from: Instant,
    pub began: Instant,
    pub ended: Instant,
    pub reports: Vec<(Instant, Report)>,
}

impl Theirs {
    /// Not finishing is a result; a comparison that could not be made, or a broken guest, is none.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Moves a fresh guest of the same kind. The lab's other guest must have ended.
pub fn run(
    pair: &Pair,
    spec: &GuestSpec,
    link: &LinkArgs,
    limit: Duration,
    screen: &mut Screen,
) -> Theirs {
    let mut theirs = Theirs {
        limit_s: limit.as_secs(),
        ..Theirs::default()
    };
    screen.put("");
    screen.say(&format!(
        "now the same by QEMU's own means over {}: blockdev-mirror, then pre-copy; {} s at most",
        link.describe(),
        limit.as_secs()
    ));
    if let Err(error) = mover::play(pair, spec, Ways::default(), limit, screen, &mut theirs) {
        theirs.problems.push(error.to_string());
    }
    theirs
}

/// The same in these ways, and without a word about it.
pub fn run_by(
    pair: &Pair,
    spec: &GuestSpec,
    ways: Ways,
    limit: Duration,
    screen: &mut Screen,
) -> Theirs {
    let mut theirs = Theirs {
        limit_s: limit.as_secs(),
        ..Theirs::default()
    };
    if let Err(error) = mover::play(pair, spec, ways, limit, screen, &mut theirs) {
        theirs.problems.push(error.to_string());
    }
    theirs
}

/// Both results side by side.
pub fn columns(ours: &Figures, theirs: &Theirs) -> String {
    use crate::demo::{mib, shown};
    let mut lines = vec![format!(
        "  {:<14}{:>16}{:>22}",
        "", "Whimbrel", "QEMU alone"
    )];
    let mut row = |name: &str, ours: String, theirs: String| {
        lines.push(format!("  {name:<14}{ours:>16}{theirs:>22}"));
    };
    let total = match theirs.finished {
        true => shown(theirs.total_s, "s", 1),
        false => format!("not done in {} s", theirs.limit_s),
    };
    row("total", format!("{:.1} s", ours.total_s), total);
    row(
        "blackout",
        shown(ours.blackout_ms, "ms", 0),
        shown(theirs.blackout_ms, "ms", 0),
    );
    row(
        "echo gap",
        shown(ours.echo_gap_ms, "ms", 0),
        shown(theirs.echo_gap_ms, "ms", 0),
    );
    row(
        "brownout",
        shown(ours.brownout_s, "s", 1),
        shown(theirs.brownout_s, "s", 1),
    );
    row("over the link", mib(ours.wan_bytes), mib(theirs.wan_bytes));
    let share = |now: &Rates, before: &Rates| format!("{:.0} %", now.share_of(before) * 100.0);
    row(
        "slowest during",
        share(&ours.rates_during, &ours.rates_before),
        share(&theirs.rates_during, &theirs.rates_before),
    );
    let words = |sound: bool| if sound { "yes" } else { "no" }.to_owned();
    let checked = match theirs.finished {
        true => words(theirs.verified),
        false => "-".to_owned(),
    };
    row("checked", words(ours.verified), checked);
    if let Some(stood) = &theirs.stood_at {
        lines.push(format!("  QEMU alone stood at: {stood}"));
    }
    lines.push("  (slowest during: the share of its earlier rate that the slowest workload had during the move)".to_owned());
    for problem in &theirs.problems {
        lines.push(format!("  WRONG (QEMU alone)  {problem}"));
    }
    lines.join("\n")
}

/// A file's end, for messages.
fn tail(path: &std::path::Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let start = text.len().saturating_sub(2000);
    String::from_utf8_lossy(&text[start..]).into_owned()
}

/// A sparse copy of the guest's disk.
fn copy_disk(disk: &guest::Disk, to: &std::path::Path) -> Result<(), CompareError> {
    Ok(disk.copy_to(to)?)
}
