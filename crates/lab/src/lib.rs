//! The laboratory, not shipped: hosts as network namespaces, WAN emulator, guest builder, workloads.
//!
//! One [`net::Lab`] is two hosts, a client and the wide area between the hosts, on one machine:
//!
//! ```text
//!   host-a  wan0 10.77.0.1 ===== WAN emulator (this process) ===== 10.77.0.2 wan0  host-b
//!     |                                                                              |
//!    br0 --taps of guests                                          taps of guests-- br0
//!     |                                                                              |
//!     +--------- veth --------- client: br0 192.168.77.1/24 --------- veth ----------+
//! ```
//!
//! The guests' LAN reaches both hosts and does not cross the WAN, so that a guest keeps its address
//! when it moves and is watched from the client ([`probe`]) by a path the move does not load.

pub mod chaos;
pub mod error;
pub mod guest;
pub mod kills;
pub mod links;
pub mod net;
pub mod pair;
mod priority;
pub mod probe;
pub mod process;
pub mod wan;

pub use error::LabError;
