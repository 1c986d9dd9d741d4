//! The content of a volume as hashes: leaves of extents, and the list of leaves.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use whimbrel_engine::space::UNIT;

use crate::hash::Hash;

/// Bytes of an extent, the last of a volume may be shorter. Smaller ones store less around a small write
/// (random writes of 4 KiB cost up to 64 times what they are here) and need more objects: four million for
/// a TiB now.
pub const EXTENT: u64 = 64 * UNIT;

/// Extents of a leaf: 128 MiB of a volume, 16 KiB of hashes.
pub const LEAF_EXTENTS: u64 = 512;

/// Stands for an extent of zeroes, which is not stored. No content is known that has it for a hash.
const HOLE: [u8; 32] = [0; 32];

/// A volume in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeTree {
    pub name: String,
    /// The volume's identity, which outlives its name and its host.
    pub uuid: String,
    /// Bytes.
    pub size: u64,
    /// One for each [`LEAF_EXTENTS`]; none where all is zero.
    pub leaves: Vec<Option<Hash>>,
}

impl VolumeTree {
    pub fn extents(&self) -> u64 {
        self.size.div_ceil(EXTENT)
    }

    /// Extents of one leaf.
    pub fn extents_of_leaf(&self, leaf: u64) -> u64 {
        LEAF_EXTENTS.min(self.extents().saturating_sub(leaf * LEAF_EXTENTS))
    }

    /// Bytes of one extent.
    pub fn len_of(&self, extent: u64) -> usize {
        EXTENT.min(self.size.saturating_sub(extent * EXTENT)) as usize
    }
}

/// The hashes of neighbouring extents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf(pub Vec<Option<Hash>>);

impl Leaf {
    pub fn of_holes(extents: u64) -> Leaf {
        Leaf(vec![None; extents as usize])
    }

    pub fn is_hole(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let hashes = self.0.iter().map(|hash| hash.map_or(HOLE, |hash| hash.0));
        hashes.flatten().collect()
    }

    /// Bytes that were compared with their hash; as many as there are extents, by 32.
    pub fn from_bytes(bytes: &[u8]) -> Leaf {
        let (hashes, _) = bytes.as_chunks::<32>();
        Leaf(
            hashes
                .iter()
                .map(|hash| (*hash != HOLE).then_some(Hash(*hash)))
                .collect(),
        )
    }
}

/// What is referred to, with what is needed to check it: bytes of content.
pub(crate) type Sizes = HashMap<Hash, usize>;
