//! What is remembered of regions, for a bounded number of them.

use std::collections::BTreeMap;

/// Something with a time at which it was last touched.
pub trait Dated {
    /// In the estimator's own clock; the smallest are forgotten first.
    fn last(&self) -> u64;
}

/// Regions with what is remembered of each.
#[derive(Clone, Debug)]
pub struct Tracked<T> {
    entries: BTreeMap<u64, T>,
    most: usize,
}

impl<T: Dated + Default> Tracked<T> {
    /// Remembers at most `most` regions, four at least.
    pub fn new(most: usize) -> Self {
        Tracked {
            entries: BTreeMap::new(),
            most: most.max(4),
        }
    }

    /// The region's entry, made if there is none. At the bound the quarter touched longest ago goes first, of
    /// equally old ones the lower regions.
    pub fn entry(&mut self, region: u64) -> &mut T {
        if self.entries.len() >= self.most && !self.entries.contains_key(&region) {
            let mut ages: Vec<_> = self.entries.iter().map(|(r, e)| (e.last(), *r)).collect();
            let gone = (self.most / 4).max(1);
            ages.select_nth_unstable(gone - 1);
            for (_, region) in &ages[..gone] {
                self.entries.remove(region);
            }
        }
        self.entries.entry(region).or_default()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.entries.iter().map(|(region, entry)| (*region, entry))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut T)> {
        self.entries
            .iter_mut()
            .map(|(region, entry)| (*region, entry))
    }

    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.entries.retain(|_, entry| keep(entry));
    }

    /// The regions of an access, as many as can be remembered.
    pub fn within(&self, units: crate::space::Extent) -> std::ops::Range<u64> {
        let all = super::regions(units);
        all.start..all.end.min(all.start.saturating_add(self.most as u64))
    }

    pub fn memory(&self) -> usize {
        // Nodes of a BTreeMap are two thirds full when filled at random.
        self.entries.len() * (size_of::<u64>() + size_of::<T>()) * 3 / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Dated for u64 {
        fn last(&self) -> u64 {
            *self
        }
    }

    #[test]
    fn at_the_bound_what_was_touched_longest_ago_is_forgotten() {
        let mut tracked: Tracked<u64> = Tracked::new(8);
        for region in 0..8 {
            *tracked.entry(region) = 100 - region;
        }
        *tracked.entry(50) = 200;
        let left: Vec<_> = tracked.iter().map(|(region, _)| region).collect();
        assert_eq!(left, [0, 1, 2, 3, 4, 5, 50]);
    }
}
