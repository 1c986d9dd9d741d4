//! What can go wrong in the laboratory's network, processes and probes.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// This machine cannot carry a lab at all; tests skip with this reason.
    #[error("no lab on this machine: {reason}")]
    Unavailable { reason: &'static str },

    #[error("`{command}` could not be started: {source}")]
    Start { command: String, source: io::Error },

    #[error("`{command}` failed ({status}): {stderr}")]
    Command {
        command: String,
        status: ExitStatus,
        stderr: String,
    },

    #[error("network namespace {name}: {source}")]
    Namespace { name: String, source: io::Error },

    #[error("in {namespace}, {device} does not come up within {after:?}")]
    DeviceDown {
        namespace: String,
        device: &'static str,
        after: Duration,
    },

    #[error("tun device {device}: {step}: {source}")]
    Tun {
        device: String,
        step: &'static str,
        source: io::Error,
    },

    #[error("a thread for {purpose} could not be started: {source}")]
    Thread {
        purpose: &'static str,
        source: io::Error,
    },

    #[error("sysctl {key} = {value}: {source}")]
    Sysctl {
        key: String,
        value: String,
        source: io::Error,
    },

    #[error("link spec: {field} is {value}, {wanted}")]
    LinkSpec {
        field: &'static str,
        value: String,
        wanted: &'static str,
    },

    #[error("the emulator's {direction} thread has ended; the link no longer carries anything")]
    WanEnded { direction: &'static str },

    #[error("interface name {name:?}: 1 to 15 bytes, no slash or space")]
    InterfaceName { name: String },

    #[error("socket {address}: {step}: {source}")]
    Socket {
        address: SocketAddr,
        step: &'static str,
        source: io::Error,
    },

    #[error("{address} did not {awaited} within {after:?}")]
    NoAnswer {
        address: SocketAddr,
        awaited: &'static str,
        after: Duration,
    },

    #[error("{address} closed the connection")]
    Closed { address: SocketAddr },

    #[error("{address} sent a line of more than {bound} bytes")]
    LongLine { address: SocketAddr, bound: usize },

    #[error("log file {path}: {source}")]
    Log { path: PathBuf, source: io::Error },

    #[error("process {name} (pid {pid}): {step}: {source}")]
    Process {
        name: String,
        pid: u32,
        step: &'static str,
        source: io::Error,
    },

    #[error("process {name} (pid {pid}) still runs after {after:?}")]
    StillRunning {
        name: String,
        pid: u32,
        after: Duration,
    },
}
