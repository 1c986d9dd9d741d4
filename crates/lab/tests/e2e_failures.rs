//! Moves that are given up, broken off or interrupted: whose the machine is stays clear, and nothing is
//! left behind.

mod e2e_support;

use e2e_support::{
    MOVE_WITHIN, NAME, Scene, can_run, each_unit_once, fast, line, secs, start, tells,
};
use whimbrel_lab::net::{Host, LabSpec};
use whimbrel_lab::pair::answers::{MachineStatus, MigrationState, Phase, SpaceKind};
use whimbrel_lab::pair::{Guest, GuestSpec, PairSpec};
use whimbrel_lab::wan::WanSpec;

#[test]
fn a_guest_that_shuts_down_before_the_switch_is_told_of_as_such() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    let args = ["migrate", NAME, "--to", "host-b", "--hold"];
    let mut follow = scene.on(Host::A).follow(&args).expect("the command starts");
    let held = follow.until("being held", MOVE_WITHIN, |view| {
        view.state == MigrationState::Held
    });
    held.expect("held");
    scene.verified_on(Host::A, &mut guest);
    let ended = follow.end(secs(30)).expect("the move ends");
    assert_eq!(ended.exit, Some(4), "{}", ended.describe());
    tells(&ended.refusal.expect("failed"), "qemu", &["shut down"]);
    let view = ended.last.expect("a last word").view;
    assert_eq!(view.state, MigrationState::Failed);
    scene.is_clean(Host::B);
    scene.reaches(Host::A, Some(MachineStatus::Defined));
    scene
        .on(Host::A)
        .run(&["machine", "start", NAME])
        .expect("it starts again");
}

#[test]
fn cancel_during_copy_leaves_source_unharmed_and_destination_clean() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    let args = [
        "migrate", NAME, "--to", "host-b", "--disks", "hybrid", "--hold",
    ];
    let mut follow = scene.on(Host::A).follow(&args).expect("the command starts");
    let held = follow.until("being held", MOVE_WITHIN, |view| {
        view.state == MigrationState::Held
    });
    assert_eq!(held.expect("held").view.phase, Phase::Copy);
    scene.works(&mut guest);

    scene.on(Host::A).run(&["cancel", NAME]).expect("cancelled");
    let ended = follow.end(secs(30)).expect("the move ends");
    assert_eq!(ended.exit, Some(4), "{}", ended.describe());
    let view = ended.last.expect("a last word").view;
    assert_eq!(view.state, MigrationState::Cancelled);
    scene.is_clean(Host::B);
    scene.works(&mut guest);
    assert_eq!(scene.status(Host::A), Some(MachineStatus::Running));

    // Given up is not given up for good.
    scene.moves(Host::A, &[]);
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}

#[test]
fn a_held_machine_goes_when_told_to() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    let args = ["migrate", NAME, "--to", "host-b", "--hold"];
    let mut follow = scene.on(Host::A).follow(&args).expect("the command starts");
    let held = follow.until("being held", MOVE_WITHIN, |view| {
        view.state == MigrationState::Held
    });
    held.expect("held");
    scene
        .on(Host::A)
        .run(&["switch", NAME])
        .expect("told to switch");
    let ended = follow.end(MOVE_WITHIN).expect("the move ends");
    assert!(ended.completed(), "{}", ended.describe());
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}

#[test]
fn destination_daemon_killed_before_the_grant() {
    if !can_run() {
        return;
    }
    let mut scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    let args = ["migrate", NAME, "--to", "host-b", "--hold"];
    let mut follow = scene.on(Host::A).follow(&args).expect("the command starts");
    let held = follow.until("being held", MOVE_WITHIN, |view| {
        view.state == MigrationState::Held
    });
    held.expect("held");
    scene.site_mut(Host::B).kill9().expect("killed");
    scene.works(&mut guest);
    scene.site_mut(Host::B).start().expect("up again");

    // The destination has forgotten the machine, and says so; the source keeps it.
    let ended = follow.end(MOVE_WITHIN).expect("the move ends");
    assert_eq!(ended.exit, Some(4), "{}", ended.describe());
    scene.is_clean(Host::B);
    scene.works(&mut guest);
    assert_eq!(scene.status(Host::A), Some(MachineStatus::Running));

    scene.moves(Host::A, &[]);
    scene.verified_on(Host::B, &mut guest);
}

/// The source's daemon dies while the machine is held in its copy, and is started again.
fn source_daemon_dies(scene: &mut Scene, guest: &mut Guest) {
    let args = ["migrate", NAME, "--to", "host-b", "--hold"];
    let mut follow = scene.on(Host::A).follow(&args).expect("the command starts");
    let held = follow.until("being held", MOVE_WITHIN, |view| {
        view.state == MigrationState::Held
    });
    held.expect("held");
    drop(follow);
    scene.site_mut(Host::A).kill9().expect("killed");
    scene.site_mut(Host::A).start().expect("up again");
    scene.reaches(Host::A, Some(MachineStatus::Running));
    scene.works(guest);
}

#[test]
fn source_daemon_killed_before_the_grant() {
    if !can_run() {
        return;
    }
    let mut scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    source_daemon_dies(&mut scene, &mut guest);
    scene.verified_on(Host::A, &mut guest);
}

#[test]
fn both_daemons_killed_before_the_grant() {
    if !can_run() {
        return;
    }
    let mut scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    source_daemon_dies(&mut scene, &mut guest);
    scene.site_mut(Host::B).kill9().expect("killed");
    scene.site_mut(Host::B).start().expect("up again");
    scene.is_clean(Host::B);
    // The source's QEMU has been through half a hand-over; the next one works all the same.
    scene.moves(Host::A, &[]);
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}

#[test]
#[ignore = "waits out the 90 s after which a destination gives a silent source up"]
fn a_destination_cleans_up_after_a_source_that_never_comes_back_to_it() {
    if !can_run() {
        return;
    }
    let mut scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    source_daemon_dies(&mut scene, &mut guest);
    std::thread::sleep(secs(95));
    scene.is_clean(Host::B);
    scene.moves(Host::A, &[]);
    scene.verified_on(Host::B, &mut guest);
}

#[test]
fn outages_while_memory_goes_ahead_and_in_the_drain_cost_only_time() {
    if !can_run() {
        return;
    }
    // Slow enough that each part lasts longer than the way to its outage.
    let wan = WanSpec::symmetric(line(80, 5));
    let scene = start(&PairSpec::new(LabSpec::new(wan)));
    let mut guest = scene.guest_on(Host::A);
    let args = ["migrate", NAME, "--to", "host-b", "--ram", "hybrid"];
    let mut follow = scene.on(Host::A).follow(&args).expect("the command starts");
    let ahead = follow.until("memory going ahead", MOVE_WITHIN, |view| {
        view.phase == Phase::Copy
            && view
                .spaces
                .iter()
                .any(|space| space.kind == SpaceKind::Ram && space.units_sent > 1000)
    });
    ahead.expect("going ahead");
    scene.lab().wan().outage(secs(4)).expect("the link is cut");
    let draining = follow.until("the drain", MOVE_WITHIN, |view| view.phase == Phase::Drain);
    draining.expect("draining");
    scene.lab().wan().outage(secs(8)).expect("the link is cut");
    let ended = follow.end(MOVE_WITHIN).expect("the move ends");
    assert!(ended.completed(), "{}", ended.describe());
    let report = ended
        .last
        .and_then(|seen| seen.view.report)
        .expect("a report");
    println!("{}", serde_json::to_string(&report).expect("plain data"));
    each_unit_once(&report);
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}

#[test]
fn outage_while_disks_go_ahead_costs_only_time() {
    if !can_run() {
        return;
    }
    let wan = WanSpec::symmetric(line(80, 5));
    let scene = start(&PairSpec::new(LabSpec::new(wan)));
    let mut guest = scene.guest_on(Host::A);
    let args = [
        "migrate", NAME, "--to", "host-b", "--disks", "hybrid", "--hold",
    ];
    let mut follow = scene.on(Host::A).follow(&args).expect("the command starts");
    let ahead = follow.until("disks going ahead", MOVE_WITHIN, |view| {
        let disks = view.spaces.iter().filter(|s| s.kind == SpaceKind::Disk);
        view.phase == Phase::Copy && disks.map(|s| s.units_sent).sum::<u64>() > 1000
    });
    ahead.expect("going ahead");
    scene.lab().wan().outage(secs(4)).expect("the link is cut");
    scene.works(&mut guest);
    let held = follow.until("being held", MOVE_WITHIN, |view| {
        view.state == MigrationState::Held
    });
    held.expect("held");
    // What it writes now went before, and is named.
    scene.works(&mut guest);
    let told = scene.on(Host::A).run(&["switch", NAME]);
    told.expect("told to switch");
    let ended = follow.end(MOVE_WITHIN).expect("the move ends");
    assert!(ended.completed(), "{}", ended.describe());
    let report = ended
        .last
        .and_then(|seen| seen.view.report)
        .expect("a report");
    println!("{}", serde_json::to_string(&report).expect("plain data"));
    each_unit_once(&report);
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}

#[test]
fn a_guest_without_disk_reads_still_moves() {
    if !can_run() {
        return;
    }
    // Nothing of the disk is asked for, and memory is all but still: the quiet end of loads.
    let mut spec = GuestSpec::small(NAME);
    spec.params.read.pace = whimbrel_workload::params::Pace::Off;
    spec.params.ram.pace = whimbrel_workload::params::Pace::PerSecond(10);
    let scene = start(&fast());
    let mut guest = scene.guest_of(Host::A, spec);
    scene.moves(Host::A, &[]);
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}
