//! Our own trace file.
//!
//! ```text
//! head:    magic "WHBLTRCE" | version u32 | reserved u32 | xxh3-64 of those u64
//! blocks:  bytes of payload u32 | records u32 | xxh3-64, seeded with the block's number, of those and the payload u64 | payload
//! end:     a block of no bytes and no records
//! record:  varint (microseconds since the record before, times two, plus one for a write)
//!          varint (zigzag of: offset less the end of the record before)
//!          varint (length)
//! ```
//! Fixed fields are little-endian, varints LEB128. Before a block's first record stand time 0 and offset 0, so a block
//! can be read without those before it. A sequential 4 KiB request takes 5 bytes.
//!
//! A block is whole or it is not believed: after a crash all blocks before the last are good, and the reader says
//! that the end is missing only after it has given all of them. Memory of both ends: one block.

use super::{REACH, Request, TraceError};
use crate::heat::AccessKind;
use std::io::{ErrorKind, Read, Write};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

pub const MAGIC: &[u8; 8] = b"WHBLTRCE";
pub const VERSION: u32 = 1;

/// Payload of a block, at most. The writer ends one before a record would not fit.
pub const BLOCK: usize = 64 << 10;

/// Bytes of a record, at most.
const RECORD: usize = 30;

const HEAD: usize = 24;
const BLOCK_HEAD: usize = 16;

/// Writes a trace. Without [`finish`](Self::finish) it is one that was cut off.
pub struct Writer<W: Write> {
    out: W,
    payload: Vec<u8>,
    records: u32,
    block: u64,
    /// Time and end of the record before, within the block.
    before: (u64, u64),
    last_us: u64,
}

impl<W: Write> Writer<W> {
    pub fn new(mut out: W) -> Result<Self, TraceError> {
        let mut head = Vec::with_capacity(HEAD);
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(&VERSION.to_le_bytes());
        head.extend_from_slice(&[0; 4]);
        head.extend_from_slice(&xxh3_64(&head).to_le_bytes());
        out.write_all(&head)?;
        Ok(Writer {
            out,
            payload: Vec::with_capacity(BLOCK),
            records: 0,
            block: 0,
            before: (0, 0),
            last_us: 0,
        })
    }

    /// Refuses what [`Request`] says cannot be.
    pub fn push(&mut self, request: &Request) -> Result<(), TraceError> {
        let Request {
            at_us,
            kind,
            offset,
            len,
        } = *request;
        let end = offset.checked_add(len).filter(|&end| end <= REACH);
        let sound = len > 0 && at_us >= self.last_us && at_us < 1 << 62;
        let (Some(end), true) = (end, sound) else {
            return Err(TraceError::Request { at_us, offset, len });
        };
        if self.payload.len() + RECORD > BLOCK {
            self.end_block()?;
        }
        let (before_us, before_end) = self.before;
        let write = u64::from(kind == AccessKind::Write);
        put(&mut self.payload, (at_us - before_us) << 1 | write);
        put(&mut self.payload, zigzag(offset as i64 - before_end as i64));
        put(&mut self.payload, len);
        self.records += 1;
        self.before = (at_us, end);
        self.last_us = at_us;
        Ok(())
    }

    fn end_block(&mut self) -> Result<(), TraceError> {
        let mut head = [0; BLOCK_HEAD];
        head[..4].copy_from_slice(&(self.payload.len() as u32).to_le_bytes());
        head[4..8].copy_from_slice(&self.records.to_le_bytes());
        let sum = checksum(&head, &self.payload, self.block);
        head[8..].copy_from_slice(&sum.to_le_bytes());
        self.out.write_all(&head)?;
        self.out.write_all(&self.payload)?;
        self.payload.clear();
        self.records = 0;
        self.before = (0, 0);
        self.block += 1;
        Ok(())
    }

    /// Writes the end; what it was written to, flushed.
    pub fn finish(mut self) -> Result<W, TraceError> {
        if self.records > 0 {
            self.end_block()?;
        }
        self.end_block()?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Reads a trace; never panics and takes a block's memory, whatever the bytes are.
pub struct Reader<R: Read> {
    input: R,
    payload: Vec<u8>,
    at: usize,
    /// Records of the block still to come.
    records: u32,
    /// Blocks read.
    block: u64,
    before: (u64, u64),
    last_us: u64,
    ended: bool,
}

impl<R: Read> Reader<R> {
    pub fn new(mut input: R) -> Result<Self, TraceError> {
        let mut head = [0; HEAD];
        input.read_exact(&mut head).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => TraceError::Magic,
            _ => e.into(),
        })?;
        if &head[..8] != MAGIC {
            return Err(TraceError::Magic);
        }
        let found = u32_at(&head, 8);
        if found != VERSION {
            return Err(TraceError::Version { found });
        }
        if xxh3_64(&head[..16]).to_le_bytes() != head[16..] {
            return Err(TraceError::Head);
        }
        Ok(Reader {
            input,
            payload: Vec::new(),
            at: 0,
            records: 0,
            block: 0,
            before: (0, 0),
            last_us: 0,
            ended: false,
        })
    }

    /// The next request; none at the end.
    pub fn next_request(&mut self) -> Result<Option<Request>, TraceError> {
        if self.records == 0 && (self.ended || !self.next_block()?) {
            self.ended = true;
            return Ok(None);
        }
        let request = self.decode().ok_or(TraceError::Block {
            block: self.block - 1,
        })?;
        self.records -= 1;
        if self.records == 0 && self.at != self.payload.len() {
            return Err(TraceError::Block {
                block: self.block - 1,
            });
        }
        self.last_us = request.at_us;
        Ok(Some(request))
    }

    fn next_block(&mut self) -> Result<bool, TraceError> {
        let block = self.block;
        let cut_off = |e: std::io::Error| match e.kind() {
            ErrorKind::UnexpectedEof => TraceError::CutOff { block },
            _ => e.into(),
        };
        let mut head = [0; BLOCK_HEAD];
        self.input.read_exact(&mut head).map_err(cut_off)?;
        let (bytes, records) = (u32_at(&head, 0) as usize, u32_at(&head, 4));
        if bytes > BLOCK || (bytes == 0) != (records == 0) {
            return Err(TraceError::Block { block });
        }
        self.payload.resize(bytes, 0);
        self.input.read_exact(&mut self.payload).map_err(cut_off)?;
        if checksum(&head, &self.payload, block).to_le_bytes() != head[8..] {
            return Err(TraceError::Block { block });
        }
        self.at = 0;
        self.records = records;
        self.before = (0, 0);
        self.block += 1;
        Ok(records > 0)
    }

    fn decode(&mut self) -> Option<Request> {
        let first = self.varint()?;
        let step = unzigzag(self.varint()?);
        let len = self.varint()?;
        let at_us = self.before.0.checked_add(first >> 1)?;
        let offset = self.before.1.checked_add_signed(step)?;
        let end = offset.checked_add(len).filter(|&end| end <= REACH)?;
        if len == 0 || at_us < self.last_us || at_us >= 1 << 62 {
            return None;
        }
        self.before = (at_us, end);
        let kind = match first & 1 {
            0 => AccessKind::Read,
            _ => AccessKind::Write,
        };
        Some(Request {
            at_us,
            kind,
            offset,
            len,
        })
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = *self.payload.get(self.at)?;
            self.at += 1;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return None;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}

fn checksum(head: &[u8; BLOCK_HEAD], payload: &[u8], block: u64) -> u64 {
    let of_head = xxh3_64_with_seed(&head[..8], block);
    xxh3_64_with_seed(payload, of_head)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63) as u64
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn requests() -> impl Strategy<Value = Vec<Request>> {
        let one = (0..1u64 << 40, any::<bool>(), 0..REACH, 1..1u64 << 30);
        prop::collection::vec(one, 0..5000).prop_map(|all| {
            let mut at_us = 0;
            let one = |(pause, write, offset, len): (u64, bool, u64, u64)| {
                at_us += pause;
                let kind = if write {
                    AccessKind::Write
                } else {
                    AccessKind::Read
                };
                let len = len.min(REACH - offset);
                Request {
                    at_us,
                    kind,
                    offset,
                    len,
                }
            };
            all.into_iter().map(one).collect()
        })
    }

    fn written(all: &[Request]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new()).unwrap();
        all.iter().for_each(|r| writer.push(r).unwrap());
        writer.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> (Vec<Request>, Result<(), TraceError>) {
        let mut all = Vec::new();
        let mut reader = match Reader::new(bytes) {
            Ok(reader) => reader,
            Err(e) => return (all, Err(e)),
        };
        loop {
            match reader.next_request() {
                Ok(Some(request)) => all.push(request),
                Ok(None) => return (all, Ok(())),
                Err(e) => return (all, Err(e)),
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_trace_comes_back_as_it_was(all in requests()) {
            let (again, end) = read(&written(&all));
            prop_assert!(end.is_ok());
            prop_assert!(again == all);
        }

        #[test]
        fn a_changed_or_cut_trace_gives_a_part_and_an_error(all in requests(), at in any::<usize>(), cut in any::<bool>()) {
            let mut bytes = written(&all);
            let at = at % bytes.len();
            if cut { bytes.truncate(at) } else { bytes[at] ^= 0x40 }
            let (part, end) = read(&bytes);
            // The reserved word is under the checksum, too.
            prop_assert!(end.is_err());
            prop_assert!(all.starts_with(&part));
        }

        #[test]
        fn whatever_the_bytes_are_reading_ends(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(&bytes);
            let mut file = written(&[]);
            file.truncate(HEAD);
            // As the payload of a block with a right checksum.
            let mut head = [0; BLOCK_HEAD];
            head[..4].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
            head[4..8].copy_from_slice(&(bytes.len() as u32 / 3).to_le_bytes());
            let sum = checksum(&head, &bytes, 0);
            head[8..].copy_from_slice(&sum.to_le_bytes());
            file.extend_from_slice(&head);
            file.extend_from_slice(&bytes);
            for request in read(&file).0 {
                prop_assert!(request.len > 0 && request.offset + request.len <= REACH);
            }
        }
    }

    #[test]
    fn a_sequential_request_takes_few_bytes() {
        let all: Vec<_> = (0..10_000)
            .map(|n| Request {
                at_us: n * 900,
                kind: AccessKind::Read,
                offset: n * 4096,
                len: 4096,
            })
            .collect();
        assert!(written(&all).len() < 52_000);
    }

    #[test]
    fn what_cannot_be_is_not_written() {
        let mut writer = Writer::new(Vec::new()).unwrap();
        let sound = Request {
            at_us: 5,
            kind: AccessKind::Write,
            offset: 0,
            len: 1,
        };
        writer.push(&sound).unwrap();
        for wrong in [
            Request { at_us: 4, ..sound },
            Request { len: 0, ..sound },
            Request {
                offset: REACH,
                ..sound
            },
            Request {
                offset: u64::MAX,
                ..sound
            },
            Request {
                at_us: u64::MAX,
                ..sound
            },
        ] {
            assert!(writer.push(&wrong).is_err(), "{wrong:?}");
        }
    }
}
