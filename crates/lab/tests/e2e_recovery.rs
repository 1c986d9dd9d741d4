//! Daemons that die after the switchover, on either side: the machine stays whose it is, the guest loses
//! nothing, and the move comes to its end without anybody's help.

mod e2e_support;

use e2e_support::{MOVE_WITHIN, NAME, Scene, can_run, line, secs, start};
use std::time::{Duration, Instant};
use whimbrel_lab::net::{Host, LabSpec};
use whimbrel_lab::pair::PairSpec;
use whimbrel_lab::pair::answers::{MachineStatus, MigrationState, MigrationView, Phase, SpaceKind};
use whimbrel_lab::wan::WanSpec;

/// Slow enough that the drain outlasts a few deaths.
fn slow() -> PairSpec {
    PairSpec::new(LabSpec::new(WanSpec::symmetric(line(100, 5))))
}

/// Starts the move and returns when so many thousandths of the disk were sent. The drain is slow, so that it is seen by
/// whoever is slow as well, until [`completes`] lets it go.
fn drains_to(scene: &Scene, permille: u64) {
    let a = scene.on(Host::A);
    let args = ["migrate", NAME, "--to", "host-b", "--hold"];
    let mut follow = a.follow(&args).expect("the command starts");
    let held = follow.until("held", MOVE_WITHIN, |view| {
        view.state == MigrationState::Held
    });
    held.expect("held before the switch");
    a.run(&["throttle", NAME, "24Mbit"]).expect("throttled");
    a.run(&["switch", NAME]).expect("told to switch");
    let draining = follow.until("the drain", MOVE_WITHIN, |view| {
        view.phase == Phase::Drain && sent(view) >= permille
    });
    assert!(sent(&draining.expect("draining").view) < 900);
}

/// Thousandths of what the disks have that were sent.
fn sent(view: &MigrationView) -> u64 {
    let disks = view.spaces.iter().filter(|s| s.kind == SpaceKind::Disk);
    let (sent, live) = disks.fold((0, 1), |(sent, live), s| {
        (sent + s.units_sent, live + s.units_live)
    });
    sent * 1000 / live
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
    // If it is not over already.
    let _ = scene.on(Host::A).run(&["throttle", NAME, "unlimited"]);
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

/// Kills everything of the machine and the daemon on a host, as a host's failure would.
fn is_lost(scene: &mut Scene, host: Host) {
    scene.site_mut(host).kill9().expect("killed");
    for pid in scene.site(host).qemus() {
        let pid = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let killed =
            rustix::process::kill_process(pid.expect("a process"), rustix::process::Signal::KILL);
        killed.expect("killed");
    }
}

/// The machine runs at the source again, and nothing of it at the destination.
fn is_back(scene: &Scene, guest: &mut whimbrel_lab::pair::Guest) {
    let view = latest(scene, Host::A).expect("the move is told of");
    assert_eq!(view.phase, Phase::Rewind, "{view:?}");
    assert_eq!(scene.status(Host::A), Some(MachineStatus::Running));
    assert_eq!(scene.site(Host::B).qemus(), Vec::<u32>::new());
    guest.set_back();
    scene.works(guest);
}

fn is_departed_from(scene: &Scene, host: Host) {
    let deadline = Instant::now() + MOVE_WITHIN;
    while scene.status(host) != Some(MachineStatus::Departed) {
        assert!(Instant::now() < deadline, "{:?}", scene.status(host));
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Asked back from a destination that answers; then from one that is lost, which is told when it is back; and
/// then it moves, as any machine does.
#[test]
fn a_machine_is_taken_back_from_the_drain_and_moves_again() {
    if !can_run() {
        return;
    }
    let mut scene = start(&slow());
    let mut guest = scene.guest_on(Host::A);
    let refused = scene.on(Host::A).run(&["recover", NAME, "--take-back"]);
    assert!(refused.is_err(), "there is nothing to take back");

    drains_to(&scene, 100);
    let known = scene.on(Host::A).run_for_people(&["recover", NAME]);
    let known = known.expect("explained");
    assert!(
        known.contains("whimbrel recover guest --take-back\n"),
        "{known}"
    );
    let sworn = ["recover", NAME, "--take-back", "--lost", "host-b"];
    let refused = scene.on(Host::A).run(&sworn).expect_err("it is not lost");
    assert!(refused.to_string().contains("is not lost"), "{refused}");
    let told = scene.on(Host::A).run(&["recover", NAME, "--take-back"]);
    told.expect("taken back");
    is_back(&scene, &mut guest);
    is_departed_from(&scene, Host::B);

    drains_to(&scene, 100);
    is_lost(&mut scene, Host::B);
    let waiting = Instant::now();
    while latest(&scene, Host::A).is_some_and(|view| view.link.connected) {
        assert!(waiting.elapsed() < MOVE_WITHIN, "the link is not missed");
        std::thread::sleep(Duration::from_millis(100));
    }
    let refused = scene.on(Host::A).run(&["recover", NAME, "--take-back"]);
    let refused = refused.expect_err("nobody can be asked").to_string();
    assert!(refused.contains("--lost host-b"), "{refused}");
    scene.on(Host::A).run(&sworn).expect("taken back");
    is_back(&scene, &mut guest);
    let explained = scene.on(Host::B).run_for_people(&["fsck"]);
    let explained = explained.expect("nothing is broken");
    assert!(explained.contains("a daemon would ask QEMU"), "{explained}");
    // It comes back, and is told that the machine is not its own.
    scene.site_mut(Host::B).start().expect("up again");
    is_departed_from(&scene, Host::B);
    scene.works(&mut guest);

    scene.moves(Host::A, &[]);
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
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

/// Kills one daemon so long after the guest's stop, or right after the order to switch, which is about when the machine
/// is granted, accepted and runs; whatever came of it, the guest has lost nothing and runs on one side only.
fn killed_around_the_switchover(kills: &[(bool, Option<u64>)]) {
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
        scene.on(at).run(&["switch", NAME]).expect("told to switch");
        if let Some(after) = after_ms {
            // What of memory is still to go ahead takes as long as it takes.
            let stops = follow.until("the stop", MOVE_WITHIN, |view| {
                !matches!(view.phase, Phase::Prepare | Phase::Copy)
            });
            stops.expect("it stops");
            std::thread::sleep(Duration::from_millis(after));
        }
        drop(follow);
        dies(&mut scene, if source { at } else { at.other() });
        let now = settles(&scene, at);
        println!(
            "{} killed after {after_ms:?} ms: the machine is at {now}",
            if source { "source" } else { "destination" }
        );
        at = now;
        scene.works(&mut guest);
    }
    scene.verified_on(at, &mut guest);
}

/// Moments from the stop until well into the drain, in milliseconds; the first is before it.
const MOMENTS: [Option<u64>; 5] = [None, Some(0), Some(20), Some(50), Some(200)];

#[test]
fn destination_daemon_killed_around_the_switchover_many_times() {
    if !can_run() {
        return;
    }
    killed_around_the_switchover(&MOMENTS.map(|ms| (false, ms)));
}

#[test]
fn source_daemon_killed_around_the_switchover_many_times() {
    if !can_run() {
        return;
    }
    killed_around_the_switchover(&MOMENTS.map(|ms| (true, ms)));
}
