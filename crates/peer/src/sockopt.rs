//! Two TCP options for which no safe wrapper exists.

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
