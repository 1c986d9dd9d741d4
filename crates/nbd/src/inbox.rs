//! What has been read from the client and not yet looked at: a buffer of fixed size.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

/// Size of the buffer, in bytes. A queue of 31 writes of 4 KiB is read at once.
pub const INBOX: usize = 128 << 10;

pub struct Inbox {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub fn new() -> Self {
        Inbox {
            buffer: vec![0; INBOX].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    pub fn data(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Drops the first bytes, of which there must be as many.
    pub fn consume(&mut self, len: usize) {
        self.start += len;
        debug_assert!(self.start <= self.end, "consumed what was not there");
    }

    /// Where at most `most` more bytes may be put. Only for when the buffer holds too little: what is
    /// there is moved to the front, and the buffer must not be full.
    pub fn room(&mut self, most: usize) -> &mut [u8] {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let limit = self.buffer.len().min(self.end.saturating_add(most));
        &mut self.buffer[self.end..limit]
    }

    /// So many bytes were put into the [room](Self::room).
    pub fn filled(&mut self, len: usize) {
        self.end += len;
        debug_assert!(self.end <= self.buffer.len(), "more than there is room for");
    }

    /// One read of at most `most` bytes into the [room](Self::room); 0 is the end of the stream.
    pub fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        most: usize,
    ) -> Poll<io::Result<usize>> {
        let mut free = ReadBuf::new(self.room(most));
        ready!(Pin::new(stream).poll_read(cx, &mut free))?;
        let len = free.filled().len();
        self.filled(len);
        Poll::Ready(Ok(len))
    }

    /// Reads until `len` bytes (at most [`INBOX`]) are there; false if the stream ends before.
    pub async fn want<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        len: usize,
    ) -> io::Result<bool> {
        while self.data().len() < len {
            if poll_fn(|cx| self.poll_fill(stream, cx, INBOX)).await? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes the next `N` bytes; `None` if the stream ends before.
    pub async fn take<S: AsyncRead + Unpin, const N: usize>(
        &mut self,
        stream: &mut S,
    ) -> io::Result<Option<[u8; N]>> {
        if !self.want(stream, N).await? {
            return Ok(None);
        }
        let bytes = self.data().first_chunk().copied();
        self.consume(N);
        Ok(bytes)
    }

    /// Skips `len` bytes without keeping them; false if the stream ends before.
    pub async fn skip<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        mut len: u64,
    ) -> io::Result<bool> {
        loop {
            let here = len.min(self.data().len() as u64);
            self.consume(here as usize);
            len -= here;
            if len == 0 {
                return Ok(true);
            }
            if !self.want(stream, 1).await? {
                return Ok(false);
            }
        }
    }
}
