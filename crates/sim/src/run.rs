//! Running seeds: one, many, and one that fails made as small as it gets.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::coverage::Coverage;
use crate::faults::DriverFault;
use crate::scenario::Scenario;
use crate::world::{Violation, World};

/// How one run went.
pub struct Ran {
    pub violation: Option<Violation>,
    pub coverage: Coverage,
    pub trace: Vec<String>,
}

/// A seed that breaks a promise, and the smallest run found that still does.
pub struct Failure {
    pub seed: u64,
    pub violation: Violation,
    pub scenario: Scenario,
    pub trace: Vec<String>,
}

/// Runs a scenario to its end.
pub fn run(scenario: Scenario, fault: Option<DriverFault>, traced: bool) -> Ran {
    let mut world = World::new(scenario, fault, traced);
    world.leave_older_copies();
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    let violation = match outcome {
        Ok(()) => world.violation.take(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Some(Violation {
                rule: "panics",
                what: text.unwrap_or("with something that is no text").to_string(),
            })
        }
    };
    let mut coverage = world.coverage;
    coverage.runs = 1;
    coverage.events = world.events;
    coverage.virtual_ns = u128::from(world.now);
    Ran {
        violation,
        coverage,
        trace: world.trace.unwrap_or_default(),
    }
}

/// Runs seeds one after the other until one fails.
pub fn run_seeds(
    seeds: impl Iterator<Item = u64>,
    fault: Option<DriverFault>,
    coverage: &mut Coverage,
) -> Option<Failure> {
    for seed in seeds {
        let ran = run(Scenario::new(seed), fault, false);
        coverage.add(&ran.coverage);
        if let Some(violation) = ran.violation {
            return Some(shrink(Scenario::new(seed), violation, fault));
        }
    }
    None
}

/// Leaves out mishaps and deeds of the guest as long as the same promise is broken.
pub fn shrink(scenario: Scenario, violation: Violation, fault: Option<DriverFault>) -> Failure {
    let seed = scenario.seed;
    let mut best = scenario;
    let mut broken = violation;
    let mut tries = 0;
    loop {
        let mut smaller = Vec::new();
        for n in 0..best.mishaps.len() {
            let mut one = best.clone();
            one.mishaps.remove(n);
            smaller.push(one);
        }
        if best.operations > 0 {
            let mut one = best.clone();
            one.operations /= 2;
            smaller.push(one);
        }
        if best.threads > 1 {
            let mut one = best.clone();
            one.threads -= 1;
            smaller.push(one);
        }
        let found = smaller.into_iter().find_map(|one| {
            tries += 1;
            let violation = run(one.clone(), fault, false).violation?;
            (violation.rule == broken.rule).then_some((one, violation))
        });
        match found {
            Some((one, violation)) if tries < 200 => (best, broken) = (one, violation),
            _ => break,
        }
    }
    let trace = run(best.clone(), fault, true).trace;
    Failure {
        seed,
        violation: broken,
        scenario: best,
        trace,
    }
}

/// Lines of a trace that are shown: the last ones.
const SHOWN: usize = 60;

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "seed {} breaks \"{}\": {}",
            self.seed, self.violation.rule, self.violation.what
        )?;
        writeln!(f, "made smaller: {:?}", self.scenario)?;
        let left_out = self.trace.len().saturating_sub(SHOWN);
        let weighty = |line: &&String| line.contains("MISHAP") || line.contains("is in");
        for line in self.trace[..left_out].iter().filter(weighty) {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "  ... {left_out} lines; then")?;
        for line in &self.trace[left_out..] {
            writeln!(f, "  {line}")?;
        }
        write!(f, "again: cargo xtask sim --seed {}", self.seed)
    }
}
