//! Modelled storage: what a disk holds now, what of it survives a power cut, and a volume's residency journal.

use std::collections::BTreeMap;

use whimbrel_engine::inflow::Change;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::Extent;

use crate::rng::Rng;

/// Sectors of a unit.
pub const SECTORS: u64 = whimbrel_engine::space::SECTORS_PER_UNIT;

/// A unit's content: a version for each sector, 0 being zeroes. RAM uses the first only.
pub type Unit = [u32; SECTORS as usize];

/// A file: each sector holds the version last written. What was not synced may be any of the versions since.
#[derive(Clone, Debug, Default)]
pub struct Store {
    now: Vec<u32>,
    /// Sectors not synced: the durable version, then those written since, the newest last.
    unsynced: BTreeMap<u64, Vec<u32>>,
}

/// What a sync that was begun will have made durable: by sector, how many later versions there were.
pub type Sync = Vec<(u64, usize)>;

impl Store {
    /// A file that reads as zeroes.
    pub fn new(sectors: u64) -> Self {
        Store {
            now: vec![0; sectors as usize],
            unsynced: BTreeMap::new(),
        }
    }

    pub fn sectors(&self) -> u64 {
        self.now.len() as u64
    }

    pub fn read(&self, sector: u64) -> u32 {
        self.now[sector as usize]
    }

    pub fn write(&mut self, sector: u64, version: u32) {
        let old = &mut self.now[sector as usize];
        self.unsynced
            .entry(sector)
            .or_insert_with(|| vec![*old])
            .push(version);
        *old = version;
    }

    /// Sectors past the end read as zeroes.
    pub fn unit(&self, unit: u64) -> Unit {
        std::array::from_fn(|bit| {
            let sector = (unit * SECTORS) as usize + bit;
            self.now.get(sector).copied().unwrap_or(0)
        })
    }

    /// Only one sync of a store may be under way.
    pub fn sync_begin(&self) -> Sync {
        let later = |(&sector, versions): (&u64, &Vec<u32>)| (sector, versions.len() - 1);
        self.unsynced.iter().map(later).collect()
    }

    pub fn sync_end(&mut self, sync: Sync) {
        for (sector, later) in sync {
            if let Some(versions) = self.unsynced.get_mut(&sector) {
                versions.drain(..later);
                if versions.len() == 1 {
                    self.unsynced.remove(&sector);
                }
            }
        }
    }

    /// Each sector that was not synced is left in any of its versions since.
    pub fn power_cut(&mut self, rng: &mut Rng) {
        for (sector, versions) in std::mem::take(&mut self.unsynced) {
            self.now[sector as usize] = versions[rng.below(versions.len() as u64) as usize];
        }
    }
}

/// A volume's residency journal, as `crates/volume/src/journal` promises it: appended records survive the
/// daemon; a power cut leaves what a readable barrier covers.
#[derive(Clone, Debug, Default)]
pub struct Residency {
    log: Vec<Change>,
    /// Records of copies that wait for the next append. Lost with the daemon.
    pub lazy: Vec<Change>,
    /// Records covered by a barrier that is durable.
    covered: usize,
    /// Records covered by a barrier that was written: it may have become durable by itself.
    written: usize,
    /// The host lost power since the last daemon that looked.
    doubtful: bool,
}

impl Residency {
    pub fn append(&mut self, changes: &[Change]) {
        self.log.append(&mut self.lazy);
        self.log.extend_from_slice(changes);
    }

    /// Records in the log, for a barrier to cover.
    pub fn records(&self) -> usize {
        self.log.len()
    }

    /// The data of so many records is durable, and a barrier says so.
    pub fn barrier_written(&mut self, records: usize) {
        self.written = self.written.max(records);
    }

    pub fn barrier_durable(&mut self, records: usize) {
        self.covered = self.covered.max(records);
    }

    pub fn daemon_died(&mut self) {
        self.lazy.clear();
    }

    pub fn power_cut(&mut self, rng: &mut Rng) {
        self.lazy.clear();
        let believed = if rng.percent(50) {
            self.written
        } else {
            self.covered
        };
        self.log.truncate(believed.max(self.covered));
        self.covered = self.log.len();
        self.written = self.log.len();
        self.doubtful = true;
    }

    /// After a power cut, or if the guest's process is gone, a write of the guest's to a unit that is here may
    /// have been done while no record tells of it. From then on all that is here counts as written by the guest:
    /// it cannot be compared with the source.
    pub fn own_what_is_doubtful(&mut self, units: u64, guest_gone: bool) {
        if std::mem::take(&mut self.doubtful) || guest_gone {
            let (resident, _, _) = self.recover(units);
            self.log.extend(resident.runs().map(Change::Written));
        }
    }

    /// Resident units, units of the guest's, and the sectors that are here of units that are not.
    pub fn recover(&self, units: u64) -> (UnitSet, UnitSet, BTreeMap<u64, u8>) {
        let (mut resident, mut owned) = (UnitSet::empty(units), UnitSet::empty(units));
        let mut partial = BTreeMap::new();
        for change in &self.log {
            match *change {
                Change::Filled(run) => {
                    resident.insert(run);
                }
                Change::Written(run) => {
                    resident.insert(run);
                    owned.insert(run);
                }
                Change::PartlyWritten { unit, mask } => {
                    owned.insert(Extent::unit(unit));
                    *partial.entry(unit).or_insert(0) |= mask;
                }
            }
        }
        partial.retain(|&unit, _| !resident.contains(unit));
        (resident, owned, partial)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_synced_survives_a_power_cut_and_what_came_after_may() {
        for seed in 0..32 {
            let mut store = Store::new(2);
            store.write(0, 1);
            let sync = store.sync_begin();
            store.write(0, 2);
            store.write(1, 3);
            store.sync_end(sync);
            store.power_cut(&mut Rng::new(seed, 0));
            assert!([1, 2].contains(&store.read(0)));
            assert!([0, 3].contains(&store.read(1)));
        }
    }

    #[test]
    fn records_past_the_last_barrier_are_lost_with_the_host_and_kept_with_the_daemon() {
        let mut journal = Residency::default();
        journal.append(&[Change::Written(Extent::unit(0))]);
        journal.barrier_written(1);
        journal.barrier_durable(1);
        journal.append(&[Change::Written(Extent::unit(1))]);
        journal.daemon_died();
        assert_eq!(journal.recover(2).0.len(), 2);
        journal.power_cut(&mut Rng::new(1, 0));
        assert_eq!(journal.recover(2).0.len(), 1);
    }
}
