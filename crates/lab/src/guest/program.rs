//! The workload program as a static binary.

use super::{GuestError, tool, workspace};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The program's path: `WHIMBREL_WORKLOAD` where that is set, otherwise built by cargo into the folder
/// `guest` of the target folder, when it is missing or older than its sources. (A folder of its own: the
/// flags of a static build would otherwise make cargo build everything else again.)
pub fn workload_program() -> Result<PathBuf, GuestError> {
    if let Some(path) = std::env::var_os("WHIMBREL_WORKLOAD") {
        return Ok(path.into());
    }
    let root = workspace();
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root.join(dir),
        None => root.join("target"),
    }
    .join("guest");
    let program = target.join(TARGET).join("release/whimbrel-workload");
    let sources = newest(&root.join("crates/workload"))?;
    let built = std::fs::metadata(&program).and_then(|m| m.modified()).ok();
    if built.is_some_and(|built| built >= sources) {
        return Ok(program);
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(root)
        .args(["build", "--quiet", "--release", "-p", "whimbrel-workload"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .output()
        .map_err(|source| GuestError::NoTool {
            tool: "cargo".into(),
            source,
        })?;
    if !output.status.success() {
        return Err(tool::failed("cargo build -p whimbrel-workload", &output));
    }
    // Cargo leaves the file alone if nothing in it changes; its age is what the next call looks at.
    let touched = std::fs::File::options()
        .append(true)
        .open(&program)
        .and_then(|file| file.set_modified(SystemTime::now()));
    touched.map_err(GuestError::io("touch", &program))?;
    Ok(program)
}

/// When the newest file below `path` was changed.
fn newest(path: &Path) -> Result<SystemTime, GuestError> {
    let modified = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified());
    let mut newest = modified(path).map_err(GuestError::io("look at", path))?;
    for entry in std::fs::read_dir(path).map_err(GuestError::io("read", path))? {
        let entry = entry.map_err(GuestError::io("read", path))?.path();
        let time = if entry.is_dir() {
            self::newest(&entry)?
        } else {
            modified(&entry).map_err(GuestError::io("look at", &entry))?
        };
        newest = newest.max(time);
    }
    Ok(newest)
}
