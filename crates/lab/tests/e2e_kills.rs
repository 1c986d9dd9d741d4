//! Daemons killed under `fio --verify` while a volume is relocated: the short form of `cargo xtask bench kills`.

mod e2e_support;

use e2e_support::can_run;
use whimbrel_lab::kills::{KillsSpec, kills};

#[test]
fn nothing_is_lost_when_daemons_are_killed_under_fio() {
    if !can_run() {
        return;
    }
    let spec = KillsSpec { kills: 4, seed: 3 };
    println!("seed {}", spec.seed);
    let report = kills(&spec, |line| println!("{line}")).expect("the trial is made");
    println!("{}", serde_json::to_string(&report).expect("plain data"));
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(report.kills.len(), 4);
    assert_eq!(report.guest_errors, 0);
}
