//! Thousands of runs, each with its own mishaps, none of which may break a promise.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use whimbrel_sim::coverage::{Coverage, Outcome};
use whimbrel_sim::run::run_seeds;
use whimbrel_sim::scenario::{KINDS, Scenario};

/// How many runs; few by themselves, all of them by `cargo xtask test`.
const SCHEDULES: &str = "WHIMBREL_SIM_SCHEDULES";
const FEW: u64 = 1_000;

#[test]
fn no_schedule_of_mishaps_breaks_a_promise() {
    let count = std::env::var(SCHEDULES).ok().and_then(|n| n.parse().ok());
    let count: u64 = count.unwrap_or(FEW);
    let next = AtomicU64::new(0);
    let total = Mutex::new(Coverage::default());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                let mut coverage = Coverage::default();
                let seeds = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)));
                let failure =
                    run_seeds(seeds.take_while(|&seed| seed < count), None, &mut coverage);
                if let Some(failure) = failure {
                    next.store(count, Ordering::Relaxed);
                    panic!("{failure}");
                }
                total.lock().expect("no holder panics").add(&coverage);
            });
        }
    });
    let total = total.into_inner().expect("no holder panics");
    println!("{total}");
    assert_eq!(total.runs, count);
    if count >= FEW {
        for (kind, name) in KINDS.iter().enumerate() {
            let struck = total.struck.keys().any(|key| key.0 == kind);
            assert!(struck, "{name} never happened");
        }
        for outcome in [Outcome::Completed, Outcome::Cancelled, Outcome::Rewound] {
            assert!(total.outcomes.contains_key(&outcome), "no run {outcome:?}");
        }
    }
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in 0..20 {
        let [first, second] = [(); 2].map(|()| {
            let ran = whimbrel_sim::run::run(Scenario::new(seed), None, true);
            (ran.trace, ran.coverage.events)
        });
        assert_eq!(first, second, "seed {seed}");
    }
}
