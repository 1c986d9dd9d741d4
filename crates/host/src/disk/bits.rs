//! A bit for each extent of a volume, set and looked at by many at once without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use whimbrel_engine::set::UnitSet;
use whimbrel_repository::EXTENT;

/// One bit for each 256 KiB: 512 KiB of memory for a TiB.
pub struct Bits {
    words: Box<[AtomicU64]>,
    extents: u64,
}

impl Bits {
    /// None set, of a volume of `size` bytes.
    pub fn none(size: u64) -> Bits {
        let extents = size.div_ceil(EXTENT);
        let words = (0..extents.div_ceil(64)).map(|_| AtomicU64::new(0));
        Bits {
            words: words.collect(),
            extents,
        }
    }

    pub fn extents(&self) -> u64 {
        self.extents
    }

    pub fn get(&self, extent: u64) -> bool {
        let word = self.words.get((extent / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (extent % 64) & 1 == 1)
    }

    /// An exchange only where it changes something: a guest writes to the same places over and over.
    pub fn set(&self, extent: u64) {
        if let Some(word) = self.words.get((extent / 64) as usize) {
            let bit = 1 << (extent % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }

    pub fn clear(&self, extent: u64) {
        if let Some(word) = self.words.get((extent / 64) as usize) {
            word.fetch_and(!(1 << (extent % 64)), Ordering::AcqRel);
        }
    }

    /// Sets all that the range touches.
    pub fn set_touched(&self, offset: u64, len: u64) {
        touched(offset, len).for_each(|extent| self.set(extent));
    }

    pub fn set_all(&self, these: &UnitSet) {
        for run in these.runs() {
            run.iter().for_each(|extent| self.set(extent));
        }
    }

    /// Those that were set; none is any more.
    pub fn take(&self) -> UnitSet {
        let words = self.words.iter();
        self.set_of(words.map(|word| word.swap(0, Ordering::AcqRel)))
    }

    /// Those that are set.
    pub fn to_set(&self) -> UnitSet {
        let words = self.words.iter();
        self.set_of(words.map(|word| word.load(Ordering::Acquire)))
    }

    fn set_of(&self, words: impl Iterator<Item = u64>) -> UnitSet {
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        UnitSet::from_bytes(self.extents, &bytes).expect("no bit past the last extent is ever set")
    }
}

/// The extents that a range of bytes touches.
pub fn touched(offset: u64, len: u64) -> std::ops::Range<u64> {
    match len {
        0 => 0..0,
        len => offset / EXTENT..(offset + len).div_ceil(EXTENT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_touched_is_taken_once() {
        let bits = Bits::none(100 * EXTENT + 1);
        bits.set_touched(EXTENT - 1, 2);
        bits.set_touched(63 * EXTENT, EXTENT);
        bits.set_touched(100 * EXTENT, 1);
        bits.set_touched(5 * EXTENT, 0);
        assert!(bits.get(0) && bits.get(1) && !bits.get(2));
        let taken = bits.take();
        let extents: Vec<u64> = taken.runs().flat_map(|run| run.iter()).collect();
        assert_eq!(extents, [0, 1, 63, 100]);
        assert!(bits.take().is_empty());
        bits.set_all(&taken);
        bits.clear(63);
        assert_eq!(bits.to_set().len(), 3);
    }
}
