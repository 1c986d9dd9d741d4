//! Replies of the transmission phase as bytes: a short fixed head and, without a copy, a body.

use bytes::{BufMut, Bytes, BytesMut};

use crate::dialect::Dialect;
use crate::export::{Errno, MAX_STATUS_RUNS, StatusRun};
use crate::spec::*;

/// The longest head: an extended header, and the offset and size of a hole.
const HEAD: usize = 44;

/// Bytes of a block status descriptor, the larger of the two forms.
pub const DESCRIPTOR: usize = 16;

/// Longest run put into one descriptor of 32 bits, rounded down to the largest minimum block.
const LONGEST_RUN: u64 = 0xffff_0000;

/// Which request a message answers, and in which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    pub dialect: Dialect,
    pub cookie: u64,
    /// That of the request.
    pub offset: u64,
}

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

    /// A chunk; not for [`Dialect::Simple`].
    fn chunk(to: &ReplyTo, kind: u16, done: bool, fixed: &[u8], body: Bytes) -> Self {
        let len = fixed.len() + body.len();
        let flags = if done { REPLY_FLAG_DONE } else { 0 };
        Frame::with(body, |head| {
            if to.dialect == Dialect::Extended {
                head.put_u32(EXTENDED_REPLY_MAGIC);
                head.put_u16(flags);
                head.put_u16(kind);
                head.put_u64(to.cookie);
                head.put_u64(to.offset);
                head.put_u64(len as u64);
            } else {
                head.put_u32(STRUCTURED_REPLY_MAGIC);
                head.put_u16(flags);
                head.put_u16(kind);
                head.put_u64(to.cookie);
                head.put_u32(len as u32);
            }
            head.put_slice(fixed);
        })
    }

    /// Success, of a request that asked for no data.
    pub fn done(to: &ReplyTo) -> Self {
        match to.dialect {
            Dialect::Extended => Frame::chunk(to, REPLY_TYPE_NONE, true, &[], Bytes::new()),
            Dialect::Simple | Dialect::Structured => Frame::simple(to.cookie, None, Bytes::new()),
        }
    }

    /// The whole content of a READ in one message, which also serves a client that forbids fragments.
    /// It may end the reply: the data are in memory, nothing can fail any more.
    pub fn content(to: &ReplyTo, data: Bytes) -> Self {
        match to.dialect {
            Dialect::Simple => Frame::simple(to.cookie, None, data),
            Dialect::Structured | Dialect::Extended => Frame::data(to, to.offset, data, true),
        }
    }

    /// A part of the content of a READ; not for [`Dialect::Simple`].
    pub fn data(to: &ReplyTo, offset: u64, data: Bytes, done: bool) -> Self {
        let fixed = offset.to_be_bytes();
        Frame::chunk(to, REPLY_TYPE_OFFSET_DATA, done, &fixed, data)
    }

    /// A part of a READ that is all zeroes; not for [`Dialect::Simple`].
    pub fn hole(to: &ReplyTo, offset: u64, len: u32, done: bool) -> Self {
        let mut fixed = [0; 12];
        let mut rest = &mut fixed[..];
        rest.put_u64(offset);
        rest.put_u32(len);
        Frame::chunk(to, REPLY_TYPE_OFFSET_HOLE, done, &fixed, Bytes::new())
    }

    /// An error. The reason, for a human being, of at most [`MAX_STRING`] bytes, is sent where the
    /// protocol has a place for it.
    pub fn error(to: &ReplyTo, errno: Errno, reason: &'static str) -> Self {
        if to.dialect == Dialect::Simple {
            return Frame::simple(to.cookie, Some(errno), Bytes::new());
        }
        let reason = &reason.as_bytes()[..reason.len().min(MAX_STRING)];
        let mut fixed = [0; 6];
        let mut rest = &mut fixed[..];
        rest.put_u32(errno.code());
        rest.put_u16(reason.len() as u16);
        let body = Bytes::from_static(reason);
        Frame::chunk(to, REPLY_TYPE_ERROR, true, &fixed, body)
    }

    /// The status of one metadata context, from [`descriptors`] of the same dialect.
    pub fn status(to: &ReplyTo, context: u32, descriptors: Bytes, done: bool) -> Self {
        let mut fixed = [0; 8];
        let mut rest = &mut fixed[..];
        rest.put_u32(context);
        rest.put_u32((descriptors.len() / DESCRIPTOR) as u32);
        match to.dialect {
            Dialect::Extended => {
                Frame::chunk(to, REPLY_TYPE_BLOCK_STATUS_EXT, done, &fixed, descriptors)
            }
            Dialect::Simple | Dialect::Structured => {
                Frame::chunk(to, REPLY_TYPE_BLOCK_STATUS, done, &fixed[..4], descriptors)
            }
        }
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
pub fn descriptors(
    runs: &[StatusRun],
    len: u64,
    room: u64,
    one: bool,
    dialect: Dialect,
) -> Option<Bytes> {
    let wide = dialect == Dialect::Extended;
    let longest = if wide { u64::MAX } else { LONGEST_RUN };
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
            let piece = left.min(longest);
            if wide {
                out.put_u64(piece);
                out.put_u64(run.flags.into());
            } else {
                out.put_u32(piece as u32);
                out.put_u32(run.flags);
            }
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

    const DIALECTS: [Dialect; 2] = [Dialect::Structured, Dialect::Extended];

    fn decode(bytes: &[u8], dialect: Dialect) -> Vec<(u64, u64)> {
        let half = if dialect == Dialect::Extended { 8 } else { 4 };
        let number = |bytes: &[u8]| bytes.iter().fold(0, |n, &byte| n << 8 | u64::from(byte));
        bytes
            .chunks_exact(2 * half)
            .map(|c| (number(&c[..half]), number(&c[half..])))
            .collect()
    }

    fn run(len: u64, flags: u32) -> StatusRun {
        StatusRun { len, flags }
    }

    #[test]
    fn heads_are_as_long_as_the_specification_says() {
        for (dialect, header) in [(Dialect::Structured, 20), (Dialect::Extended, 32)] {
            let to = ReplyTo {
                dialect,
                cookie: 1,
                offset: 2,
            };
            let body = Bytes::from_static(b"abc");
            let descriptor = Bytes::from_static(&[0; DESCRIPTOR]);
            let id = if header == 32 { 8 } else { 4 };
            for (frame, fixed) in [
                (Frame::data(&to, 2, body.clone(), true), 8),
                (Frame::content(&to, body), 8),
                (Frame::hole(&to, 2, 512, false), 12),
                (Frame::error(&to, Errno::Eio, "no"), 6),
                (Frame::status(&to, 1, descriptor, true), id),
            ] {
                assert_eq!(frame.head().len(), header + fixed);
                let payload = (fixed + frame.body().len()) as u32;
                assert_eq!(frame.head()[header - 4..header], payload.to_be_bytes());
            }
        }
    }

    #[test]
    fn only_extended_headers_give_a_plain_success_the_form_of_a_chunk() {
        for (dialect, len) in [
            (Dialect::Simple, 16),
            (Dialect::Structured, 16),
            (Dialect::Extended, 32),
        ] {
            let to = ReplyTo {
                dialect,
                cookie: 1,
                offset: 2,
            };
            assert_eq!(Frame::done(&to).wire_len(), len);
        }
    }

    #[test]
    fn no_run_is_no_reply() {
        for dialect in DIALECTS {
            assert_eq!(descriptors(&[], 512, 512, false, dialect), None);
            assert_eq!(descriptors(&[run(0, 1)], 512, 512, false, dialect), None);
        }
    }

    #[test]
    fn a_run_of_terabytes_is_cut_to_32_bits_where_there_are_no_more() {
        for (dialect, expected) in [
            (Dialect::Structured, LONGEST_RUN),
            (Dialect::Extended, 1 << 40),
        ] {
            let got = descriptors(&[run(1 << 40, 3)], 1 << 20, 1 << 40, false, dialect).unwrap();
            assert_eq!(decode(&got, dialect), [(expected, 3)]);
        }
    }

    #[test]
    fn more_runs_than_fit_are_left_for_the_next_question() {
        let many: Vec<_> = (0..3 * MAX_STATUS_RUNS as u32)
            .map(|i| run(512, i % 2))
            .collect();
        for dialect in DIALECTS {
            let got = descriptors(&many, u64::from(u32::MAX), 1 << 40, false, dialect).unwrap();
            assert_eq!(decode(&got, dialect).len(), MAX_STATUS_RUNS);
        }
    }

    proptest! {
        #[test]
        fn descriptors_obey_the_specification(
            runs in prop::collection::vec((0u64..1 << 33, 0u32..3), 0..20),
            len in 1u64..1 << 34,
            room in 1u64..1 << 34,
            one: bool,
            dialect in prop::sample::select(&DIALECTS[..]),
        ) {
            let len = len.min(room);
            let runs: Vec<_> = runs.into_iter().map(|(l, f)| run(l, f)).collect();
            let got = descriptors(&runs, len, room, one, dialect);
            let total: u64 = runs.iter().map(|r| r.len).sum();
            prop_assert_eq!(got.is_some(), total > 0);
            let Some(got) = got else { return Ok(()) };
            let got = decode(&got, dialect);
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
                    if at < r.len { return u64::from(r.flags) }
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
