//! `cargo xtask test`, step *fuzz*: the fuzz targets of NBD, for a minute in all.
//!
//! They are libFuzzer's, guided by coverage, on the compiler the product is built with: the instrumentation is
//! made of stable codegen options, the ones `cargo fuzz` gives. What needs a nightly compiler is the address
//! sanitizer, which has little to find in code without `unsafe`; overflow checks and debug assertions are on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::Error;
use crate::process;
use crate::workspace::Workspace;

const FOLDER: &str = "crates/nbd/fuzz";

const TARGETS: [&str; 2] = ["negotiation", "request"];

/// Seconds of each; they run side by side.
const SECONDS: u32 = 30;

/// Named, so that build scripts are not instrumented.
const HOST: &str = "x86_64-unknown-linux-gnu";

const INSTRUMENTATION: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    --cfg fuzzing -Cdebug-assertions -Coverflow-checks";

/// The environment variable that gives a seed, to run again what a run did.
const SEED: &str = "WHIMBREL_FUZZ_SEED";

/// What a failed run shows of its log.
const LAST_LINES: usize = 40;

pub fn run(workspace: &Workspace) -> Result<(), Error> {
    let built = workspace.target().join("fuzz");
    build(workspace, &built)?;
    let seed = seed();
    let runs = TARGETS
        .iter()
        .map(|target| start(workspace, &built, target, seed))
        .collect::<Result<Vec<_>, _>>()?;
    let faults: Vec<String> = runs
        .into_iter()
        .map(Run::end)
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .flatten()
        .collect();
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Error::Check {
            what: "a fuzz target found something",
            faults,
        })
    }
}

fn build(workspace: &Workspace, built: &Path) -> Result<(), Error> {
    let mut cargo = workspace.cargo();
    cargo
        .args(["build", "--quiet", "--locked", "--release"])
        .args(["--target", HOST, "--manifest-path"])
        .arg(format!("{FOLDER}/Cargo.toml"))
        .arg("--target-dir")
        .arg(built)
        .env("RUSTFLAGS", INSTRUMENTATION)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        // Built once and run for half a minute: the quick build is the shorter whole.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
    process::run(&mut cargo)
}

/// `SEED` of the environment, else the clock's; never 0, for which libFuzzer takes one of its own.
fn seed() -> u32 {
    let given = std::env::var(SEED).ok().and_then(|text| text.parse().ok());
    let clock = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map_or(1, |time| time.as_millis() as u32)
    };
    given.unwrap_or_else(clock).max(1)
}

struct Run {
    target: &'static str,
    child: Child,
    log: PathBuf,
    /// The start of the names of inputs that failed.
    artifacts: PathBuf,
}

fn start(
    workspace: &Workspace,
    built: &Path,
    target: &'static str,
    seed: u32,
) -> Result<Run, Error> {
    let (corpus, artifacts) = (
        built.join("corpus").join(target),
        built.join("artifacts").join(target),
    );
    for folder in [&corpus, &artifacts] {
        fs::create_dir_all(folder).map_err(|cause| Error::File {
            path: folder.clone(),
            cause,
        })?;
    }
    let log = built.join(format!("{target}.log"));
    let failed = |cause| Error::File {
        path: log.clone(),
        cause,
    };
    let output = File::create(&log).map_err(failed)?;
    let errors = output.try_clone().map_err(failed)?;
    let mut command = Command::new(built.join(HOST).join("release").join(target));
    command
        .current_dir(workspace.root())
        .arg(format!("-max_total_time={SECONDS}"))
        .arg(format!("-seed={seed}"))
        .arg("-timeout=20")
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(&corpus)
        .arg(format!("{FOLDER}/seeds/{target}"))
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors);
    println!("{target}: {SECONDS} s of libFuzzer from the stored seeds, {SEED}={seed}");
    let child = command
        .spawn()
        .map_err(|cause| process::start(&command, cause))?;
    Ok(Run {
        target,
        child,
        log,
        artifacts,
    })
}

impl Run {
    /// What it found, if anything.
    fn end(mut self) -> Result<Option<String>, Error> {
        let log = self.log.clone();
        let failed = |cause| Error::File { path: log, cause };
        let status = self.child.wait().map_err(failed)?;
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        if status.success() {
            let last = text.lines().last().unwrap_or("no word from it");
            println!("{}: {last}", self.target);
            return Ok(None);
        }
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
        Ok(Some(format!(
            "{} ({status}); its input is in {}\n{end}",
            self.target,
            self.artifacts.display()
        )))
    }
}
