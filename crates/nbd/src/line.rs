//! The stream under a connection, and what more it can do on a thread that serves nobody else.
//!
//! While a client owes the next move, its connection's thread has nothing to do but to wait for it. Waiting
//! in the kernel's `recv` itself costs one system call where the way over epoll costs two or three, and a
//! client that sent half a request wakes nobody before the rest is there. So the descriptor is
//! made a blocking one: what must not wait says so with each call (`MSG_DONTWAIT`), and what may wait
//! does so for [`PATIENCE`] at most and then goes back to the runtime, which also sees shutdowns and timers.
//!
//! Trap: a blocking descriptor must never be read by tokio itself. Its readiness may be out of date, as the
//! kernel tells epoll of bytes that a waiting `recv` has taken meanwhile, and the read would hang.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// How long a thread waits for its client alone: the most by which a shutdown is noticed later.
const PATIENCE: Duration = Duration::from_millis(20);

/// A stream of a connection.
pub trait Line: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// Reads, holding up the thread until something is there; with `whole`, until `into` is full, if it
    /// does not last too long. [`io::ErrorKind::WouldBlock`] if nothing came in good time. `None` if this
    /// stream cannot, or may not.
    fn read_here(&mut self, into: &mut [u8], whole: bool) -> Option<io::Result<usize>>;
}

impl<L: Line> Line for tokio_rustls::server::TlsStream<L> {
    fn read_here(&mut self, _into: &mut [u8], _whole: bool) -> Option<io::Result<usize>> {
        None
    }
}

/// Any stream, on a thread that others may need.
pub struct Guest<S>(pub S);

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> Line for Guest<S> {
    fn read_here(&mut self, _into: &mut [u8], _whole: bool) -> Option<io::Result<usize>> {
        None
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guest<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guest<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A socket whose thread waits for it alone.
pub enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// To be called in the runtime of the thread that serves it.
    pub fn unix(stream: std::os::unix::net::UnixStream) -> io::Result<Socket> {
        let stream = UnixStream::from_std(stream)?;
        make_patient(&stream)?;
        Ok(Socket::Unix(stream))
    }

    /// To be called in the runtime of the thread that serves it.
    pub fn tcp(stream: std::net::TcpStream) -> io::Result<Socket> {
        let stream = TcpStream::from_std(stream)?;
        make_patient(&stream)?;
        Ok(Socket::Tcp(stream))
    }

    fn receive(&self, into: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        let got = match self {
            Socket::Unix(stream) => recv(stream, into, flags),
            Socket::Tcp(stream) => recv(stream, into, flags),
        };
        Ok(got.map(|(got, _)| got)?)
    }

    fn send(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut nothing_else = SendAncillaryBuffer::default();
        Ok(match self {
            Socket::Unix(stream) => sendmsg(stream, slices, &mut nothing_else, flags),
            Socket::Tcp(stream) => sendmsg(stream, slices, &mut nothing_else, flags),
        }?)
    }

    fn try_io<T>(&self, interest: Interest, io: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match self {
            Socket::Unix(stream) => stream.try_io(interest, io),
            Socket::Tcp(stream) => stream.try_io(interest, io),
        }
    }
}

fn make_patient(socket: &impl std::os::fd::AsFd) -> io::Result<()> {
    set_socket_timeout(socket, Timeout::Recv, Some(PATIENCE))?;
    Ok(rustix::io::ioctl_fionbio(socket, false)?)
}

impl Line for Socket {
    fn read_here(&mut self, into: &mut [u8], whole: bool) -> Option<io::Result<usize>> {
        let flags = if whole {
            RecvFlags::WAITALL
        } else {
            RecvFlags::empty()
        };
        Some(self.receive(into, flags))
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(match &*self {
                Socket::Unix(stream) => stream.poll_read_ready(cx),
                Socket::Tcp(stream) => stream.poll_read_ready(cx),
            })?;
            let room = into.initialize_unfilled();
            let mut got = None;
            let tried = self.try_io(Interest::READABLE, || {
                let len = self.receive(room, RecvFlags::DONTWAIT)?;
                got = Some(len);
                if len > 0 && len < room.len() {
                    // That was all: to wait for more need not begin with a vain attempt.
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(())
            });
            match (got, tried) {
                (Some(len), _) => {
                    into.advance(len);
                    return Poll::Ready(Ok(()));
                }
                (None, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                (None, Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                (None, result) => return Poll::Ready(result),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(match &*self {
                Socket::Unix(stream) => stream.poll_write_ready(cx),
                Socket::Tcp(stream) => stream.poll_write_ready(cx),
            })?;
            match self.try_io(Interest::WRITABLE, || self.send(slices)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
