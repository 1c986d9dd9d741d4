//! How often each unit of a space is written to: the write working set, as the next seconds will see it.
//!
//! Idea: a byte for each unit. What was written in an epoch grows by [`STEP`], everything else loses a quarter.
//! So a unit that was written once is cold again after some epochs, one that is written all the time stays hot
//! for long after it was last seen, and no unit needs more than its byte. (Svärd et al., "Principles and
//! performance characteristics of algorithms for live VM migration", order pages by such counts; MLLM predicts
//! writes by windows of them.)
//!
//! Traps: what is known of writes is what the dirty log told: once for each of QEMU's passes, not for each write.
//! Epochs are therefore the caller's and should be no shorter than a pass.

use crate::outflow::Outflow;
use crate::set::UnitSet;
use crate::space::{Extent, SpaceId};

/// Milliseconds of an epoch: about what a pass of QEMU's over a few hundred dirty pages takes, and
/// short beside a copy of memory.
pub const EPOCH: u64 = 500;

/// What one epoch with a write adds.
pub const STEP: u8 = 64;

/// Counts for the units of one space.
#[derive(Clone, Debug)]
pub struct WriteHeat {
    counts: Vec<u8>,
    /// Written since the epoch began.
    fresh: UnitSet,
    /// Something has a count at all.
    is_warm: bool,
}

impl WriteHeat {
    /// Everything is cold.
    pub fn new(units: u64) -> Self {
        WriteHeat {
            counts: vec![0; units as usize],
            fresh: UnitSet::empty(units),
            is_warm: false,
        }
    }

    pub fn units(&self) -> u64 {
        self.fresh.capacity()
    }

    /// These units, a set over the space, were written to.
    pub fn written(&mut self, units: &UnitSet) {
        self.fresh.union_with(units);
    }

    /// An epoch is over.
    pub fn epoch(&mut self) {
        if self.is_warm {
            let mut left = 0;
            for count in &mut self.counts {
                *count -= count.div_ceil(4);
                left |= *count;
            }
            self.is_warm = left != 0;
        }
        for unit in self.fresh.runs().flat_map(|run| run.iter()) {
            let count = &mut self.counts[unit as usize];
            *count = count.saturating_add(STEP);
            self.is_warm = true;
        }
        self.fresh = UnitSet::empty(self.fresh.capacity());
    }

    /// Units with a count above `level`, and those written to since the epoch began.
    pub fn hotter_than(&self, level: u8) -> UnitSet {
        let mut hot = self.fresh.clone();
        if !self.is_warm {
            return hot;
        }
        let mut unit = 0;
        for run in self.counts.chunk_by(|a, b| (*a > level) == (*b > level)) {
            let len = run.len() as u64;
            if run[0] > level {
                hot.insert(Extent::new(unit, len));
            }
            unit += len;
        }
        hot
    }

    /// The unit's count.
    pub fn of(&self, unit: u64) -> u8 {
        self.counts[unit as usize]
    }
}

/// The heat of all RAM blocks of a move while they are sent, each a space of an [`Outflow`].
#[derive(Clone, Debug)]
pub(crate) struct Heats {
    /// In the order of their spaces.
    blocks: Vec<(SpaceId, WriteHeat)>,
    /// When the next epoch begins, in the caller's milliseconds.
    epoch_ends: u64,
}

impl Heats {
    /// `held` is what each block has content in; all of it is offered.
    pub(crate) fn begin(
        out: &mut Outflow,
        held: impl IntoIterator<Item = (SpaceId, UnitSet)>,
        now_ms: u64,
    ) -> Self {
        let blocks = held.into_iter().map(|(space, held)| {
            out.offer_set(space, &held);
            (space, WriteHeat::new(held.capacity()))
        });
        Heats {
            blocks: blocks.collect(),
            epoch_ends: now_ms + EPOCH,
        }
    }

    /// These units of a block have other content than before: they are withheld until it is decided on them.
    pub(crate) fn written(&mut self, out: &mut Outflow, block: usize, units: &UnitSet) {
        if let Some((space, heat)) = self.blocks.get_mut(block) {
            heat.written(units);
            out.changed(*space, units);
        }
    }

    /// Time has passed; whether an epoch is over.
    pub(crate) fn look(&mut self, now_ms: u64) -> bool {
        let is_over = now_ms >= self.epoch_ends;
        if is_over {
            self.blocks.iter_mut().for_each(|(_, heat)| heat.epoch());
            self.epoch_ends = now_ms + EPOCH;
        }
        is_over
    }

    pub(crate) fn blocks(&self) -> impl Iterator<Item = (SpaceId, &WriteHeat)> {
        self.blocks.iter().map(|(space, heat)| (*space, heat))
    }

    /// Withholds of each block what `kept` says; whether anything is left that may go.
    pub(crate) fn withhold(
        &self,
        out: &mut Outflow,
        kept: impl Fn(&Outflow, SpaceId, &WriteHeat) -> UnitSet,
    ) -> bool {
        let mut rest = false;
        for (space, heat) in self.blocks() {
            let kept = kept(out, space, heat);
            out.set_withheld(space, &kept);
            rest |= out.has_pushable(space);
        }
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(units: &[u64]) -> UnitSet {
        let mut set = UnitSet::empty(100);
        for &unit in units {
            set.insert(Extent::unit(unit));
        }
        set
    }

    #[test]
    fn one_write_is_forgotten_and_many_are_remembered_for_longer() {
        let mut heat = WriteHeat::new(100);
        for epoch in 0..8 {
            heat.written(&set(if epoch == 7 { &[3, 9] } else { &[3] }));
            heat.epoch();
        }
        assert_eq!(heat.of(9), STEP);
        assert!(heat.of(3) > 2 * STEP);
        let mut until_cold = [0, 0];
        for epoch in 1..40 {
            heat.epoch();
            for (at, unit) in [9, 3].into_iter().enumerate() {
                if heat.of(unit) == 0 && until_cold[at] == 0 {
                    until_cold[at] = epoch;
                }
            }
        }
        assert!(
            until_cold[0] > 0 && until_cold[0] < until_cold[1],
            "{until_cold:?}"
        );
        assert_eq!(heat.hotter_than(0), set(&[]));
    }

    #[test]
    fn what_was_written_in_this_epoch_is_hotter_than_any_level() {
        let mut heat = WriteHeat::new(100);
        heat.written(&set(&[0, 50, 99]));
        assert_eq!(heat.hotter_than(u8::MAX), set(&[0, 50, 99]));
        heat.epoch();
        assert_eq!(heat.hotter_than(STEP - 1), set(&[0, 50, 99]));
        assert_eq!(heat.hotter_than(STEP), set(&[]));
    }
}
