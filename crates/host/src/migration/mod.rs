//! Migrations: one driver task at each end, a session between them.
//!
//! ```text
//!        source                                             destination
//!  outgoing (driver) -- departure (session) === WAN === arrival (session) -- incoming (driver)
//!        |                   |                               |                    |
//!  engine::Source     flow (what leaves)           arrivals (what comes)  engine::Destination
//!        |                                                                        |
//!     record (journal)                                        landing (room made), record (journal)
//! ```
//!
//! Drivers decide nothing about ownership: they perform what the engine's state machines say. Sessions
//! know nothing of phases: they carry messages and content, and survive their connections. Beside both
//! [`recording`] keeps what happened when.

pub mod arrival;
pub mod arrivals;
pub mod board;
mod deltas;
pub mod departure;
pub mod easing;
pub mod flow;
mod governor;
mod heat;
pub mod incoming;
pub mod landing;
mod lane;
pub mod outgoing;
mod packing;
pub mod peeks;
pub mod record;
pub mod recording;
mod report;
mod spaces;
mod verify;

use std::time::Duration;

/// How long a destination whose migration is over still answers a source that did not hear of it.
pub const LINGER: Duration = Duration::from_secs(10);
