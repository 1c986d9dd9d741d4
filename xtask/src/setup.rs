//! `cargo xtask setup`: makes a machine fit for building, testing and showing Whimbrel.
//!
//! Everything is looked up before anything is installed, so that a machine that lacks nothing is done at once.

use std::time::Instant;

use crate::apt;
use crate::error::Error;
use crate::kernel;
use crate::needs;
use crate::tools;
use crate::workspace::Workspace;

/// What running Whimbrel and its laboratory takes.
pub fn for_running(workspace: &Workspace) -> Result<(), Error> {
    let missing = needs::missing();
    if !missing.is_empty() {
        apt::install(&missing)?;
    }
    if kernel::find(workspace).is_none() {
        kernel::fetch(workspace)?;
    }
    Ok(())
}

/// What the checks take as well.
pub fn everything(workspace: &Workspace) -> Result<(), Error> {
    let start = Instant::now();
    for_running(workspace)?;
    if !tools::has_nextest() {
        println!(
            "cargo-nextest is not installed: `cargo test` will run the tests (slower, one test program at a time)"
        );
    }
    if tools::find_cargo_deny(workspace).is_none() {
        tools::build_cargo_deny(workspace)?;
    }
    println!(
        "setup: nothing is missing ({:.1} s)",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}
