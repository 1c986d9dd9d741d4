//! Each deliberate fault is found by the simulator, within a bounded number of seeds.

use whimbrel_engine::faults::{Fault, choose};
use whimbrel_sim::coverage::Coverage;
use whimbrel_sim::faults::DriverFault;
use whimbrel_sim::run::run;
use whimbrel_sim::scenario::Scenario;

/// Far more than any fault needs.
const MOST_SEEDS: u64 = 40_000;

/// The first seed that breaks a promise, and the promise.
fn found(fault: Option<DriverFault>) -> Option<(u64, String)> {
    (0..MOST_SEEDS).find_map(|seed| {
        let violation = run(Scenario::new(seed), fault, false).violation?;
        Some((seed, format!("{}: {}", violation.rule, violation.what)))
    })
}

fn report(name: &str, found: &Option<(u64, String)>) {
    match found {
        Some((seed, what)) => {
            let what: String = what.chars().take(110).collect();
            println!("{name:<28}{:>7} seeds  {what}", seed + 1);
        }
        None => println!("{name:<28}not found in {MOST_SEEDS} seeds"),
    }
}

/// A fault that is found by panicking prints nothing of it.
fn quietly<T>(f: impl FnOnce() -> T) -> T {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = f();
    std::panic::set_hook(hook);
    result
}

#[test]
fn each_fault_is_found() {
    let missed = quietly(|| {
        let mut missed = Vec::new();
        for fault in Fault::ALL {
            choose(Some(fault));
            let found = found(None);
            choose(None);
            report(&format!("{fault:?}"), &found);
            if found.is_none() {
                missed.push(format!("{fault:?}"));
            }
        }
        for fault in DriverFault::ALL {
            let found = found(Some(fault));
            report(&format!("{fault:?}"), &found);
            if found.is_none() {
                missed.push(format!("{fault:?}"));
            }
        }
        missed
    });
    assert!(missed.is_empty(), "not found: {missed:?}");
}

#[test]
fn with_no_fault_chosen_nothing_is_found() {
    let mut coverage = Coverage::default();
    for seed in 0..500 {
        let ran = run(Scenario::new(seed), None, false);
        assert_eq!(ran.violation, None, "seed {seed}");
        coverage.add(&ran.coverage);
    }
    assert_eq!(coverage.runs, 500);
}
