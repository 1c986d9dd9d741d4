//! An NBD export that is given requests of all kinds, many at a time, by somebody who keeps the books.
//!
//! Two halves that work side by side: one says what is to be done, each order under a cookie of its own; the other tells
//! which is done, in whatever order the server answers. Content that is read is dropped: what is of interest is
//! that it came, and when. Negotiated without structured replies, so that each order has one answer.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

use super::nbd::{NbdError, NbdUri, PATIENCE, SIMPLE_REPLY, Stream, open_plain, request};

/// Longest read or write of one order, bytes: what every server must take (NBD's `doc/proto.md`, size constraints).
pub const LONGEST: u64 = 32 << 20;

/// Longest trim or zeroing of one order, bytes.
pub const LONGEST_PLAIN: u64 = 1 << 30;

/// What an export can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Read,
    Write,
    Flush,
    Trim,
    Zero,
}

impl Order {
    fn command(self) -> u16 {
        match self {
            Order::Read => 0,
            Order::Write => 1,
            Order::Flush => 3,
            Order::Trim => 4,
            Order::Zero => 6,
        }
    }
}

/// What an export is, and takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Bytes.
    pub size: u64,
    flags: u16,
}

impl Offer {
    /// Whether an order of this kind may be given.
    pub fn takes(self, order: Order) -> bool {
        let flag = |bit: u16| self.flags & 1 << bit != 0;
        let read_only = flag(1);
        match order {
            Order::Read => true,
            Order::Write => !read_only,
            Order::Flush => flag(2),
            Order::Trim => !read_only && flag(5),
            Order::Zero => !read_only && flag(6),
        }
    }
}

/// The half that says what is to be done.
pub struct Orders {
    place: String,
    to: WriteHalf<Box<dyn Stream>>,
}

/// The half that tells what is done.
pub struct Answers {
    place: String,
    from: ReadHalf<Box<dyn Stream>>,
}

/// Opens the export.
pub async fn open(uri: &NbdUri) -> Result<(Offer, Orders, Answers), NbdError> {
    let (stream, place, told) = open_plain(uri).await?;
    let (from, to) = tokio::io::split(stream);
    let offer = Offer {
        size: told.size,
        flags: told.flags,
    };
    let orders = Orders {
        place: place.clone(),
        to,
    };
    Ok((offer, orders, Answers { place, from }))
}

fn broken(place: &str) -> impl FnOnce(std::io::Error) -> NbdError {
    let place = place.to_string();
    |source| NbdError::Broken { place, source }
}

async fn in_time<T>(
    place: &str,
    patience: Duration,
    work: impl Future<Output = std::io::Result<T>>,
) -> Result<T, NbdError> {
    match tokio::time::timeout(patience, work).await {
        Ok(done) => done.map_err(broken(place)),
        Err(_) => Err(NbdError::Silent {
            place: place.to_string(),
        }),
    }
}

impl Orders {
    /// Gives an order; `content` is what a write writes, and empty otherwise. A server that takes nothing for a minute has
    /// broken off.
    pub async fn give(
        &mut self,
        order: Order,
        cookie: u64,
        offset: u64,
        len: u32,
        content: &[u8],
    ) -> Result<(), NbdError> {
        let head = request(order.command(), cookie, offset, len);
        let to = &mut self.to;
        in_time(&self.place, PATIENCE, async {
            to.write_all(&head).await?;
            to.write_all(content).await
        })
        .await
    }

    /// Says that there is nothing more to come; what was ordered should have been answered.
    pub async fn close(mut self) {
        // Whether it is heard makes no difference to what was done.
        let _ = self.to.write_all(&request(2, 0, 0, 0)).await;
        let _ = self.to.shutdown().await;
    }
}

impl Answers {
    /// The next answer: its cookie, and the error's number, 0 for none. `content_of` says how many bytes come with the
    /// answer to a cookie, or that there is no such order. Waits as long as nothing comes: who has orders open bounds it.
    pub async fn next(
        &mut self,
        content_of: impl FnOnce(u64) -> Option<u32>,
    ) -> Result<(u64, u32), NbdError> {
        let mut head = [0; 16];
        let read = self.from.read_exact(&mut head).await;
        read.map_err(broken(&self.place))?;
        let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|n| head[at + n]));
        let errno = word(4);
        let cookie = u64::from(word(8)) << 32 | u64::from(word(12));
        let wrong = |what: &str| NbdError::Protocol {
            place: self.place.clone(),
            what: what.to_string(),
        };
        if word(0) != SIMPLE_REPLY {
            return Err(wrong("what is no answer"));
        }
        let content =
            content_of(cookie).ok_or_else(|| wrong("an answer to nothing that was asked"))?;
        if errno == 0 {
            let mut content = (&mut self.from).take(u64::from(content));
            let drop_all = async { tokio::io::copy(&mut content, &mut tokio::io::sink()).await };
            let dropped = in_time(&self.place, PATIENCE, drop_all).await?;
            if content.limit() > 0 {
                let early = std::io::ErrorKind::UnexpectedEof.into();
                tracing::debug!(dropped, "content ended early");
                return Err(broken(&self.place)(early));
            }
        }
        Ok((cookie, errno))
    }
}
