//! The programs that end-to-end tests, demo and benchmarks start, and the environment that tells where they are.
//!
//! The guests' workload runs where no library is, so it is linked statically. That takes compiler flags, and flags
//! are part of what cargo decides by whether to build anew: so it is built in a folder of its own, where the laboratory
//! looks for it too. It is a release build even for tests, because guests without KVM are slow as it is.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use crate::error::Error;
use crate::kernel;
use crate::process;
use crate::setup;
use crate::workspace::Workspace;

const WHIMBREL: &str = "whimbrel";
const LAB: &str = "whimbrel-lab";
const WORKLOAD: &str = "whimbrel-workload";

/// What runs inside the guests is built for; named, so that the flags are not used for build scripts as well.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Profile {
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

/// Builds `whimbrel` and the guests' workload as tests use them.
pub fn for_tests(workspace: &Workspace) -> Result<Artifacts, Error> {
    artifacts(workspace, Profile::Dev, &[WHIMBREL])
}

/// `cargo xtask demo ...` and `cargo xtask bench ...`: becomes the laboratory's program with the same arguments.
pub fn exec_lab(workspace: &Workspace, args: &[String]) -> Result<(), Error> {
    setup::for_running(workspace)?;
    println!("Building the release programs (minutes the first time, then nothing)");
    let artifacts = artifacts(workspace, Profile::Release, &[WHIMBREL, LAB])?;
    let mut lab = Command::new(program(workspace, Profile::Release, LAB));
    lab.args(args);
    artifacts.export(&mut lab);
    let cause = lab.exec();
    Err(process::start(&lab, cause))
}

fn artifacts(
    workspace: &Workspace,
    profile: Profile,
    programs: &[&str],
) -> Result<Artifacts, Error> {
    let mut cargo = workspace.cargo();
    // Of the whole workspace, although few programs are wanted: asked for one package alone, cargo would choose other
    // features for what they share, and the tests would build it all a second time.
    cargo
        .args(["build", "--quiet", "--workspace"])
        .args(profile.args());
    if profile == Profile::Dev {
        // For the same reason: what tests depend on has its say in the choice of features.
        cargo.arg("--tests");
    }
    cargo.args(programs.iter().flat_map(|name| ["--bin", name]));
    process::run(&mut cargo)?;
    let mut variables = vec![
        ("WHIMBREL_BIN", program(workspace, profile, WHIMBREL)),
        ("WHIMBREL_WORKLOAD", build_workload(workspace)?),
    ];
    if let Some(kernel) = kernel::find(workspace) {
        variables.push(("WHIMBREL_KERNEL", kernel));
    }
    Ok(Artifacts { variables })
}

fn program(workspace: &Workspace, profile: Profile, name: &str) -> PathBuf {
    workspace.target().join(profile.folder()).join(name)
}

fn build_workload(workspace: &Workspace) -> Result<PathBuf, Error> {
    let target = workspace.target().join("guest");
    let mut cargo = workspace.cargo();
    cargo.args([
        "build",
        "--quiet",
        "--release",
        "--package",
        WORKLOAD,
        "--target",
        GUEST_TARGET,
        "--target-dir",
    ]);
    cargo
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    cargo.env_remove("CARGO_ENCODED_RUSTFLAGS");
    process::run(&mut cargo)?;
    Ok(target.join(GUEST_TARGET).join("release").join(WORKLOAD))
}
