//! Why a guest could not be built, asked or verified.

use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error("cannot {action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("`{tool}` could not be started: {source}")]
    NoTool { tool: String, source: io::Error },
    #[error("`{tool}` failed with status {status:?}: {stderr}")]
    Tool {
        tool: String,
        /// `None` if a signal ended it.
        status: Option<i32>,
        /// The first 2000 bytes.
        stderr: String,
    },
    #[error(
        "no kernel /boot/vmlinuz-*-cloud-amd64 with its modules; install linux-image-cloud-amd64"
    )]
    NoKernel,
    #[error("kernel {release} has no module {module}")]
    NoModule { release: String, module: String },
    #[error("no static busybox at {path}; install busybox-static")]
    NoBusybox { path: PathBuf },
    #[error("{found_mib} MiB of files under the given trees, {wanted_mib} MiB wanted")]
    TooFewFiles { found_mib: u64, wanted_mib: u64 },
    #[error("{path} is not what was written there: {source}")]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("the guest's control connection: {source}")]
    Control { source: io::Error },
    #[error("the guest closed its control connection")]
    ControlClosed,
    #[error("the guest refused `{line}`: {reason}")]
    Refused { line: String, reason: String },
    #[error("the guest answered `{line}` with `{answer}`")]
    Answer { line: String, answer: String },
}

impl GuestError {
    /// For `map_err` on file operations.
    pub(super) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> GuestError {
        let path = path.into();
        move |source| GuestError::Io {
            action,
            path,
            source,
        }
    }
}
