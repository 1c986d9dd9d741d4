//! Heat on disk: what an [`AccessLog`]'s counters were, to go on from after a restart.
//!
//! ```text
//! magic "WHBLHEAT" | version u32 | reserved u32 | size of the volume u64
//! runs:  first extent u32 | extents u32 (not 0) | per extent: reads u16, writes u16
//! end:   0 u32 | 0 u32 | xxh3-64 of all before u64
//! ```
//! Little-endian. Extents nobody used take no room, so the file of an idle volume of a TiB is 40 bytes; of
//! one used all over it is 4 MiB. Heat is a hint: a file that cannot be read is as good as none, and
//! whoever reads it says so and starts cold.

use crate::heat::{AccessLog, HEAT_EXTENT, HeatSnapshot};
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: &[u8; 8] = b"WHBLHEAT";
const VERSION: u32 = 1;
const HEAD: usize = 24;

/// Why a heat file is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeatFault {
    #[error("it is no heat file")]
    Magic,
    #[error("it has version {0}, this program knows {VERSION}")]
    Version(u32),
    #[error("its checksum is wrong")]
    Checksum,
    #[error("it is of a volume of another size")]
    Size,
    #[error("it names extents that there are not")]
    Extents,
}

/// The counters as a file's content, for a volume of `size` bytes.
pub fn encode(size: u64, heat: &HeatSnapshot) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&0u32.to_le_bytes());
    out.extend_from_slice(&size.to_le_bytes());
    let used = |n: usize| heat.reads[n] != 0 || heat.writes[n] != 0;
    let extents = heat.reads.len().min(heat.writes.len());
    let mut next = 0;
    while let Some(first) = (next..extents).find(|&n| used(n)) {
        let end = (first..extents).find(|&n| !used(n)).unwrap_or(extents);
        out.extend_from_slice(&(first as u32).to_le_bytes());
        out.extend_from_slice(&((end - first) as u32).to_le_bytes());
        for n in first..end {
            out.extend_from_slice(&heat.reads[n].to_le_bytes());
            out.extend_from_slice(&heat.writes[n].to_le_bytes());
        }
        next = end;
    }
    out.extend_from_slice(&[0; 8]);
    let sum = xxh3_64(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    out
}

/// Sets the counters of a log that is as yet empty.
pub fn restore(log: &AccessLog, size: u64, bytes: &[u8]) -> Result<(), HeatFault> {
    let u32_at = |at: usize| -> Result<u32, HeatFault> {
        let b = bytes.get(at..at + 4).ok_or(HeatFault::Extents)?;
        Ok(u32::from_le_bytes(b.try_into().expect("four bytes")))
    };
    if bytes.len() < HEAD + 16 || &bytes[..8] != MAGIC {
        return Err(HeatFault::Magic);
    }
    if u32_at(8)? != VERSION {
        return Err(HeatFault::Version(u32_at(8)?));
    }
    let (content, sum) = bytes.split_at(bytes.len() - 8);
    if xxh3_64(content).to_le_bytes() != *sum {
        return Err(HeatFault::Checksum);
    }
    if content[16..HEAD] != size.to_le_bytes() {
        return Err(HeatFault::Size);
    }
    let extents = size.div_ceil(HEAT_EXTENT);
    let mut at = HEAD;
    loop {
        let (first, len) = (u64::from(u32_at(at)?), u64::from(u32_at(at + 4)?));
        at += 8;
        if len == 0 {
            return Ok(());
        }
        if first + len > extents {
            return Err(HeatFault::Extents);
        }
        for n in first..first + len {
            let both = u32_at(at)?;
            log.preset(n as usize, both as u16, (both >> 16) as u16);
            at += 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heat::AccessKind;
    use proptest::prelude::*;

    const SIZE: u64 = (100 << 20) + 512;

    proptest! {
        #[test]
        fn heat_comes_back_as_it_was(accesses in prop::collection::vec((any::<bool>(), 0..SIZE, 1..3_000_000u64), 0..60)) {
            let log = AccessLog::new(SIZE, 8);
            for (write, at, len) in accesses {
                let kind = if write { AccessKind::Write } else { AccessKind::Read };
                log.log(0, kind, at, len.min(SIZE - at));
            }
            let before = log.snapshot();
            let bytes = encode(SIZE, &before);
            let again = AccessLog::new(SIZE, 8);
            restore(&again, SIZE, &bytes).unwrap();
            let after = again.snapshot();
            prop_assert_eq!((before.reads, before.writes), (after.reads, after.writes));
        }

        #[test]
        fn what_is_no_heat_file_is_refused_whatever_it_is(mut bytes in prop::collection::vec(any::<u8>(), 0..200), flip in any::<usize>()) {
            let log = AccessLog::new(SIZE, 1);
            prop_assert!(restore(&log, SIZE, &bytes).is_err());
            log.log(0, AccessKind::Read, 1 << 20, 5 << 20);
            bytes = encode(SIZE, &log.snapshot());
            let at = flip % bytes.len();
            bytes[at] ^= 0x10;
            prop_assert!(restore(&AccessLog::new(SIZE, 1), SIZE, &bytes).is_err());
        }
    }

    #[test]
    fn the_file_of_an_idle_tebibyte_is_small() {
        let log = AccessLog::new(1 << 40, 1);
        let bytes = encode(1 << 40, &log.snapshot());
        assert_eq!(bytes.len(), 40);
        assert_eq!(restore(&log, 1 << 39, &bytes), Err(HeatFault::Size));
    }
}
