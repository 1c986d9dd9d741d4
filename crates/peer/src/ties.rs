//! The connections that stand, by the key at their other end, so that a peer that is trusted no more is
//! cut off at once and not at its next connection.
//!
//! A tie is a second descriptor of the connection's socket. Cutting shuts the socket down, both ways:
//! whoever reads from it or writes to it, in whatever task, finds it closed. The tie goes with the two
//! halves of the connection.
//!
//! Trap: whether the key is trusted is looked up *inside* the lock under which cutting goes through the
//! ties. So a connection that is made while its peer is being revoked is either cut or never tied.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::Shutdown;

use crate::key_id::KeyId;

#[derive(Debug, Default)]
struct Knots {
    next: u64,
    by_number: HashMap<u64, (KeyId, OwnedFd)>,
}

/// All ties of a trust store. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ties(Arc<Mutex<Knots>>);

/// A connection's entry; it goes when this is dropped.
#[derive(Debug)]
pub struct Tie {
    ties: Ties,
    number: u64,
}

impl Ties {
    // Each entry is put in and taken out by one call, so a poisoned lock still guards a whole map.
    fn knots(&self) -> MutexGuard<'_, Knots> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ties a connection, if its key is trusted at this moment.
    pub(crate) fn tie(
        &self,
        key: KeyId,
        socket: impl AsFd,
        is_trusted: impl FnOnce() -> bool,
    ) -> io::Result<Option<Tie>> {
        let socket = socket.as_fd().try_clone_to_owned()?;
        let mut knots = self.knots();
        if !is_trusted() {
            return Ok(None);
        }
        let number = knots.next;
        knots.next += 1;
        knots.by_number.insert(number, (key, socket));
        Ok(Some(Tie {
            ties: self.clone(),
            number,
        }))
    }

    /// Cuts every connection whose key is trusted no more; how many.
    pub(crate) fn cut(&self, is_trusted: impl Fn(&KeyId) -> bool) -> usize {
        let knots = self.knots();
        let gone = knots.by_number.values().filter(|(key, _)| !is_trusted(key));
        gone.map(|(key, socket)| {
            tracing::info!(%key, "a connection of a host that is trusted no more is cut");
            // One that has ended by itself cannot be shut down, and need not be.
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        })
        .count()
    }
}

impl Drop for Tie {
    fn drop(&mut self) {
        self.ties.knots().by_number.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_the_connections_of_keys_that_are_gone_are_cut() {
        let ties = Ties::default();
        let (gone, kept) = (KeyId::of_public_key(&[1]), KeyId::of_public_key(&[2]));
        let (mut a, a_far) = UnixStream::pair().unwrap();
        let (b, mut b_far) = UnixStream::pair().unwrap();
        let _a = ties.tie(gone, &a, || true).unwrap().unwrap();
        let b_tie = ties.tie(kept, &b, || true).unwrap().unwrap();
        assert_eq!(ties.cut(|key| *key == kept), 1);
        assert_eq!(a.read(&mut [0]).unwrap(), 0, "it reads as closed");
        drop(a_far);
        b_far.set_nonblocking(true).unwrap();
        let quiet = b_far.read(&mut [0]).unwrap_err();
        assert_eq!(quiet.kind(), io::ErrorKind::WouldBlock);
        drop(b_tie);
        assert_eq!(ties.cut(|_| false), 1, "what was untied is not cut again");
    }

    #[test]
    fn a_key_that_is_not_trusted_is_not_tied() {
        let (socket, _far) = UnixStream::pair().unwrap();
        let tie = Ties::default().tie(KeyId::of_public_key(&[1]), &socket, || false);
        assert!(tie.unwrap().is_none());
    }
}
