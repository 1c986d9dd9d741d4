//! The laboratory's guest: a kernel with one program, a disk with real files, and the check afterwards.
//!
//! ```text
//!   BootFiles   Debian's cloud kernel + an initramfs of busybox, virtio modules and the workload
//!   DiskSpec    -> Disk: a sparse raw ext4 image of real files, with a manifest; cached
//!   Params      what the guest does, on the kernel command line (crate `whimbrel-workload`)
//!   Control     status, pause, resume, pace, sync, poweroff over TCP
//!   verify      the stopped guest's image against the manifest and the acknowledged numbers
//! ```
//!
//! Everything that is slow to make is kept in a cache folder under a name made from what it depends on.

mod boot;
mod control;
mod disk;
mod error;
mod image;
mod initramfs;
mod kernel;
mod program;
mod sparse;
mod tool;
mod verify;

pub use boot::BootFiles;
pub use control::Control;
pub use disk::{Disk, DiskSpec};
pub use error::GuestError;
pub use kernel::Kernel;
pub use program::workload_program;
pub use sparse::copy_sparse;
pub use verify::{FAILURES_LISTED, Failure, Found, VerifyReport, verify};
pub use whimbrel_workload::manifest::Manifest;
pub use whimbrel_workload::params::Params;
pub use whimbrel_workload::report::{Ack, Line, Outcome, Report, Status};

use std::path::{Path, PathBuf};

/// The checkout this crate was built in.
pub fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here)
}

/// Where built images are kept: `WHIMBREL_CACHE`, otherwise `.lab/cache` in the checkout.
pub fn cache_dir() -> PathBuf {
    match std::env::var_os("WHIMBREL_CACHE") {
        Some(dir) => dir.into(),
        None => workspace().join(".lab/cache"),
    }
}
