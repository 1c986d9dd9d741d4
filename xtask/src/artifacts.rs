//! The programs that end-to-end tests, demo and benchmarks start, and the environment that tells where they are.
//!
//! The guests' workload is process 1 of a guest without any library, so it is linked statically. Only its last step
//! differs from an ordinary build (`cargo rustc ... -- -C target-feature=+crt-static`), so that everything below it
//! is built once; and as an ordinary build of the workspace writes a dynamic program to the same place, the static
//! one is copied out of its way.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use crate::error::Error;
use crate::kernel;
use crate::process;
use crate::setup;
use crate::workspace::Workspace;

const WHIMBREL: (&str, &str) = ("whimbrel-cli", "whimbrel");
const LAB: (&str, &str) = ("whimbrel-lab", "whimbrel-lab");
const WORKLOAD: (&str, &str) = ("whimbrel-workload", "whimbrel-workload");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    Dev,
    Release,
}

impl Profile {
    fn folder(self) -> &'static str {
        match self {
            Profile::Dev => "debug",
            Profile::Release => "release",
        }
    }

    fn args(self) -> &'static [&'static str] {
        match self {
            Profile::Dev => &[],
            Profile::Release => &["--release"],
        }
    }
}

/// What tests, demo and benchmarks find in their environment.
pub struct Artifacts {
    variables: Vec<(&'static str, PathBuf)>,
}

impl Artifacts {
    pub fn export(&self, command: &mut Command) {
        command.envs(self.variables.iter().map(|(name, path)| (name, path)));
    }
}

/// Builds `whimbrel` and the guests' workload.
pub fn build(workspace: &Workspace, profile: Profile) -> Result<Artifacts, Error> {
    // The workload first: the ordinary build after it leaves cargo's own folder as any other command expects it.
    let workload = build_workload(workspace, profile)?;
    let mut variables = vec![
        ("WHIMBREL_BIN", build_program(workspace, profile, WHIMBREL)?),
        ("WHIMBREL_WORKLOAD", workload),
    ];
    if let Some(kernel) = kernel::find(workspace) {
        variables.push(("WHIMBREL_KERNEL", kernel.image));
        variables.push(("WHIMBREL_MODULES", kernel.modules));
    }
    Ok(Artifacts { variables })
}

/// `cargo xtask demo ...` and `cargo xtask bench ...`: becomes the laboratory's program with the same arguments.
pub fn exec_lab(workspace: &Workspace, args: &[String]) -> Result<(), Error> {
    setup::for_running(workspace)?;
    println!("Building the release programs (minutes the first time, then nothing)");
    let artifacts = build(workspace, Profile::Release)?;
    let mut lab = Command::new(build_program(workspace, Profile::Release, LAB)?);
    lab.args(args);
    artifacts.export(&mut lab);
    let cause = lab.exec();
    Err(process::start(&lab, cause))
}

fn build_program(
    workspace: &Workspace,
    profile: Profile,
    (package, name): (&str, &str),
) -> Result<PathBuf, Error> {
    let mut cargo = workspace.cargo();
    cargo
        .args(["build", "--quiet", "--package", package, "--bin", name])
        .args(profile.args());
    process::run(&mut cargo)?;
    Ok(workspace.target().join(profile.folder()).join(name))
}

fn build_workload(workspace: &Workspace, profile: Profile) -> Result<PathBuf, Error> {
    let (package, name) = WORKLOAD;
    let mut cargo = workspace.cargo();
    cargo
        .args(["rustc", "--quiet", "--package", package, "--bin", name])
        .args(profile.args());
    cargo.args(["--", "-C", "target-feature=+crt-static"]);
    process::run(&mut cargo)?;
    let built = workspace.target().join(profile.folder()).join(name);
    let folder = workspace.target().join("lab").join(profile.folder());
    let kept = folder.join(name);
    // A running guest's builder may have the old one open: a new file takes its place in one step.
    let fresh = folder.join(format!("{name}.new"));
    fs::create_dir_all(&folder)
        .and_then(|()| fs::copy(&built, &fresh))
        .and_then(|_| fs::rename(&fresh, &kept))
        .map_err(|cause| Error::File {
            path: kept.clone(),
            cause,
        })?;
    Ok(kept)
}
