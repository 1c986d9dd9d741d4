//! `cargo xtask sim`: one seed with its trace, or many on all cores.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use whimbrel_sim::coverage::Coverage;
use whimbrel_sim::run::{Failure, run, run_seeds};
use whimbrel_sim::scenario::Scenario;

const USAGE: &str = "usage: whimbrel-sim --seed S | --runs N [--from S]";

/// Seeds taken at a time by one thread.
const TAKEN: u64 = 256;

enum Wanted {
    Seed(u64),
    Runs { from: u64, count: u64 },
}

fn wanted(args: &[String]) -> Option<Wanted> {
    let number = |text: &String| text.parse::<u64>().ok();
    match args {
        [flag, seed] if flag == "--seed" => Some(Wanted::Seed(number(seed)?)),
        [flag, count] if flag == "--runs" => Some(Wanted::Runs {
            from: 0,
            count: number(count)?,
        }),
        [flag, count, other, from] if flag == "--runs" && other == "--from" => Some(Wanted::Runs {
            from: number(from)?,
            count: number(count)?,
        }),
        _ => None,
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let good = match wanted(&args) {
        None => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
        Some(Wanted::Seed(seed)) => one(seed),
        Some(Wanted::Runs { from, count }) => many(from, count),
    };
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// One seed, with all that happens.
fn one(seed: u64) -> bool {
    let scenario = Scenario::new(seed);
    println!("{scenario:#?}");
    let ran = run(scenario, None, true);
    for line in &ran.trace {
        println!("{line}");
    }
    println!("{}", ran.coverage);
    match &ran.violation {
        Some(violation) => println!("BROKEN {}: {}", violation.rule, violation.what),
        None => println!("all promises were kept"),
    }
    ran.violation.is_none()
}

/// Many seeds on all cores, until one fails.
fn many(from: u64, count: u64) -> bool {
    let begun = Instant::now();
    let next = AtomicU64::new(from);
    let stop = AtomicBool::new(false);
    let total = Mutex::new((Coverage::default(), None::<Failure>));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let first = next.fetch_add(TAKEN, Ordering::Relaxed);
                    let last = (first + TAKEN).min(from + count);
                    if first >= last {
                        break;
                    }
                    let mut coverage = Coverage::default();
                    let failure = run_seeds(first..last, None, &mut coverage);
                    let mut total = total.lock().expect("no holder of this lock panics");
                    total.0.add(&coverage);
                    if let Some(failure) = failure {
                        stop.store(true, Ordering::Relaxed);
                        total.1.get_or_insert(failure);
                    }
                }
            });
        }
    });
    let (coverage, failure) = total.into_inner().expect("no holder of this lock panics");
    let seconds = begun.elapsed().as_secs_f64();
    print!("{coverage}");
    println!(
        "{seconds:.1} s on {cores} cores: {:.0} runs/s, {:.0} events/s",
        coverage.runs as f64 / seconds,
        coverage.events as f64 / seconds
    );
    if let Some(failure) = &failure {
        println!("{failure}");
    }
    failure.is_none()
}
