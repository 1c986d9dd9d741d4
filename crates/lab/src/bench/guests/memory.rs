//! What a case needs of this computer: huge pages, firmware.

use std::path::PathBuf;

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

const HUGE_MIB: u64 = 2;

/// Where distributions put a UEFI firmware and an empty store of its variables.
const FIRMWARE: [(&str, &str); 3] = [
    (
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
        "/usr/share/OVMF/OVMF_VARS_4M.fd",
    ),
    (
        "/usr/share/OVMF/OVMF_CODE.fd",
        "/usr/share/OVMF/OVMF_VARS.fd",
    ),
    (
        "/usr/share/edk2/ovmf/OVMF_CODE.fd",
        "/usr/share/edk2/ovmf/OVMF_VARS.fd",
    ),
];

/// Huge pages kept for a case; given back when dropped.
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// So many MiB of 2 MiB pages beside those there are; the reason if this kernel does not give them.
    pub fn take(mib: u64) -> Result<HugePages, String> {
        let before = pages().ok_or("this kernel has no huge pages")?;
        let wanted = before + mib.div_ceil(HUGE_MIB);
        let taken = HugePages { before };
        std::fs::write(HUGE_PAGES, wanted.to_string())
            .map_err(|error| format!("no huge pages may be kept here: {error}"))?;
        match pages() {
            Some(now) if now >= wanted => Ok(taken),
            now => Err(format!(
                "{} of {wanted} huge pages can be had here",
                now.unwrap_or(0)
            )),
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // They were to be had; giving them back cannot fail in a way that matters to figures.
        let _ = std::fs::write(HUGE_PAGES, self.before.to_string());
    }
}

fn pages() -> Option<u64> {
    std::fs::read_to_string(HUGE_PAGES)
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// The UEFI firmware's code and variables: `WHIMBREL_OVMF` names a folder with both, otherwise the distribution's.
pub fn firmware() -> Option<(PathBuf, PathBuf)> {
    let own = std::env::var_os("WHIMBREL_OVMF").map(|folder| {
        let folder = PathBuf::from(folder);
        (
            folder.join("OVMF_CODE_4M.fd"),
            folder.join("OVMF_VARS_4M.fd"),
        )
    });
    let known = FIRMWARE.map(|(code, vars)| (code.into(), vars.into()));
    own.into_iter()
        .chain(known)
        .find(|(code, vars)| code.is_file() && vars.is_file())
}
