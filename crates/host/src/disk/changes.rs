//! Where a guest writes to a disk whose content goes ahead of a switchover.
//!
//! A write is noted when it has ended and before it is answered, however it ended: a copy that is read while it
//! is under way is noted as old afterwards. It is noted when it begins too, since a write whose client goes away
//! meanwhile is not waited for.

use std::sync::{Mutex, MutexGuard};

use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::Extent;

/// Units that were written to and not looked at yet.
pub struct Changes {
    units: u64,
    noted: Mutex<UnitSet>,
}

impl Changes {
    /// Of a disk of so many units.
    pub fn new(units: u64) -> Self {
        Changes {
            units,
            noted: Mutex::new(UnitSet::empty(units)),
        }
    }

    fn noted(&self) -> MutexGuard<'_, UnitSet> {
        self.noted.lock().expect("no holder of this lock panics")
    }

    /// A change of these bytes begins; it is noted again when what is returned goes.
    pub fn begin(&self, offset: u64, len: u64) -> Change<'_> {
        let extent = Extent::touching(offset, len).clamp_to(Extent::new(0, self.units));
        self.noted().insert(extent);
        Change {
            changes: self,
            extent,
        }
    }

    /// What was noted since this was last asked.
    pub fn take(&self) -> UnitSet {
        std::mem::replace(&mut *self.noted(), UnitSet::empty(self.units))
    }
}

/// A change under way.
pub struct Change<'a> {
    changes: &'a Changes,
    extent: Extent,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.changes.noted().insert(self.extent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_that_was_looked_at_while_it_was_under_way_is_noted_once_more() {
        let changes = Changes::new(10);
        let write = changes.begin(4096, 100);
        assert_eq!(changes.take().runs().collect::<Vec<_>>(), [Extent::unit(1)]);
        assert!(changes.take().is_empty());
        drop(write);
        assert_eq!(changes.take().runs().collect::<Vec<_>>(), [Extent::unit(1)]);
    }

    #[test]
    fn what_is_beyond_the_disk_is_noted_as_nothing() {
        let changes = Changes::new(2);
        drop(changes.begin(2 * 4096, 4096));
        assert!(changes.take().is_empty());
    }
}
