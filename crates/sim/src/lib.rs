//! A deterministic simulator of a migration. Not shipped.
//!
//! The engine's own state machines (`Source`, `Destination`, `Outflow`, `SpaceIn`) are driven on virtual time by
//! a model of the two daemons of `crates/host`, over modelled links and disks, with a guest that checks all it
//! reads, while daemons die, hosts lose power, connections break and operators cancel. A run is a seed: it can be
//! had again exactly, made smaller, and printed.
//!
//! | module | idea |
//! |---|---|
//! | [`scenario`] | a run before it runs: sizes, rates, mishaps, all from a seed |
//! | [`world`] | the queue of events, and what both sides share |
//! | [`source`], [`memory`], [`flow`] | the source: its driver, the guest's memory there, its session |
//! | [`destination`], [`arrival`], [`filling`] | the destination: its driver, its session, what is stored |
//! | [`guest`], [`oracle`] | the guest, and what it knows |
//! | [`store`], [`link`], [`message`] | disks and journals, connections, what is said |
//! | [`mishaps`] | what goes wrong |
//! | [`verdict`] | what must hold in the end |
//! | [`run`], [`coverage`] | seeds, shrinking, counters |
//! | [`faults`] | deliberate faults, each of which must be found |
//!
//! Checked at every step: at most one host runs the guest (I8), epochs only rise (I5), nobody writes to a frozen
//! disk (I5), every read returns the guest's own last write (I1, I2, I7), after a power cut nothing older than an
//! acknowledged flush (I4), no unit whose content has stopped to change goes twice on one connection and no page is placed twice (I3), a demand goes
//! before any push (I6). In the end: a fair run has ended, one side owns the machine, all content is there, and
//! nothing is left half done that was not told to a person.
//!
//! Not modelled: pre-copy of RAM, several RAM blocks, flow control of TCP, full disks, a machine that moves on or
//! back. The drivers are models: a fault of the real ones is found only if the model shares it.
#![forbid(unsafe_code)]

pub mod arrival;
pub mod coverage;
pub mod destination;
pub mod disks_ahead;
pub mod faults;
pub mod filling;
pub mod flow;
pub mod guest;
pub mod link;
pub mod memory;
pub mod message;
pub mod mishaps;
pub mod oracle;
pub mod rng;
pub mod run;
pub mod scenario;
pub mod seeds;
pub mod source;
pub mod store;
pub mod verdict;
pub mod world;
