//! What a connection's requests hold, against its limits.

use crate::limits::Limits;

/// Part of a load, given back once its reply is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    pub requests: u32,
    /// Bytes of payload.
    pub bytes: u32,
}

/// Requests accepted and not yet answered in full, and the payload held for them.
pub struct Load {
    requests: usize,
    bytes: u64,
    most_requests: usize,
    most_bytes: u64,
}

impl Load {
    pub fn new(limits: &Limits) -> Self {
        Load {
            requests: 0,
            bytes: 0,
            most_requests: limits.requests.max(1),
            most_bytes: limits.bytes,
        }
    }

    /// Whether one more request with so much payload may start. A payload larger than the limit may
    /// when it is the only one: else it could never.
    pub fn admits(&self, payload: u32) -> bool {
        self.requests < self.most_requests
            && (payload == 0
                || self.bytes == 0
                || self.bytes + u64::from(payload) <= self.most_bytes)
    }

    pub fn take(&mut self, payload: u32) {
        self.requests += 1;
        self.bytes += u64::from(payload);
    }

    pub fn give(&mut self, share: Share) {
        self.requests -= share.requests as usize;
        self.bytes -= u64::from(share.bytes);
    }

    pub fn requests(&self) -> usize {
        self.requests
    }
}
