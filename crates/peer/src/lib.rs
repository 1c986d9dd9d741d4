//! Peers: who the hosts are, how they meet, and how their frames travel.
//!
//! A host is its key: it makes one ([`identity`]), is known by the key's fingerprint ([`key_id`]) and
//! trusts others by theirs ([`trust`]). Two hosts meet over TLS 1.3 in which each pins the other's
//! key ([`tls`]), greet each other in words ([`hello`]), and then exchange frames ([`connection`])
//! over sockets set up so that what goes next is decided here and not by a queue in the kernel
//! ([`socket`]).
//!
//! | module | idea |
//! |---|---|
//! | [`identity`] | a host's own key and certificate, on disk |
//! | [`key_id`] | the fingerprint by which a key is named |
//! | [`trust`] | `peers.toml`: the hosts that are trusted, by name |
//! | [`rights`] | what a trusted host may do |
//! | [`invitation`], [`join`] | a one-time token by which two hosts come to trust each other |
//! | [`ties`] | the connections that stand, cut when their peer is trusted no more |
//! | [`tls`] | TLS 1.3, mutual, with pinned keys |
//! | [`hello`] | the greeting: versions, features, class, session; or a refusal in words |
//! | [`socket`] | socket options and which of them the kernel took |
//! | [`dial`] | reaching a peer |
//! | [`listener`] | being reached, by strangers too |
//! | [`connection`] | frames over an established connection |
//! | [`pace`] | token buckets, one per migration under one per host |
//! | [`backoff`] | how long to wait before trying again |
//! | [`rtt`] | round-trip time from pings |
#![deny(missing_docs)]

pub mod backoff;
pub mod connection;
pub mod dial;
mod durable;
pub mod error;
pub mod gauge;
pub mod hello;
pub mod identity;
pub mod invitation;
pub mod join;
pub mod key_id;
pub mod listener;
mod owned_file;
pub mod pace;
pub mod rights;
pub mod rtt;
pub mod socket;
mod sockopt;
pub mod ties;
pub mod tls;
pub mod trust;

pub use error::PeerError;
