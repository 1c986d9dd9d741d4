//! TCP options for which no safe wrapper exists.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{c_int, c_uint, socklen_t};

/// Linux 6.15; see `tcp(7)` and `include/uapi/linux/tcp.h`.
const TCP_RTO_MAX_MS: c_int = 44;

/// Bounds what waits unsent in the kernel (`TCP_NOTSENT_LOWAT`), in bytes.
pub(crate) fn set_notsent_lowat(socket: impl AsFd, bytes: u32) -> io::Result<()> {
    set_uint(socket, libc::TCP_NOTSENT_LOWAT, bytes)
}

/// Bounds the time between two retransmissions, in milliseconds (the kernel takes 1,000 to 120,000).
pub(crate) fn set_rto_max(socket: impl AsFd, ms: u32) -> io::Result<()> {
    set_uint(socket, TCP_RTO_MAX_MS, ms)
}

/// The largest window offered to the peer (`TCP_WINDOW_CLAMP`), in bytes; raises what the kernel began with.
pub(crate) fn set_window_clamp(socket: impl AsFd, bytes: u32) -> io::Result<()> {
    set_uint(socket, libc::TCP_WINDOW_CLAMP, bytes)
}

/// What the kernel tells of a connection (`struct tcp_info`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct TcpInfo([u8; TcpInfo::LEN]);

impl TcpInfo {
    // Where fields lie (`include/uapi/linux/tcp.h`); the layout only grows.
    const SND_MSS: usize = 16;
    const UNACKED: usize = 24;
    const SACKED: usize = 28;
    const LOST: usize = 32;
    const RETRANS: usize = 36;
    const RTT: usize = 68;
    const SND_CWND: usize = 80;
    const BYTES_ACKED: usize = 120;
    const NOTSENT_BYTES: usize = 144;
    const LEN: usize = 148;

    /// `None` from a kernel whose `tcp_info` ends before the fields read here (before Linux 4.6).
    pub(crate) fn of(socket: impl AsFd) -> io::Result<Option<TcpInfo>> {
        let mut info = [0_u8; TcpInfo::LEN];
        let mut len = info.len() as socklen_t;
        // SAFETY: the descriptor is borrowed and so open for the call; the kernel writes at most `len`
        // bytes to the live array of that length, and to `len` how many it wrote.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                info.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((len as usize >= TcpInfo::LEN).then_some(TcpInfo(info)))
    }

    fn u32(&self, at: usize) -> u64 {
        let bytes = self.0[at..at + 4].try_into();
        u32::from_ne_bytes(bytes.expect("a range of four bytes")).into()
    }

    /// Bytes that have reached the peer's kernel, those behind a gap included.
    pub(crate) fn delivered(&self) -> u64 {
        let bytes = self.0[Self::BYTES_ACKED..Self::BYTES_ACKED + 8].try_into();
        let in_order = u64::from_ne_bytes(bytes.expect("a range of eight bytes"));
        in_order + self.u32(Self::SACKED) * self.u32(Self::SND_MSS)
    }

    /// The smoothed round trip of segments, in microseconds; 0 before the first.
    pub(crate) fn rtt_us(&self) -> u64 {
        self.u32(Self::RTT)
    }

    /// Bytes that wait for the congestion control to let them go.
    pub(crate) fn unsent(&self) -> u64 {
        self.u32(Self::NOTSENT_BYTES)
    }

    /// Nothing is under way, nor waits to be.
    pub(crate) fn is_idle(&self) -> bool {
        self.u32(Self::UNACKED) == 0 && self.u32(Self::NOTSENT_BYTES) == 0
    }

    /// Bytes that would leave at once: what the congestion window has room for, less what waits already.
    pub(crate) fn room(&self) -> u64 {
        let out = self.u32(Self::UNACKED) + self.u32(Self::RETRANS);
        let gone = self.u32(Self::SACKED) + self.u32(Self::LOST);
        let flying = out.saturating_sub(gone);
        let free = self.u32(Self::SND_CWND).saturating_sub(flying);
        (free * self.u32(Self::SND_MSS)).saturating_sub(self.u32(Self::NOTSENT_BYTES))
    }
}

fn set_uint(socket: impl AsFd, option: c_int, value: c_uint) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed and so open for the call; the pointer and the length are
    // those of `value`, a live integer that the kernel only reads.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast(),
            size_of::<c_uint>() as socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
