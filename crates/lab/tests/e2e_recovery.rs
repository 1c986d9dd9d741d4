//! Daemons that die after the switchover, on either side: the machine stays whose it is, the guest loses
//! nothing, and the move comes to its end without anybody's help.

mod e2e_support;

use e2e_support::{MOVE_WITHIN, NAME, Scene, can_run, line, secs, start};
use std::time::{Duration, Instant};
use whimbrel_lab::net::{Host, LabSpec};
use whimbrel_lab::pair::PairSpec;
use whimbrel_lab::pair::answers::{MachineStatus, MigrationState, MigrationView, Phase};
use whimbrel_lab::wan::WanSpec;

/// Slow enough that the drain outlasts a few deaths.
fn slow() -> PairSpec {
    PairSpec::new(LabSpec::new(WanSpec::symmetric(line(100, 5))))
}

/// Starts the move and returns when so many thousandths of it have arrived.
fn drains_to(scene: &Scene, permille: u16) {
    let args = ["migrate", NAME, "--to", "host-b"];
    let mut follow = scene.on(Host::A).follow(&args).expect("the command starts");
    let draining = follow.until("the drain", MOVE_WITHIN, |view| {
        view.phase == Phase::Drain && view.permille >= permille
    });
    assert!(draining.expect("draining").view.permille < 900);
}

/// Of `whimbrel status MACHINE`, what counts here.
#[derive(serde::Deserialize)]
struct Status {
    migration: Option<MigrationView>,
}

fn latest(scene: &Scene, host: Host) -> Option<MigrationView> {
    let answer = scene.on(host).answer(&["status", NAME]);
    let status: Status = answer.expect("the daemon answers");
    status.migration
}

/// Waits for both sides to say that the move is over.
fn completes(scene: &Scene) {
    let deadline = Instant::now() + MOVE_WITHIN;
    for host in [Host::B, Host::A] {
        loop {
            let view = latest(scene, host).expect("the move is told of");
            if view.phase == Phase::Complete {
                assert_eq!(view.state, MigrationState::Completed, "{view:?}");
                break;
            }
            assert!(Instant::now() < deadline, "{host}: {view:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    assert_eq!(scene.status(Host::A), Some(MachineStatus::Departed));
}

fn dies(scene: &mut Scene, host: Host) {
    scene.site_mut(host).kill9().expect("killed");
    scene.site_mut(host).start().expect("up again");
}

#[test]
fn destination_daemon_killed_in_the_drain() {
    if !can_run() {
        return;
    }
    let mut scene = start(&slow());
    let mut guest = scene.guest_on(Host::A);
    drains_to(&scene, 200);
    dies(&mut scene, Host::B);
    completes(&scene);
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}

#[test]
fn source_daemon_killed_in_the_drain() {
    if !can_run() {
        return;
    }
    let mut scene = start(&slow());
    let mut guest = scene.guest_on(Host::A);
    drains_to(&scene, 200);
    dies(&mut scene, Host::A);
    completes(&scene);
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}

#[test]
fn both_daemons_killed_in_the_drain_again_and_again() {
    if !can_run() {
        return;
    }
    let mut scene = start(&slow());
    let mut guest = scene.guest_on(Host::A);
    drains_to(&scene, 50);
    for _ in 0..2 {
        dies(&mut scene, Host::A);
        dies(&mut scene, Host::B);
        std::thread::sleep(secs(1));
    }
    completes(&scene);
    scene.works(&mut guest);
    // And it moves back, as any machine does.
    scene.moves(Host::B, &[]);
    scene.works(&mut guest);
    scene.verified_on(Host::A, &mut guest);
}

/// Waits until exactly one side has the machine and nothing of the move is left; says which.
fn settles(scene: &Scene, from: Host) -> Host {
    let to = from.other();
    let begun = Instant::now();
    loop {
        let (here, there) = (scene.status(from), scene.status(to));
        let over = |view: Option<MigrationView>| {
            view.is_none_or(|v| matches!(v.phase, Phase::Complete | Phase::Cancel | Phase::Rewind))
        };
        let is_gone = |status| matches!(status, None | Some(MachineStatus::Departed));
        if there == Some(MachineStatus::Running)
            && is_gone(here)
            && over(latest(scene, to))
            && over(latest(scene, from))
        {
            return to;
        }
        if here == Some(MachineStatus::Running) && is_gone(there) && over(latest(scene, from)) {
            return from;
        }
        assert!(
            begun.elapsed() < MOVE_WITHIN,
            "{from}: {here:?} {:?}, {to}: {there:?}",
            latest(scene, from)
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Kills one daemon so long after the order to switch, which is about when the machine is granted,
/// accepted and runs; whatever came of it, the guest has lost nothing and runs on one side only.
fn killed_around_the_switchover(kills: &[(bool, u64)]) {
    let mut scene = start(&slow());
    let mut guest = scene.guest_on(Host::A);
    let mut at = Host::A;
    for &(source, after_ms) in kills {
        let to = at.other().to_string();
        let args = ["migrate", NAME, "--to", &to, "--hold"];
        let mut follow = scene.on(at).follow(&args).expect("the command starts");
        let held = follow.until("being held", MOVE_WITHIN, |view| {
            view.state == MigrationState::Held
        });
        held.expect("held");
        drop(follow);
        scene.on(at).run(&["switch", NAME]).expect("told to switch");
        std::thread::sleep(Duration::from_millis(after_ms));
        dies(&mut scene, if source { at } else { at.other() });
        let now = settles(&scene, at);
        println!(
            "{} killed after {after_ms} ms: the machine is at {now}",
            if source { "source" } else { "destination" }
        );
        at = now;
        scene.works(&mut guest);
    }
    scene.verified_on(at, &mut guest);
}

/// Moments from the order to switch until well into the drain, in milliseconds.
const MOMENTS: [u64; 13] = [
    0, 100, 150, 180, 200, 220, 240, 260, 280, 300, 330, 360, 400,
];

#[test]
#[ignore = "takes minutes"]
fn destination_daemon_killed_around_the_switchover_many_times() {
    if !can_run() {
        return;
    }
    killed_around_the_switchover(&MOMENTS.map(|ms| (false, ms)));
}

#[test]
#[ignore = "takes minutes, and fails: QEMU does not resume a guest whose daemon dies between its stop and its device state"]
fn source_daemon_killed_around_the_switchover_many_times() {
    if !can_run() {
        return;
    }
    killed_around_the_switchover(&MOMENTS.map(|ms| (true, ms)));
}
