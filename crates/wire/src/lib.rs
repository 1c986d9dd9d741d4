//! What two daemons say to each other: [frames](frame), the [messages](message) and the [units]
//! inside them, which may be [packed](pack),
//! or said as what [changed](delta) of content that [both ends keep](kept).
//!
//! Nothing here opens a socket: bytes in, values out. Every decoder takes bytes from a peer that may be
//! wrong or hostile, bounds what it allocates, and is fuzzed.
#![forbid(unsafe_code)]

pub mod delta;
pub mod frame;
pub mod kept;
pub mod message;
pub mod pack;
#[cfg(test)]
mod previous;
pub mod units;
