//! `cargo xtask sim`, and the step that puts deliberate faults into the engine: the simulator must find each, and
//! nothing that is shipped may have a point at which one could be.

use std::process::Command;

use crate::error::Error;
use crate::process;
use crate::workspace::Workspace;

const SIMULATOR: &str = "whimbrel-sim";

/// Runs the simulator's own program.
pub fn simulate(workspace: &Workspace, args: &[String]) -> Result<(), Error> {
    let mut cargo = workspace.cargo();
    cargo
        .args(["run", "--quiet", "-p", SIMULATOR, "--"])
        .args(args);
    process::run(&mut cargo)
}

pub fn check(workspace: &Workspace) -> Result<(), Error> {
    none_is_shipped(workspace)?;
    let mut cargo = workspace.cargo();
    cargo
        .args(["test", "--quiet", "-p", SIMULATOR, "--features", "faults"])
        .args(["--test", "simulated", "deliberate_faults", "--"])
        .arg("--nocapture");
    process::run(&mut cargo)
}

/// With the features that a build of the whole workspace has, the engine has no faults.
fn none_is_shipped(workspace: &Workspace) -> Result<(), Error> {
    let mut tree = workspace.cargo();
    tree.args([
        "tree",
        "--workspace",
        "--edges",
        "features,normal,dev,build",
    ])
    .args(["--prefix", "none"]);
    let features = output(&mut tree)?;
    let faults: Vec<String> = features
        .lines()
        .filter(|line| line.contains("feature \"faults\""))
        .map(|line| format!("{line} is switched on"))
        .collect();
    // A tree that does not name the engine at all would prove nothing.
    if !features.contains("whimbrel-engine") {
        return Err(Error::Check {
            what: "cargo tree does not name the engine",
            faults: vec![features.lines().take(3).collect()],
        });
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Error::Check {
            what: "Deliberate faults would be shipped",
            faults,
        })
    }
}

fn output(command: &mut Command) -> Result<String, Error> {
    let output = command
        .output()
        .map_err(|cause| process::start(command, cause))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(Error::Child {
            command: process::line(command),
            status: output.status.to_string(),
        })
    }
}
