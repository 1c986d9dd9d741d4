//! Replies of the transmission phase as bytes: a short fixed head and, without a copy, a body.

use bytes::{BufMut, Bytes, BytesMut};

use crate::export::{Errno, MAX_STATUS_RUNS, StatusRun};
use crate::spec::*;

/// The longest head: a structured header and the offset of its data.
const HEAD: usize = 28;

/// Longest run put into one descriptor: 32 bits, rounded down to the largest minimum block.
const LONGEST_RUN: u64 = 0xffff_0000;

/// One message to the client: a head, then a body.
#[derive(Clone, Debug)]
pub struct Frame {
    head: [u8; HEAD],
    head_len: u8,
    body: Bytes,
}

impl Frame {
    fn with(body: Bytes, fill: impl FnOnce(&mut &mut [u8])) -> Self {
        let mut head = [0; HEAD];
        let mut rest = &mut head[..];
        fill(&mut rest);
        let head_len = (HEAD - rest.len()) as u8;
        Frame {
            head,
            head_len,
            body,
        }
    }

    /// A simple reply. `data` is the content for a successful READ, else empty.
    pub fn simple(cookie: u64, error: Option<Errno>, data: Bytes) -> Self {
        Frame::with(data, |head| {
            head.put_u32(SIMPLE_REPLY_MAGIC);
            head.put_u32(error.map_or(0, Errno::code));
            head.put_u64(cookie);
        })
    }

    fn chunk(cookie: u64, kind: u16, done: bool, fixed: &[u8], body: Bytes) -> Self {
        let len = (fixed.len() + body.len()) as u32;
        Frame::with(body, |head| {
            head.put_u32(STRUCTURED_REPLY_MAGIC);
            head.put_u16(if done { REPLY_FLAG_DONE } else { 0 });
            head.put_u16(kind);
            head.put_u64(cookie);
            head.put_u32(len);
            head.put_slice(fixed);
        })
    }

    /// The whole content of a READ in one chunk, which also serves a client that forbids fragments.
    /// It may end the reply: the data are in memory, nothing can fail any more.
    pub fn data(cookie: u64, offset: u64, data: Bytes) -> Self {
        let fixed = offset.to_be_bytes();
        Frame::chunk(cookie, REPLY_TYPE_OFFSET_DATA, true, &fixed, data)
    }

    /// A structured error, with a reason for a human being of at most [`MAX_STRING`] bytes.
    pub fn error(cookie: u64, errno: Errno, reason: &'static str) -> Self {
        let reason = &reason.as_bytes()[..reason.len().min(MAX_STRING)];
        let mut fixed = [0; 6];
        let mut rest = &mut fixed[..];
        rest.put_u32(errno.code());
        rest.put_u16(reason.len() as u16);
        let body = Bytes::from_static(reason);
        Frame::chunk(cookie, REPLY_TYPE_ERROR, true, &fixed, body)
    }

    /// The status of one metadata context, from [`descriptors`].
    pub fn status(cookie: u64, context: u32, descriptors: Bytes, done: bool) -> Self {
        let fixed = context.to_be_bytes();
        Frame::chunk(cookie, REPLY_TYPE_BLOCK_STATUS, done, &fixed, descriptors)
    }

    pub fn head(&self) -> &[u8] {
        &self.head[..usize::from(self.head_len)]
    }

    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// Bytes on the wire.
    pub fn wire_len(&self) -> usize {
        usize::from(self.head_len) + self.body.len()
    }
}

/// Encodes the runs that start at the request's offset as block status descriptors.
///
/// `len` is the length asked for and `room` the bytes from the offset to the end of the export, both at
/// least 1. Neighbours of equal status are joined; what begins at or past `len` is left out, as is
/// what lies past the end of the export, and what exceeds [`MAX_STATUS_RUNS`]. With `one`, one
/// descriptor of at most `len` bytes. `None` if there is no run at all.
pub fn descriptors(runs: &[StatusRun], len: u64, room: u64, one: bool) -> Option<Bytes> {
    let end = if one { len.min(room) } else { room };
    let mut out = BytesMut::new();
    let mut at = 0;
    let mut runs = runs.iter().filter(|run| run.len > 0).copied().peekable();
    let mut count = 0;
    'runs: while let Some(mut run) = runs.next() {
        while let Some(next) = runs.next_if(|next| next.flags == run.flags) {
            run.len = run.len.saturating_add(next.len);
        }
        let mut left = run.len.min(end - at);
        while left > 0 {
            if at >= len || count == MAX_STATUS_RUNS || (one && count == 1) {
                break 'runs;
            }
            let piece = left.min(LONGEST_RUN);
            out.put_u32(piece as u32);
            out.put_u32(run.flags);
            at += piece;
            left -= piece;
            count += 1;
        }
    }
    (count > 0).then(|| out.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(bytes: &[u8]) -> Vec<(u64, u32)> {
        bytes
            .chunks_exact(8)
            .map(|c| {
                let word = |c: &[u8]| u32::from_be_bytes(c.try_into().unwrap());
                (u64::from(word(&c[..4])), word(&c[4..]))
            })
            .collect()
    }

    fn run(len: u64, flags: u32) -> StatusRun {
        StatusRun { len, flags }
    }

    #[test]
    fn heads_are_as_long_as_the_specification_says() {
        assert_eq!(Frame::simple(1, None, Bytes::new()).head().len(), 16);
        let frame = Frame::data(1, 2, Bytes::from_static(b"abc"));
        assert_eq!(frame.head().len(), 28);
        assert_eq!(frame.head()[16..20], 11u32.to_be_bytes());
        assert_eq!(Frame::error(1, Errno::Eio, "no").head().len(), 26);
        assert_eq!(Frame::status(1, 0, Bytes::new(), true).head().len(), 24);
    }

    #[test]
    fn no_run_is_no_reply() {
        assert_eq!(descriptors(&[], 512, 512, false), None);
        assert_eq!(descriptors(&[run(0, 1)], 512, 512, false), None);
    }

    #[test]
    fn a_run_of_terabytes_is_cut_to_32_bits() {
        let got = descriptors(&[run(1 << 40, 3)], 1 << 20, 1 << 40, false).unwrap();
        assert_eq!(decode(&got), [(LONGEST_RUN, 3)]);
    }

    #[test]
    fn more_runs_than_fit_are_left_for_the_next_question() {
        let many: Vec<_> = (0..3 * MAX_STATUS_RUNS as u32)
            .map(|i| run(512, i % 2))
            .collect();
        let got = descriptors(&many, u64::from(u32::MAX), 1 << 40, false).unwrap();
        assert_eq!(got.len(), 8 * MAX_STATUS_RUNS);
    }

    proptest! {
        #[test]
        fn descriptors_obey_the_specification(
            runs in prop::collection::vec((0u64..1 << 33, 0u32..3), 0..20),
            len in 1u64..1 << 32,
            room in 1u64..1 << 34,
            one: bool,
        ) {
            let len = len.min(room);
            let runs: Vec<_> = runs.into_iter().map(|(l, f)| run(l, f)).collect();
            let got = descriptors(&runs, len, room, one);
            let total: u64 = runs.iter().map(|r| r.len).sum();
            prop_assert_eq!(got.is_some(), total > 0);
            let Some(got) = got else { return Ok(()) };
            let got = decode(&got);
            let sum: u64 = got.iter().map(|d| d.0).sum();
            prop_assert!(got.iter().all(|d| d.0 > 0));
            prop_assert!(sum - got[got.len() - 1].0 < len);
            prop_assert!(sum <= room && sum <= total);
            if one {
                prop_assert_eq!(got.len(), 1);
                prop_assert!(sum <= len);
            }
            // Every descriptor tells the truth about its first and last byte.
            let flags_at = |mut at: u64| {
                for r in &runs {
                    if at < r.len { return r.flags }
                    at -= r.len;
                }
                unreachable!("within the total")
            };
            let mut at = 0;
            for (piece, flags) in got {
                prop_assert_eq!(flags_at(at), flags);
                prop_assert_eq!(flags_at(at + piece - 1), flags);
                at += piece;
            }
        }
    }
}
