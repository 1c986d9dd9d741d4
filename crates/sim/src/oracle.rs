//! What the guest knows: which versions each sector of its disks may hold.
//!
//! As long as no host loses power a sector holds exactly what was last acknowledged. After a power cut it may
//! hold that or anything older, down to what the last acknowledged flush covered; the first read settles which.

use std::collections::{BTreeMap, BTreeSet};

/// The guest's knowledge of one disk.
#[derive(Clone, Debug)]
pub struct Oracle {
    newest: Vec<(u32, u64)>,
    /// Versions before the newest that no acknowledged flush has made impossible, with the count of
    /// acknowledgements at which they were acknowledged. Oldest first.
    older: BTreeMap<u64, Vec<(u32, u64)>>,
    /// Sectors that a power cut may have set back.
    vague: BTreeSet<u64>,
}

impl Oracle {
    pub fn new(content: &[u32]) -> Self {
        Oracle {
            newest: content.iter().map(|&v| (v, 0)).collect(),
            older: BTreeMap::new(),
            vague: BTreeSet::new(),
        }
    }

    pub fn wrote(&mut self, sector: u64, version: u32, acknowledgement: u64) {
        let newest = &mut self.newest[sector as usize];
        self.older.entry(sector).or_default().push(*newest);
        *newest = (version, acknowledgement);
    }

    /// A flush that was begun after so many acknowledgements was acknowledged.
    pub fn flushed(&mut self, acknowledgements: u64) {
        let newest = &self.newest;
        self.older.retain(|&sector, versions| {
            if newest[sector as usize].1 <= acknowledgements {
                return false;
            }
            let covered = versions.iter().rposition(|v| v.1 <= acknowledgements);
            versions.drain(..covered.unwrap_or(0));
            true
        });
    }

    /// The host lost power. These writes were under way, and may have been done.
    pub fn power_cut(&mut self, under_way: impl Iterator<Item = (u64, u32)>) {
        for (sector, version) in under_way {
            self.wrote(sector, version, u64::MAX);
        }
        self.vague.extend(self.older.keys());
    }

    /// The guest is gone, its host is not. These writes were under way, and may be done yet.
    pub fn abandoned(&mut self, under_way: impl Iterator<Item = (u64, u32)>) {
        for (sector, version) in under_way {
            self.wrote(sector, version, u64::MAX);
            self.vague.insert(sector);
        }
    }

    /// Whether the sector may read so; what was read is known from then on.
    pub fn read(&mut self, sector: u64, version: u32) -> bool {
        let newest = &mut self.newest[sector as usize];
        if !self.vague.contains(&sector) {
            return newest.0 == version;
        }
        let older = self.older.get(&sector).map_or(&[][..], Vec::as_slice);
        let possible = newest.0 == version || older.iter().any(|v| v.0 == version);
        if possible {
            *newest = (version, 0);
            self.older.remove(&sector);
            self.vague.remove(&sector);
        }
        possible
    }

    /// For a message: what the sector should read.
    pub fn expected(&self, sector: u64) -> String {
        let newest = self.newest[sector as usize].0;
        match self.older.get(&sector) {
            Some(older) if self.vague.contains(&sector) => {
                let older: Vec<u32> = older.iter().map(|v| v.0).collect();
                format!("{newest} or one of {older:?}")
            }
            _ => newest.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_power_cut_nothing_older_than_the_flush_may_be_read() {
        let mut oracle = Oracle::new(&[7]);
        oracle.wrote(0, 8, 1);
        oracle.wrote(0, 9, 2);
        oracle.flushed(1);
        assert!(!oracle.read(0, 8), "no power was cut");
        oracle.power_cut([(0, 10)].into_iter());
        assert!(!oracle.clone().read(0, 7));
        for possible in [8, 9, 10] {
            let mut oracle = oracle.clone();
            assert!(oracle.read(0, possible));
            assert!(!oracle.read(0, 100));
            assert!(oracle.read(0, possible), "settled");
        }
    }
}
