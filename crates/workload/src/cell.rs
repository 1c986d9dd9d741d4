//! The cell: a stretch of bytes that says what it is and proves it.
//!
//! RAM pages, log records, random blocks and streamed chunks are all cells, so that one check answers for all of them: a
//! cell that was lost, torn, misplaced or mixed from two generations does not open. That it is the
//! *newest* generation only the reader can know.
//!
//! Layout, little-endian, of any length from [`HEADER`] up:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | magic, its last byte the kind |
//! | 8..16 | index: page, slot or block number |
//! | 16..24 | generation |
//! | 24..32 | seed of the run |
//! | 32..40 | xxh3-64 of all the other bytes |
//! | 40.. | payload: its first half random, the rest one word repeated, so that it compresses about 2:1 as real data does |

use crate::chance::{Rng, mix};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Bytes before the payload.
pub const HEADER: usize = 40;

/// Bytes of a chunk that the guest streams.
pub const CHUNK: usize = 1024;

const MAGIC: u64 = u64::from_le_bytes(*b"whimbre\0");

/// What the cell is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    RamPage,
    LogRecord,
    RandomBlock,
    /// A chunk of what the guest streams.
    Chunk,
}

impl Kind {
    fn magic(self) -> u64 {
        let tag = match self {
            Kind::RamPage => b'p',
            Kind::LogRecord => b'l',
            Kind::RandomBlock => b'r',
            Kind::Chunk => b'c',
        };
        MAGIC | u64::from(tag) << 56
    }
}

/// Why bytes are not the cell they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Broken {
    #[error("shorter than a header")]
    Short,
    #[error("all zero")]
    Zero,
    #[error("no cell of this kind")]
    Magic,
    #[error("checksum differs")]
    Checksum,
    #[error("belongs at index {found}")]
    Misplaced { found: u64 },
    #[error("of another run, with seed {found}")]
    OtherRun { found: u64 },
}

/// Which cell: its place and its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub kind: Kind,
    pub seed: u64,
    pub index: u64,
}

impl Place {
    /// Makes `bytes` this place's cell of the given generation.
    ///
    /// # Panics
    /// If `bytes` is shorter than [`HEADER`].
    pub fn seal(self, generation: u64, bytes: &mut [u8]) {
        let (header, payload) = bytes.split_at_mut(HEADER);
        fill(payload, self.seed ^ mix(self.index) ^ mix(!generation));
        header[0..8].copy_from_slice(&self.kind.magic().to_le_bytes());
        header[8..16].copy_from_slice(&self.index.to_le_bytes());
        header[16..24].copy_from_slice(&generation.to_le_bytes());
        header[24..32].copy_from_slice(&self.seed.to_le_bytes());
        let sum = checksum(bytes);
        bytes[32..40].copy_from_slice(&sum.to_le_bytes());
    }

    /// The generation of the cell in `bytes`, if it is whole and belongs here.
    pub fn open(self, bytes: &[u8]) -> Result<u64, Broken> {
        if bytes.len() < HEADER {
            return Err(Broken::Short);
        }
        if word(bytes, 0) != self.kind.magic() {
            let zero = bytes.iter().all(|&b| b == 0);
            return Err(if zero { Broken::Zero } else { Broken::Magic });
        }
        if word(bytes, 32) != checksum(bytes) {
            return Err(Broken::Checksum);
        }
        if word(bytes, 24) != self.seed {
            return Err(Broken::OtherRun {
                found: word(bytes, 24),
            });
        }
        if word(bytes, 8) != self.index {
            return Err(Broken::Misplaced {
                found: word(bytes, 8),
            });
        }
        Ok(word(bytes, 16))
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn checksum(bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(&bytes[HEADER..], xxh3_64(&bytes[..32]))
}

fn fill(payload: &mut [u8], seed: u64) {
    let mut rng = Rng::new(seed, 0);
    let (random, repeated) = payload.split_at_mut(payload.len() / 2);
    for chunk in random.chunks_mut(8) {
        let len = chunk.len();
        chunk.copy_from_slice(&rng.next_u64().to_le_bytes()[..len]);
    }
    let word = rng.next_u64().to_le_bytes();
    for chunk in repeated.chunks_mut(8) {
        let len = chunk.len();
        chunk.copy_from_slice(&word[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLACE: Place = Place {
        kind: Kind::RandomBlock,
        seed: 11,
        index: 5,
    };

    #[test]
    fn a_cell_opens_only_where_it_belongs() {
        let mut bytes = [0; 512];
        assert_eq!(PLACE.open(&bytes), Err(Broken::Zero));
        PLACE.seal(9, &mut bytes);
        assert_eq!(PLACE.open(&bytes), Ok(9));
        let elsewhere = Place { index: 6, ..PLACE };
        assert_eq!(elsewhere.open(&bytes), Err(Broken::Misplaced { found: 5 }));
        let other_run = Place { seed: 12, ..PLACE };
        assert_eq!(other_run.open(&bytes), Err(Broken::OtherRun { found: 11 }));
        let other_kind = Place {
            kind: Kind::RamPage,
            ..PLACE
        };
        assert_eq!(other_kind.open(&bytes), Err(Broken::Magic));
        assert_eq!(PLACE.open(&bytes[..20]), Err(Broken::Short));
    }

    proptest! {
        #[test]
        fn any_changed_byte_breaks_it(len in HEADER..5000usize, at: usize, flip in 1u8..) {
            let mut bytes = vec![0; len];
            PLACE.seal(3, &mut bytes);
            bytes[at % len] ^= flip;
            prop_assert!(PLACE.open(&bytes).is_err());
        }

        #[test]
        fn two_generations_mixed_at_a_sector_do_not_open(cut in 1..8usize) {
            let (mut old, mut new) = ([0; 4096], [0; 4096]);
            PLACE.seal(3, &mut old);
            PLACE.seal(4, &mut new);
            old[..cut * 512].copy_from_slice(&new[..cut * 512]);
            prop_assert_eq!(PLACE.open(&old), Err(Broken::Checksum));
        }
    }
}
