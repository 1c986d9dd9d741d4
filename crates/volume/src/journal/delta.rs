//! What the log has said since the last snapshot, in memory.
//!
//! Its size follows the log, not the volume: a change touches at most two partly covered chunks of
//! 512 units (128 bytes each), whole chunks are a bit in a set over chunks (64 KiB per TiB), and a log
//! holds a bounded number of changes. So a journal needs no bitmap of its volume in memory: a new
//! snapshot is the old one streamed through, with the delta laid over it.
//!
//! All changes are unions: they may be applied in any order and any number of times.

use std::collections::BTreeMap;

use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::Extent;

use super::snapshot::{BLOCK_UNITS, Block};
use super::{Change, VolumeIdentity};

/// Units per chunk.
const CHUNK: u64 = 512;
const WORDS: usize = (CHUNK / 64) as usize;

/// Resident and guest-owned bits of one chunk.
#[derive(Clone, Copy, Default)]
struct Bits {
    resident: [u64; WORDS],
    owned: [u64; WORDS],
}

#[derive(Clone)]
pub(super) struct Delta {
    units: u64,
    whole_resident: UnitSet,
    whole_owned: UnitSet,
    bits: BTreeMap<u64, Bits>,
    partial: BTreeMap<u64, u8>,
}

impl Delta {
    pub fn empty(identity: &VolumeIdentity) -> Self {
        let units = identity.units();
        Delta {
            units,
            whole_resident: UnitSet::empty(units.div_ceil(CHUNK)),
            whole_owned: UnitSet::empty(units.div_ceil(CHUNK)),
            bits: BTreeMap::new(),
            partial: BTreeMap::new(),
        }
    }

    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Filled(extent) => self.add(extent, false),
            Change::Written(extent) => self.add(extent, true),
            Change::PartlyWritten { unit, mask } => {
                *self.partial.entry(unit).or_default() |= mask;
            }
        }
    }

    fn add(&mut self, extent: Extent, owned: bool) {
        let mut unit = extent.start;
        while unit < extent.end() {
            let chunk = unit / CHUNK;
            let chunk_end = ((chunk + 1) * CHUNK).min(self.units);
            let end = extent.end().min(chunk_end);
            if unit.is_multiple_of(CHUNK) && end == chunk_end {
                // As many whole chunks as the extent has.
                let last = if extent.end() == self.units {
                    self.units.div_ceil(CHUNK)
                } else {
                    extent.end() / CHUNK
                };
                let run = Extent::new(chunk, last - chunk);
                self.whole_resident.insert(run);
                if owned {
                    self.whole_owned.insert(run);
                }
                unit = (last * CHUNK).min(extent.end());
            } else {
                let bits = self.bits.entry(chunk).or_default();
                let within = Extent::new(unit % CHUNK, end - unit);
                set_bits(&mut bits.resident, within);
                if owned {
                    set_bits(&mut bits.owned, within);
                }
                unit = end;
            }
        }
    }

    /// Whether applying the change would tell nothing new. Answered for small changes only; a large
    /// one is rare and its repetition harmless.
    pub fn knows(&self, change: Change) -> bool {
        let (extent, owned) = match change {
            Change::Filled(extent) => (extent, false),
            Change::Written(extent) => (extent, true),
            Change::PartlyWritten { unit, mask } => {
                return self.partial.get(&unit).is_some_and(|m| m & mask == mask);
            }
        };
        if extent.len > CHUNK {
            return false;
        }
        extent.iter().all(|unit| {
            let chunk = unit / CHUNK;
            let (word, bit) = ((unit % CHUNK / 64) as usize, unit % 64);
            let (whole, bits) = if owned {
                (
                    &self.whole_owned,
                    self.bits.get(&chunk).map(|b| b.owned[word]),
                )
            } else {
                (
                    &self.whole_resident,
                    self.bits.get(&chunk).map(|b| b.resident[word]),
                )
            };
            whole.contains(chunk) || bits.is_some_and(|b| b >> bit & 1 == 1)
        })
    }

    /// Lays the delta over one block of a snapshot.
    pub fn lay_over(&self, block: &mut Block, identity: &VolumeIdentity) {
        let chunks_per_block = BLOCK_UNITS / CHUNK;
        let first_chunk = block.index * chunks_per_block;
        let chunks = first_chunk..(first_chunk + chunks_per_block).min(self.units.div_ceil(CHUNK));
        for chunk in chunks.clone() {
            let at = (chunk - first_chunk) as usize * WORDS;
            if self.whole_resident.contains(chunk) {
                block.resident[at..at + WORDS].fill(u64::MAX);
            }
            if self.whole_owned.contains(chunk) {
                block.owned[at..at + WORDS].fill(u64::MAX);
            }
        }
        for (&chunk, bits) in self.bits.range(chunks) {
            let at = (chunk - first_chunk) as usize * WORDS;
            for w in 0..WORDS {
                block.resident[at + w] |= bits.resident[w];
                block.owned[at + w] |= bits.owned[w];
            }
        }
        let first = block.index * BLOCK_UNITS;
        for (&unit, &mask) in self.partial.range(first..first + BLOCK_UNITS) {
            *block.partial.entry((unit - first) as u16).or_default() |= mask;
        }
        block.settle(identity);
    }
}

fn set_bits(words: &mut [u64; WORDS], extent: Extent) {
    for unit in extent.iter() {
        words[(unit / 64) as usize] |= 1 << (unit % 64);
    }
}
