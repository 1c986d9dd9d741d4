//! Frames: how messages and units are cut on a byte stream.
//!
//! A frame is a header of 16 bytes and a payload, little-endian:
//!
//! | bytes | field |
//! |---|---|
//! | 0 | magic and format version, `0xb1` (high nibble: Whimbrel, low nibble: format 1) |
//! | 1 | [`Kind`] |
//! | 2..4 | flags: opaque to this module; written 0 until a feature gives a bit a meaning |
//! | 4..8 | length of the payload, at most [`MAX_PAYLOAD`] |
//! | 8..16 | xxh3-64 of bytes 0..8 followed by the payload |
//!
//! The header is all this module understands; payloads are opaque. Nothing here does input or output:
//! a writer asks for a [`header`] and writes it before payload bytes it never copies, a reader feeds
//! what arrives to a [`Decoder`], which takes payloads out of the reader's buffer without copying.
//!
//! Traps. A stream that held one bad frame cannot be resynchronised, so a [`Decoder`] that failed
//! stays failed and its connection must be closed. A damaged length is found by its bound or, once the
//! payload is in, by the checksum: until then the reader waits, which is why streams run over TLS.
//! A payload shares its memory with what was read beside it (up to one frame and one read), so
//! whoever keeps a few bytes of a payload for long copies them.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::Xxh3;

/// Bytes in a frame's header.
pub const HEADER_LEN: usize = 16;

/// The most bytes a payload may have: 1 MiB of units and 64 KiB to describe them.
pub const MAX_PAYLOAD: usize = (1 << 20) + (64 << 10);

/// Bytes in the payload of a [`Kind::Ping`] or [`Kind::Pong`].
pub const PING_LEN: usize = 8;

const MAGIC: u8 = 0xb1;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// The link layer's greeting, sent once in each direction before anything else.
    Hello = 1,
    /// One message.
    Control = 2,
    /// Contents of units and what describes them.
    Units = 3,
    /// 8 bytes that the receiver sends back as a [`Kind::Pong`] at once.
    Ping = 4,
    /// The 8 bytes of a ping.
    Pong = 5,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        [
            Kind::Hello,
            Kind::Control,
            Kind::Units,
            Kind::Ping,
            Kind::Pong,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }

    fn accepts(self, len: usize) -> Result<(), FrameError> {
        match self {
            Kind::Ping | Kind::Pong if len != PING_LEN => {
                Err(FrameError::PingLength { kind: self, len })
            }
            _ if len > MAX_PAYLOAD => Err(FrameError::TooLong { len: len as u64 }),
            _ => Ok(()),
        }
    }
}

/// Why bytes are not a frame, or a frame cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("not a frame: it begins with byte {found:#04x}, a frame with {MAGIC:#04x}")]
    BadMagic { found: u8 },
    #[error("a frame of unknown kind {kind}")]
    UnknownKind { kind: u8 },
    #[error("a frame of {len} bytes, over the bound of {MAX_PAYLOAD}")]
    TooLong { len: u64 },
    #[error("a {kind:?} frame of {len} bytes, where {PING_LEN} are due")]
    PingLength { kind: Kind, len: usize },
    #[error(
        "a {kind:?} frame of {len} bytes is damaged: its checksum says {stated:#018x}, its content {computed:#018x}"
    )]
    Checksum {
        kind: Kind,
        len: usize,
        stated: u64,
        computed: u64,
    },
}

/// A frame as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    pub flags: u16,
    pub payload: Bytes,
}

impl Frame {
    /// Bytes that the frame took on the stream, its header included.
    pub fn wire_len(&self) -> usize {
        HEADER_LEN + self.payload.len()
    }
}

/// The header of a frame whose payload is `parts`, one after the other.
pub fn header(kind: Kind, flags: u16, parts: &[&[u8]]) -> Result<[u8; HEADER_LEN], FrameError> {
    let len = parts
        .iter()
        .fold(0_usize, |sum, part| sum.saturating_add(part.len()));
    kind.accepts(len)?;
    let mut bytes = [0; HEADER_LEN];
    bytes[0] = MAGIC;
    bytes[1] = kind as u8;
    bytes[2..4].copy_from_slice(&flags.to_le_bytes());
    bytes[4..8].copy_from_slice(&(len as u32).to_le_bytes());
    let checksum = checksum(&bytes[..8], parts);
    bytes[8..].copy_from_slice(&checksum.to_le_bytes());
    Ok(bytes)
}

/// Appends a whole frame to `out`, copying the payload.
pub fn encode(
    kind: Kind,
    flags: u16,
    payload: &[u8],
    out: &mut BytesMut,
) -> Result<(), FrameError> {
    let header = header(kind, flags, &[payload])?;
    out.reserve(HEADER_LEN + payload.len());
    out.put_slice(&header);
    out.put_slice(payload);
    Ok(())
}

fn checksum(fields: &[u8], parts: &[&[u8]]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(fields);
    for part in parts {
        hash.update(part);
    }
    hash.digest()
}

#[derive(Clone, Copy, Debug)]
struct Header {
    kind: Kind,
    flags: u16,
    len: usize,
    fields: [u8; 8],
    checksum: u64,
}

impl Header {
    fn take(buf: &mut BytesMut) -> Result<Header, FrameError> {
        let mut fields = [0; 8];
        buf.copy_to_slice(&mut fields);
        let checksum = buf.get_u64_le();
        if fields[0] != MAGIC {
            return Err(FrameError::BadMagic { found: fields[0] });
        }
        let kind = Kind::from_byte(fields[1]).ok_or(FrameError::UnknownKind { kind: fields[1] })?;
        let len = u32::from_le_bytes([fields[4], fields[5], fields[6], fields[7]]) as usize;
        kind.accepts(len)?;
        Ok(Header {
            kind,
            flags: u16::from_le_bytes([fields[2], fields[3]]),
            len,
            fields,
            checksum,
        })
    }
}

/// Cuts frames out of a growing buffer.
#[derive(Debug, Default)]
pub struct Decoder {
    header: Option<Header>,
    failed: Option<FrameError>,
}

impl Decoder {
    /// Takes the next frame out of the front of `buf`; `None` while it is not wholly there. An error
    /// is for good: every later call returns it again.
    pub fn decode(&mut self, buf: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let result = self.advance(buf);
        if let Err(error) = &result {
            self.failed = Some(*error);
        }
        result
    }

    fn advance(&mut self, buf: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        let header = match self.header {
            Some(header) => header,
            // The first byte alone shows a stranger, who may never send a whole header.
            None if buf.first().is_some_and(|&found| found != MAGIC) => {
                return Err(FrameError::BadMagic { found: buf[0] });
            }
            None if buf.len() < HEADER_LEN => return Ok(None),
            None => *self.header.insert(Header::take(buf)?),
        };
        if buf.len() < header.len {
            return Ok(None);
        }
        self.header = None;
        let payload = buf.split_to(header.len).freeze();
        let computed = checksum(&header.fields, &[&payload]);
        if computed != header.checksum {
            return Err(FrameError::Checksum {
                kind: header.kind,
                len: header.len,
                stated: header.checksum,
                computed,
            });
        }
        Ok(Some(Frame {
            kind: header.kind,
            flags: header.flags,
            payload,
        }))
    }

    /// How many more bytes `buf` needs before [`decode`](Self::decode) can come further: what to
    /// reserve before the next read. At most [`MAX_PAYLOAD`], and never 0 after a `None`.
    pub fn wants(&self, buf: &BytesMut) -> usize {
        self.header
            .map_or(HEADER_LEN, |header| header.len)
            .saturating_sub(buf.len())
    }

    /// Whether the stream stands between two frames, so that it may end here.
    pub fn is_between_frames(&self, buf: &BytesMut) -> bool {
        self.header.is_none() && buf.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(kind: Kind, payload: &[u8]) -> BytesMut {
        let mut out = BytesMut::new();
        encode(kind, 0, payload, &mut out).unwrap();
        out
    }

    fn decode(mut bytes: BytesMut) -> Result<Option<Frame>, FrameError> {
        Decoder::default().decode(&mut bytes)
    }

    #[test]
    fn the_layout_on_the_wire_stays_as_it_is() {
        // The checksum was computed with the reference implementation of xxHash.
        let frame = encoded(Kind::Control, b"whimbrel");
        assert_eq!(frame[..8], [0xb1, 2, 0, 0, 8, 0, 0, 0]);
        assert_eq!(frame[8..16], 0xba0d_525a_2bb6_c2f2_u64.to_le_bytes());
        assert_eq!(&frame[16..], b"whimbrel");
    }

    #[test]
    fn a_header_over_parts_is_the_header_over_the_whole() {
        let whole = header(Kind::Units, 7, &[b"headbody"]).unwrap();
        assert_eq!(header(Kind::Units, 7, &[b"head", b"body"]).unwrap(), whole);
    }

    #[test]
    fn a_stranger_is_told_by_its_first_byte() {
        assert_eq!(
            decode(BytesMut::from(&b"G"[..])),
            Err(FrameError::BadMagic { found: b'G' })
        );
    }

    #[test]
    fn an_unknown_kind_is_an_error() {
        let mut frame = encoded(Kind::Control, b"");
        frame[1] = 77;
        assert_eq!(decode(frame), Err(FrameError::UnknownKind { kind: 77 }));
    }

    #[test]
    fn an_oversize_frame_is_refused_before_its_payload_comes() {
        let mut frame = encoded(Kind::Units, b"");
        frame[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(
            decode(frame),
            Err(FrameError::TooLong {
                len: u64::from(u32::MAX)
            })
        );
    }

    #[test]
    fn an_oversize_payload_is_not_written() {
        let part = vec![0; MAX_PAYLOAD];
        assert!(header(Kind::Units, 0, &[&part]).is_ok());
        assert_eq!(
            header(Kind::Units, 0, &[&part, b"x"]),
            Err(FrameError::TooLong {
                len: MAX_PAYLOAD as u64 + 1
            })
        );
    }

    #[test]
    fn a_ping_has_eight_bytes() {
        let error = FrameError::PingLength {
            kind: Kind::Ping,
            len: 7,
        };
        assert_eq!(header(Kind::Ping, 0, &[b"1234567"]), Err(error));
        let mut frame = encoded(Kind::Control, b"1234567");
        frame[1] = Kind::Ping as u8;
        assert_eq!(decode(frame), Err(error));
    }

    #[test]
    fn a_decoder_that_failed_stays_failed() {
        let mut decoder = Decoder::default();
        let mut buf = BytesMut::from(&b"GET / HTTP/1.1\r\n"[..]);
        let error = decoder.decode(&mut buf).unwrap_err();
        let mut buf = encoded(Kind::Control, b"fine");
        assert_eq!(decoder.decode(&mut buf), Err(error));
    }

    #[test]
    fn a_stream_may_end_only_between_frames() {
        let mut decoder = Decoder::default();
        let mut buf = encoded(Kind::Control, b"12345678");
        assert!(!decoder.is_between_frames(&buf));
        let tail = buf.split_off(20);
        assert_eq!(decoder.decode(&mut buf), Ok(None));
        assert_eq!(decoder.wants(&buf), 4);
        buf.unsplit(tail);
        assert!(decoder.decode(&mut buf).unwrap().is_some());
        assert!(decoder.is_between_frames(&buf));
    }
}
