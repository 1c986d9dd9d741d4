//! Content that both ends of a connection keep, so that of a unit that is sent again only the change goes.
//!
//! # The idea
//! Each end of a push connection has a [`Table`]: slots of one unit's content each, all empty when the connection
//! begins, changed only by its frames, in their order. So the tables are equal whenever the same frames have
//! passed; there is nothing to agree on, and nothing to recover when the connection breaks: the next one begins
//! with empty tables. The sender alone decides which slot holds what ([`Place`]); how many there may be the
//! receiver has said before (`Message::Slots`).
//!
//! # The body of a units frame
//! ```text
//! u64 xxh3-64 of the content | u8 form | u32 length of the records        (little-endian)
//! records, one for each unit in the order of the runs; as they are (form 0), or as one zstd frame (form 1)
//!
//! u8 0                         | 4096 bytes                the content; not kept
//! u8 1 | u16 slot              | 4096 bytes                the content; kept in this slot
//! u8 2 | u16 slot | u16 length | a delta                   see [`delta`](crate::delta)
//! u8 3 | u16 slot | u16 length | a zstd frame              with the slot's content for its prefix
//! ```
//! The slot of a record 2 or 3 holds older content of the very same unit, and the new from then on.
//!
//! # Whom to trust
//! Nobody. So much is allocated as the runs announce: the content, and records of the length that is said if
//! so many units can have them; slots are allocated as they are filled, within what was granted. A slot that was
//! never filled, or holds another unit's content, is an error, and so is content that has not the checksum
//! that the source took of it: a table that differs from the other end's never places a wrong page.

use bytes::Bytes;
use whimbrel_engine::delta::Place;
use whimbrel_engine::space::{Extent, SpaceId};
use xxhash_rust::xxh3::xxh3_64;
use zstd::bulk::Decompressor;
use zstd::zstd_safe::{CCtx, CParameter, DCtx};

use crate::delta::{PAGE, Page, PatchError, diff, patch};
use crate::pack::Packer;

/// Slots are numbered by 16 bits.
pub const MAX_SLOTS: u32 = 1 << 16;

/// Checksum, form, length.
const HEAD: usize = 8 + 1 + 4;

/// The longest record: all of the content, and that it is kept. Deltas are never longer.
const MAX_RECORD: usize = 3 + PAGE;

const PLAIN: u8 = 0;
const ZSTD: u8 = 1;

const RAW: u8 = 0;
const KEEP: u8 = 1;
const DELTA: u8 = 2;
const PREFIXED: u8 = 3;

/// A delta may be so long. Longer ones gain little on what packing makes of the content.
const MOST_DELTA: usize = PAGE / 4;

/// Packed with a prefix a unit must be half as long: alone it mostly packs to that.
const MOST_PREFIXED: usize = PAGE / 2;

/// The level for that: the quickest real one.
const PREFIXED_LEVEL: i32 = 1;

/// A body that breaks the format, or does not fit what is kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeptError {
    #[error("content made from kept content, on a connection that keeps none")]
    NoTable,
    #[error("kept content of {len} bytes ends inside its head")]
    Short { len: usize },
    #[error("unknown form {0} of kept content")]
    Form(u8),
    #[error("records of {len} bytes for {units} units")]
    TooLong { len: usize, units: usize },
    #[error("records do not come to the {expected} bytes that were said")]
    Length { expected: usize },
    #[error("a record ends too early")]
    Truncated,
    #[error("{len} bytes after the last record")]
    Rest { len: usize },
    #[error("unknown record {0}")]
    Record(u8),
    #[error("slot {slot} of {granted}")]
    NoSuchSlot { slot: u16, granted: u32 },
    #[error("slot {slot} was never filled")]
    Empty { slot: u16 },
    #[error("slot {slot} does not hold unit {unit} of {space}")]
    OfAnother {
        slot: u16,
        space: SpaceId,
        unit: u64,
    },
    #[error("{0}")]
    Delta(#[from] PatchError),
    #[error("a record with a prefix does not unpack to one unit")]
    Prefixed,
    #[error("content has checksum {computed:#018x}, not {announced:#018x}")]
    Checksum { announced: u64, computed: u64 },
}

struct Slot {
    space: SpaceId,
    unit: u64,
    page: Box<Page>,
}

/// What one end of a connection keeps.
pub struct Table {
    granted: u32,
    slots: Vec<Option<Slot>>,
}

/// How one unit was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// Whole, whether it is kept or not.
    Whole,
    /// As the change to what was kept.
    Delta,
    Prefixed,
}

/// Records of the units of one batch, in order.
#[derive(Clone, Debug, Default)]
pub struct Records {
    bytes: Vec<u8>,
    /// By unit: where its record ends.
    ends: Vec<usize>,
}

impl Records {
    /// The records of so many units after the first `from`.
    pub fn of(&self, from: usize, units: usize) -> &[u8] {
        let end_of = |n: usize| n.checked_sub(1).map_or(0, |n| self.ends[n]);
        &self.bytes[end_of(from)..end_of(from + units)]
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn begin(&mut self, record: u8, slot: Option<u16>) {
        self.bytes.push(record);
        if let Some(slot) = slot {
            self.bytes.extend(slot.to_le_bytes());
        }
    }

    /// A record whose bytes after its length `write` appends, if it wants to.
    fn sized(&mut self, record: u8, slot: u16, write: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        let begin = self.bytes.len();
        self.begin(record, Some(slot));
        let at = self.bytes.len();
        self.bytes.extend([0; 2]);
        if !write(&mut self.bytes) {
            self.bytes.truncate(begin);
            return false;
        }
        let len = (self.bytes.len() - at - 2) as u16;
        self.bytes[at..at + 2].copy_from_slice(&len.to_le_bytes());
        true
    }
}

impl Table {
    /// An empty one, for a new connection; `granted` is [`MAX_SLOTS`] at most.
    pub fn new(granted: u32) -> Table {
        Table {
            granted: granted.min(MAX_SLOTS),
            slots: Vec::new(),
        }
    }

    /// Slots up to the last that was ever filled.
    pub fn filled(&self) -> usize {
        self.slots.len()
    }

    /// Writes a unit, and keeps it as `place` says. The same units must be read at the other end, in this order.
    ///
    /// `prefixed` is asked whether to pack the unit with its old content where a delta does not do, and told
    /// what packing that came to: the bytes, none if they were too many.
    pub fn write(
        &mut self,
        (space, unit): (SpaceId, u64),
        content: &Page,
        place: Place,
        prefixed: &mut impl Prefixing,
        records: &mut Records,
    ) -> Written {
        let (written, slot) = match place {
            Place::Forget => (Written::Whole, None),
            Place::Keep(slot) => (Written::Whole, Some(slot)),
            Place::Against(slot) => {
                let old = self
                    .of_unit(slot, space, unit)
                    .expect("the sender says `against` only of what it had kept");
                let page = &old.page;
                let delta = |out: &mut Vec<u8>| diff(page, content, MOST_DELTA, out);
                let pack = |out: &mut Vec<u8>| pack_after(page, content, out);
                let written = if records.sized(DELTA, slot, delta) {
                    Written::Delta
                } else if prefixed.tries() {
                    let before = records.bytes.len();
                    let shorter = records.sized(PREFIXED, slot, pack);
                    prefixed.tried(shorter.then(|| records.bytes.len() - before));
                    match shorter {
                        true => Written::Prefixed,
                        false => Written::Whole,
                    }
                } else {
                    Written::Whole
                };
                if written != Written::Whole {
                    old.page.copy_from_slice(content);
                }
                (written, Some(slot))
            }
        };
        if written == Written::Whole {
            let record = if slot.is_some() { KEEP } else { RAW };
            records.begin(record, slot);
            records.bytes.extend_from_slice(content);
            if let Some(slot) = slot {
                self.keep(slot, space, unit, content)
                    .expect("the sender keeps within what was granted");
            }
        }
        records.ends.push(records.bytes.len());
        written
    }

    /// The content of a body, for units of a space that come to [`MAX_UNITS`](crate::units::MAX_UNITS) at most.
    pub fn read(
        &mut self,
        space: SpaceId,
        runs: &[Extent],
        body: &[u8],
    ) -> Result<Bytes, KeptError> {
        let short = KeptError::Short { len: body.len() };
        let (head, rest) = body.split_first_chunk::<HEAD>().ok_or(short)?;
        let [sum @ .., form, l0, l1, l2, l3] = *head;
        let announced = u64::from_le_bytes(sum);
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let units = runs.iter().map(|run| run.len).sum::<u64>() as usize;
        if len > units * MAX_RECORD {
            return Err(KeptError::TooLong { len, units });
        }
        let mut unpacked = Vec::new();
        let mut records = match form {
            PLAIN => rest,
            ZSTD => {
                unpacked.reserve_exact(len);
                Decompressor::new()
                    .and_then(|mut zstd| zstd.decompress_to_buffer(rest, &mut unpacked))
                    .map_err(|_| KeptError::Length { expected: len })?;
                &unpacked
            }
            other => return Err(KeptError::Form(other)),
        };
        if records.len() != len {
            return Err(KeptError::Length { expected: len });
        }
        let mut content = Vec::with_capacity(units * PAGE);
        for unit in runs.iter().flat_map(|run| run.start..run.end()) {
            self.read_unit(space, unit, &mut records, &mut content)?;
        }
        if !records.is_empty() {
            let len = records.len();
            return Err(KeptError::Rest { len });
        }
        let computed = xxh3_64(&content);
        if announced != computed {
            return Err(KeptError::Checksum {
                announced,
                computed,
            });
        }
        Ok(content.into())
    }

    fn read_unit(
        &mut self,
        space: SpaceId,
        unit: u64,
        records: &mut &[u8],
        content: &mut Vec<u8>,
    ) -> Result<(), KeptError> {
        let [record] = *take::<1>(records)?;
        match record {
            RAW => content.extend_from_slice(take::<PAGE>(records)?),
            KEEP => {
                let slot = u16::from_le_bytes(*take(records)?);
                let page = take::<PAGE>(records)?;
                self.keep(slot, space, unit, page)?;
                content.extend_from_slice(page);
            }
            DELTA | PREFIXED => {
                let slot = u16::from_le_bytes(*take(records)?);
                let len = usize::from(u16::from_le_bytes(*take(records)?));
                let (change, rest) = records.split_at_checked(len).ok_or(KeptError::Truncated)?;
                *records = rest;
                let old = self.of_unit(slot, space, unit)?;
                if record == DELTA {
                    patch(&mut old.page, change)?;
                } else {
                    old.page = unpack_after(&old.page, change).ok_or(KeptError::Prefixed)?;
                }
                content.extend_from_slice(&old.page[..]);
            }
            other => return Err(KeptError::Record(other)),
        }
        Ok(())
    }

    fn keep(&mut self, slot: u16, space: SpaceId, unit: u64, page: &Page) -> Result<(), KeptError> {
        let at = usize::from(slot);
        if u32::from(slot) >= self.granted {
            let granted = self.granted;
            return Err(KeptError::NoSuchSlot { slot, granted });
        }
        if at >= self.slots.len() {
            self.slots.resize_with(at + 1, || None);
        }
        match &mut self.slots[at] {
            Some(held) => {
                (held.space, held.unit) = (space, unit);
                held.page.copy_from_slice(page);
            }
            empty => {
                let page = Box::new(*page);
                *empty = Some(Slot { space, unit, page });
            }
        }
        Ok(())
    }

    fn of_unit(&mut self, slot: u16, space: SpaceId, unit: u64) -> Result<&mut Slot, KeptError> {
        match self.slots.get_mut(usize::from(slot)) {
            Some(Some(held)) if (held.space, held.unit) == (space, unit) => Ok(held),
            Some(Some(_)) => Err(KeptError::OfAnother { slot, space, unit }),
            _ => Err(KeptError::Empty { slot }),
        }
    }
}

/// Whether packing with the old content is worth it.
pub trait Prefixing {
    fn tries(&mut self) -> bool;
    fn tried(&mut self, bytes: Option<usize>);
}

/// A body of these records; `None` if it was to be packed and that is not worth it.
pub(crate) fn body(
    content: &[u8],
    records: &[u8],
    packed: Option<(&mut Packer, i32)>,
) -> Option<Bytes> {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&xxh3_64(content).to_le_bytes());
    head[8] = if packed.is_some() { ZSTD } else { PLAIN };
    head[9..].copy_from_slice(&(records.len() as u32).to_le_bytes());
    match packed {
        Some((packer, level)) => packer.after(&head, records, level),
        None => Some([&head, records].concat().into()),
    }
}

fn take<'a, const N: usize>(records: &mut &'a [u8]) -> Result<&'a [u8; N], KeptError> {
    let (taken, rest) = records
        .split_first_chunk::<N>()
        .ok_or(KeptError::Truncated)?;
    *records = rest;
    Ok(taken)
}

/// Appends the content packed with the old content for a prefix, if that is short enough.
fn pack_after(old: &Page, content: &Page, out: &mut Vec<u8>) -> bool {
    let mut packed = [0; MOST_PREFIXED];
    // A context lends a prefix for as long as it lives itself, so each prefix has one of its own.
    let mut zstd = CCtx::create();
    let level = CParameter::CompressionLevel(PREFIXED_LEVEL);
    let len = zstd
        .set_parameter(level)
        .and_then(|_| zstd.ref_prefix(old))
        .and_then(|_| zstd.compress2(&mut packed[..], content));
    match len {
        Ok(len) => {
            out.extend_from_slice(&packed[..len]);
            true
        }
        Err(_) => false,
    }
}

fn unpack_after(old: &Page, packed: &[u8]) -> Option<Box<Page>> {
    let mut page = Box::new([0; PAGE]);
    let mut zstd = DCtx::create();
    zstd.ref_prefix(old).ok()?;
    let len = zstd.decompress(&mut page[..], packed).ok()?;
    (len == PAGE).then_some(page)
}

#[cfg(test)]
#[path = "kept_tests.rs"]
mod tests;
