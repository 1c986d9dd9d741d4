//! Packed content of units: zstd over all of a frame's content at once.
//!
//! ```text
//! u64 xxh3-64 of the content (little-endian) | one zstd frame (RFC 8878), no dictionary
//! ```
//!
//! The frame's own checksum is of what crosses the link; this one is of what was read at the source and is
//! checked against what will be stored, so an error in between, in this library or in memory, is noticed.
//!
//! Whoever unpacks knows beforehand how much must come out: the units that the frame announces. So much is
//! allocated and no more is written, whatever the packed bytes claim; a byte more or less is an error.

use bytes::Bytes;
use whimbrel_engine::codec::ASKABLE;
use whimbrel_engine::space::UNIT;
use xxhash_rust::xxh3::xxh3_64;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::ResetDirective;

const SUM: usize = 8;

/// Packed content must be smaller by this share at least, or it goes as it is: unpacking costs too.
const WORTH: usize = 32;

/// Sampled to tell whether content packs at all: so many pieces of so many bytes.
const SAMPLES: usize = 4;
const SAMPLE: usize = 1024;

/// Content shorter than this is its own sample.
const SAMPLED_FROM: usize = 4 * UNIT as usize;

/// Packed content that cannot be unpacked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnpackError {
    #[error("packed content of {len} bytes ends inside its head")]
    Short { len: usize },
    #[error("packed content is no zstd of at most {expected} bytes")]
    Zstd { expected: usize },
    #[error("packed content holds {len} bytes, not {expected}")]
    Length { expected: usize, len: usize },
    #[error("packed content has checksum {computed:#018x}, not {announced:#018x}")]
    Checksum { announced: u64, computed: u64 },
}

/// Packs, keeping the memory that zstd works in (up to some megabytes at high levels).
pub struct Packer {
    zstd: Compressor<'static>,
    level: i32,
}

impl Default for Packer {
    fn default() -> Self {
        let zstd = Compressor::new(1).expect("zstd knows level 1");
        Packer { zstd, level: 1 }
    }
}

impl Packer {
    fn at(&mut self, level: i32) -> &mut Compressor<'static> {
        let level = level.clamp(*ASKABLE.start(), *ASKABLE.end());
        if level != self.level {
            // Content that did not fit left a frame half-way, and no level is taken until that is dropped.
            let context = self.zstd.context_mut();
            context
                .reset(ResetDirective::SessionOnly)
                .expect("dropping a frame needs nothing");
            self.zstd
                .set_compression_level(level)
                .expect("zstd knows all of ASKABLE");
            self.level = level;
        }
        &mut self.zstd
    }

    /// The content packed, at a level of [`ASKABLE`] or the nearest; `None` if that is not worth it.
    pub fn pack(&mut self, content: &[u8], level: i32) -> Option<Bytes> {
        self.after(&xxh3_64(content).to_le_bytes(), content, level)
    }

    /// As [`pack`](Self::pack), with another head than the content's checksum.
    pub(crate) fn after(&mut self, head: &[u8], content: &[u8], level: i32) -> Option<Bytes> {
        let most = content.len() - content.len() / WORTH;
        // zstd stops when it would write more than fits.
        let mut packed = vec![0; most.max(head.len())];
        let len = self
            .at(level)
            .compress_to_buffer(content, &mut packed[head.len()..])
            .ok()?;
        packed[..head.len()].copy_from_slice(head);
        packed.truncate(head.len() + len);
        Some(packed.into())
    }

    /// Whether content seems not worth packing, by a few pieces of it: cheap at any level.
    pub fn is_dense(&mut self, content: &[u8]) -> bool {
        if content.len() < SAMPLED_FROM {
            return false;
        }
        let mut sample = [0; SAMPLES * SAMPLE];
        for (n, piece) in sample.chunks_exact_mut(SAMPLE).enumerate() {
            // From the middles of equal parts: what begins a unit may be a header, unlike the rest.
            let at = (content.len() * (2 * n + 1) / (2 * SAMPLES)).min(content.len() - SAMPLE);
            piece.copy_from_slice(&content[at..at + SAMPLE]);
        }
        let mut packed = [0; SAMPLES * SAMPLE - SAMPLES * SAMPLE / WORTH];
        self.at(1)
            .compress_to_buffer(&sample, &mut packed[..])
            .is_err()
    }
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer")
            .field("level", &self.level)
            .finish()
    }
}

/// The content, which must be `expected` bytes. The caller bounds that.
pub fn unpack(packed: &[u8], expected: usize) -> Result<Bytes, UnpackError> {
    let Some((sum, zstd)) = packed.split_first_chunk::<SUM>() else {
        return Err(UnpackError::Short { len: packed.len() });
    };
    let mut content = Vec::with_capacity(expected);
    let len = Decompressor::new()
        .and_then(|mut unpacker| unpacker.decompress_to_buffer(zstd, &mut content))
        .map_err(|_| UnpackError::Zstd { expected })?;
    if len != expected {
        return Err(UnpackError::Length { expected, len });
    }
    let (announced, computed) = (u64::from_le_bytes(*sum), xxh3_64(&content));
    if announced != computed {
        return Err(UnpackError::Checksum {
            announced,
            computed,
        });
    }
    Ok(content.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that nothing packs.
    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let words =
            (0..=len as u64 / 8).map(|n| xxh3_64(&(seed ^ n.rotate_left(32)).to_le_bytes()));
        words.flat_map(u64::to_le_bytes).take(len).collect()
    }

    #[test]
    fn noise_is_not_worth_packing_at_any_level_and_is_known_as_such() {
        let noise = noise(256 << 10, 1);
        let mut packer = Packer::default();
        assert!(packer.is_dense(&noise));
        for level in ASKABLE {
            assert_eq!(packer.pack(&noise, level), None, "level {level}");
        }
    }

    #[test]
    fn text_is_worth_packing_and_known_as_such() {
        let lines =
            (0..4000).flat_map(|n| format!("line {n} of a log that goes on and on\n").into_bytes());
        let text: Vec<u8> = lines.collect();
        let mut packer = Packer::default();
        assert!(!packer.is_dense(&text));
        for level in ASKABLE {
            let packed = packer.pack(&text, level).expect("text packs");
            assert!(packed.len() < text.len() / 3, "level {level}");
            assert_eq!(unpack(&packed, text.len()).as_deref(), Ok(&text[..]));
        }
    }

    /// A gigabyte of zeroes is some tens of kilobytes of zstd.
    #[test]
    fn a_bomb_is_an_error_and_not_an_allocation() {
        let mut bomb = 0_u64.to_le_bytes().to_vec();
        bomb.extend(zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap());
        assert_eq!(
            unpack(&bomb, 4096),
            Err(UnpackError::Zstd { expected: 4096 })
        );
    }

    #[test]
    fn a_changed_checksum_is_an_error() {
        let mut packed = Packer::default().pack(&[7; 4096], 1).unwrap().to_vec();
        packed[0] ^= 1;
        assert!(matches!(
            unpack(&packed, 4096),
            Err(UnpackError::Checksum { .. })
        ));
    }

    proptest! {
        #[test]
        fn what_was_packed_comes_back(
            pieces in prop::collection::vec((any::<u8>(), 0_usize..5000, any::<bool>(), any::<u64>()), 0..12),
            level in ASKABLE,
        ) {
            let mut content = Vec::new();
            for (byte, len, is_noise, seed) in pieces {
                match is_noise {
                    true => content.extend(noise(len, seed)),
                    false => content.resize(content.len() + len, byte),
                }
            }
            let mut packer = Packer::default();
            packer.is_dense(&content);
            if let Some(packed) = packer.pack(&content, level) {
                prop_assert!(packed.len() < content.len() + SUM);
                let back = unpack(&packed, content.len());
                prop_assert_eq!(back.as_deref(), Ok(&content[..]));
                prop_assert!(unpack(&packed, content.len() + 1).is_err());
                prop_assert!(unpack(&packed, content.len().saturating_sub(1)).is_err() || content.is_empty());
            }
        }

        #[test]
        fn damage_never_passes_and_never_panics(at in 0_usize..2000, flip in 1_u8.., expected in 0_usize..9000) {
            let content: Vec<u8> = (0..8192_u32).map(|n| (n / 64) as u8).collect();
            let mut packed = Packer::default().pack(&content, 3).unwrap().to_vec();
            let at = at % packed.len();
            packed[at] ^= flip;
            prop_assert!(unpack(&packed, expected) != Ok(content.clone().into()) || expected == 8192);
            if let Ok(bytes) = unpack(&packed, content.len()) {
                prop_assert_eq!(&bytes[..], &content[..]);
            }
        }
    }
}
