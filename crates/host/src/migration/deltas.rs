//! The source's side of what a push connection keeps: who is kept, the content, and whether packing with old
//! content pays. One for each connection, empty when it begins; see [`whimbrel_wire::kept`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use whimbrel_engine::delta::{Keeper, Place, Trial};
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::UNIT;
use whimbrel_wire::delta::{PAGE, Page};
use whimbrel_wire::kept::{Prefixing, Records, Table, Written};
use whimbrel_wire::units::Units;

/// What deltas came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeltaCount {
    /// Units that had gone over the same connection before.
    pub again: u64,
    /// Of these, whose content then was kept.
    pub found: u64,
    /// Of these, that went as what changed, ...
    pub units: u64,
    /// ... and by so many bytes less than whole, before packing.
    pub saved: u64,
    /// Units whose content is kept now.
    pub kept: u64,
}

impl DeltaCount {
    /// With what came after it. What is kept is not a sum: it counts where it was most.
    pub fn add(&mut self, more: DeltaCount) {
        self.again += more.again;
        self.found += more.found;
        self.units += more.units;
        self.saved += more.saved;
        self.kept = self.kept.max(more.kept);
    }
}

/// What a batch is of.
#[derive(Clone, Debug)]
pub enum Kind {
    Disk {
        ram_changes: bool,
    },
    /// While RAM changes, what is sent may be sent again.
    Ram {
        changes: bool,
        /// Units that were written to since the copy began.
        warm: Arc<UnitSet>,
    },
}

/// A batch as records, at least one of them with a slot.
pub struct Batch {
    pub records: Records,
    pub count: DeltaCount,
}

/// What packing a unit with its old content may cost.
#[derive(Clone, Copy, Debug)]
pub struct Means {
    /// Not even tried where the operator wants nothing packed.
    pub packs: bool,
    /// Bytes a second that the link carries.
    pub link: u64,
    /// Bytes that a unit without its old content would take.
    pub whole: usize,
}

pub struct Deltas {
    keeper: Keeper,
    table: Table,
    trial: Trial,
}

impl Deltas {
    /// For a destination that grants so many slots.
    pub fn new(granted: u32) -> Deltas {
        Deltas {
            keeper: Keeper::new(granted),
            table: Table::new(granted),
            trial: Trial::default(),
        }
    }

    /// What is sent from now on is not sent again.
    pub fn close(&mut self) {
        self.keeper.close();
    }

    /// Writes units of a RAM block, of which these were written to lately; `None` if none of them is kept or was.
    pub fn write(&mut self, content: &Units, warm: &UnitSet, means: Means) -> Option<Batch> {
        let mut records = Records::default();
        let mut count = DeltaCount::default();
        let mut has_slots = false;
        let each = content.runs.iter().flat_map(|run| run.start..run.end());
        for (unit, bytes) in each.zip(content.body.chunks_exact(PAGE)) {
            let page: &Page = bytes.try_into().expect("chunks are whole units");
            let (place, is_again) =
                self.keeper
                    .next(content.space, warm.capacity(), unit, warm.contains(unit));
            let mut asked = Asked {
                trial: &mut self.trial,
                means,
                began: None,
            };
            let before = records.bytes().len();
            let key = (content.space, unit);
            let written = self.table.write(key, page, place, &mut asked, &mut records);
            has_slots |= place != Place::Forget;
            count.again += u64::from(is_again);
            if let Place::Against(slot) = place {
                let helped = written != Written::Whole;
                self.keeper.helped(slot, helped);
                count.found += 1;
                if helped {
                    count.units += 1;
                    count.saved += UNIT.saturating_sub((records.bytes().len() - before) as u64);
                }
            }
        }
        count.kept = self.keeper.kept() as u64;
        has_slots.then_some(Batch { records, count })
    }
}

/// [`Trial`], with the time.
struct Asked<'a> {
    trial: &'a mut Trial,
    means: Means,
    began: Option<Instant>,
}

impl Prefixing for Asked<'_> {
    fn tries(&mut self) -> bool {
        let tries = self.means.packs && self.trial.tries();
        self.began = tries.then(Instant::now);
        tries
    }

    fn tried(&mut self, bytes: Option<usize>) {
        let took = self.began.map_or(Duration::ZERO, |began| began.elapsed());
        let saved = bytes.map_or(0, |bytes| self.means.whole.saturating_sub(bytes));
        self.trial.tried(took, saved, self.means.link);
    }
}
