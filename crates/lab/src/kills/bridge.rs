//! A client that survives the server: QEMU's own, between fio and a machine's export.
//!
//! `fio`'s NBD engine gives up with its connection. QEMU's client does not: for `reconnect-delay` it holds
//! requests that had no answer and sends them again. It is the client a guest's disk has, here without a
//! guest, in a `qemu-storage-daemon` that serves on what it reaches.

use crate::pair::PairError;
use crate::process::Process;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Seconds for which requests are held while nobody serves. Beyond it they fail, and fio says so.
const RECONNECT_DELAY: u32 = 120;

const UP_WITHIN: Duration = Duration::from_secs(60);

/// The running bridge.
#[derive(Debug)]
pub struct Bridge {
    socket: PathBuf,
    process: Process,
}

impl Bridge {
    /// Joins `export` on the socket `to` with a socket of its own in `folder`, under the same name.
    pub fn start(to: &Path, export: &str, folder: &Path) -> Result<Bridge, PairError> {
        let socket = folder.join("bridge.sock");
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!(
                "driver=nbd,node-name=far,export={export},server.type=unix,server.path={},reconnect-delay={RECONNECT_DELAY}",
                to.display()
            ))
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={},max-connections=0", socket.display()))
            .arg("--export")
            .arg(format!("type=nbd,id=near,node-name=far,name={export},writable=on"));
        let mut process = Process::spawn("bridge", command, &folder.join("bridge.log"))?;
        let deadline = Instant::now() + UP_WITHIN;
        while !socket.exists() {
            if !process.is_running()? || Instant::now() >= deadline {
                return Err(PairError::Helper {
                    program: "qemu-storage-daemon",
                    said: process.output(),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Bridge { socket, process })
    }

    /// Where fio finds `export`.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// Whether it has lived until now.
    pub fn is_running(&mut self) -> Result<bool, PairError> {
        Ok(self.process.is_running()?)
    }
}
