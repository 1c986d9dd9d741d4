//! The steps of `cargo xtask test`, in their order: what is done at once first, the tests last, so that the test
//! runner's summary ends the output.

use crate::artifacts::Artifacts;
use crate::error::Error;
use crate::process;
use crate::tools;
use crate::workspace::Workspace;
use crate::{arrows, dependencies, faults, fuzz, layout};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Fmt,
    Layout,
    Arrows,
    Dependencies,
    Deny,
    Clippy,
    Docs,
    Doctests,
    Fuzz,
    Faults,
    Tests,
}

impl Step {
    pub const ALL: [Step; 11] = [
        Step::Fmt,
        Step::Layout,
        Step::Arrows,
        Step::Dependencies,
        Step::Deny,
        Step::Clippy,
        Step::Docs,
        Step::Doctests,
        Step::Fuzz,
        Step::Faults,
        Step::Tests,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Step::Fmt => "fmt",
            Step::Layout => "layout",
            Step::Arrows => "arrows",
            Step::Dependencies => "dependencies",
            Step::Deny => "deny",
            Step::Clippy => "clippy",
            Step::Docs => "docs",
            Step::Doctests => "doctests",
            Step::Fuzz => "fuzz",
            Step::Faults => "faults",
            Step::Tests => "tests",
        }
    }

    pub fn what(self) -> &'static str {
        match self {
            Step::Fmt => "the sources are formatted (cargo fmt)",
            Step::Layout => "no source file is too long, no name is empty of meaning",
            Step::Arrows => "crates depend on each other in one direction only",
            Step::Dependencies => "every dependency is named once and explained once",
            Step::Deny => {
                "licences, bans and sources of all dependencies (cargo deny; advisories need a download: not here)"
            }
            Step::Clippy => "lints, all targets, warnings are errors",
            Step::Docs => "the documentation of all crates builds without a warning",
            Step::Doctests => "the examples in the documentation run",
            Step::Fuzz => {
                "the fuzz targets of NBD: a minute from the stored seeds, guided by coverage"
            }
            Step::Faults => {
                "the simulator finds each deliberate fault of the engine, and what is shipped has none"
            }
            Step::Tests => "unit, property and end-to-end tests",
        }
    }

    /// Left out by `--quick`.
    pub fn is_slow(self) -> bool {
        matches!(
            self,
            Step::Deny | Step::Docs | Step::Doctests | Step::Fuzz | Step::Faults
        )
    }
}

/// Which tests [`Step::Tests`] runs.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Selection {
    /// Leave out those that boot QEMU.
    pub quick: bool,
    /// Only those whose name contains it.
    pub filter: Option<String>,
}

/// The test programs that boot QEMU, as `.config/nextest.toml` has them in its test group.
const BOOTS_QEMU: &[&str] = &["handover", "recovery", "guest_", "e2e_", "wan_"];

/// Schedules of the journal's crash test (`crates/volume/src/journal/crash.rs`), which runs few of them by itself.
const CRASH_SCHEDULES: &str = "WHIMBREL_CRASH_SCHEDULES";
/// A core's work of about 40 s, beside the guests.
const ALL_CRASH_SCHEDULES: &str = "10000";

/// Schedules of the simulator (`crates/sim/tests/simulated/schedules.rs`), which runs few of them by itself.
const SIM_SCHEDULES: &str = "WHIMBREL_SIM_SCHEDULES";
/// Both cores' work of about half a minute.
const ALL_SIM_SCHEDULES: &str = "25000";

/// Every step but the tests.
pub fn run_check(step: Step, workspace: &Workspace) -> Result<(), Error> {
    let mut cargo = workspace.cargo();
    match step {
        Step::Layout => return layout::check(workspace),
        Step::Arrows => return arrows::check(workspace),
        Step::Dependencies => return dependencies::check(workspace),
        Step::Fuzz => return fuzz::run(workspace),
        Step::Faults => return faults::check(workspace),
        Step::Fmt => cargo.args(["fmt", "--all", "--check"]),
        Step::Deny => {
            let Some(program) = tools::find_cargo_deny(workspace) else {
                return Err(Error::Check {
                    what: "cargo-deny is not installed",
                    faults: vec!["`cargo xtask setup` builds it".into()],
                });
            };
            let mut deny = std::process::Command::new(program);
            deny.current_dir(workspace.root());
            deny.args([
                "--log-level",
                "warn",
                "check",
                "--hide-inclusion-graph",
                "licenses",
                "bans",
                "sources",
            ]);
            return process::run(&mut deny);
        }
        Step::Clippy => cargo
            .args([
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ])
            .args([
                // Nothing half-done is handed in.
                "-D",
                "clippy::todo",
                "-D",
                "clippy::unimplemented",
                "-D",
                "clippy::dbg_macro",
            ]),
        Step::Docs => cargo
            .args([
                "doc",
                "--quiet",
                "--workspace",
                "--no-deps",
                "--document-private-items",
            ])
            .env("RUSTDOCFLAGS", "-D warnings"),
        Step::Doctests => cargo.args(["test", "--quiet", "--workspace", "--doc"]),
        Step::Tests => {
            unreachable!("the caller keeps the tests for run_tests, which takes more arguments")
        }
    };
    process::run(&mut cargo)
}

/// The tests, by cargo-nextest where it is installed, else by cargo itself.
pub fn run_tests(
    workspace: &Workspace,
    artifacts: &Artifacts,
    selection: &Selection,
) -> Result<(), Error> {
    let mut cargo = workspace.cargo();
    if tools::has_nextest() {
        cargo
            .args(["nextest", "run", "--workspace"])
            .args(nextest_selection(selection));
    } else {
        // Cargo runs one test program after the other, so guests do not meet; within one they must not either.
        // It cannot leave test programs out by name: the quick run does without all that stand apart from their crate.
        cargo.args(["test", "--workspace", "--no-fail-fast", "--lib", "--bins"]);
        if !selection.quick {
            cargo.arg("--tests");
        }
        cargo
            .args(selection.filter.as_deref())
            .args(["--", "--test-threads=1"]);
    }
    artifacts.export(&mut cargo);
    if !selection.quick {
        cargo.env(CRASH_SCHEDULES, ALL_CRASH_SCHEDULES);
        cargo.env(SIM_SCHEDULES, ALL_SIM_SCHEDULES);
    }
    match process::run(&mut cargo) {
        Err(Error::Child { .. }) => Err(Error::TestsFailed),
        other => other,
    }
}

fn nextest_selection(selection: &Selection) -> Vec<String> {
    let mut args = Vec::new();
    if selection.quick {
        args.push("-E".to_string());
        args.push(format!("not binary(/^({})/)", BOOTS_QEMU.join("|")));
    }
    args.extend(selection.filter.clone());
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quick_leaves_out_exactly_the_test_group_of_the_runners_configuration() {
        let args = nextest_selection(&Selection {
            quick: true,
            filter: None,
        });
        let pattern = args[1].strip_prefix("not ").unwrap();
        let configuration = include_str!("../../.config/nextest.toml");
        assert!(
            configuration.contains(&format!("filter = '{pattern}'")),
            "{pattern} is not in .config/nextest.toml"
        );
    }

    #[test]
    fn names_of_steps_differ() {
        for (index, step) in Step::ALL.iter().enumerate() {
            assert!(
                Step::ALL[..index]
                    .iter()
                    .all(|other| other.name() != step.name())
            );
        }
    }
}
