//! The payload of a `Units` frame: content of units of one space.
//!
//! ```text
//! u16 space | u8 class | u8 encoding | u16 runs | u16 zero     (little-endian)
//! runs x { u64 first unit | u32 units }
//! body: the encoded content of all runs, one after the other
//! ```
//!
//! Encodings: `0` raw (4096 bytes a unit), `1` zero (no body). A unit at the end of a space that is not a
//! whole number of units travels as a whole unit, padded with zeroes.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use whimbrel_engine::outflow::Class;
use whimbrel_engine::space::{Extent, SpaceId, UNIT};

/// Most content in one frame, in units: 256 KiB. It bounds how long a demand waits behind one frame.
pub const MAX_UNITS: u64 = 64;

/// Most units in one zero frame: it carries no content.
pub const MAX_ZERO_UNITS: u64 = 1 << 20;

const FIXED: usize = 8;
const RUN: usize = 12;

/// How the content is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Raw,
    Zero,
}

/// Units as they travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Units {
    pub space: SpaceId,
    pub class: Class,
    pub encoding: Encoding,
    /// Disjoint, ascending runs.
    pub runs: Vec<Extent>,
    /// `units * 4096` bytes for [`Encoding::Raw`], else nothing.
    pub body: Bytes,
}

/// A `Units` payload that breaks the format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitsError {
    #[error("units frame of {len} bytes ends inside its head")]
    Short { len: usize },
    #[error("unknown class {0} of units")]
    Class(u8),
    #[error("unknown encoding {0} of units")]
    Encoding(u8),
    #[error("units frame has no runs, an empty run, or runs out of order")]
    Runs,
    #[error("units frame of {units} units, more than {limit}")]
    TooMany { units: u64, limit: u64 },
    #[error("units frame announces {units} units but carries {bytes} bytes")]
    Length { units: u64, bytes: usize },
}

impl Units {
    pub fn units(&self) -> u64 {
        self.runs.iter().map(|r| r.len).sum()
    }

    /// Everything before the body.
    pub fn head(&self) -> Bytes {
        let mut head = BytesMut::with_capacity(FIXED + self.runs.len() * RUN);
        head.put_u16_le(self.space.0);
        head.put_u8(match self.class {
            Class::Demand => 0,
            Class::Push => 1,
        });
        head.put_u8(match self.encoding {
            Encoding::Raw => 0,
            Encoding::Zero => 1,
        });
        head.put_u16_le(self.runs.len() as u16);
        head.put_u16_le(0);
        for run in &self.runs {
            head.put_u64_le(run.start);
            head.put_u32_le(run.len as u32);
        }
        head.freeze()
    }

    /// Reads a payload; the body is a slice of it, not a copy.
    pub fn decode(mut payload: Bytes) -> Result<Units, UnitsError> {
        let len = payload.len();
        if len < FIXED {
            return Err(UnitsError::Short { len });
        }
        let space = SpaceId(payload.get_u16_le());
        let class = match payload.get_u8() {
            0 => Class::Demand,
            1 => Class::Push,
            other => return Err(UnitsError::Class(other)),
        };
        let encoding = match payload.get_u8() {
            0 => Encoding::Raw,
            1 => Encoding::Zero,
            other => return Err(UnitsError::Encoding(other)),
        };
        let count = usize::from(payload.get_u16_le());
        let _reserved = payload.get_u16_le();
        if payload.len() < count * RUN {
            return Err(UnitsError::Short { len });
        }
        let mut runs: Vec<Extent> = Vec::with_capacity(count);
        let mut units = 0;
        for _ in 0..count {
            let run = Extent::new(payload.get_u64_le(), u64::from(payload.get_u32_le()));
            let after = runs.last().map_or(0, Extent::end);
            // Unit indices stay far below the width of a byte offset.
            if run.is_empty() || run.start < after || run.start > u64::MAX / UNIT / 4 {
                return Err(UnitsError::Runs);
            }
            units += run.len;
            runs.push(run);
        }
        if runs.is_empty() {
            return Err(UnitsError::Runs);
        }
        let (limit, bytes) = match encoding {
            Encoding::Raw => (MAX_UNITS, units * UNIT),
            Encoding::Zero => (MAX_ZERO_UNITS, 0),
        };
        if units > limit {
            return Err(UnitsError::TooMany { units, limit });
        }
        if payload.len() as u64 != bytes {
            return Err(UnitsError::Length {
                units,
                bytes: payload.len(),
            });
        }
        Ok(Units {
            space,
            class,
            encoding,
            runs,
            body: payload,
        })
    }

    /// The runs, each with its content; for [`Encoding::Zero`] the content is empty.
    pub fn pieces(&self) -> impl Iterator<Item = (Extent, Bytes)> + '_ {
        let mut at = 0;
        self.runs.iter().map(move |&run| {
            let bytes = match self.encoding {
                Encoding::Raw => run.byte_len() as usize,
                Encoding::Zero => 0,
            };
            let piece = self.body.slice(at..at + bytes);
            at += bytes;
            (run, piece)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Units {
        Units {
            space: SpaceId(3),
            class: Class::Demand,
            encoding: Encoding::Raw,
            runs: vec![Extent::new(5, 2), Extent::new(9, 1)],
            body: Bytes::from(vec![7; 3 * UNIT as usize]),
        }
    }

    fn join(u: &Units) -> Bytes {
        let mut all = BytesMut::from(&u.head()[..]);
        all.extend_from_slice(&u.body);
        all.freeze()
    }

    #[test]
    fn units_come_back_as_they_went() {
        let u = sample();
        assert_eq!(Units::decode(join(&u)), Ok(u));
    }

    /// The bytes of version 1, for ever.
    #[test]
    fn head_has_its_golden_bytes() {
        assert_eq!(
            &sample().head()[..],
            [
                3, 0, 0, 0, 2, 0, 0, 0, // space 3, demand, raw, two runs
                5, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, // 5..7
                9, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, // 9..10
            ]
        );
    }

    #[test]
    fn a_body_of_another_length_is_refused() {
        let mut u = sample();
        u.body = u.body.slice(1..);
        assert!(matches!(
            Units::decode(join(&u)),
            Err(UnitsError::Length { units: 3, .. })
        ));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(u) = Units::decode(Bytes::from(bytes)) {
                prop_assert_eq!(u.pieces().count(), u.runs.len());
            }
        }
    }
}
