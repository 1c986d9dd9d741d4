//! The return path: what a destination says to its source on the same socket.
//!
//! A message is `u16 type, u16 len, data`. Both directions are here: Whimbrel is a source to the
//! destination QEMU (and reads this) and a destination to the source QEMU (and writes it).

use whimbrel_engine::set::UnitSet;

/// Longest message taken: a block's name and three numbers.
const MAX_MESSAGE: usize = 1024;
const HEADER: usize = 4;

/// What closes a bitmap of received units.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// One message of the return path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReturnMessage {
    /// The destination has everything (0) or failed.
    Shut(u32),
    Pong(u32),
    /// Bytes `start..start + len` are wanted; no name: the block named last.
    RequestPages {
        block: Option<String>,
        start: u64,
        len: u32,
    },
    /// Answer to a RECV_BITMAP command; the bitmap itself follows outside of the framing.
    RecvBitmap {
        block: String,
    },
    /// Answer to POSTCOPY_RESUME; 1 is yes.
    ResumeAck(u32),
    /// The destination agrees to the switchover (QEMU 8.1 and newer, capability `switchover-ack`).
    SwitchoverAck,
}

/// The bytes of a bitmap of received units, which follow [`ReturnMessage::RecvBitmap`]: u64 size, the
/// set's little-endian words, u64 end mark.
pub fn encode_bitmap(received: &UnitSet) -> Vec<u8> {
    let bytes = received.to_bytes();
    let mut out = (bytes.len() as u64).to_be_bytes().to_vec();
    out.extend(bytes);
    out.extend(BITMAP_END.to_be_bytes());
    out
}

/// Bytes that [`encode_bitmap`] makes of a set of that capacity.
pub fn bitmap_len(units: u64) -> usize {
    units.div_ceil(64) as usize * 8 + 16
}

/// Reads what [`encode_bitmap`] has written: exactly [`bitmap_len`] bytes.
pub fn decode_bitmap(units: u64, bytes: &[u8]) -> Result<UnitSet, ReturnError> {
    let word = |at: usize| {
        let word = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
        word.map(u64::from_be_bytes)
    };
    let len = bitmap_len(units);
    let whole =
        bytes.len() == len && word(0) == Some(len as u64 - 16) && word(len - 8) == Some(BITMAP_END);
    let set = whole.then(|| UnitSet::from_bytes(units, &bytes[8..len - 8]));
    set.flatten().ok_or(ReturnError::Bitmap { units })
}

/// What a return path can be wrong in.
#[derive(Debug, thiserror::Error)]
pub enum ReturnError {
    #[error("reading failed: {0}")]
    Read(#[source] std::io::Error),
    #[error("writing failed: {0}")]
    Write(#[source] std::io::Error),
    #[error("message type {0} is unknown")]
    Type(u16),
    #[error("message type {kind} of {len} bytes is malformed")]
    Malformed { kind: u16, len: usize },
    #[error("the bitmap of received pages of a block of {units} units is malformed")]
    Bitmap { units: u64 },
    #[error("pages are wanted of block {0:?}, which does not exist")]
    Block(String),
    #[error("bytes {start}+{len} of block {block} do not exist")]
    Range { block: usize, start: u64, len: u32 },
}

impl ReturnMessage {
    /// The message's bytes. A block name longer than 255 bytes is refused by
    /// [`StreamLayout::check`](super::StreamLayout::check) long before.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, data): (u16, Vec<u8>) = match self {
            ReturnMessage::Shut(value) => (1, value.to_be_bytes().to_vec()),
            ReturnMessage::Pong(value) => (2, value.to_be_bytes().to_vec()),
            ReturnMessage::RequestPages { block, start, len } => {
                let mut data = start.to_be_bytes().to_vec();
                data.extend(len.to_be_bytes());
                if let Some(name) = block {
                    data.extend(counted(name));
                }
                (if block.is_some() { 3 } else { 4 }, data)
            }
            ReturnMessage::RecvBitmap { block } => (5, counted(block)),
            ReturnMessage::ResumeAck(value) => (6, value.to_be_bytes().to_vec()),
            ReturnMessage::SwitchoverAck => (7, Vec::new()),
        };
        let mut out = kind.to_be_bytes().to_vec();
        out.extend((data.len() as u16).to_be_bytes());
        out.extend(data);
        out
    }

    /// The first message in `bytes` and how many bytes it took; `None` if it is not all there yet.
    pub fn decode(bytes: &[u8]) -> Result<Option<(ReturnMessage, usize)>, ReturnError> {
        let Some((header, rest)) = bytes.split_at_checked(HEADER) else {
            return Ok(None);
        };
        let kind = u16::from_be_bytes([header[0], header[1]]);
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let malformed = ReturnError::Malformed { kind, len };
        if len > MAX_MESSAGE {
            return Err(malformed);
        }
        let Some(data) = rest.get(..len) else {
            return Ok(None);
        };
        let word = |data: &[u8]| <[u8; 4]>::try_from(data).ok().map(u32::from_be_bytes);
        let message = match kind {
            1 => word(data).map(ReturnMessage::Shut),
            2 => word(data).map(ReturnMessage::Pong),
            3 | 4 => request(data, kind == 3),
            5 => name(data).map(|block| ReturnMessage::RecvBitmap { block }),
            6 => word(data).map(ReturnMessage::ResumeAck),
            7 => data.is_empty().then_some(ReturnMessage::SwitchoverAck),
            _ => return Err(ReturnError::Type(kind)),
        };
        match message {
            Some(message) => Ok(Some((message, HEADER + len))),
            None => Err(malformed),
        }
    }
}

fn counted(name: &str) -> Vec<u8> {
    let bytes = &name.as_bytes()[..name.len().min(255)];
    let mut out = vec![bytes.len() as u8];
    out.extend(bytes);
    out
}

fn name(data: &[u8]) -> Option<String> {
    let (&len, rest) = data.split_first()?;
    if usize::from(len) != rest.len() {
        return None;
    }
    String::from_utf8(rest.to_vec()).ok()
}

fn request(data: &[u8], named: bool) -> Option<ReturnMessage> {
    let start = u64::from_be_bytes(data.get(..8)?.try_into().ok()?);
    let len = u32::from_be_bytes(data.get(8..12)?.try_into().ok()?);
    let rest = &data[12..];
    let block = match (named, rest.is_empty()) {
        (true, _) => Some(name(rest)?),
        (false, true) => None,
        (false, false) => return None,
    };
    Some(ReturnMessage::RequestPages { block, start, len })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_message() -> impl Strategy<Value = ReturnMessage> {
        prop_oneof![
            any::<u32>().prop_map(ReturnMessage::Shut),
            any::<u32>().prop_map(ReturnMessage::Pong),
            any::<u32>().prop_map(ReturnMessage::ResumeAck),
            Just(ReturnMessage::SwitchoverAck),
            "[a-z./0-9]{1,255}".prop_map(|block| ReturnMessage::RecvBitmap { block }),
            (
                proptest::option::of("[a-z./0-9]{1,255}"),
                any::<u64>(),
                any::<u32>()
            )
                .prop_map(|(block, start, len)| ReturnMessage::RequestPages {
                    block,
                    start,
                    len
                }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_said_is_heard(message in any_message(), cut in any::<prop::sample::Index>()) {
            let bytes = message.encode();
            prop_assert_eq!(ReturnMessage::decode(&bytes).expect("valid"), Some((message, bytes.len())));
            let part = &bytes[..cut.index(bytes.len())];
            prop_assert_eq!(ReturnMessage::decode(part).expect("valid so far"), None);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = ReturnMessage::decode(&bytes);
            for units in [0, 1, 64, 200] {
                let _ = decode_bitmap(units, &bytes);
            }
        }

        #[test]
        fn a_bitmap_is_read_as_it_was_written(units in 0u64..500, runs in proptest::collection::vec((0u64..500, 0u64..90), 0..6), at in any::<prop::sample::Index>()) {
            let mut set = UnitSet::empty(units);
            for (start, len) in runs {
                set.insert(whimbrel_engine::space::Extent::new(start, len));
            }
            let mut bytes = encode_bitmap(&set);
            prop_assert_eq!(bytes.len(), bitmap_len(units));
            prop_assert_eq!(decode_bitmap(units, &bytes).expect("valid"), set);
            prop_assert!(decode_bitmap(units, &bytes[1..]).is_err());
            let last = bytes.len() - 1 - at.index(8);
            bytes[last] ^= 1;
            prop_assert!(decode_bitmap(units, &bytes).is_err());
        }
    }
}
