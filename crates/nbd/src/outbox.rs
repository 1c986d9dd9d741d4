//! Replies waiting to be sent, in the order in which they were answered, and their vectored writing.
//!
//! All that has gathered leaves in one write, bodies uncopied. A stream that cannot write vectors (some
//! TLS layers) gets the same coalescing through a buffer instead. The number of frames and the bytes of
//! their bodies are bounded by the connection's [`Load`](crate::load::Load): every frame carries what
//! its sending gives back.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;

use crate::load::Share;
use crate::reply::Frame;

/// Most slices handed to the kernel at once.
const SLICES: usize = 128;
/// Bytes gathered for a stream without vectored writes.
const GATHER: usize = 64 << 10;

pub struct Outbox {
    frames: VecDeque<(Frame, Share)>,
    /// Bytes of the first frame that have been sent.
    sent: usize,
    /// Bytes of all frames, the sent ones included.
    bytes: usize,
    gather: Vec<u8>,
    unflushed: bool,
}

impl Outbox {
    pub fn new() -> Self {
        Outbox {
            frames: VecDeque::new(),
            sent: 0,
            bytes: 0,
            gather: Vec::new(),
            unflushed: false,
        }
    }

    /// Bytes that wait.
    pub fn bytes(&self) -> usize {
        self.bytes - self.sent
    }

    /// `share` is given back once the whole frame is sent.
    pub fn push(&mut self, frame: Frame, share: Share) {
        self.bytes += frame.wire_len();
        self.frames.push_back((frame, share));
    }

    /// Sends as much as the stream takes; ready when nothing is left. `freed` is called for every share
    /// that comes free.
    pub fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        freed: &mut impl FnMut(Share),
    ) -> Poll<io::Result<()>> {
        while self.bytes() > 0 {
            let len = if stream.is_write_vectored() {
                let mut slices = [IoSlice::new(&[]); SLICES];
                let count = self.slices(&mut slices);
                ready!(Pin::new(&mut *stream).poll_write_vectored(cx, &slices[..count]))?
            } else {
                self.fill_gather();
                ready!(Pin::new(&mut *stream).poll_write(cx, &self.gather))?
            };
            if len == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.advance(len, freed);
        }
        if self.unflushed {
            ready!(Pin::new(stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Forgets everything: the client is gone.
    pub fn clear(&mut self, freed: &mut impl FnMut(Share)) {
        self.frames.drain(..).for_each(|(_, share)| freed(share));
        self.sent = 0;
        self.bytes = 0;
        self.unflushed = false;
    }

    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let mut skip = self.sent;
        self.frames
            .iter()
            .flat_map(|(frame, _)| [frame.head(), frame.body()])
            .map(move |part| {
                let cut = skip.min(part.len());
                skip -= cut;
                &part[cut..]
            })
            .filter(|part| !part.is_empty())
    }

    fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES]) -> usize {
        let mut count = 0;
        for (slot, part) in slices.iter_mut().zip(self.parts()) {
            *slot = IoSlice::new(part);
            count += 1;
        }
        count
    }

    fn fill_gather(&mut self) {
        let mut gather = std::mem::take(&mut self.gather);
        gather.clear();
        for part in self.parts() {
            let room = GATHER - gather.len();
            gather.extend_from_slice(&part[..part.len().min(room)]);
            if gather.len() == GATHER {
                break;
            }
        }
        self.gather = gather;
    }

    fn advance(&mut self, len: usize, freed: &mut impl FnMut(Share)) {
        self.sent += len;
        while let Some((frame, _)) = self.frames.front() {
            let whole = frame.wire_len();
            if self.sent < whole {
                break;
            }
            self.sent -= whole;
            self.bytes -= whole;
            if let Some((_, share)) = self.frames.pop_front() {
                freed(share);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;
    use std::task::Waker;

    /// Takes as many bytes at a time as its script says, and then is full for one turn.
    struct Grudging {
        vectored: bool,
        script: Vec<usize>,
        taken: Vec<u8>,
        full: bool,
    }

    impl AsyncWrite for Grudging {
        fn poll_write(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
        }
        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.full = !self.full;
            if self.full {
                return Poll::Pending;
            }
            let most = self.script.pop().unwrap_or(usize::MAX);
            let all = slices.iter().flat_map(|slice| slice.iter().copied());
            let before = self.taken.len();
            self.taken.extend(all.take(most));
            Poll::Ready(Ok(self.taken.len() - before))
        }
        fn is_write_vectored(&self) -> bool {
            self.vectored
        }
        fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    proptest! {
        #[test]
        fn frames_arrive_whole_and_in_order_however_they_are_cut(
            bodies in prop::collection::vec(0usize..70_000, 1..20),
            script in prop::collection::vec(1usize..90_000, 0..20),
            vectored: bool,
        ) {
            let mut outbox = Outbox::new();
            let mut expected = Vec::new();
            for (index, len) in bodies.iter().enumerate() {
                let body = Bytes::from(vec![index as u8; *len]);
                let frame = Frame::simple(index as u64, None, body);
                expected.extend_from_slice(frame.head());
                expected.extend_from_slice(frame.body());
                outbox.push(frame, Share { requests: 1, bytes: *len as u32 });
            }
            prop_assert_eq!(outbox.bytes(), expected.len());
            let mut stream = Grudging { vectored, script, taken: Vec::new(), full: false };
            let mut freed = Share::default();
            let mut cx = Context::from_waker(Waker::noop());
            let mut add = |share: Share| {
                freed.requests += share.requests;
                freed.bytes += share.bytes;
            };
            while outbox.poll_send(&mut stream, &mut cx, &mut add).is_pending() {}
            prop_assert!(stream.taken == expected);
            prop_assert_eq!(outbox.bytes(), 0);
            prop_assert_eq!(freed.requests as usize, bodies.len());
            prop_assert_eq!(freed.bytes as usize, bodies.iter().sum::<usize>());
        }
    }
}
