//! The bounds of a server and of each of its connections, and what happens at each.

use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests of one connection that are being served or whose answer is not yet sent. At the bound
    /// (at least 1) nothing more is read from the client until an answer is sent.
    pub requests: usize,
    /// Bytes of payload, written or read, held for those requests; the descriptors of a block status
    /// count as read. A request that would exceed the bound waits, unread; one that alone exceeds it is
    /// served alone. So the most a connection holds is the greater of this and the export's `max_block`,
    /// plus a fixed buffer of [`INBOX`](crate::INBOX) bytes and, with TLS, some 200 KiB of its records.
    pub bytes: u64,
    /// Time from the connection to the end of negotiation. Then the connection is closed.
    pub handshake: Duration,
    /// Time for the requests in flight once no more are accepted: after a DISC, the client's end of
    /// stream, or a shutdown. Then the connection is closed with some unanswered; reads among them are
    /// dropped, writes are finished in the background.
    pub linger: Duration,
    /// Connections of a [`Server`](crate::Server), over all its listeners. At the bound (at least 1) new
    /// ones stay in the listen queue.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            requests: 256,
            bytes: 64 << 20,
            handshake: Duration::from_secs(30),
            linger: Duration::from_secs(30),
            connections: 256,
        }
    }
}
