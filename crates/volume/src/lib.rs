//! Volumes: the disks of a machine as this host holds them.
//!
//! | module | idea |
//! |---|---|
//! | [`pool`] | the few threads on which blocking I/O runs, so that the async runtime never does |
//! | [`lent`] | threads that serve one client, on which disk I/O needs no other thread |
//! | [`raw`] | a raw sparse file (or block device) with an async face |
//! | [`backend`] | what the content lies in: a raw file, a block device, a qcow2 image; one type for all |
//! | [`journal`] | which units of a volume being filled are here, through any crash |
//! | [`digest`] | what a volume's content adds up to, for verification |
//! | [`heat`], [`heat_file`] | which parts of a volume are read and written, and how much; kept over restarts |
//! | [`trace`] | what a guest did to a disk, recorded: our own format, and import of others |
//!
//! Every error of the crate is a [`VolumeError`].

pub mod backend;
mod buffers;
pub mod digest;
pub mod error;
pub mod heat;
pub mod heat_file;
pub mod journal;
pub mod lent;
pub mod pool;
pub mod raw;
mod ring;
pub mod trace;
mod turns;

pub use error::{Operation, VolumeError};
