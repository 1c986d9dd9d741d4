//! Cargo's helpers: cargo-nextest runs the tests where it is installed, cargo-deny checks licences and sources.

use std::fs;
use std::path::PathBuf;

use crate::error::Error;
use crate::process;
use crate::workspace::Workspace;

/// The version that is built where none is installed.
const CARGO_DENY: &str = "0.20.2";

pub fn has_nextest() -> bool {
    process::find_program("cargo-nextest").is_some()
}

/// An installed cargo-deny, else the one built below the target folder.
pub fn find_cargo_deny(workspace: &Workspace) -> Option<PathBuf> {
    process::find_program("cargo-deny")
        .or_else(|| Some(built_cargo_deny(workspace)).filter(|file| file.exists()))
}

/// Builds cargo-deny below the target folder; the home folder of whoever runs this is left alone.
pub fn build_cargo_deny(workspace: &Workspace) -> Result<(), Error> {
    let root = workspace.target().join("tools");
    println!(
        "This machine lacks cargo-deny, which checks the licences of all dependencies.\n\
         Building cargo-deny {CARGO_DENY} into {}: once, about 2 minutes on 2 cores",
        root.display()
    );
    // Kept apart and then removed: some 300 MB that nothing else uses.
    let scratch = root.join("build");
    let built = process::run(
        workspace
            .cargo()
            .args([
                "install",
                "--quiet",
                "--locked",
                // It runs for seconds, and without optimisation it is built in half the time.
                "--debug",
                "--version",
                CARGO_DENY,
                "cargo-deny",
                "--root",
            ])
            .arg(&root)
            .arg("--target-dir")
            .arg(&scratch)
            .env("CARGO_PROFILE_DEV_DEBUG", "0"),
    );
    if scratch.exists() {
        fs::remove_dir_all(&scratch).map_err(|cause| Error::File {
            path: scratch,
            cause,
        })?;
    }
    built.map_err(|cause| Error::CargoDeny {
        cause: Box::new(cause),
    })
}

fn built_cargo_deny(workspace: &Workspace) -> PathBuf {
    workspace.target().join("tools/bin/cargo-deny")
}
