//! An unmodified QEMU, seen from its own host.
//!
//! The wide area never reaches QEMU. Its memory leaves by an ordinary migration into the daemon beside
//! it and enters another QEMU as an ordinary post-copy from the daemon beside that one; disks are NBD
//! exports. What this crate knows of QEMU is its command line, its monitor, and its migration stream.
//!
//! | module | idea |
//! |---|---|
//! | [`qmp`] | the monitor: commands, events with QEMU's own time |
//! | [`stream`] | the migration stream and its return path, read and written, free of sockets |
//! | [`store`] | the newest copy of every page, at the source |
//! | [`source`] | RAM out of a running QEMU; the stop that carries no page; the way back |
//! | [`paused`] | RAM of a stopped QEMU, read where it lies |
//! | [`content`] | the store or the paused QEMU, whichever a copy is fed from |
//! | [`sink`] | RAM into a waiting QEMU: post-copy, or pre-copy where userfaultfd is missing |
//! | [`launch`] | a QEMU's command line; starting it so that it outlives the daemon |
//! | `lifeline` | a monitor connection that outlives the daemon |
//! | [`info`] | what a running QEMU is made of, and the pages its devices touch first |
#![deny(unsafe_code)]

pub mod content;
mod error;
pub mod info;
pub mod launch;
mod lifeline;
pub mod paused;
pub mod qmp;
mod settings;
pub mod sink;
pub mod source;
pub mod store;
pub mod stream;

pub use error::{Error, Result, SourceState};
