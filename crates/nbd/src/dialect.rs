//! What messages of the transmission phase look like: the client's choice in the negotiation.

/// The sizes and forms of headers, requests and replies alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// 28-byte requests, simple replies.
    #[default]
    Simple,
    /// 28-byte requests; replies that carry data come in chunks, the others stay simple.
    Structured,
    /// 32-byte requests with lengths of 64 bits, and chunks only.
    Extended,
}

impl Dialect {
    /// Bytes of a request's header.
    pub fn header(self) -> usize {
        match self {
            Dialect::Simple | Dialect::Structured => 28,
            Dialect::Extended => 32,
        }
    }

    /// Whether a reply may have chunks: what holes, contexts and reasons of errors need.
    pub fn chunks(self) -> bool {
        self != Dialect::Simple
    }
}
