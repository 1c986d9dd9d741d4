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
