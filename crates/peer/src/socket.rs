//! Socket options: little in the kernel's queues, patience in outages, haste after them.
//!
//! - What goes next is decided by the daemon, so the kernel is kept from holding much that it has not
//!   sent: `TCP_NOTSENT_LOWAT`, and no Nagle.
//! - BBR, where the kernel has it, fills a lossy long link without filling the queues on the way.
//! - An outage alone must not end a connection: `TCP_USER_TIMEOUT` is long. With it set the kernel
//!   goes by it alone, and neither by the number of retransmissions nor by that of keep-alive probes.
//! - A link that comes back is used within a second: `TCP_RTO_MAX_MS` keeps retransmissions from
//!   backing off to two minutes. Trap: without a user timeout it would *shorten* the patience, as the
//!   number of retransmissions is fixed; so it is set only where the other was taken.
//! - A send buffer bounds what is sent and unacknowledged, so it must hold the bandwidth-delay product.
//!   Trap: setting it below that slows the link, and a value over `net.core.wmem_max` is silently cut
//!   to it. It is therefore forced where the process may (`CAP_NET_ADMIN`), else set if it is not
//!   cut, else left to the kernel's own tuning, which `tcp_wmem` bounds.
//! - A receive buffer bounds the same from the other end. The kernel tunes it by how fast it is read, which on
//!   a lossy link it reads as slow: what came behind a gap cannot be read. So where the process may, room for
//!   the product is there from the start on connections of push. That is known after the greeting, hence only
//!   of peers that are trusted; nothing is taken until it arrives. Trap: with a buffer that was set the kernel
//!   no longer raises the window beyond what it began with, so that is said too.
//!
//! Nothing here fails a connection: options are taken or not, and the [`SocketReport`] says which.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;

use crate::hello::Class;
use crate::sockopt as tcp;

/// How sockets are set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketSettings {
    /// Bytes that may wait unsent in the kernel on a control connection.
    pub control_unsent: u32,
    /// Bytes that may wait unsent in the kernel on a push connection.
    pub push_unsent: u32,
    /// The most bytes sent and unacknowledged on a push connection; `None` leaves it to the kernel.
    pub push_send_buffer: Option<usize>,
    /// Room for bytes that have come on a push connection; `None` leaves it to the kernel.
    pub push_receive_buffer: Option<u32>,
    /// Congestion control asked for; where the kernel has it not, its default stays.
    pub congestion: Option<String>,
    /// The longest time between two retransmissions, 1 s to 120 s.
    pub retransmit_within: Duration,
    /// How long a connection outlives the link.
    pub outlive_outage: Duration,
    /// How long a connection is silent before the kernel asks whether the peer is still there.
    pub keepalive: Duration,
}

impl Default for SocketSettings {
    fn default() -> Self {
        SocketSettings {
            control_unsent: 32 << 10,
            push_unsent: 128 << 10,
            // The kernel counts its own overhead too: some 25 MB in flight, 1 Gbit/s at 200 ms.
            push_send_buffer: Some(32 << 20),
            push_receive_buffer: Some(32 << 20),
            congestion: Some("bbr".into()),
            retransmit_within: Duration::from_secs(1),
            outlive_outage: Duration::from_secs(15 * 60),
            keepalive: Duration::from_secs(15),
        }
    }
}

/// What the kernel took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketReport {
    /// Congestion control in use; empty if the kernel does not tell.
    pub congestion: String,
    /// Bytes that may wait unsent; `None` if the kernel sets no bound.
    pub unsent: Option<u32>,
    /// The send buffer as the kernel accounts it, twice what was set, or what it began with where it
    /// tunes the buffer itself.
    pub send_buffer: usize,
    /// Whether the send buffer is the one asked for, and not tuned by the kernel.
    pub send_buffer_set: bool,
    /// The longest time between two retransmissions; `None` where the kernel's 120 s stay.
    pub retransmit_within: Option<Duration>,
    /// How long the connection outlives the link; `None` where the kernel decides.
    pub outlive_outage: Option<Duration>,
}

/// Sets a socket up for its class.
pub fn set_up(socket: impl AsFd, class: Class, settings: &SocketSettings) -> SocketReport {
    let socket = socket.as_fd();
    let _ = sockopt::set_tcp_nodelay(socket, true);
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_tcp_keepidle(socket, settings.keepalive);
    let _ = sockopt::set_tcp_keepintvl(socket, settings.keepalive);
    if let Some(name) = &settings.congestion {
        let _ = sockopt::set_tcp_congestion(socket, name);
    }

    let outlive = milliseconds(settings.outlive_outage);
    let outlives = sockopt::set_tcp_user_timeout(socket, outlive).is_ok();
    let retransmit = milliseconds(settings.retransmit_within).clamp(1_000, 120_000);
    let retransmits = outlives && tcp::set_rto_max(socket, retransmit).is_ok();

    if let (Class::Push(_), Some(bytes)) = (class, settings.push_receive_buffer)
        && sockopt::set_socket_recv_buffer_size_force(socket, bytes as usize).is_ok()
    {
        let _ = tcp::set_window_clamp(socket, bytes);
    }

    let (unsent, buffer) = match class {
        Class::Control => (settings.control_unsent, None),
        Class::Push(_) => (settings.push_unsent, settings.push_send_buffer),
    };
    let bounded = tcp::set_notsent_lowat(socket, unsent).is_ok();
    let send_buffer_set = buffer.is_some_and(|bytes| set_send_buffer(socket, bytes));

    let duration = |ms: u32| Duration::from_millis(u64::from(ms));
    SocketReport {
        congestion: sockopt::tcp_congestion(socket).unwrap_or_default(),
        unsent: bounded.then_some(unsent),
        send_buffer: sockopt::socket_send_buffer_size(socket).unwrap_or_default(),
        send_buffer_set,
        retransmit_within: retransmits.then(|| duration(retransmit)),
        outlive_outage: outlives.then(|| duration(outlive)),
    }
}

fn set_send_buffer(socket: impl AsFd, bytes: usize) -> bool {
    if sockopt::set_socket_send_buffer_size_force(socket.as_fd(), bytes).is_ok() {
        return true;
    }
    let most = std::fs::read_to_string("/proc/sys/net/core/wmem_max")
        .ok()
        .and_then(|text| text.trim().parse::<usize>().ok());
    most.is_some_and(|most| bytes <= most)
        && sockopt::set_socket_send_buffer_size(socket, bytes).is_ok()
}

fn milliseconds(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(i32::MAX as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket() -> std::os::fd::OwnedFd {
        use rustix::net::{AddressFamily, SocketType, socket};
        socket(AddressFamily::INET, SocketType::STREAM, None).unwrap()
    }

    #[test]
    fn a_congestion_control_that_is_missing_leaves_the_kernels_own() {
        let before = sockopt::tcp_congestion(socket()).unwrap();
        let settings = SocketSettings {
            congestion: Some("no-such-thing".into()),
            ..SocketSettings::default()
        };
        let report = set_up(socket(), Class::Control, &settings);
        assert_eq!(report.congestion, before);
    }

    #[test]
    fn a_push_socket_is_bounded_as_asked() {
        let settings = SocketSettings {
            push_send_buffer: Some(64 << 10),
            ..SocketSettings::default()
        };
        let report = set_up(socket(), Class::Push(0), &settings);
        assert_eq!(report.unsent, Some(settings.push_unsent));
        assert!(report.send_buffer_set);
        assert_eq!(report.send_buffer, 128 << 10);
        assert_eq!(report.outlive_outage, Some(settings.outlive_outage));
    }

    #[test]
    fn a_control_socket_keeps_the_kernels_buffer() {
        let before = sockopt::socket_send_buffer_size(socket()).unwrap();
        let report = set_up(socket(), Class::Control, &SocketSettings::default());
        assert!(!report.send_buffer_set);
        assert_eq!(report.send_buffer, before);
        assert_eq!(report.unsent, Some(32 << 10));
    }
}
