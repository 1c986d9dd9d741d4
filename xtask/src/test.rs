//! `cargo xtask test`: what was asked for, step by step, each with its time.

use std::time::{Duration, Instant};

use crate::artifacts;
use crate::error::Error;
use crate::needs;
use crate::steps::{self, Selection, Step};
use crate::workspace::Workspace;

#[derive(Debug, PartialEq, Eq)]
struct Plan {
    steps: Vec<Step>,
    selection: Selection,
    keep_going: bool,
    /// Only name the steps.
    list: bool,
}

pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), Error> {
    let plan = parse(args)?;
    if plan.list {
        for step in &plan.steps {
            println!("{:<13} {}", step.name(), step.what());
        }
        return Ok(());
    }
    let start = Instant::now();
    let mut failed: Vec<&'static str> = Vec::new();
    for step in plan
        .steps
        .iter()
        .copied()
        .filter(|step| *step != Step::Tests)
    {
        println!("== {}: {}", step.name(), step.what());
        if let Err(error) = timed(step.name(), || steps::run_check(step, workspace)) {
            println!("{error}");
            failed.push(step.name());
            if !plan.keep_going {
                return Err(Error::Steps(failed));
            }
        }
    }
    if plan.steps.contains(&Step::Tests) {
        for need in needs::missing() {
            println!(
                "warning: {} is not installed ({}); `cargo xtask setup` does it",
                need.package, need.why
            );
        }
        println!("== build: the programs that end-to-end tests start");
        let artifacts = timed("build", || artifacts::for_tests(workspace))?;
        println!(
            "== tests: {} ({} so far)",
            Step::Tests.what(),
            seconds(start.elapsed())
        );
        steps::run_tests(workspace, &artifacts, &plan.selection)?;
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(Error::Steps(failed))
    }
}

fn timed<T>(name: &str, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let start = Instant::now();
    let result = work();
    let verdict = if result.is_ok() { "ok" } else { "FAILED" };
    println!("== {name}: {verdict} ({})", seconds(start.elapsed()));
    result
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

fn parse(args: &[String]) -> Result<Plan, Error> {
    let mut plan = Plan {
        steps: Vec::new(),
        selection: Selection::default(),
        keep_going: false,
        list: false,
    };
    let mut only: Option<Vec<Step>> = None;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => plan.selection.quick = true,
            "--keep-going" => plan.keep_going = true,
            "--list" => plan.list = true,
            "--only" => {
                let names = args
                    .next()
                    .ok_or_else(|| Error::Usage("--only needs the names of steps".into()))?;
                only = Some(steps_named(names)?);
            }
            _ => match arg.strip_prefix("--only=") {
                Some(names) => only = Some(steps_named(names)?),
                None if arg.starts_with('-') => {
                    return Err(Error::Usage(format!("test knows no option {arg}")));
                }
                None if plan.selection.filter.is_some() => {
                    return Err(Error::Usage("one FILTER at most".into()));
                }
                None => plan.selection.filter = Some(arg.clone()),
            },
        }
    }
    plan.steps = match only {
        Some(steps) => steps,
        // Whoever asks for some tests by name is at work on them, and wants no other answer first.
        None if plan.selection.filter.is_some() => vec![Step::Tests],
        None => Step::ALL
            .into_iter()
            .filter(|step| !(plan.selection.quick && step.is_slow()))
            .collect(),
    };
    Ok(plan)
}

/// The named steps, in the order in which steps run.
fn steps_named(names: &str) -> Result<Vec<Step>, Error> {
    let names: Vec<&str> = names.split(',').map(str::trim).collect();
    if let Some(unknown) = names
        .iter()
        .find(|name| Step::ALL.iter().all(|step| step.name() != **name))
    {
        let known = Step::ALL.map(Step::name).join(", ");
        return Err(Error::Usage(format!(
            "no step is called {unknown:?}; there are {known}"
        )));
    }
    Ok(Step::ALL
        .into_iter()
        .filter(|step| names.contains(&step.name()))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(line: &str) -> Result<Plan, Error> {
        parse(
            &line
                .split_whitespace()
                .map(String::from)
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn nothing_asked_for_is_everything_with_the_tests_last() {
        let plan = plan("").unwrap();
        assert_eq!(plan.steps, Step::ALL);
        assert_eq!(plan.steps.last(), Some(&Step::Tests));
    }

    #[test]
    fn a_filter_alone_runs_tests_alone() {
        let plan = plan("zero --quick").unwrap();
        assert_eq!(plan.steps, [Step::Tests]);
        assert_eq!(
            plan.selection,
            Selection {
                quick: true,
                filter: Some("zero".into())
            }
        );
    }

    #[test]
    fn chosen_steps_run_in_their_own_order() {
        assert_eq!(
            plan("--only tests,fmt").unwrap().steps,
            [Step::Fmt, Step::Tests]
        );
        assert_eq!(plan("--only=layout").unwrap().steps, [Step::Layout]);
    }

    #[test]
    fn quick_keeps_the_lints_and_drops_what_is_slow() {
        let steps = plan("--quick").unwrap().steps;
        assert!(steps.contains(&Step::Clippy) && steps.contains(&Step::Tests));
        assert!(!steps.contains(&Step::Deny) && !steps.contains(&Step::Docs));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for line in ["--only", "--only speed", "--fast", "one two"] {
            assert!(matches!(plan(line), Err(Error::Usage(_))), "{line}");
        }
    }
}
