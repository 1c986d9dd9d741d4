//! What the kernel knows of a connection under way, and a word with its congestion control.
//!
//! Push is paced by the daemon, from the delay it causes and from what the far side has acknowledged.
//! So the congestion control below it has one duty left: not to slow down for losses that are no
//! congestion. BBR does that, but every ten seconds in which the round trip never fell to its least
//! (and push keeps a short queue, so it never does) it sends four packets a round trip for 200 ms, to
//! measure that least; a demand then waits behind whatever the kernel holds. The daemon knows the least
//! round trip better, by pings. So BBR is begun anew before its ten seconds are over: the congestion
//! window stays, its memory of the round trip does not.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use crate::sockopt as tcp;

/// BBR measures the least round trip when it has not met it for ten seconds.
const RENEW_EVERY: Duration = Duration::from_secs(7);

/// Every kernel has it, and it may always be chosen.
const ALWAYS_THERE: &str = "reno";

/// A view of one connection's socket. It keeps the socket open: drop it with the connection.
#[derive(Debug)]
pub struct Gauge {
    socket: OwnedFd,
    congestion: String,
    renewed: Mutex<Instant>,
}

impl Gauge {
    /// `congestion` is the control in use, as [`SocketReport`](crate::socket::SocketReport) tells.
    pub(crate) fn new(socket: impl AsFd, congestion: &str) -> io::Result<Gauge> {
        Ok(Gauge {
            socket: socket.as_fd().try_clone_to_owned()?,
            congestion: congestion.to_owned(),
            renewed: Mutex::new(Instant::now()),
        })
    }

    /// Bytes the peer's kernel has acknowledged since the connection was made, TLS included; `None` if
    /// the kernel does not tell (before Linux 4.1).
    pub fn acknowledged(&self) -> Option<u64> {
        tcp::bytes_acked(&self.socket).ok().flatten()
    }

    /// To be called now and then, at least once a second: keeps BBR from measuring the round trip at
    /// the cost of demands. Does nothing to any other congestion control.
    pub fn keep_going(&self, now: Instant) {
        if self.congestion != "bbr" {
            return;
        }
        // A panic elsewhere leaves the time as it was, which is all there is to protect.
        let mut renewed = self
            .renewed
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if now.saturating_duration_since(*renewed) < RENEW_EVERY {
            return;
        }
        *renewed = now;
        // Setting the one in use changes nothing, so by way of another. Should the way back be barred
        // (it was not when the connection was made) the connection goes on with the other.
        if sockopt::set_tcp_congestion(&self.socket, ALWAYS_THERE).is_ok() {
            let _ = sockopt::set_tcp_congestion(&self.socket, &self.congestion);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn what_the_peer_took_is_acknowledged() {
        let (mut near, mut far) = pair();
        let gauge = Gauge::new(&near, "").unwrap();
        let before = gauge.acknowledged().unwrap();
        near.write_all(&[7; 4000]).unwrap();
        far.read_exact(&mut [0; 4000]).unwrap();
        while gauge.acknowledged().unwrap() < before + 4000 {
            std::thread::yield_now();
        }
        assert_eq!(gauge.acknowledged(), Some(before + 4000));
    }

    #[test]
    fn bbr_begun_anew_is_bbr_and_the_connection_goes_on() {
        let (mut near, mut far) = pair();
        if sockopt::set_tcp_congestion(&near, "bbr").is_err() {
            eprintln!("skipped: this kernel has no BBR");
            return;
        }
        let gauge = Gauge::new(&near, "bbr").unwrap();
        gauge.keep_going(Instant::now() + 2 * RENEW_EVERY);
        assert_eq!(sockopt::tcp_congestion(&near).unwrap(), "bbr");
        near.write_all(b"still there").unwrap();
        let mut heard = [0; 11];
        far.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"still there");
    }

    #[test]
    fn another_congestion_control_is_left_alone() {
        let (near, _far) = pair();
        sockopt::set_tcp_congestion(&near, "cubic").unwrap();
        let gauge = Gauge::new(&near, "cubic").unwrap();
        gauge.keep_going(Instant::now() + 2 * RENEW_EVERY);
        assert_eq!(sockopt::tcp_congestion(&near).unwrap(), "cubic");
    }
}
