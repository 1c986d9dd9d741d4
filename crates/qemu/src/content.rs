//! Where the content of RAM units is read from at the source.

use std::sync::Arc;

use whimbrel_engine::space::{Extent, UNIT};

use crate::Result;
use crate::paused::PausedRam;
use crate::store::RamStore;

/// The copy this daemon has taken, or the stopped QEMU itself: what a restarted daemon has left.
#[derive(Clone, Debug)]
pub enum RamContent {
    Store(Arc<RamStore>),
    Paused(Arc<PausedRam>),
}

impl RamContent {
    /// Appends the content of `units` units to `out`: [`RamStore::read`], [`PausedRam::read`].
    pub fn read(&self, block: usize, unit: u64, units: u64, out: &mut Vec<u8>) -> Result<()> {
        match self {
            RamContent::Store(store) => store.read(block, unit, units, out),
            RamContent::Paused(paused) => paused.read(block, unit, units, out),
        }
    }

    /// Whether the unit is a page of zeros. Costs a look at the page in a paused QEMU, where it is also
    /// false if the page cannot be read.
    pub fn is_zero(&self, block: usize, unit: u64) -> bool {
        match self {
            RamContent::Store(store) => store.is_zero(block, unit),
            RamContent::Paused(paused) => {
                let mut page = Vec::with_capacity(UNIT as usize);
                let read = paused.read(block, unit, 1, &mut page);
                read.is_ok() && page.iter().all(|b| *b == 0)
            }
        }
    }

    /// Waits until no unit of the extent is still to come. In a paused QEMU nothing ever is.
    pub async fn wait_current(&self, block: usize, extent: Extent) {
        match self {
            RamContent::Store(store) => store.wait_current(block, extent).await,
            RamContent::Paused(_) => {}
        }
    }
}
