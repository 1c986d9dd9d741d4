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

/// Where `tcpi_bytes_acked` lies in `struct tcp_info` (`include/uapi/linux/tcp.h`), whose layout only grows.
const BYTES_ACKED: std::ops::Range<usize> = 120..128;

/// Bytes acknowledged by the peer; `None` from a kernel whose `tcp_info` ends before them.
pub(crate) fn bytes_acked(socket: impl AsFd) -> io::Result<Option<u64>> {
    let mut info = [0_u8; BYTES_ACKED.end];
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
    if (len as usize) < BYTES_ACKED.end {
        return Ok(None);
    }
    let bytes = info[BYTES_ACKED].try_into();
    Ok(Some(u64::from_ne_bytes(
        bytes.expect("a range of eight bytes"),
    )))
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
