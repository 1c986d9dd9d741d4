//! Snapshots of volumes, kept in a repository.
//!
//! A repository is a store of objects that are written once and never changed. Content is cut into
//! *extents* of [`EXTENT`] bytes, each stored once under the hash of its content. A *leaf* lists the hashes
//! of [`LEAF_EXTENTS`] neighbouring extents, and is stored under its own hash. A *manifest* is a snapshot:
//! for each volume the hashes of its leaves. So a snapshot is complete in itself (there is no chain to
//! replay), one that differs little from another shares nearly all with it, and two trees are compared
//! without their content.
//!
//! ```text
//! repository            which repository this is, and its format
//! lock                  held shared by whoever reads or adds, alone by whoever deletes
//! snapshots/NAME        manifests
//! leaves/ab/<hash>      lists of extents
//! extents/ab/<hash>     content
//! tmp/                  what is being written
//! ```
//!
//! An object for each extent, and not packs of many: deleting is then all that a collection of garbage
//! does, nothing that is alive is ever written again, and there is no index that could be lost or lie. It
//! costs a file for 256 KiB, and the time to make each of them durable, which batches share.
//!
//! | module | idea |
//! |---|---|
//! | [`store`], [`local`], [`memory`] | where objects lie: what is asked of a store, a folder, and memory for tests |
//! | [`hash`], [`object`] | names made from content, and how content is packed |
//! | [`tree`], [`manifest`] | leaves, volumes, snapshots; what foreign bytes may be |
//! | [`repository`] | opening, listing |
//! | [`mod@write`], [`read`] | making a snapshot, reading a volume of one |
//! | [`verify`], [`collect`] | is everything there, and what nobody needs any more |
//!
//! Why nothing is lost in a crash. A name in the store has its whole, durable content. A manifest gets its
//! name after a barrier behind which the names of all that it refers to are durable. A collection has the
//! repository alone, makes the removal of manifests durable first, refuses to go on if it cannot read one
//! of those that stay, and then deletes what none of them reaches. `tests/crash.rs` kills all of this at
//! every step.

pub mod collect;
pub mod error;
pub mod hash;
pub mod local;
pub mod manifest;
pub mod memory;
pub mod object;
pub mod read;
pub mod repository;
pub mod store;
pub mod tree;
pub mod verify;
pub mod write;

pub use error::RepositoryError;
pub use hash::Hash;
pub use manifest::{Consistency, Manifest, SnapshotName};
pub use repository::Repository;
pub use tree::{EXTENT, LEAF_EXTENTS, VolumeTree};
