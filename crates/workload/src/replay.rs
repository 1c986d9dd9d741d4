//! What the disk must hold, computed again from the seed and the last fsynced numbers.
//!
//! The log is a ring: record `seq` (from 1) lies in slot `(seq - 1) % slots`. The random writer's n-th
//! write (its generation, from 1) goes to block [`target`](Geometry::target). Both therefore need no list of what was
//! written where: one number per file, the last that an fsync covered, says what every slot and block
//! must at least be, inside the guest after a restart as well as outside it after a shutdown.

use crate::cell::{Kind, Place};
use crate::chance::{mix, scale};
use serde::{Deserialize, Serialize};

/// The workloads' folder, from the image's root.
pub const WORK_DIR: &str = "wl";
/// In [`WORK_DIR`]: the [`Geometry`] as JSON.
pub const GEOMETRY_FILE: &str = "geometry.json";
/// In [`WORK_DIR`]: the append log.
pub const LOG_FILE: &str = "log";
/// In [`WORK_DIR`]: the random writer's file.
pub const RANDOM_FILE: &str = "random";

/// Bytes in a random block.
pub const BLOCK: usize = 4096;

/// How the two files are laid out; written once, when the disk is first used, and kept over restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    pub seed: u64,
    /// Bytes per log record.
    pub record_bytes: u32,
    /// Records between two fsyncs of the log.
    pub log_batch: u32,
    /// Records after which the log wraps.
    pub log_slots: u64,
    /// Blocks of the random file; 0 if it is not used.
    pub random_blocks: u64,
    /// Writes between two fsyncs of the random file.
    pub sync_every: u32,
}

impl Geometry {
    /// The cell of log slot `slot`.
    pub fn log_place(&self, slot: u64) -> Place {
        Place {
            kind: Kind::LogRecord,
            seed: self.seed,
            index: slot,
        }
    }

    /// The slot of record `seq`, which counts from 1.
    pub fn slot(&self, seq: u64) -> u64 {
        (seq - 1) % self.log_slots
    }

    /// The least sequence number that slot `slot` may hold once `acknowledged` is fsynced; `None` if
    /// the log has not got there.
    pub fn least_seq(&self, slot: u64, acknowledged: u64) -> Option<u64> {
        let first = slot + 1;
        if first > acknowledged {
            return None;
        }
        Some(first + (acknowledged - first) / self.log_slots * self.log_slots)
    }

    /// The cell of random block `block`.
    pub fn random_place(&self, block: u64) -> Place {
        Place {
            kind: Kind::RandomBlock,
            seed: self.seed,
            index: block,
        }
    }

    /// The block that write `generation`, which counts from 1, goes to.
    pub fn target(&self, generation: u64) -> u64 {
        scale(mix(self.seed ^ mix(generation)), self.random_blocks)
    }

    /// For each block the last generation up to `acknowledged` that was written to it, 0 for none.
    pub fn random_generations(&self, acknowledged: u64) -> Vec<u64> {
        let mut last = vec![0; self.random_blocks as usize];
        if self.random_blocks > 0 {
            for generation in 1..=acknowledged {
                last[self.target(generation) as usize] = generation;
            }
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry(log_slots: u64, random_blocks: u64) -> Geometry {
        Geometry {
            seed: 42,
            record_bytes: 512,
            log_batch: 1,
            log_slots,
            random_blocks,
            sync_every: 16,
        }
    }

    proptest! {
        #[test]
        fn least_seq_is_what_writing_the_ring_leaves(slots in 1..40u64, acknowledged in 0..200u64) {
            let g = geometry(slots, 0);
            let mut ring = vec![None; slots as usize];
            for seq in 1..=acknowledged {
                ring[g.slot(seq) as usize] = Some(seq);
            }
            for slot in 0..slots {
                prop_assert_eq!(g.least_seq(slot, acknowledged), ring[slot as usize]);
            }
        }

        #[test]
        fn every_target_is_a_block(blocks in 1..1000u64, generation: u64) {
            prop_assert!(geometry(1, blocks).target(generation) < blocks);
        }
    }

    #[test]
    fn random_writes_reach_most_blocks() {
        let last = geometry(1, 256).random_generations(2560);
        assert!(last.iter().filter(|&&g| g == 0).count() < 3);
        assert_eq!(last.iter().max(), Some(&2560));
    }
}
