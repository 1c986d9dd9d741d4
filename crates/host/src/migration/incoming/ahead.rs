//! Disks that come ahead of the switchover: the destination's part. The order that makes it safe is told in
//! `outgoing/disks.rs`.

use std::sync::Arc;

use whimbrel_engine::inflow::SpaceIn;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId};
use whimbrel_engine::switchover::Phase;

use super::Incoming;
use crate::disk::{Filling, Soil};
use crate::migration::arrivals::ArrivalError;
use crate::migration::lane::LaneError;
use crate::migration::spaces;

impl Incoming {
    /// Lets disks in, though the machine will run here only later. Said again on each connection.
    pub(super) fn begin_disks_ahead(&mut self) {
        if self.has_disks_ahead() || self.switch.phase() != Phase::Copy {
            return;
        }
        let Some(fillings) = self.fillings() else {
            return;
        };
        let units = fillings.iter().map(Filling::units);
        self.stale_disks = units.map(UnitSet::empty).collect();
        let fillings = fillings.into_iter().map(|disk| Arc::new(disk.ahead()));
        self.setup.arrivals.set_disks(fillings.collect());
        self.setup
            .board
            .tell("disks come ahead of the switchover, as far as the guest does not write to them");
    }

    pub(super) fn has_disks_ahead(&self) -> bool {
        !self.stale_disks.is_empty()
    }

    /// The disks, to be filled; `None` without volumes and a QEMU for them.
    fn fillings(&mut self) -> Option<Vec<Filling>> {
        let running = self.running.as_ref()?;
        let landing = self.landing.as_mut()?;
        let mut fillings = Vec::new();
        for (n, (volume, disk)) in landing.volumes.iter_mut().zip(&running.disks).enumerate() {
            fillings.push(Filling::new(
                SpaceIn::absent(spaces::disk(n, disk.name(), disk.size())),
                Soil::Fresh,
                volume.file.clone(),
                volume.journal.take()?,
                self.setup.wants.clone(),
                self.setup.board.clock(),
            ));
        }
        Some(fillings)
    }

    /// The disks at the switchover: what came ahead and is old is absent again.
    pub(super) fn disks_taken_over(&mut self) -> Option<Vec<Arc<Filling>>> {
        if !self.has_disks_ahead() {
            let fillings = self.fillings()?;
            return Some(fillings.into_iter().map(Arc::new).collect());
        }
        let disks = self.setup.arrivals.disks();
        for (disk, stale) in disks.iter().zip(&self.stale_disks) {
            disk.take_over(stale);
        }
        Some(disks)
    }

    /// What the source says of spaces that do not exist, or of units beyond them, is nothing to this side.
    pub(super) fn note_stale(&mut self, space: SpaceId, runs: &[Extent]) {
        let disks = self.running.as_ref().map_or(0, |r| r.disks.len());
        let n = usize::from(space.0);
        let stale = match n.checked_sub(disks) {
            Some(block) => self.stale.get_mut(block),
            None => self.stale_disks.get_mut(n),
        };
        let Some(stale) = stale else { return };
        let whole = Extent::new(0, stale.capacity());
        for run in runs {
            stale.insert(run.clamp_to(whole));
        }
    }

    /// Why the connection broke, if this host cannot store what comes ahead.
    pub(super) fn cannot_store(&self, error: &LaneError) -> Option<String> {
        match error {
            LaneError::Arrival(ArrivalError::Disk { .. }) if self.switch.phase() == Phase::Copy => {
                Some(error.to_string())
            }
            _ => None,
        }
    }
}
