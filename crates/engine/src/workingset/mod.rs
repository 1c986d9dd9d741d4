//! Working sets: which parts of a space will be read, and which written, in the time to come.
//!
//! # The idea
//! An [`Estimator`] is told every access and, whenever it is asked, names the regions that it expects to be
//! touched in a time to come, the likeliest first: reads and writes apart, because they are used for opposite
//! ends. What will be *read* is worth sending early, for a read of an absent unit waits for the link. What will be
//! *written* is not worth sending yet, for it would have to go again.
//!
//! | estimator | is |
//! |---|---|
//! | [`heat::DecayedHeat`] | accesses, each worth less the older it is |
//! | [`windows::SlidingWindows`] | in how many of the latest windows a region was touched (MLLM) |
//! | [`lifetable::LifeTable`] | how often regions with such a past were touched again, as learned from this very space |
//! | [`oracle::Oracle`] | the future, for benches: what no estimator can be better than |
//!
//! [`judge`] says how good one is: precision, recall, and what a migration that believes it pays.
//!
//! # The grain
//! A region is [`REGION_UNITS`] units: 64 KiB. By the unit, a table that remembers 4 GiB of touched disk would have
//! a million entries, and a guest that reads a file for the second time rarely reads the very same units only. By
//! the MiB (the grain of the access log's counters) a hot region is mostly cold: one written unit of 4 KiB would hold
//! back 255 others, and the reads of a mail spool spread over all of it. 64 KiB is where ext4 and XFS keep files
//! of that size together, where guests' readahead ends, and 65,536 regions are 4 GiB.
//!
//! # Memory
//! An estimator remembers at most as many regions as it was made for. When one more is touched, the quarter that was
//! touched longest ago is forgotten at once.

pub mod heat;
pub mod judge;
pub mod lifetable;
pub mod oracle;
mod tracked;
pub mod windows;

use crate::space::Extent;
#[cfg(test)]
use crate::space::UNIT;

/// Units of a region: 64 KiB.
pub const REGION_UNITS: u64 = 16;

/// Regions an estimator remembers unless told otherwise: 4 GiB of touched disk.
pub const REGIONS: usize = 65_536;

/// Which of the two working sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Touch {
    Read,
    Write,
}

impl Touch {
    pub const BOTH: [Touch; 2] = [Touch::Read, Touch::Write];

    pub fn other(self) -> Touch {
        match self {
            Touch::Read => Touch::Write,
            Touch::Write => Touch::Read,
        }
    }
}

/// One access of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The caller's milliseconds; one that is earlier than its predecessor counts as made at the same time.
    pub at_ms: u64,
    pub touch: Touch,
    /// Every unit touched, though it be in part.
    pub units: Extent,
}

/// A region that is expected to be touched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranked {
    /// The region's first unit is this times [`REGION_UNITS`].
    pub region: u64,
    /// How strongly; comparable within one answer alone.
    pub score: f32,
}

impl Ranked {
    pub fn units(&self) -> Extent {
        Extent::new(self.region * REGION_UNITS, REGION_UNITS)
    }
}

/// The time that a prediction is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub from_ms: u64,
    /// Not in it.
    pub until_ms: u64,
}

impl Span {
    pub fn new(from_ms: u64, until_ms: u64) -> Span {
        Span { from_ms, until_ms }
    }
}

/// Predicts working sets. Deterministic: the same accesses and questions give the same answers.
pub trait Estimator {
    /// The guest did this.
    fn access(&mut self, access: Access);

    /// The working set of a time to come, as known at `now_ms`: the regions that are expected to be touched so, at
    /// most `most`, strongest first, of equally strong ones the lower first, none twice. Empty if nothing was ever
    /// touched. `span` begins now or later; estimators that know but one future answer with that.
    fn predict(&mut self, touch: Touch, now_ms: u64, span: Span, most: usize) -> Vec<Ranked>;

    /// Bytes of what it remembers, about.
    fn memory(&self) -> usize;
}

/// The regions that units lie in.
pub fn regions(units: Extent) -> std::ops::Range<u64> {
    if units.is_empty() {
        return 0..0;
    }
    let end = units.start.saturating_add(units.len);
    units.start / REGION_UNITS..end.div_ceil(REGION_UNITS)
}

/// The strongest `most`, in order.
fn rank(mut all: Vec<Ranked>, most: usize) -> Vec<Ranked> {
    let order = |a: &Ranked, b: &Ranked| b.score.total_cmp(&a.score).then(a.region.cmp(&b.region));
    if all.len() > most && most > 0 {
        all.select_nth_unstable_by(most - 1, order);
    }
    all.truncate(most);
    all.sort_unstable_by(order);
    all
}

#[cfg(test)]
mod tests;
