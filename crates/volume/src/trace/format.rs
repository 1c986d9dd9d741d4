//! Our own trace file.
//!
//! ```text
//! head:    magic "WHBLTRCE" | version u32 | reserved u32 | xxh3-64 of those u64
//! blocks:  bytes of payload u32 | records u32 | xxh3-64, seeded with the block's number, of those and the payload u64 | payload
//! end:     a block of no bytes and no records
//! record:  varint (microseconds since the record before, times eight, plus the kind's number)
//!          varint (zigzag of: offset less the end of the record before)
//!          varint (length)
//! ```
//! Flushes and gaps have the first varint, and a gap the last; they have no place, so what follows
//! starts from the end of the record before them.
//! Kinds are numbered from 0: read, write, zero, trim, flush, gap. Version 1 had reads and writes only, and times two in
//! place of eight; it is still read.
//!
//! Fixed fields are little-endian, varints LEB128. Before a block's first record stand time 0 and offset 0, so a block
//! can be read without those before it. A sequential 4 KiB request takes 5 bytes.
//!
//! A block is whole or it is not believed: after a crash all blocks before the last are good, and the reader says
//! that the end is missing only after it has given all of them. Memory of both ends: one block.

use super::{Kind, REACH, Record, TraceError};
use std::io::{ErrorKind, Read, Write};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

pub const MAGIC: &[u8; 8] = b"WHBLTRCE";
pub const VERSION: u32 = 2;

/// The oldest that is read.
const OLDEST: u32 = 1;

/// No record is later, in microseconds.
const LATEST: u64 = 1 << 60;

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
    written: u64,
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
            written: HEAD as u64,
        })
    }

    /// Refuses what [`Record`] and [`Request`](super::Request) say cannot be.
    pub fn push(&mut self, record: &Record) -> Result<(), TraceError> {
        let Record {
            at_us,
            kind,
            offset,
            len,
        } = *record;
        if !is_sound(record, self.last_us) {
            return Err(TraceError::Request { at_us, offset, len });
        }
        if self.payload.len() + RECORD > BLOCK {
            self.end_block()?;
        }
        let (before_us, before_end) = self.before;
        put(&mut self.payload, (at_us - before_us) << 3 | kind as u64);
        let mut end = before_end;
        if kind.has_place() {
            put(&mut self.payload, zigzag(offset as i64 - before_end as i64));
            end = offset + len;
        }
        if kind != Kind::Flush {
            put(&mut self.payload, len);
        }
        self.records += 1;
        self.before = (at_us, end);
        self.last_us = at_us;
        Ok(())
    }

    /// Bytes written, the head's and those of whole blocks.
    pub fn written(&self) -> u64 {
        self.written
    }

    fn end_block(&mut self) -> Result<(), TraceError> {
        let mut head = [0; BLOCK_HEAD];
        head[..4].copy_from_slice(&(self.payload.len() as u32).to_le_bytes());
        head[4..8].copy_from_slice(&self.records.to_le_bytes());
        let sum = checksum(&head, &self.payload, self.block);
        head[8..].copy_from_slice(&sum.to_le_bytes());
        self.out.write_all(&head)?;
        self.out.write_all(&self.payload)?;
        self.written += (BLOCK_HEAD + self.payload.len()) as u64;
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
    version: u32,
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
        if !(OLDEST..=VERSION).contains(&found) {
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
            version: found,
        })
    }

    /// The next record; none at the end.
    pub fn next_record(&mut self) -> Result<Option<Record>, TraceError> {
        if self.records == 0 && (self.ended || !self.next_block()?) {
            self.ended = true;
            return Ok(None);
        }
        let record = self.decode().ok_or(TraceError::Block {
            block: self.block - 1,
        })?;
        self.records -= 1;
        if self.records == 0 && self.at != self.payload.len() {
            return Err(TraceError::Block {
                block: self.block - 1,
            });
        }
        self.last_us = record.at_us;
        Ok(Some(record))
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

    fn decode(&mut self) -> Option<Record> {
        let first = self.varint()?;
        let (step, number) = match self.version {
            1 => (first >> 1, first & 1),
            _ => (first >> 3, first & 7),
        };
        let kind = *Kind::ALL.get(number as usize)?;
        let mut record = Record {
            at_us: self.before.0.checked_add(step)?,
            kind,
            offset: 0,
            len: 0,
        };
        if kind.has_place() {
            let step = unzigzag(self.varint()?);
            record.offset = self.before.1.checked_add_signed(step)?;
        }
        if kind != Kind::Flush {
            record.len = self.varint()?;
        }
        if !is_sound(&record, self.last_us) {
            return None;
        }
        self.before.0 = record.at_us;
        if kind.has_place() {
            self.before.1 = record.offset + record.len;
        }
        Some(record)
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

fn is_sound(record: &Record, last_us: u64) -> bool {
    let Record {
        at_us,
        kind,
        offset,
        len,
    } = *record;
    let fits = match kind {
        Kind::Flush => offset == 0 && len == 0,
        Kind::Gap => offset == 0 && len > 0,
        Kind::Read | Kind::Write | Kind::Zero | Kind::Trim => {
            len > 0 && offset.checked_add(len).is_some_and(|end| end <= REACH)
        }
    };
    fits && at_us >= last_us && at_us < LATEST
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

    fn requests() -> impl Strategy<Value = Vec<Record>> {
        let one = (0..1u64 << 40, 0..6usize, 0..REACH, 1..1u64 << 30);
        prop::collection::vec(one, 0..5000).prop_map(|all| {
            let mut at_us = 0;
            let one = |(pause, kind, offset, len): (u64, usize, u64, u64)| {
                at_us += pause;
                let kind = Kind::ALL[kind];
                let (offset, len) = match kind {
                    Kind::Flush => (0, 0),
                    Kind::Gap => (0, len),
                    _ => (offset, len.min(REACH - offset)),
                };
                Record {
                    at_us,
                    kind,
                    offset,
                    len,
                }
            };
            all.into_iter().map(one).collect()
        })
    }

    fn written(all: &[Record]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new()).unwrap();
        all.iter().for_each(|r| writer.push(r).unwrap());
        writer.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> (Vec<Record>, Result<(), TraceError>) {
        let mut all = Vec::new();
        let mut reader = match Reader::new(bytes) {
            Ok(reader) => reader,
            Err(e) => return (all, Err(e)),
        };
        loop {
            match reader.next_record() {
                Ok(Some(record)) => all.push(record),
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
                prop_assert!(is_sound(&request, 0));
            }
        }
    }

    #[test]
    fn a_sequential_request_takes_few_bytes() {
        let all: Vec<_> = (0..10_000)
            .map(|n| Record {
                at_us: n * 900,
                kind: Kind::Read,
                offset: n * 4096,
                len: 4096,
            })
            .collect();
        assert!(written(&all).len() < 52_000);
    }

    #[test]
    fn a_trace_of_the_first_version_is_read() {
        let mut payload = Vec::new();
        for (first, step, len) in [(10, 4096, 512), (7 << 1 | 1, 0, 4096)] {
            put(&mut payload, first);
            put(&mut payload, zigzag(step));
            put(&mut payload, len);
        }
        let mut file = written(&[]);
        file[8] = 1;
        let sum = xxh3_64(&file[..16]).to_le_bytes();
        file[16..HEAD].copy_from_slice(&sum);
        file.truncate(HEAD);
        for (block, (payload, records)) in [(payload.as_slice(), 2), (&[], 0)].iter().enumerate() {
            let mut head = [0; BLOCK_HEAD];
            head[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
            head[4] = *records;
            let sum = checksum(&head, payload, block as u64);
            head[8..].copy_from_slice(&sum.to_le_bytes());
            file.extend_from_slice(&head);
            file.extend_from_slice(payload);
        }
        let (all, end) = read(&file);
        end.unwrap();
        let record = |at_us, kind, offset, len| Record {
            at_us,
            kind,
            offset,
            len,
        };
        let expected = [
            record(5, Kind::Read, 4096, 512),
            record(12, Kind::Write, 4608, 4096),
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn what_cannot_be_is_not_written() {
        let mut writer = Writer::new(Vec::new()).unwrap();
        let sound = Record {
            at_us: 5,
            kind: Kind::Write,
            offset: 0,
            len: 1,
        };
        writer.push(&sound).unwrap();
        for wrong in [
            Record { at_us: 4, ..sound },
            Record { len: 0, ..sound },
            Record {
                offset: REACH,
                ..sound
            },
            Record {
                offset: u64::MAX,
                ..sound
            },
            Record {
                at_us: u64::MAX,
                ..sound
            },
            Record {
                kind: Kind::Flush,
                ..sound
            },
            Record {
                kind: Kind::Gap,
                len: 0,
                ..sound
            },
        ] {
            assert!(writer.push(&wrong).is_err(), "{wrong:?}");
        }
    }
}
