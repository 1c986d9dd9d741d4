//! The log's format: one header block, then 32-byte records.
//!
//! ```text
//! header, 4096 bytes (zero-filled)          record, 32 bytes: record i lies at 4096 + 32 i
//!   0  magic "WHMBRLJL"                       0  sequence number = generation << 32 | i
//!   8  version u32 = 1                        8  first unit, or what a barrier covers
//!  12  slots u32                             16  length in units (48 bits) | kind << 48 | mask << 56
//!  16  volume uuid                           24  xxh3-64 of bytes 0..24, seeded with the nonce
//!  32  volume size, bytes u64
//!  40  epoch u64                            All integers are little-endian.
//!  48  boot id
//!  64  generation u64
//!  72  nonce u64
//!  80  xxh3-64 of bytes 0..80
//! ```
//!
//! Sixteen records fill a sector exactly, so a device that writes sectors whole never tears one. The
//! place of a record decides its sequence number and the nonce is fresh in every log, so nothing left
//! over from another file, place or log can pass for a record. A slot never written is all zero.

use whimbrel_engine::space::Extent;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::{BootId, Change, Fault, VolumeIdentity};

/// Bytes of a record.
pub const RECORD: usize = 32;
/// Bytes before the first record.
pub const HEADER: usize = 4096;

const MAGIC: &[u8; 8] = b"WHMBRLJL";
const VERSION: u32 = 1;
const LEN_BITS: u32 = 48;

/// A record's place in the order of all records of a volume: generation of the log, then slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sequence(pub u64);

impl Sequence {
    pub fn new(generation: u64, slot: u32) -> Self {
        Sequence(generation << 32 | u64::from(slot))
    }
}

/// The first block of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogHeader {
    pub identity: VolumeIdentity,
    pub boot: BootId,
    pub generation: u64,
    pub nonce: u64,
    /// Records the file has room for.
    pub slots: u32,
}

impl LogHeader {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.slots.to_le_bytes());
        out.extend_from_slice(&self.identity.uuid);
        out.extend_from_slice(&self.identity.size.to_le_bytes());
        out.extend_from_slice(&self.identity.epoch.to_le_bytes());
        out.extend_from_slice(&self.boot.0);
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.extend_from_slice(&self.nonce.to_le_bytes());
        let check = xxh3_64(&out);
        out.extend_from_slice(&check.to_le_bytes());
        out.resize(HEADER, 0);
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<LogHeader, Fault> {
        if bytes.len() < HEADER {
            return Err(Fault::Truncated);
        }
        if &bytes[..8] != MAGIC {
            return Err(Fault::Magic);
        }
        if u64_at(bytes, 80) != xxh3_64(&bytes[..80]) {
            return Err(Fault::Checksum);
        }
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return Err(Fault::Version {
                found: version,
                known: VERSION,
            });
        }
        if u64_at(bytes, 64) > u64::from(u32::MAX) {
            return Err(Fault::Nonsense);
        }
        Ok(LogHeader {
            identity: VolumeIdentity {
                uuid: array_at(bytes, 16),
                size: u64_at(bytes, 32),
                epoch: u64_at(bytes, 40),
            },
            boot: BootId(array_at(bytes, 48)),
            generation: u64_at(bytes, 64),
            nonce: u64_at(bytes, 72),
            slots: u32_at(bytes, 12),
        })
    }
}

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    Change(Change),
    /// The data of every record of this boot up to and including `covers` is durable. When this was
    /// written, the first `settled` slots of this log were themselves known to be durable.
    Barrier {
        covers: Sequence,
        settled: u32,
    },
    /// Closed in good order: nothing follows in this log.
    Closed,
}

/// What a slot of the log holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Never written.
    Empty,
    /// Written in part, or damaged.
    Torn,
    /// Whole, but of no known kind or with impossible numbers.
    Nonsense,
    Valid(Entry),
}

/// Encodes one record for the slot that `at` names.
pub fn encode(entry: Entry, at: Sequence, nonce: u64) -> [u8; RECORD] {
    let (first, len, kind, mask) = match entry {
        Entry::Change(Change::Filled(e)) => (e.start, e.len, 1, 0),
        Entry::Change(Change::Written(e)) => (e.start, e.len, 2, 0),
        Entry::Change(Change::PartlyWritten { unit, mask }) => (unit, 1, 3, mask),
        Entry::Barrier { covers, settled } => (covers.0, u64::from(settled), 4, 0),
        Entry::Closed => (0, 0, 5, 0),
    };
    debug_assert!(len < 1 << LEN_BITS, "a volume has fewer units than 2^48");
    let mut out = [0; RECORD];
    out[..8].copy_from_slice(&at.0.to_le_bytes());
    out[8..16].copy_from_slice(&first.to_le_bytes());
    let word = len | kind << LEN_BITS | u64::from(mask) << 56;
    out[16..24].copy_from_slice(&word.to_le_bytes());
    let check = xxh3_64_with_seed(&out[..24], nonce);
    out[24..].copy_from_slice(&check.to_le_bytes());
    out
}

/// Decodes the slot that `at` names, in a log of a volume of `units` units.
pub fn decode(bytes: &[u8; RECORD], at: Sequence, nonce: u64, units: u64) -> Slot {
    if bytes.iter().all(|&b| b == 0) {
        return Slot::Empty;
    }
    if u64_at(bytes, 24) != xxh3_64_with_seed(&bytes[..24], nonce) || u64_at(bytes, 0) != at.0 {
        return Slot::Torn;
    }
    let first = u64_at(bytes, 8);
    let word = u64_at(bytes, 16);
    let len = word & ((1 << LEN_BITS) - 1);
    let mask = (word >> 56) as u8;
    let extent = Extent::new(first, len);
    let within = len > 0 && first.checked_add(len).is_some_and(|end| end <= units);
    match (word >> LEN_BITS) & 0xff {
        1 if within && mask == 0 => Slot::Valid(Entry::Change(Change::Filled(extent))),
        2 if within && mask == 0 => Slot::Valid(Entry::Change(Change::Written(extent))),
        3 if within && len == 1 && mask != 0 => {
            Slot::Valid(Entry::Change(Change::PartlyWritten { unit: first, mask }))
        }
        4 if first < at.0 && len <= at.0 & u64::from(u32::MAX) && mask == 0 => {
            Slot::Valid(Entry::Barrier {
                covers: Sequence(first),
                settled: len as u32,
            })
        }
        5 if first == 0 && len == 0 && mask == 0 => Slot::Valid(Entry::Closed),
        _ => Slot::Nonsense,
    }
}

/// Every slot of a log's bytes after the header; an incomplete last record counts as torn.
pub fn slots<'a>(
    header: &'a LogHeader,
    records: &'a [u8],
) -> impl Iterator<Item = (u32, Slot)> + 'a {
    let units = header.identity.units();
    records
        .chunks(RECORD)
        .zip(0..header.slots)
        .map(move |(chunk, slot)| {
            let at = Sequence::new(header.generation, slot);
            let decoded = match <&[u8; RECORD]>::try_from(chunk) {
                Ok(whole) => decode(whole, at, header.nonce, units),
                Err(_) => Slot::Torn,
            };
            (slot, decoded)
        })
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

pub(super) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> LogHeader {
        LogHeader {
            identity: VolumeIdentity {
                uuid: [7; 16],
                size: 1 << 30,
                epoch: 3,
            },
            boot: BootId([9; 16]),
            generation: 5,
            nonce: 0x1234,
            slots: 64,
        }
    }

    fn entry() -> impl Strategy<Value = Entry> {
        let extent = (0u64..1000, 1u64..1000).prop_map(|(s, l)| Extent::new(s, l));
        prop_oneof![
            extent
                .clone()
                .prop_map(|e| Entry::Change(Change::Filled(e))),
            extent.prop_map(|e| Entry::Change(Change::Written(e))),
            (0u64..1000, 1u8..)
                .prop_map(|(unit, mask)| { Entry::Change(Change::PartlyWritten { unit, mask }) }),
            (0u64..7 << 32, 0u32..7).prop_map(|(c, settled)| Entry::Barrier {
                covers: Sequence(c),
                settled
            }),
            Just(Entry::Closed),
        ]
    }

    #[test]
    fn a_header_survives_and_one_flipped_bit_does_not() {
        let bytes = header().encode();
        assert_eq!(LogHeader::decode(&bytes), Ok(header()));
        for bit in 0..88 * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(LogHeader::decode(&bad).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn a_record_is_read_only_in_its_own_place(entry in entry(), slot in 7u32..64) {
            let at = Sequence::new(7, slot);
            let units = header().identity.units();
            let bytes = encode(entry, at, 99);
            prop_assert_eq!(decode(&bytes, at, 99, units), Slot::Valid(entry));
            prop_assert_eq!(decode(&bytes, Sequence::new(7, slot + 1), 99, units), Slot::Torn);
            prop_assert_eq!(decode(&bytes, at, 98, units), Slot::Torn);
            for bit in 0..RECORD * 8 {
                let mut bad = bytes;
                bad[bit / 8] ^= 1 << (bit % 8);
                prop_assert_eq!(decode(&bad, at, 99, units), Slot::Torn);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
            let _ = LogHeader::decode(&bytes);
            prop_assert!(slots(&header(), &bytes).all(|(_, s)| !matches!(s, Slot::Valid(_))));
        }
    }
}
