//! What a destination QEMU that is gone had written to its log.
//!
//! Why: a feeder dies while QEMU loads the devices, QEMU ends by itself, and a later daemon finds nothing but the
//! log. Loading that failed is proof that the guest never ran: from the moment in which QEMU has taken RUN it does
//! not give up for want of a feeder, it pauses and says so.
//!
//! Traps: the log is appended to, by earlier QEMUs too; the caller says from where it is this one's. Only QEMU
//! writes there, the guest cannot.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use crate::{Error, Result};

/// Most of a log that is looked at. A QEMU that is told nothing writes a few lines; one that wrote more than
/// this proves nothing.
const MOST: u64 = 256 << 10;
/// QEMU 7.2 to 10: the main stream, or the package with the device state, ended too early or was refused.
const LOADING_FAILED: [&str; 2] = ["load of migration failed", "loadvm failed"];
/// QEMU 7.2 to 10: it had taken RUN.
const HAD_RUN: &str = "Migration paused";

/// Whether the log, from this byte on, proves that loading failed before the guest ran. `false` proves nothing.
pub fn gave_up_loading(log: &Path, from: u64) -> Result<bool> {
    let io = |source| Error::Io {
        what: "read",
        path: log.to_owned(),
        source,
    };
    let mut file = match File::open(log) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io(error)),
    };
    file.seek(SeekFrom::Start(from)).map_err(io)?;
    let mut text = Vec::new();
    file.take(MOST + 1).read_to_end(&mut text).map_err(io)?;
    Ok(text.len() as u64 <= MOST && proves(&String::from_utf8_lossy(&text)))
}

fn proves(text: &str) -> bool {
    let failed = LOADING_FAILED.iter().any(|words| text.contains(words));
    failed && !text.contains(HAD_RUN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_this_qemu_wrote_counts() {
        let dir = tempfile::tempdir().expect("a folder");
        let log = dir.path().join("qemu.log");
        assert!(!gave_up_loading(&log, 0).expect("no log"));
        let former = "qemu: load of migration failed: Input/output error\n";
        std::fs::write(&log, format!("{former}qemu: terminating on signal 15\n")).expect("written");
        assert!(gave_up_loading(&log, 0).expect("read"));
        assert!(!gave_up_loading(&log, former.len() as u64).expect("read"));
        assert!(!gave_up_loading(&log, 1 << 20).expect("read"));
    }

    #[test]
    fn one_that_had_paused_had_run() {
        let text =
            "Detected IO failure for postcopy. Migration paused.\nload of migration failed\n";
        assert!(!proves(text));
        assert!(!proves(""));
    }
}
