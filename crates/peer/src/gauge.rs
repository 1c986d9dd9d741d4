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

use crate::sockopt::TcpInfo;

/// BBR measures the least round trip when it has not met it for ten seconds.
const RENEW_EVERY: Duration = Duration::from_secs(7);

/// Every kernel has it, and it may always be chosen.
const ALWAYS_THERE: &str = "reno";

/// The usual one, which does not space segments.
const UNPACED: &str = "cubic";

/// A connection at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Bytes that have reached the peer's kernel since the connection was made, TLS included. What came
    /// behind a gap counts, so that losses do not make it stand still and then leap.
    pub delivered: u64,
    /// The smoothed round trip, by the segments themselves: unlike a ping, none waits behind one that is
    /// sent again. It is old on a connection that idles.
    pub rtt: Duration,
    /// Bytes that would leave at once.
    pub room: u64,
    /// Bytes that wait for the congestion control to let them go.
    pub unsent: u64,
    /// Nothing is under way.
    pub is_idle: bool,
}

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

    /// How the connection does; `None` if the kernel does not tell (before Linux 4.6).
    pub fn reading(&self) -> Option<Reading> {
        let info = TcpInfo::of(&self.socket).ok().flatten()?;
        Some(Reading {
            delivered: info.delivered(),
            rtt: Duration::from_micros(info.rtt_us()),
            room: info.room(),
            unsent: info.unsent(),
            is_idle: info.is_idle(),
        })
    }

    /// Lets segments leave as soon as the window has room for them. BBR would space them by what it takes
    /// for the link's rate, which of a connection that mostly idles is little.
    pub fn unpaced(&mut self) {
        for name in [UNPACED, ALWAYS_THERE] {
            if sockopt::set_tcp_congestion(&self.socket, name).is_ok() {
                name.clone_into(&mut self.congestion);
                return;
            }
        }
    }

    /// To be called now and then, at least once a second: keeps BBR from measuring the round trip at
    /// the cost of demands. Does nothing to any other congestion control.
    pub fn keep_going(&self, now: Instant) {
        self.begin_anew(now, RENEW_EVERY);
    }

    /// Lets BBR look for the link's rate from the beginning, if it has gone on for so long. It takes a
    /// connection that had little to send for one on a slow link, and from then on grows by a quarter in
    /// eight round trips; in the beginning it doubles in one. Does nothing to any other control.
    pub fn begin_anew(&self, now: Instant, after: Duration) {
        if self.congestion != "bbr" {
            return;
        }
        // A panic elsewhere leaves the time as it was, which is all there is to protect.
        let mut renewed = self
            .renewed
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if now.saturating_duration_since(*renewed) < after {
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
    fn what_the_peer_took_is_delivered() {
        let (mut near, mut far) = pair();
        let gauge = Gauge::new(&near, "").unwrap();
        let before = gauge.reading().unwrap().delivered;
        near.write_all(&[7; 4000]).unwrap();
        far.read_exact(&mut [0; 4000]).unwrap();
        while gauge.reading().unwrap().delivered < before + 4000 {
            std::thread::yield_now();
        }
        let after = gauge.reading().unwrap();
        assert_eq!(after.delivered, before + 4000);
        assert!(after.room >= 4000, "an idle connection has room: {after:?}");
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
    fn an_unpaced_connection_has_another_control_and_keeps_it() {
        let (near, _far) = pair();
        let mut gauge = Gauge::new(&near, "bbr").unwrap();
        gauge.unpaced();
        gauge.keep_going(Instant::now() + 2 * RENEW_EVERY);
        assert_ne!(sockopt::tcp_congestion(&near).unwrap(), "bbr");
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
