//! The Whimbrel daemon: wires engine, volumes, NBD, QEMU and peers together.
//!
//! | module | idea |
//! |---|---|
//! | [`config`], [`state`] | what the operator says, and what must survive a crash |
//! | [`api`] | what the command and other programs may ask |
//! | [`daemon`] | start, stop, and the API's operations |
//! | [`machines`], [`machine`] | the machines of this host, and a machine's QEMU, disks and cards |
//! | [`volumes`] | a volume's life apart from any machine |
//! | [`snapshots`] | a machine's disks at one instant, into a repository and back |
//! | [`disk`] | a disk as its guest sees it, whatever state the volume is in |
//! | [`migration`] | a machine on its way, at either end |
//! | [`peers`] | reaching other hosts |
//! | [`report`] | what a migration came to, as figures, plots and a page |
//! | [`fsck`] | explaining a state directory, without a daemon |

pub mod api;
pub mod config;
pub mod daemon;
pub mod disk;
pub mod fsck;
pub mod host;
pub mod machine;
pub mod machines;
pub mod migration;
pub mod peers;
pub mod report;
pub mod schedule;
pub mod service;
pub mod snapshots;
pub mod state;
pub mod volumes;
mod wakers;
