//! The payload of a `Units` frame: content of units of one space.
//!
//! ```text
//! u16 space | u8 class | u8 encoding | u16 runs | u16 zero     (little-endian)
//! runs x { u64 first unit | u32 units }
//! body: the encoded content of all runs, one after the other
//! ```
//!
//! Encodings: `0` raw (4096 bytes a unit), `1` zero (no body), `2` packed (see [`pack`](mod@crate::pack)), `3` kept
//! (see [`crate::kept`]). A unit at the end of a space that is not a whole number of units travels as a whole
//! unit, padded with zeroes.
//!
//! [`Units`] are content; a [`Parcel`] is how they are written this time. Whoever decodes sees content only:
//! what was packed, or made from what was kept, comes out raw, or not at all.

use crate::frame::HEADER_LEN;
use crate::kept::{self, KeptError, Table};
use crate::pack::{self, Packer};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use whimbrel_engine::outflow::Class;
use whimbrel_engine::space::{Extent, SpaceId, UNIT};

/// Most content in one frame, in units: 256 KiB. It bounds how long a demand waits behind one frame.
pub const MAX_UNITS: u64 = 64;

/// Most units in one zero frame: it carries no content.
pub const MAX_ZERO_UNITS: u64 = 1 << 20;

const FIXED: usize = 8;
const RUN: usize = 12;

const RAW: u8 = 0;
const ZERO: u8 = 1;
const PACKED: u8 = 2;
const KEPT: u8 = 3;

/// What the content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Bytes.
    Raw,
    /// Zeroes.
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
    #[error("units frame: {0}")]
    Packed(#[from] pack::UnpackError),
    #[error("units frame: {0}")]
    Kept(#[from] KeptError),
}

/// A payload ready to go, in two parts so that content is not copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parcel {
    pub head: Bytes,
    pub body: Bytes,
}

impl Parcel {
    /// Bytes of the frame, its header included.
    pub fn wire_len(&self) -> u64 {
        (HEADER_LEN + self.head.len() + self.body.len()) as u64
    }
}

impl Units {
    pub fn units(&self) -> u64 {
        self.runs.iter().map(|r| r.len).sum()
    }

    /// Written as it is.
    pub fn plain(self) -> Parcel {
        let encoding = match self.encoding {
            Encoding::Raw => RAW,
            Encoding::Zero => ZERO,
        };
        Parcel {
            head: self.head(encoding),
            body: self.body,
        }
    }

    /// Written as one packed stretch; `None` if that is not worth it. Only for peers with
    /// [`FEATURE_ZSTD`](crate::message::FEATURE_ZSTD).
    pub fn packed(&self, packer: &mut Packer, level: i32) -> Option<Parcel> {
        match self.encoding {
            Encoding::Zero => None,
            Encoding::Raw => Some(Parcel {
                body: packer.pack(&self.body, level)?,
                head: self.head(PACKED),
            }),
        }
    }

    /// Written as these [records](kept::Records), the encoder's for just these units; packed at a level if that
    /// is wanted, then `None` if it is not worth it. Only for a connection with a table at its other end.
    pub fn kept(&self, records: &[u8], packed: Option<(&mut Packer, i32)>) -> Option<Parcel> {
        Some(Parcel {
            body: kept::body(&self.body, records, packed)?,
            head: self.head(KEPT),
        })
    }

    /// Everything before the body.
    fn head(&self, encoding: u8) -> Bytes {
        let mut head = BytesMut::with_capacity(FIXED + self.runs.len() * RUN);
        head.put_u16_le(self.space.0);
        head.put_u8(match self.class {
            Class::Demand => 0,
            Class::Push => 1,
        });
        head.put_u8(encoding);
        head.put_u16_le(self.runs.len() as u16);
        head.put_u16_le(0);
        for run in &self.runs {
            head.put_u64_le(run.start);
            head.put_u32_le(run.len as u32);
        }
        head.freeze()
    }

    /// Reads a payload. The body is a slice of it and not a copy, unless it was packed: then so much is
    /// allocated as the runs announce, which is [`MAX_UNITS`] at most. On a connection without a table of what
    /// is kept.
    pub fn decode(payload: Bytes) -> Result<Units, UnitsError> {
        Self::decode_with(payload, None)
    }

    /// As [`decode`](Self::decode), on a connection whose frames so far made this table. After an error the
    /// table is of no use any more.
    pub fn decode_with(mut payload: Bytes, table: Option<&mut Table>) -> Result<Units, UnitsError> {
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
        let written = payload.get_u8();
        let encoding = match written {
            RAW | PACKED | KEPT => Encoding::Raw,
            ZERO => Encoding::Zero,
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
        match written {
            PACKED => payload = pack::unpack(&payload, bytes as usize)?,
            KEPT => {
                let table = table.ok_or(KeptError::NoTable)?;
                payload = table.read(space, &runs, &payload)?;
            }
            _ => {}
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
        whole(u.clone().plain())
    }

    fn whole(parcel: Parcel) -> Bytes {
        [&parcel.head[..], &parcel.body].concat().into()
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
            &sample().plain().head[..],
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

    /// The bytes of version 1, for ever: the checksum is of the content, the rest is zstd's.
    #[test]
    fn a_packed_payload_has_its_golden_bytes() {
        let parcel = sample()
            .packed(&mut Packer::default(), 1)
            .expect("sevens pack well");
        assert_eq!(parcel.head[3], 2);
        let sum = xxhash_rust::xxh3::xxh3_64(&sample().body);
        assert_eq!(parcel.body[..8], sum.to_le_bytes());
        assert_eq!(parcel.body[8..12], [0x28, 0xb5, 0x2f, 0xfd], "zstd's magic");
        assert!(parcel.wire_len() < 100);
        assert_eq!(Units::decode(whole(parcel)), Ok(sample()));
    }

    #[test]
    fn packed_content_of_more_units_than_a_frame_may_have_is_not_unpacked() {
        let mut u = sample();
        u.runs = vec![Extent::new(0, MAX_UNITS + 1)];
        u.body = Bytes::from(vec![0; ((MAX_UNITS + 1) * UNIT) as usize]);
        let parcel = u
            .packed(&mut Packer::default(), 1)
            .expect("zeroes pack well");
        assert_eq!(
            Units::decode(whole(parcel)),
            Err(UnitsError::TooMany {
                units: MAX_UNITS + 1,
                limit: MAX_UNITS
            })
        );
    }

    #[test]
    fn packed_content_of_another_length_than_its_runs_is_refused() {
        let parcel = sample()
            .packed(&mut Packer::default(), 1)
            .expect("sevens pack well");
        for units in [1, 2, 4] {
            let mut other = sample();
            other.runs = vec![Extent::new(5, units)];
            let payload = [&other.head(PACKED)[..], &parcel.body].concat();
            assert!(matches!(
                Units::decode(payload.into()),
                Err(UnitsError::Packed(_))
            ));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut table = Table::new(8);
            if let Ok(u) = Units::decode_with(Bytes::from(bytes), Some(&mut table)) {
                prop_assert_eq!(u.pieces().count(), u.runs.len());
            }
        }
    }
}
