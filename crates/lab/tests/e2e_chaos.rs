//! Some cells of the crash table, drawn anew in each run: the short form of `cargo xtask bench chaos`.

mod e2e_support;

use e2e_support::can_run;
use std::time::{SystemTime, UNIX_EPOCH};
use whimbrel_lab::chaos::cell::Cell;
use whimbrel_lab::chaos::{ChaosSpec, chaos};
use whimbrel_workload::chance::Rng;

/// About ten seconds each, on top of a boot and the check at the end.
const CELLS: usize = 3;

/// Says which to draw; otherwise the clock does.
const SEED: &str = "WHIMBREL_CHAOS_SEED";

#[test]
fn what_the_crash_table_says_comes_true() {
    if !can_run() {
        return;
    }
    let given = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok());
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    let seed = given.unwrap_or(clock.map_or(0, |now| now.as_micros() as u64 % 1_000_000));
    let mut cells = Cell::all();
    Rng::new(seed, 0).shuffle(&mut cells);
    cells.truncate(CELLS);
    let only: String = cells.iter().map(|cell| format!(" --only {cell}")).collect();
    println!("again: {SEED}={seed}, or cargo xtask bench chaos --seed {seed}{only}");
    let spec = ChaosSpec { cells, seed };
    let report = chaos(&spec, |line| println!("{line}")).expect("the trial is made");
    println!("{}", serde_json::to_string(&report).expect("plain data"));
    assert!(report.passed(), "see PROBLEM above");
}
