//! The daemon's end of a hand-over, kept open by QEMU itself.
//!
//! # Why
//! A source QEMU whose reader goes away in the wrong moment runs its guest on by itself: while it sends the
//! package with the device state, and again while it ends its post-copy. By then the guest may run
//! elsewhere. (In between it pauses its post-copy, which is safe; and a stream that breaks in the middle of
//! the package may leave it `cancelling` for ever, paused and not to be resumed.) No order of messages
//! closes that gap: a daemon can always die in it.
//!
//! # How
//! Before it asks for the stop, the daemon hands QEMU a copy of *its own* end of the stream (`getfd`). QEMU
//! knows nothing of what it holds; but its stream has an open other end now, whatever becomes of the daemon,
//! and nothing breaks. The guest stands until somebody decides. The next daemon finds that end in QEMU's file
//! table, by the path it was accepted on, and [releases](release) QEMU: it says that all has arrived and reads
//! to the end. QEMU is `completed` then as after any other hand-over, with all memory in it.
//!
//! # Traps
//! Until it is released a QEMU may wait in a write to that stream with its lock held, and then it answers no
//! command. So releasing comes before speaking, and needs no monitor.
//! What is read is thrown away: it is a copy of what is in QEMU's memory.
//! A name is the monitor's it was given on, so a later daemon may not be able to close what it holds: then
//! it stays open with nobody at its other end.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::json;

use super::PATIENCE;
use crate::qmp::Qmp;
use crate::stream::return_path::ReturnMessage;
use crate::{Error, Result};

/// What QEMU calls what it keeps.
const NAME: &str = "whimbrel-ram-out";

/// Most descriptors of a QEMU that are looked at.
const DESCRIPTORS: usize = 65_536;

/// Lets QEMU keep the other end of its own stream.
pub(super) async fn keep(qmp: &Qmp, socket: &UnixStream) -> Result<()> {
    let copy = socket.as_fd().try_clone_to_owned();
    let copy = copy.map_err(|source| Error::Io {
        what: "copy the end of",
        path: "migration stream".into(),
        source,
    })?;
    qmp.pass(NAME, copy).await
}

/// The hand-over is over, or never began.
pub(super) async fn let_go(qmp: &Qmp) {
    // Refused where nothing is kept under that name.
    let _ = qmp.execute("closefd", json!({ "fdname": NAME })).await;
}

/// Releases a QEMU whose hand-over's reader has died, if it keeps the end of one that was accepted on
/// `socket`: what it still writes is read and thrown away, in the background, and it is told that all has
/// arrived. Returns how many ends were found. Not for a hand-over that somebody still reads from.
pub fn release(pid: i32, socket: &Path) -> io::Result<usize> {
    let ends = find(pid, socket)?;
    let found = ends.len();
    for end in ends {
        std::thread::Builder::new()
            .name("ram-release".into())
            .spawn(move || {
                if let Err(error) = drain(&end) {
                    tracing::warn!(%error, "a QEMU's hand-over does not come to its end");
                }
            })?;
    }
    Ok(found)
}

fn drain(mut end: &UnixStream) -> io::Result<()> {
    // Left as a daemon used it that may have been in the middle of anything.
    end.set_nonblocking(false)?;
    end.set_read_timeout(Some(PATIENCE))?;
    end.set_write_timeout(Some(PATIENCE))?;
    match end.write_all(&ReturnMessage::Shut(0).encode()) {
        // It had been told, and is through.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        other => other?,
    }
    let mut nowhere = vec![0; 256 << 10];
    while end.read(&mut nowhere)? > 0 {}
    Ok(())
}

/// The ends in a process' file table that were accepted on this path.
fn find(pid: i32, socket: &Path) -> io::Result<Vec<UnixStream>> {
    let process = match Pid::from_raw(pid) {
        Some(pid) => pidfd_open(pid, PidfdFlags::empty())?,
        None => return Ok(Vec::new()),
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.take(DESCRIPTORS) {
        let entry = entry?;
        let number = entry.file_name();
        let number = number.to_str().and_then(|text| text.parse().ok());
        let is_socket = std::fs::read_link(entry.path()).is_ok_and(|target| {
            target
                .as_os_str()
                .as_encoded_bytes()
                .starts_with(b"socket:")
        });
        let (Some(number), true) = (number, is_socket) else {
            continue;
        };
        // One that was closed meanwhile is none of ours.
        let Ok(copy) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) else {
            continue;
        };
        if was_accepted_on(&copy, socket) {
            found.push(UnixStream::from(copy));
        }
    }
    Ok(found)
}

fn was_accepted_on(socket: &OwnedFd, path: &Path) -> bool {
    use rustix::net::{SocketType, getsockname, sockopt::socket_acceptconn, sockopt::socket_type};
    let is_stream = socket_type(socket).is_ok_and(|kind| kind == SocketType::STREAM);
    let listens = socket_acceptconn(socket).unwrap_or(true);
    let name = getsockname(socket).and_then(rustix::net::SocketAddrUnix::try_from);
    let same = name.is_ok_and(|name| {
        let name = name.path_bytes().unwrap_or_default();
        is_same_place(Path::new(OsStr::from_bytes(name)), path)
    });
    is_stream && !listens && same
}

/// The socket's file is gone, so it is the folders that are compared.
fn is_same_place(one: &Path, other: &Path) -> bool {
    let folder = |path: &Path| path.parent().and_then(|folder| folder.canonicalize().ok());
    one == other
        || (one.file_name() == other.file_name()
            && folder(one).is_some_and(|one| folder(other) == Some(one)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn an_end_is_found_by_the_path_it_was_accepted_on_and_released() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("out");
        let listener = UnixListener::bind(&path).expect("bound");
        let mut qemu = UnixStream::connect(&path).expect("connected");
        let (ours, _) = listener.accept().expect("accepted");
        std::fs::remove_file(&path).expect("removed");
        let this = std::process::id() as i32;
        assert_eq!(
            find(this, &dir.path().join("other")).expect("read").len(),
            0
        );
        assert_eq!(release(this, &path).expect("released"), 1);
        // More than a socket holds: somebody reads it.
        qemu.write_all(&vec![1; 4 << 20]).expect("taken");
        let mut told = [0; 8];
        qemu.read_exact(&mut told).expect("told");
        assert_eq!(told[..], ReturnMessage::Shut(0).encode());
        drop(ours);
    }
}
