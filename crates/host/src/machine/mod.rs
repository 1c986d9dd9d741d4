//! Machines at work: a QEMU, its disks on a socket of their own, its network cards on bridges.

mod launch;
mod sockets;
mod tap;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use whimbrel_nbd::{Limits, Server};
use whimbrel_qemu::launch::Launched;
use whimbrel_qemu::qmp::Qmp;

use crate::disk::{Disk, MachineDisks};
use crate::state::{MachineSpec, QemuProcess};

pub use launch::{Adoption, Boot, adopt, drive_name, probe, qemu_log, reattach, start};
pub use sockets::{disk_socket, qmp_socket, ram_in_socket, ram_out_socket};
pub use tap::{Tap, TapError};

/// Longest path of a unix socket, its closing zero not counted.
const MAX_SOCKET: usize = 107;

/// What can go wrong with a machine's process.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("QEMU: {0}")]
    Qemu(#[from] whimbrel_qemu::Error),
    #[error("the network `{network}` of machine `{machine}` is no network of this host")]
    NoNetwork { machine: String, network: String },
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("cannot serve disks on {}: {source}", path.display())]
    Socket {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "the socket path {} is longer than the {MAX_SOCKET} bytes the kernel allows: use a state directory with a shorter path",
        path.display()
    )]
    SocketPath { path: PathBuf },
    #[error("cannot prepare {}: {source}", path.display())]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the running QEMU has {what} {found}, the description says {expected}")]
    Mismatch {
        what: &'static str,
        found: String,
        expected: String,
    },
    #[error(
        "volume `{volume}` is not a disk of the running QEMU by way of {}; attach it there (NBD, export `{volume}`) and adopt again",
        socket.display()
    )]
    DiskElsewhere { volume: String, socket: PathBuf },
    #[error("process {pid} is gone")]
    Gone { pid: u32 },
}

/// The NBD socket of one machine's disks. Dropping it stops serving; requests under way are finished.
pub struct DiskServer {
    socket: PathBuf,
    stop: CancellationToken,
}

impl DiskServer {
    /// Serves the disks on the socket, replacing what a daemon that died left there.
    pub fn start(socket: &Path, disks: &[Arc<Disk>]) -> Result<Self, MachineError> {
        check_socket(socket)?;
        let error = |source| MachineError::Socket {
            path: socket.to_path_buf(),
            source,
        };
        match std::fs::remove_file(socket) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(error(e)),
            _ => {}
        }
        let listener = UnixListener::bind(socket).map_err(error)?;
        let directory = Arc::new(MachineDisks::new(disks.iter().cloned()));
        let stop = CancellationToken::new();
        let (server, until) = (Server::new(directory, Limits::default()), stop.clone());
        tokio::spawn(async move { server.serve_unix(listener, until).await });
        Ok(DiskServer {
            socket: socket.to_path_buf(),
            stop,
        })
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        self.stop.cancel();
        // What is left behind is replaced by the next server.
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn check_socket(path: &Path) -> Result<(), MachineError> {
    if path.as_os_str().len() > MAX_SOCKET {
        return Err(MachineError::SocketPath {
            path: path.to_path_buf(),
        });
    }
    Ok(())
}

/// A machine's QEMU with everything this daemon does for it.
pub struct Running {
    pub spec: MachineSpec,
    pub process: QemuProcess,
    pub qmp: Qmp,
    /// For out-of-band commands of a later daemon; held so that its events are read.
    _lifeline: Option<Qmp>,
    /// In the order of the description, which is the order of a migration's disk spaces.
    pub disks: Vec<Arc<Disk>>,
    server: DiskServer,
    taps: Vec<Tap>,
    launched: Option<Launched>,
}

impl Running {
    pub fn disk_socket(&self) -> &Path {
        self.server.socket()
    }

    /// The host interface of a card, by its position.
    pub fn interface(&self, nic: usize) -> Option<&str> {
        self.taps.get(nic).map(Tap::name)
    }

    /// Resolves when the process has ended, however.
    pub async fn ended(&self) {
        match &self.launched {
            Some(launched) => {
                launched.exited().await;
            }
            None => {
                self.qmp.closed().await;
                while self.process.is_alive() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// Resolves when the process has ended; true if it was asked to, from within or without.
    pub fn end_watch(&self) -> impl Future<Output = bool> + Send + use<> {
        let (mut events, process) = (self.qmp.events(), self.process.clone());
        async move {
            let mut asked = false;
            while let Ok(event) = events.next().await {
                asked |= event.name == "SHUTDOWN";
            }
            while process.is_alive() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            asked
        }
    }

    pub fn has_ended(&self) -> bool {
        !self.process.is_alive()
    }

    /// The daemon goes away and leaves the guest running: its interfaces stay.
    pub fn leave(&mut self) {
        for tap in &mut self.taps {
            tap.keep();
        }
    }

    /// Ends the process now, waits until it is gone, and takes its interfaces away.
    pub async fn kill(self) {
        let Ok(pid) = i32::try_from(self.process.pid) else {
            return;
        };
        if self.process.is_alive()
            && let Some(pid) = rustix::process::Pid::from_raw(pid)
            && let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::KILL)
        {
            tracing::warn!(pid = self.process.pid, %error, "cannot end QEMU");
        }
        self.ended().await;
    }

    /// Asks the guest to shut down and waits at most `patience`; whether it did.
    pub async fn shut_down(&self, patience: Duration) -> Result<bool, MachineError> {
        self.qmp
            .execute("system_powerdown", serde_json::json!({}))
            .await?;
        Ok(tokio::time::timeout(patience, self.ended()).await.is_ok())
    }
}
