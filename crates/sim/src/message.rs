//! What the two daemons say: the messages of `crates/wire` that decide anything, without their bytes.

use whimbrel_engine::outflow::Class;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId};
use whimbrel_engine::switchover::{Epoch, Say};

use crate::store::Unit;

#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    Prepare {
        epoch: Epoch,
    },
    Prepared {
        epoch: Epoch,
    },
    Layout,
    LayoutTaken,
    Own(Say),
    Grant {
        epoch: Epoch,
    },
    Stale {
        space: SpaceId,
        runs: Vec<Extent>,
    },
    Ahead,
    DisksAhead,
    RamEnd {
        frames: u64,
    },
    RamTaken,
    Empty {
        space: SpaceId,
        set: UnitSet,
    },
    Have {
        space: SpaceId,
        held: UnitSet,
    },
    Evicted,
    HaveEnd,
    Demand {
        space: SpaceId,
        runs: Vec<Extent>,
    },
    Forget {
        space: SpaceId,
        runs: Vec<Extent>,
    },
    Seeded {
        space: SpaceId,
    },
    SeedHashes {
        space: SpaceId,
        first: u64,
        has: Vec<(u64, Unit)>,
    },
    SeedAlike {
        space: SpaceId,
        first: u64,
        alike: Vec<Extent>,
    },
    SeedEnd {
        space: SpaceId,
    },
    Unstored {
        space: SpaceId,
        runs: Vec<Extent>,
    },
    Digest {
        space: SpaceId,
        included: UnitSet,
        digest: u64,
    },
    DigestAnswer {
        space: SpaceId,
        same: bool,
    },
    Units(Units),
}

/// Content on its way. Zeroes have none.
#[derive(Clone, Debug, PartialEq)]
pub struct Units {
    pub space: SpaceId,
    pub class: Class,
    pub runs: Vec<Extent>,
    pub content: Option<Vec<Unit>>,
}

impl Message {
    /// About as many as the real message takes on the wire.
    pub fn bytes(&self) -> u64 {
        match self {
            Message::Units(units) => {
                64 + units.content.as_ref().map_or(0, Vec::len) as u64
                    * whimbrel_engine::space::UNIT
            }
            Message::Grant { .. } => 60_000,
            Message::Have { .. } | Message::Empty { .. } | Message::Digest { .. } => 160,
            _ => 64,
        }
    }
}
