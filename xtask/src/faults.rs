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
    tree.args(["tree", "--workspace", "--edges", "normal,dev,build"])
        .args(["--prefix", "none", "--format", "{p} [{f}]"]);
    let faults = faults_in(&output(&mut tree)?);
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Error::Check {
            what: "Deliberate faults would be shipped",
            faults,
        })
    }
}

/// What is wrong with a listing of packages and their features.
fn faults_in(tree: &str) -> Vec<String> {
    let engine: Vec<&str> = tree
        .lines()
        .filter(|line| line.starts_with("whimbrel-engine "))
        .collect();
    if engine.is_empty() {
        // Such a listing would prove nothing.
        return vec!["the engine is not listed".to_string()];
    }
    let features = |line: &str| {
        line.rsplit_once('[')
            .map(|(_, rest)| rest.replace(']', ","))
            .unwrap_or_default()
    };
    engine
        .into_iter()
        .filter(|line| features(line).split(',').any(|feature| feature == "faults"))
        .map(str::to_string)
        .collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_with_faults_is_noticed_and_so_is_a_listing_without_one() {
        let clean = "whimbrel-cli v0.1.0 (/x) []\nwhimbrel-engine v0.1.0 (/x) []\n";
        assert_eq!(faults_in(clean), Vec::<String>::new());
        for faulty in [
            "whimbrel-engine v0.1.0 (/x) [faults] (*)\n",
            "whimbrel-engine v0.1.0 (/x) [default,faults]\n",
            "whimbrel-cli v0.1.0 (/x) []\n",
        ] {
            assert_eq!(faults_in(faulty).len(), 1, "{faulty}");
        }
    }
}
