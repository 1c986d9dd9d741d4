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

use crate::set::UnitSet;
use crate::space::Extent;

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
