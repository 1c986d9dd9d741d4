//! Running the file system tools.

use super::GuestError;
use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};

/// Bytes of a failed tool's stderr that go into the error.
const STDERR: usize = 2000;

/// Runs a tool to its end, whatever its status.
pub fn output(tool: &str, args: &[impl AsRef<OsStr>]) -> Result<Output, GuestError> {
    // e2fsprogs live in sbin, which is not on everybody's path.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    Command::new(tool)
        .args(args)
        .env("PATH", path)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| GuestError::NoTool {
            tool: tool.into(),
            source,
        })
}

/// Runs a tool that must succeed; its stdout.
pub fn run(tool: &str, args: &[impl AsRef<OsStr>]) -> Result<Vec<u8>, GuestError> {
    let output = output(tool, args)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(failed(tool, &output))
}

pub fn failed(tool: &str, output: &Output) -> GuestError {
    let end = output.stderr.len().min(STDERR);
    GuestError::Tool {
        tool: tool.into(),
        status: output.status.code(),
        stderr: String::from_utf8_lossy(&output.stderr[..end]).into_owned(),
    }
}
