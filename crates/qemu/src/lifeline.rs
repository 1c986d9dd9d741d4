//! A monitor connection that outlives the daemon.
//!
//! # Why
//! A destination QEMU whose feeder died may wait for a page on its main thread, or on a virtual CPU that
//! holds its lock. Then it answers nothing but out-of-band commands, among them the one that lets a new
//! feeder in. But a monitor takes those only after a negotiation, and the negotiation itself is answered
//! by the main thread: a connection made *after* the feeder's death comes too late.
//!
//! # How
//! QEMU is started with a socket pair of which it inherits both ends. On one it serves a monitor; of the
//! other it knows nothing, so it keeps it open. The daemon that starts it has a copy of that other end and
//! negotiates at once. A later daemon takes a copy out of QEMU's file table (`pidfd_getfd`), and finds a
//! connection on which everything is agreed. The number of the descriptor is in the name of the monitor's
//! character device, hence on QEMU's command line.
//!
//! # Traps
//! Commands that the main thread does not answer stay in this monitor's queue, which stops it when it is
//! full; nothing drops them when a daemon dies. So it is for out-of-band commands, and ordinary ones only
//! while there is no other way.
//! Events come here too; somebody has to read them. What came while there was no daemon waits in the
//! socket, the first line perhaps without its beginning.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use rustix::fd::AsRawFd;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// What the monitor's character device is called, before the descriptor's number.
const NAME: &str = "lifeline";

/// The daemon's end, of a QEMU about to be started.
#[derive(Clone, Debug)]
pub(crate) struct Lifeline {
    ours: Arc<UnixStream>,
}

impl Lifeline {
    /// Adds the monitor to QEMU's command line, and both ends to what it inherits.
    #[allow(unsafe_code)]
    pub(crate) fn tie(command: &mut Command) -> io::Result<Lifeline> {
        let (ours, theirs) = UnixStream::pair()?;
        let ours = Arc::new(ours);
        let (kept, served) = (ours.as_raw_fd(), theirs.as_raw_fd());
        command.args(["-chardev", &format!("socket,id={NAME}{kept},fd={served}")]);
        command.args(["-mon", &format!("chardev={NAME}{kept},mode=control")]);
        let inherited = Arc::clone(&ours);
        // SAFETY: between fork and exec the closure makes two system calls, fcntl, on descriptors that it
        // owns, and touches no memory of the parent's; fcntl is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                fcntl_setfd(inherited.as_fd(), FdFlags::empty())?;
                fcntl_setfd(theirs.as_fd(), FdFlags::empty())?;
                Ok(())
            });
        }
        Ok(Lifeline { ours })
    }

    /// The connection, not yet negotiated.
    pub(crate) fn stream(&self) -> io::Result<UnixStream> {
        self.ours.try_clone()
    }
}

/// The lifeline of a running QEMU, negotiated long ago; `None` if it was started without one.
pub(crate) fn of(pid: i32) -> io::Result<Option<UnixStream>> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline"))?;
    let (Some(kept), Some(pid)) = (descriptor(&line), Pid::from_raw(pid)) else {
        return Ok(None);
    };
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let end: OwnedFd = pidfd_getfd(process, kept, PidfdGetfdFlags::empty())?;
    Ok(Some(UnixStream::from(end)))
}

/// The number in a command line's `-chardev socket,id=lifelineN,...`.
fn descriptor(command_line: &[u8]) -> Option<i32> {
    let device = format!("socket,id={NAME}");
    command_line.split(|&byte| byte == 0).find_map(|argument| {
        let rest = std::str::from_utf8(argument).ok()?.strip_prefix(&device)?;
        rest.split(',').next()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptor_is_read_off_the_command_line() {
        let line = b"qemu\0-chardev\0socket,id=qmp0,path=/x,server=on\0-chardev\0socket,id=lifeline17,fd=18\0";
        assert_eq!(descriptor(line), Some(17));
        assert_eq!(
            descriptor(b"qemu\0-chardev\0socket,id=lifelineX,fd=18\0"),
            None
        );
        assert_eq!(descriptor(b"qemu\0"), None);
    }
}
