//! Frames over an established connection.
//!
//! A [`Connection`] is split into a [`FrameSender`] and a [`FrameReceiver`], each owned by one task.
//! Neither queues: a sender holds at most the one frame it is sending, a receiver at most the one it
//! is receiving and what was read with it. So what goes next is decided by whoever calls
//! [`send`](FrameSender::send), and the kernel holds no more unsent than the socket's settings allow.
//!
//! Flush policy: `send` returns when the last byte of the frame has been handed to the kernel. There
//! is no timer and nothing lingers.
//!
//! Cancellation: both are cancel-safe. A cancelled `recv` loses nothing. A cancelled `send` never
//! tears a frame: the rest of one that was begun goes out before the next; whether it was begun tells
//! [`FrameSender::begun`].

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;
use whimbrel_wire::frame::{self, Decoder, Frame, FrameError, HEADER_LEN, Kind};

use crate::error::{Direction, PeerError};
use crate::gauge::Gauge;
use crate::hello::{HelloFault, Speaker};
use crate::key_id::KeyId;
use crate::socket::SocketReport;
use crate::ties::Tie;
use crate::trust::{PeerName, TrustStore};

/// What a read asks for at least. A TLS record brings 16 KiB, so more would seldom be filled.
const READ: usize = 32 << 10;

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// This host's name for the peer when the connection was made.
    pub name: PeerName,
    /// The key that it proved to have: who it is.
    pub key: KeyId,
    /// Where it is.
    pub addr: SocketAddr,
    /// What it says of itself.
    pub speaker: Speaker,
}

/// What both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The protocol version spoken.
    pub version: u16,
    /// Features that both sides have, a bit each.
    pub features: u64,
}

/// Frames and bytes that went over a connection, each frame with its header, before TLS adds about
/// 22 bytes to every 16 KiB. Bytes being sent count as they are handed to the kernel.
#[derive(Debug, Default)]
pub struct Traffic {
    frames_sent: AtomicU64,
    bytes_sent: AtomicU64,
    frames_received: AtomicU64,
    bytes_received: AtomicU64,
}

impl Traffic {
    /// Frames sent, wholly.
    pub fn frames_sent(&self) -> u64 {
        self.frames_sent.load(Ordering::Relaxed)
    }

    /// Bytes of frames sent.
    pub fn bytes_sent(&self) -> u64 {
        self.bytes_sent.load(Ordering::Relaxed)
    }

    /// Frames received.
    pub fn frames_received(&self) -> u64 {
        self.frames_received.load(Ordering::Relaxed)
    }

    /// Bytes of frames received.
    pub fn bytes_received(&self) -> u64 {
        self.bytes_received.load(Ordering::Relaxed)
    }
}

/// A connection ready for frames.
#[derive(Debug)]
pub struct Connection {
    pub(crate) stream: TlsStream<TcpStream>,
    /// Read with the greeting, and to be decoded next.
    pub(crate) unread: BytesMut,
    pub(crate) remote: Arc<Remote>,
    pub(crate) agreed: Agreed,
    pub(crate) sockets: SocketReport,
    pub(crate) tie: Option<Arc<Tie>>,
}

impl Connection {
    /// Who is at the other end.
    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// What both sides agreed on.
    pub fn agreed(&self) -> Agreed {
        self.agreed
    }

    /// Ties the connection to its peer's being trusted: it is cut when the store trusts the key no more.
    /// Accepted connections are tied already.
    ///
    /// # Errors
    /// [`PeerError::UnknownKey`] if that is so by now; [`PeerError::Broken`] where the process may open
    /// no more files.
    pub fn tied(mut self, trust: &TrustStore) -> Result<Connection, PeerError> {
        let (addr, presented) = (self.remote.addr, self.remote.key);
        let tie = trust.tie(presented, self.stream.get_ref().0);
        let tie = tie.map_err(|source| PeerError::Broken {
            name: self.remote.name.clone(),
            addr,
            direction: Direction::Receiving,
            source,
        })?;
        let tie = tie.ok_or(PeerError::UnknownKey { addr, presented })?;
        self.tie = Some(Arc::new(tie));
        Ok(self)
    }

    /// How the socket is set up.
    pub fn sockets(&self) -> &SocketReport {
        &self.sockets
    }

    /// A view of the socket for whoever paces what is sent. It fails where the process may open no
    /// more files.
    pub fn gauge(&self) -> io::Result<Gauge> {
        Gauge::new(self.stream.get_ref().0, &self.sockets.congestion)
    }

    /// The two directions, to be owned by a task each.
    pub fn split(self) -> (FrameSender, FrameReceiver) {
        let traffic = Arc::new(Traffic::default());
        let (read, write) = tokio::io::split(self.stream);
        let sender = FrameSender {
            write,
            front: BytesMut::new(),
            body: Bytes::new(),
            unflushed: false,
            begun: 0,
            remote: self.remote.clone(),
            traffic: traffic.clone(),
            _tie: self.tie.clone(),
        };
        let receiver = FrameReceiver {
            read,
            unread: self.unread,
            decoder: Decoder::default(),
            remote: self.remote,
            traffic,
            _tie: self.tie,
        };
        (sender, receiver)
    }
}

/// The direction to the peer.
#[derive(Debug)]
pub struct FrameSender {
    write: WriteHalf<TlsStream<TcpStream>>,
    /// What is left of the frame's header and of the head of its payload.
    front: BytesMut,
    /// What is left of the rest of its payload.
    body: Bytes,
    unflushed: bool,
    begun: u64,
    remote: Arc<Remote>,
    traffic: Arc<Traffic>,
    _tie: Option<Arc<Tie>>,
}

impl FrameSender {
    /// Sends a frame whose payload is `head` and then `body`. The head is copied, the body is not.
    /// Returns when the kernel has all of it.
    pub async fn send(&mut self, kind: Kind, head: &[u8], body: Bytes) -> Result<(), PeerError> {
        self.finish().await?;
        let header =
            frame::header(kind, 0, &[head, &body]).map_err(|source| PeerError::FrameRefused {
                name: self.remote.name.clone(),
                addr: self.remote.addr,
                source,
            })?;
        self.front.clear();
        self.front.reserve(HEADER_LEN + head.len());
        self.front.put_slice(&header);
        self.front.put_slice(head);
        self.body = body;
        self.begun += 1;
        self.finish().await
    }

    /// Sends what a cancelled [`send`](Self::send) left over.
    pub async fn finish(&mut self) -> Result<(), PeerError> {
        self.write_out().await.map_err(|source| PeerError::Broken {
            name: self.remote.name.clone(),
            addr: self.remote.addr,
            direction: Direction::Sending,
            source,
        })
    }

    async fn write_out(&mut self) -> io::Result<()> {
        while !(self.front.is_empty() && self.body.is_empty()) {
            let parts = [IoSlice::new(&self.front), IoSlice::new(&self.body)];
            self.unflushed = true;
            let written = self.write.write_vectored(&parts).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            let of_front = written.min(self.front.len());
            self.front.advance(of_front);
            self.body.advance(written - of_front);
            let bytes = &self.traffic.bytes_sent;
            bytes.fetch_add(written as u64, Ordering::Relaxed);
        }
        if self.unflushed {
            self.write.flush().await?;
            self.unflushed = false;
            self.traffic.frames_sent.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Finishes the frame being sent and tells the peer that no more will come.
    pub async fn close(mut self) -> Result<(), PeerError> {
        self.finish().await?;
        self.write
            .shutdown()
            .await
            .map_err(|source| PeerError::Broken {
                name: self.remote.name.clone(),
                addr: self.remote.addr,
                direction: Direction::Sending,
                source,
            })
    }

    /// Frames begun so far. Each goes out wholly, before any later one, unless the connection breaks.
    pub fn begun(&self) -> u64 {
        self.begun
    }

    /// Counts of both directions.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// Who is at the other end.
    pub fn remote(&self) -> &Arc<Remote> {
        &self.remote
    }
}

/// The direction from the peer.
#[derive(Debug)]
pub struct FrameReceiver {
    read: ReadHalf<TlsStream<TcpStream>>,
    unread: BytesMut,
    decoder: Decoder,
    remote: Arc<Remote>,
    traffic: Arc<Traffic>,
    _tie: Option<Arc<Tie>>,
}

impl FrameReceiver {
    /// The next frame. [`PeerError::Closed`] where the peer closed, or died, between two frames.
    ///
    /// Pings come out here too: who receives one sends its payload back as a pong. A payload shares
    /// its memory with what was read beside it; copy what is kept for long.
    pub async fn recv(&mut self) -> Result<Frame, PeerError> {
        let received = read_frame(&mut self.read, &mut self.decoder, &mut self.unread).await;
        let (name, addr) = (&self.remote.name, self.remote.addr);
        match received {
            Ok(Frame {
                kind: Kind::Hello, ..
            }) => Err(PeerError::GreetedAgain {
                name: name.clone(),
                addr,
            }),
            Ok(frame) => {
                let traffic = &self.traffic;
                traffic.frames_received.fetch_add(1, Ordering::Relaxed);
                let bytes = frame.wire_len() as u64;
                traffic.bytes_received.fetch_add(bytes, Ordering::Relaxed);
                Ok(frame)
            }
            Err(fault) => Err(fault.with(name, addr)),
        }
    }

    /// Counts of both directions.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// Who is at the other end.
    pub fn remote(&self) -> &Arc<Remote> {
        &self.remote
    }
}

/// Why no frame came.
#[derive(Debug)]
pub(crate) enum ReadFault {
    Frame(FrameError),
    Closed,
    Torn,
    /// It has more bytes than were allowed here; they were not read.
    TooLong {
        len: usize,
    },
    Io(io::Error),
}

impl ReadFault {
    pub(crate) fn with(self, name: &PeerName, addr: SocketAddr) -> PeerError {
        let name = name.clone();
        match self {
            ReadFault::Frame(source) => PeerError::BadFrame { name, addr, source },
            ReadFault::Closed => PeerError::Closed { name, addr },
            ReadFault::Torn => PeerError::Torn { name, addr },
            ReadFault::TooLong { len } => PeerError::Greeting {
                name,
                addr,
                fault: HelloFault::TooLong { len },
            },
            ReadFault::Io(source) => PeerError::Broken {
                name,
                addr,
                direction: Direction::Receiving,
                source,
            },
        }
    }
}

/// Reads until there is a frame. Cancel-safe: what was read is in `unread`.
pub(crate) async fn read_frame(
    read: &mut (impl AsyncRead + Unpin),
    decoder: &mut Decoder,
    unread: &mut BytesMut,
) -> Result<Frame, ReadFault> {
    read_frame_of(usize::MAX, read, decoder, unread).await
}

/// As [`read_frame`]; no memory is taken for a frame whose payload is longer than `most`.
pub(crate) async fn read_frame_of(
    most: usize,
    read: &mut (impl AsyncRead + Unpin),
    decoder: &mut Decoder,
    unread: &mut BytesMut,
) -> Result<Frame, ReadFault> {
    loop {
        if let Some(frame) = decoder.decode(unread).map_err(ReadFault::Frame)? {
            return Ok(frame);
        }
        let wants = decoder.wants(unread);
        // A header is never longer than what is read at once.
        let len = unread.len().saturating_add(wants);
        if len > most.max(HEADER_LEN) {
            return Err(ReadFault::TooLong { len });
        }
        if unread.capacity() - unread.len() < wants {
            unread.reserve(wants.max(READ));
        }
        match read.read_buf(unread).await {
            Ok(0) if decoder.is_between_frames(unread) => return Err(ReadFault::Closed),
            Ok(0) => return Err(ReadFault::Torn),
            Ok(_) => {}
            // A process that died, or was killed, closes TCP without a farewell in TLS.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(if decoder.is_between_frames(unread) {
                    ReadFault::Closed
                } else {
                    ReadFault::Torn
                });
            }
            Err(error) => return Err(ReadFault::Io(error)),
        }
    }
}
