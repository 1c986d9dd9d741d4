//! How an object's content is packed: `u8 how (0 plain, 1 zstd) | content`.
//!
//! Nothing more is needed to know that it is whole: its name is the hash of its content.

use crate::hash::Hash;

/// Level 3: a third of the time of what goes along with it (reading, hashing, making durable), and clearly
/// better than 1. Content that does not shrink by a sixteenth at least stays plain.
const LEVEL: i32 = 3;

const PLAIN: u8 = 0;
const ZSTD: u8 = 1;

/// Why an object is not what its name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectFault {
    #[error("it is empty")]
    Empty,
    #[error("it is packed in an unknown way ({0})")]
    Packing(u8),
    #[error("it cannot be unpacked")]
    Zstd,
    #[error("it has {found} bytes of content, and must have {expected}")]
    Length { found: usize, expected: usize },
    #[error("its content is not what its name says")]
    Content,
}

/// Packs, keeping the memory that zstd works in.
pub struct Packer(Option<zstd::bulk::Compressor<'static>>);

impl Default for Packer {
    fn default() -> Packer {
        // Without the memory for it, everything stays plain.
        Packer(zstd::bulk::Compressor::new(LEVEL).ok())
    }
}

impl Packer {
    pub fn pack(&mut self, content: &[u8]) -> Vec<u8> {
        let worth = content.len() - content.len() / 16;
        let mut packed = vec![0; 1 + worth];
        packed[0] = ZSTD;
        let into = &mut packed[1..];
        // Fails, too, if it would become longer than is worth it.
        let packing = self.0.as_mut();
        match packing.and_then(|zstd| zstd.compress_to_buffer(content, into).ok()) {
            Some(len) => packed.truncate(1 + len),
            None => {
                packed.clear();
                packed.push(PLAIN);
                packed.extend_from_slice(content);
            }
        }
        packed
    }
}

/// The content of a packed object that must have `expected` bytes of it, and this hash.
pub fn unpack(packed: &[u8], expected: usize, name: &Hash) -> Result<Vec<u8>, ObjectFault> {
    let (&how, rest) = packed.split_first().ok_or(ObjectFault::Empty)?;
    let length = |found| ObjectFault::Length { found, expected };
    let content = match how {
        PLAIN if rest.len() == expected => rest.to_vec(),
        PLAIN => return Err(length(rest.len())),
        // One byte more, so that what is too long is seen and not cut off.
        ZSTD => zstd::bulk::decompress(rest, expected + 1).map_err(|_| ObjectFault::Zstd)?,
        other => return Err(ObjectFault::Packing(other)),
    };
    if content.len() != expected {
        return Err(length(content.len()));
    }
    match Hash::of(&content) == *name {
        true => Ok(content),
        false => Err(ObjectFault::Content),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_unpacked_is_what_was_packed(content in prop::collection::vec(0..4u8, 0..5000), noise in prop::collection::vec(any::<u8>(), 0..5000)) {
            for content in [content, noise] {
                let packed = Packer::default().pack(&content);
                prop_assert!(packed.len() <= content.len() + 1);
                prop_assert_eq!(unpack(&packed, content.len(), &Hash::of(&content)), Ok(content));
            }
        }

        #[test]
        fn arbitrary_bytes_are_refused_and_nothing_more(bytes in prop::collection::vec(any::<u8>(), 0..300), zstd in any::<bool>()) {
            let mut bytes = bytes;
            if zstd && bytes.len() > 5 {
                bytes[..5].copy_from_slice(&[ZSTD, 0x28, 0xb5, 0x2f, 0xfd]);
            }
            prop_assert!(unpack(&bytes, 100, &Hash::of(b"something else")).is_err());
        }

        #[test]
        fn a_changed_bit_is_noticed(content in prop::collection::vec(0..4u8, 1..3000), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let mut packed = Packer::default().pack(&content);
            let at = at.index(packed.len());
            packed[at] ^= 1 << bit;
            // Some bits of a zstd frame mean nothing; the content is right then.
            if let Ok(unpacked) = unpack(&packed, content.len(), &Hash::of(&content)) {
                prop_assert_eq!(unpacked, content);
            }
        }
    }
}
