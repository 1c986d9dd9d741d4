//! The core of Whimbrel, free of input and output.
//!
//! A machine is a set of [spaces](space) (each disk, each RAM block), each an array of 4 KiB
//! [units](space::UNIT). Moving a machine is moving units, and for every unit one question matters:
//! *where is its current content?* This crate answers it, decides what moves next, and decides who
//! owns the machine. Events go in, actions come out, time is passed in: nothing here opens a file, a
//! socket or a clock, so every decision can be tested, model-checked and simulated.
//!
//! | module | idea |
//! |---|---|
//! | [`space`] | units, extents, spaces: the coordinates of everything |
//! | [`set`] | a set of units, as a bitmap with runs |
//! | [`outflow`] | the source's side of a copy: what is still to send, and what goes next |
//! | [`disks_ahead`] | what of the disks crosses before the switchover |
//! | [`inflow`] | the destination's side of a copy: what is resident, who waits, what may be stored |
//! | [`switchover`] | who owns the machine: the two state machines and their journal records |
//! | [`latency`] | how long requests took, counted by size |
//! | [`guard`] | how much push may go while the guest's own I/O is slow |
//! | [`codec`] | none or zstd, at which level: whatever delivers most at the moment |
//! | [`delta`] | whose content is kept at both ends, so that only what changed of it goes again |
//! | [`timeline`] | what a migration did over time, in a bounded number of stretches |
//! | [`workingset`] | what the guest will read and write next, by several estimators, and a judge of them |
//! | [`progress`] | bytes, rate, ETA and one monotone bar over every space |
#![forbid(unsafe_code)]

/// Whether this engine has a deliberate fault; never in what is shipped.
#[cfg(feature = "faults")]
macro_rules! faulty {
    ($fault:ident) => {
        $crate::faults::has($crate::faults::Fault::$fault)
    };
}
#[cfg(not(feature = "faults"))]
macro_rules! faulty {
    ($fault:ident) => {
        false
    };
}

pub mod ahead;
pub mod codec;
pub mod delta;
pub mod disks_ahead;
#[cfg(feature = "faults")]
pub mod faults;
pub mod guard;
pub mod inflow;
pub mod latency;
pub mod outflow;
pub mod progress;
pub mod rounds;
pub mod set;
pub mod space;
pub mod switchover;
pub mod timeline;
pub mod workingset;
pub mod write_heat;
