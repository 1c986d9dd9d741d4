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
    migration: MigrationView,
}

/// Waits for both sides to say that the move is over.
fn completes(scene: &Scene) {
    let deadline = Instant::now() + MOVE_WITHIN;
    for host in [Host::B, Host::A] {
        loop {
            let status: Status = scene
                .on(host)
                .answer(&["status", NAME])
                .expect("the daemon answers");
            let view = status.migration;
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
    for _ in 0..3 {
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
