//! The coordinates of everything that moves: spaces, units and extents.

use serde::{Deserialize, Serialize};

/// Bytes in a unit, the grain in which content moves.
pub const UNIT: u64 = 4096;

/// Bytes in a sector, the grain in which a guest may write a disk.
pub const SECTOR: u64 = 512;

/// Sectors in a unit.
pub const SECTORS_PER_UNIT: u64 = UNIT / SECTOR;

/// A space's number within one migration: its index in the migration's list of spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SpaceId(pub u16);

impl std::fmt::Display for SpaceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "space {}", self.0)
    }
}

/// What a space is made of. The engine treats both alike but for two things: a disk's units may be
/// written in sectors, and a RAM unit at the destination may be placed only once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpaceKind {
    Disk,
    Ram,
}

/// A space as both daemons know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceInfo {
    pub id: SpaceId,
    pub kind: SpaceKind,
    /// The volume's name, or QEMU's name of the RAM block (`pc.ram`).
    pub name: String,
    /// Length in bytes. The last unit may be shorter than [`UNIT`].
    pub len: u64,
}

impl SpaceInfo {
    /// Number of units, the last possibly partial.
    pub fn units(&self) -> u64 {
        self.len.div_ceil(UNIT)
    }
}

/// A run of units: `start .. start + len`, in units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    pub start: u64,
    pub len: u64,
}

impl Extent {
    pub fn new(start: u64, len: u64) -> Self {
        Extent { start, len }
    }

    /// One unit.
    pub fn unit(index: u64) -> Self {
        Extent {
            start: index,
            len: 1,
        }
    }

    /// Every unit that the byte range touches; empty for a range of no bytes.
    pub fn touching(offset: u64, bytes: u64) -> Self {
        if bytes == 0 {
            return Extent::new(offset / UNIT, 0);
        }
        let start = offset / UNIT;
        Extent::new(start, (offset + bytes).div_ceil(UNIT) - start)
    }

    /// First unit after the run.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Offset of the first byte.
    pub fn byte_offset(&self) -> u64 {
        self.start * UNIT
    }

    /// Bytes in the run, were all its units whole.
    pub fn byte_len(&self) -> u64 {
        self.len * UNIT
    }

    pub fn contains(&self, unit: u64) -> bool {
        unit >= self.start && unit < self.end()
    }

    /// The part of the run that lies within `other`.
    pub fn clamp_to(&self, other: Extent) -> Extent {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        Extent::new(start, end.saturating_sub(start))
    }

    pub fn iter(&self) -> std::ops::Range<u64> {
        self.start..self.end()
    }

    /// The run in pieces of at most so many units, in order.
    pub fn pieces(self, most: u64) -> impl Iterator<Item = Extent> {
        (0..self.len.div_ceil(most)).map(move |n| {
            let start = self.start + n * most;
            Extent::new(start, most.min(self.end() - start))
        })
    }
}

impl std::fmt::Display for Extent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "units {}..{}", self.start, self.end())
    }
}
