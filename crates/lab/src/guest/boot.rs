//! What QEMU needs to start a guest.

use super::{GuestError, Kernel, Params, initramfs};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// A kernel and an initramfs.
#[derive(Clone, Debug)]
pub struct BootFiles {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

impl BootFiles {
    /// Finds the kernel; builds the program and the initramfs where they are not up to date.
    pub fn prepare(cache: &Path) -> Result<BootFiles, GuestError> {
        let kernel = Kernel::find()?;
        let initramfs = initramfs::build(&kernel, cache)?;
        Ok(BootFiles {
            kernel: kernel.image,
            initramfs,
        })
    }

    /// The kernel's command line: the console on the first serial port, quiet, no second life after a
    /// panic (QEMU wants `-no-reboot` for that), and the workload's parameters.
    pub fn append(params: &Params) -> String {
        format!(
            "console=ttyS0 quiet loglevel=3 panic=-1 net.ifnames=0 {}",
            params.to_cmdline()
        )
    }

    /// QEMU's `-kernel`, `-initrd` and `-append`. A migration's destination must be given the same.
    pub fn qemu_args(&self, params: &Params) -> Vec<OsString> {
        vec![
            "-kernel".into(),
            self.kernel.clone().into(),
            "-initrd".into(),
            self.initramfs.clone().into(),
            "-append".into(),
            Self::append(params).into(),
        ]
    }
}
