//! The snapshot's format: the state of a whole volume, block by block.
//!
//! ```text
//! header, 64 bytes                     block of 32,768 units (128 MiB of the volume)
//!   0  magic "WHMBRLJS"                  0  index u64
//!   8  version u32 = 1                   8  resident: 0 none, 1 all, 2 bitmap (u8); 9 owned: likewise
//!  12  zero u32                         10  zero u16
//!  16  volume uuid                      12  number p of partly written units, u32
//!  32  volume size, bytes u64           16  bitmaps, 4096 bytes each, unit 0 in bit 0 of byte 0
//!  40  epoch u64                            p times: unit u16, mask u8, zero u8; ascending
//!  48  generation u64                       xxh3-64 of all the block before it
//!  56  xxh3-64 of bytes 0..56
//! end: as a block, of index 2^64-1, with p = 0 and instead of bitmaps:
//!      number of blocks u64, number of resident units u64
//! ```
//!
//! Blocks ascend; one with nothing to say is left out, so the snapshot of a fresh volume has 104
//! bytes, that of a full terabyte 200 KB, and the worst 8 KiB per 128 MiB. Checksums are seeded with
//! the generation and the volume. A file that ends before its end block was cut off.

use std::collections::BTreeMap;
use std::io::Read;

use whimbrel_engine::space::Extent;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::record::{array_at, u32_at, u64_at};
use super::{Fault, VolumeIdentity};

/// Units per block.
pub const BLOCK_UNITS: u64 = 32768;
const WORDS: usize = (BLOCK_UNITS / 64) as usize;
const BITMAP: usize = (BLOCK_UNITS / 8) as usize;

const HEADER: usize = 64;
const BLOCK_HEAD: usize = 16;
const MAGIC: &[u8; 8] = b"WHMBRLJS";
const VERSION: u32 = 1;
const END: u64 = u64::MAX;

/// The state of 32,768 consecutive units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub index: u64,
    pub resident: Vec<u64>,
    pub owned: Vec<u64>,
    /// Partly written units, counted from the block's first: sector masks.
    pub partial: BTreeMap<u16, u8>,
}

impl Block {
    pub fn empty(index: u64) -> Self {
        Block {
            index,
            resident: vec![0; WORDS],
            owned: vec![0; WORDS],
            partial: BTreeMap::new(),
        }
    }

    /// The block's units in a volume of `units`.
    pub fn extent(index: u64, units: u64) -> Extent {
        Extent::new(index * BLOCK_UNITS, BLOCK_UNITS).clamp_to(Extent::new(0, units))
    }

    fn is_empty(&self) -> bool {
        self.partial.is_empty() && self.resident.iter().chain(&self.owned).all(|&w| w == 0)
    }

    pub fn resident_count(&self) -> u64 {
        self.resident
            .iter()
            .map(|w| u64::from(w.count_ones()))
            .sum()
    }

    /// Draws the conclusions: a unit whose every sector was written is resident, a resident unit is
    /// not partly written, and there is nothing past the volume's end.
    pub(super) fn settle(&mut self, identity: &VolumeIdentity) {
        let first = self.index * BLOCK_UNITS;
        let (resident, owned) = (&mut self.resident, &mut self.owned);
        self.partial.retain(|&unit, mask| {
            let (word, bit) = (usize::from(unit) / 64, unit % 64);
            owned[word] |= 1 << bit;
            let all = identity.all_sectors(first + u64::from(unit));
            if *mask & all == all {
                resident[word] |= 1 << bit;
            }
            resident[word] >> bit & 1 == 0
        });
        let valid = Block::extent(self.index, identity.units()).len;
        trim(resident, valid);
        trim(owned, valid);
    }
}

/// Clears every bit at or past `valid`.
fn trim(words: &mut [u64], valid: u64) {
    for (w, word) in words.iter_mut().enumerate() {
        let below = valid.saturating_sub(w as u64 * 64);
        if below < 64 {
            *word &= (1 << below) - 1;
        }
    }
}

fn seed(identity: &VolumeIdentity, generation: u64) -> u64 {
    xxh3_64(&identity.uuid) ^ generation
}

/// Builds a snapshot piece by piece; the caller writes each piece where the last one ended.
pub struct SnapshotWriter {
    identity: VolumeIdentity,
    seed: u64,
    blocks: u64,
    resident: u64,
}

impl SnapshotWriter {
    /// The writer, and the file's first piece.
    pub fn new(identity: VolumeIdentity, generation: u64) -> (Self, Vec<u8>) {
        let mut out = Vec::with_capacity(HEADER);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&identity.uuid);
        out.extend_from_slice(&identity.size.to_le_bytes());
        out.extend_from_slice(&identity.epoch.to_le_bytes());
        out.extend_from_slice(&generation.to_le_bytes());
        let check = xxh3_64(&out);
        out.extend_from_slice(&check.to_le_bytes());
        let writer = SnapshotWriter {
            identity,
            seed: seed(&identity, generation),
            blocks: 0,
            resident: 0,
        };
        (writer, out)
    }

    /// Appends the block to `out`, or nothing if it is empty. Blocks must ascend and be settled.
    pub fn block(&mut self, block: &Block, out: &mut Vec<u8>) {
        if block.is_empty() {
            return;
        }
        let from = out.len();
        let valid = Block::extent(block.index, self.identity.units()).len;
        let kinds = [shape(&block.resident, valid), shape(&block.owned, valid)];
        out.extend_from_slice(&block.index.to_le_bytes());
        out.extend_from_slice(&kinds);
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&(block.partial.len() as u32).to_le_bytes());
        for (kind, words) in kinds.into_iter().zip([&block.resident, &block.owned]) {
            if kind == 2 {
                out.extend(words.iter().flat_map(|w| w.to_le_bytes()));
            }
        }
        for (&unit, &mask) in &block.partial {
            out.extend_from_slice(&unit.to_le_bytes());
            out.extend_from_slice(&[mask, 0]);
        }
        self.seal(from, out);
        self.blocks += 1;
        self.resident += block.resident_count();
    }

    /// Appends the end; returns the number of resident units.
    pub fn end(self, out: &mut Vec<u8>) -> u64 {
        let from = out.len();
        out.extend_from_slice(&END.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&self.blocks.to_le_bytes());
        out.extend_from_slice(&self.resident.to_le_bytes());
        self.seal(from, out);
        self.resident
    }

    fn seal(&self, from: usize, out: &mut Vec<u8>) {
        let check = xxh3_64_with_seed(&out[from..], self.seed);
        out.extend_from_slice(&check.to_le_bytes());
    }
}

fn shape(words: &[u64], valid: u64) -> u8 {
    let count: u64 = words.iter().map(|w| u64::from(w.count_ones())).sum();
    match count {
        0 => 0,
        c if c == valid => 1,
        _ => 2,
    }
}

/// Why a snapshot could not be read on.
#[derive(Debug)]
pub enum SnapshotFault {
    /// The reader itself failed.
    Read(std::io::Error),
    /// Read, but not a snapshot any more.
    Damaged { offset: u64, fault: Fault },
}

/// Reads a snapshot block by block, every checksum tested before a byte of the block is believed.
pub struct SnapshotReader<R> {
    from: R,
    offset: u64,
    identity: VolumeIdentity,
    generation: u64,
    seed: u64,
    last: Option<u64>,
    blocks: u64,
    resident: u64,
    ended: bool,
}

impl<R: Read> SnapshotReader<R> {
    /// Reads the header.
    pub fn new(mut from: R) -> Result<Self, SnapshotFault> {
        let mut bytes = [0; HEADER];
        read_all(&mut from, 0, &mut bytes)?;
        let fault = |fault| Err(SnapshotFault::Damaged { offset: 0, fault });
        if &bytes[..8] != MAGIC {
            return fault(Fault::Magic);
        }
        if u64_at(&bytes, 56) != xxh3_64(&bytes[..56]) {
            return fault(Fault::Checksum);
        }
        let version = u32_at(&bytes, 8);
        if version != VERSION {
            return fault(Fault::Version {
                found: version,
                known: VERSION,
            });
        }
        let identity = VolumeIdentity {
            uuid: array_at(&bytes, 16),
            size: u64_at(&bytes, 32),
            epoch: u64_at(&bytes, 40),
        };
        let generation = u64_at(&bytes, 48);
        Ok(SnapshotReader {
            from,
            offset: HEADER as u64,
            identity,
            generation,
            seed: seed(&identity, generation),
            last: None,
            blocks: 0,
            resident: 0,
            ended: false,
        })
    }

    pub fn identity(&self) -> VolumeIdentity {
        self.identity
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The next block, or `None` after the end block.
    pub fn next_block(&mut self) -> Result<Option<Block>, SnapshotFault> {
        if self.ended {
            return Ok(None);
        }
        let start = self.offset;
        let fault = |fault| {
            Err(SnapshotFault::Damaged {
                offset: start,
                fault,
            })
        };
        let mut bytes = vec![0; BLOCK_HEAD];
        self.fill(&mut bytes, 0)?;
        let index = u64_at(&bytes, 0);
        let (kinds, partials) = ([bytes[8], bytes[9]], u32_at(&bytes, 12) as usize);
        let units = self.identity.units();
        let block_count = units.div_ceil(BLOCK_UNITS);
        let payload = if index == END {
            16
        } else if index >= block_count
            || self.last.is_some_and(|l| index <= l)
            || kinds.iter().any(|&k| k > 2)
            || partials as u64 > BLOCK_UNITS
        {
            // Checked before the checksum, since they say how much to read.
            return fault(Fault::Nonsense);
        } else {
            kinds.iter().filter(|&&k| k == 2).count() * BITMAP + partials * 4
        };
        bytes.resize(BLOCK_HEAD + payload + 8, 0);
        self.fill(&mut bytes, BLOCK_HEAD)?;
        let body = BLOCK_HEAD + payload;
        if u64_at(&bytes, body) != xxh3_64_with_seed(&bytes[..body], self.seed) {
            return fault(Fault::Checksum);
        }
        if index == END {
            if u64_at(&bytes, 16) != self.blocks || u64_at(&bytes, 24) != self.resident {
                return fault(Fault::Nonsense);
            }
            self.ended = true;
            return Ok(None);
        }
        let mut block = Block::empty(index);
        let valid = Block::extent(index, units).len;
        let mut at = BLOCK_HEAD;
        for (kind, words) in kinds
            .into_iter()
            .zip([&mut block.resident, &mut block.owned])
        {
            match kind {
                0 => {}
                1 => {
                    words.fill(u64::MAX);
                    trim(words, valid);
                }
                _ => {
                    for (word, chunk) in words.iter_mut().zip(bytes[at..at + BITMAP].chunks(8)) {
                        *word = u64_at(chunk, 0);
                    }
                    at += BITMAP;
                    let count: u64 = words.iter().map(|w| u64::from(w.count_ones())).sum();
                    trim(words, valid);
                    if count != words.iter().map(|w| u64::from(w.count_ones())).sum::<u64>() {
                        return fault(Fault::Nonsense);
                    }
                }
            }
        }
        let mut above = None;
        for entry in bytes[at..body].chunks(4) {
            let (unit, mask) = (u16::from_le_bytes([entry[0], entry[1]]), entry[2]);
            if u64::from(unit) >= valid || above.is_some_and(|a| unit <= a) || mask == 0 {
                return fault(Fault::Nonsense);
            }
            above = Some(unit);
            block.partial.insert(unit, mask);
        }
        self.last = Some(index);
        self.blocks += 1;
        self.resident += block.resident_count();
        Ok(Some(block))
    }

    fn fill(&mut self, bytes: &mut [u8], from: usize) -> Result<(), SnapshotFault> {
        read_all(&mut self.from, self.offset, &mut bytes[from..])?;
        self.offset += (bytes.len() - from) as u64;
        Ok(())
    }
}

fn read_all(from: &mut impl Read, offset: u64, bytes: &mut [u8]) -> Result<(), SnapshotFault> {
    from.read_exact(bytes).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => SnapshotFault::Damaged {
            offset,
            fault: Fault::Truncated,
        },
        _ => SnapshotFault::Read(e),
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Change, delta::Delta};
    use super::*;
    use proptest::prelude::*;
    use whimbrel_engine::set::UnitSet;

    fn identity() -> VolumeIdentity {
        // Not whole units: the last has three sectors.
        VolumeIdentity {
            uuid: [3; 16],
            size: 70_000 * 4096 + 1536,
            epoch: 2,
        }
    }

    fn write(delta: &Delta) -> Vec<u8> {
        let id = identity();
        let (mut writer, mut out) = SnapshotWriter::new(id, 4);
        for index in 0..id.units().div_ceil(BLOCK_UNITS) {
            let mut block = Block::empty(index);
            delta.lay_over(&mut block, &id);
            writer.block(&block, &mut out);
        }
        writer.end(&mut out);
        out
    }

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let units = identity().units();
        let extent = (0..units, prop_oneof![1u64..20, 1u64..units])
            .prop_map(move |(s, l)| Extent::new(s, l.min(units - s)));
        proptest::collection::vec(
            prop_oneof![
                extent.clone().prop_map(Change::Filled),
                extent.prop_map(Change::Written),
                (0..units, 1u8..).prop_map(|(unit, mask)| Change::PartlyWritten { unit, mask }),
            ],
            0..12,
        )
    }

    #[test]
    fn a_fresh_volume_has_a_tiny_snapshot() {
        assert_eq!(write(&Delta::empty(&identity())).len(), 104);
    }

    #[test]
    fn every_cut_and_every_flipped_byte_is_noticed() {
        let mut delta = Delta::empty(&identity());
        delta.apply(Change::Written(Extent::new(5, 40_000)));
        delta.apply(Change::PartlyWritten { unit: 3, mask: 5 });
        let bytes = write(&delta);
        let whole = |bytes: &[u8]| {
            let mut reader = SnapshotReader::new(bytes).ok()?;
            while reader.next_block().ok()?.is_some() {}
            Some(())
        };
        assert!(whole(&bytes).is_some());
        for cut in 0..bytes.len() {
            assert!(whole(&bytes[..cut]).is_none(), "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert!(whole(&bad).is_none(), "flip at {at}");
        }
    }

    proptest! {
        #[test]
        fn a_snapshot_tells_what_the_changes_told(changes in changes()) {
            let id = identity();
            let units = id.units();
            let (mut resident, mut owned) = (UnitSet::empty(units), UnitSet::empty(units));
            let mut partial = BTreeMap::<u64, u8>::new();
            let mut delta = Delta::empty(&id);
            for &change in &changes {
                delta.apply(change);
                match change {
                    Change::Filled(e) => { resident.insert(e); }
                    Change::Written(e) => { resident.insert(e); owned.insert(e); }
                    Change::PartlyWritten { unit, mask } => {
                        owned.insert(Extent::unit(unit));
                        *partial.entry(unit).or_default() |= mask;
                    }
                }
            }
            for (&unit, &mask) in &partial {
                if mask & id.all_sectors(unit) == id.all_sectors(unit) {
                    resident.insert(Extent::unit(unit));
                }
            }
            partial.retain(|&unit, _| !resident.contains(unit));

            let bytes = write(&delta);
            let mut reader = SnapshotReader::new(&bytes[..]).unwrap();
            let mut state = super::super::State::empty(&id);
            while let Some(block) = reader.next_block().unwrap() {
                state.take(&block);
            }
            prop_assert_eq!(&state.resident, &resident);
            prop_assert_eq!(&state.guest_owned, &owned);
            prop_assert_eq!(&state.partial, &partial);
        }

        #[test]
        fn arbitrary_bytes_after_a_good_header_never_panic(
            tail in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let (_, mut bytes) = SnapshotWriter::new(identity(), 4);
            bytes.extend(tail);
            let mut reader = SnapshotReader::new(&bytes[..]).unwrap();
            while let Ok(Some(_)) = reader.next_block() {}
        }
    }
}
