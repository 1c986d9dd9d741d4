//! A choice among the metadata contexts of an export, by their numbers on the wire.

use crate::export::MAX_CONTEXTS;

/// Numbers from 1 to [`MAX_CONTEXTS`], each at most once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ContextSet(u32);

const _: () = assert!(MAX_CONTEXTS < u32::BITS as usize);

impl ContextSet {
    /// False if the number was there before, or cannot be one.
    pub fn insert(&mut self, number: u32) -> bool {
        let new = (1..=MAX_CONTEXTS as u32).contains(&number) && !self.contains(number);
        if new {
            self.0 |= 1 << number;
        }
        new
    }

    pub fn contains(self, number: u32) -> bool {
        number < u32::BITS && self.0 & 1 << number != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }
}

impl FromIterator<u32> for ContextSet {
    /// Leaves out what [`ContextSet::insert`] would not take.
    fn from_iter<I: IntoIterator<Item = u32>>(numbers: I) -> Self {
        let mut set = ContextSet::default();
        for number in numbers {
            set.insert(number);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_taken_once_and_only_if_it_can_be_one() {
        let mut set = ContextSet::default();
        assert!(set.insert(1) && set.insert(16));
        for refused in [0, 1, 16, 17, 31, 32, u32::MAX] {
            assert!(!set.insert(refused), "{refused}");
        }
        assert_eq!(set.len(), 2);
        assert!(set.contains(16) && !set.contains(2) && !set.contains(33));
    }
}
