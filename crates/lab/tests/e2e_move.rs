//! A running machine moves, RAM and disk, and everything is as it was.

mod e2e_support;

use e2e_support::{NAME, Scene, can_run, each_unit_once, fast, start};
use whimbrel_lab::net::Host;
use whimbrel_lab::pair::answers::{
    MachineStatus, MigrationReport, Phase, ReportSummary, ReportView, SpaceKind,
};
use whimbrel_lab::pair::{GuestSpec, Monitor};

#[test]
fn a_running_machine_moves_and_verifies() {
    if !can_run() {
        return;
    }
    let mut scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    // Told to, not left to it: what a busy machine has time for is another matter.
    let ended = scene.moves(Host::A, &["--compress", "zstd:1"]);
    let view = ended.last.expect("a last word").view;
    let report = view.report.expect("a report");
    println!("{}", serde_json::to_string(&report).expect("plain data"));
    each_unit_once(&report);
    assert!(report.stop_to_resume_ms().is_some_and(|ms| ms > 0.0));
    // A kernel, programs and text files pack.
    let (sent, codecs) = (report.sent, report.codecs);
    assert!(codecs.zstd > 0, "{codecs:?}");
    assert!(sent.demand + sent.push < sent.content * 9 / 10, "{sent:?}");
    assert_eq!(codecs.plain + codecs.zstd + codecs.zero, report.units_sent);
    assert_eq!(view.permille, 1000);
    for kind in [SpaceKind::Disk, SpaceKind::Ram] {
        assert!(
            view.spaces
                .iter()
                .any(|s| s.kind == kind && s.bytes_sent > 0)
        );
    }
    scene.works(&mut guest);
    assert_eq!(scene.status(Host::A), Some(MachineStatus::Departed));
    assert_eq!(scene.status(Host::B), Some(MachineStatus::Running));
    let machine = scene.machine(Host::B, NAME).expect("shown").expect("known");
    assert!(machine.pid.is_some());
    let reports = both_ends_report(&scene, &report);
    scene.verified_on(Host::B, &mut guest);
    // What was recorded outlives the daemon that recorded it.
    for (host, before) in Host::BOTH.into_iter().zip(reports) {
        scene.site_mut(host).stop().expect("stopped");
        scene.site_mut(host).start().expect("up again");
        assert_eq!(report_of(&scene, host).summary, before);
    }
}

fn report_of(scene: &Scene, host: Host) -> ReportView {
    let said = scene.on(host).run(&["report", NAME]).expect("a report");
    serde_json::from_str(&said).expect("understood")
}

/// What was recorded over time agrees with what the migration says it came to, at either end.
fn both_ends_report(scene: &Scene, told: &MigrationReport) -> [ReportSummary; 2] {
    let [source, destination] = Host::BOTH.map(|host| report_of(scene, host));
    for report in [&source, &destination] {
        assert_eq!(report.migration.phase, Phase::Complete);
        let phases: Vec<Phase> = report.summary.phases.iter().map(|p| p.phase).collect();
        assert_eq!(phases.first(), Some(&Phase::Prepare), "{phases:?}");
        assert_eq!(phases.last(), Some(&Phase::Complete), "{phases:?}");
        assert!(report.summary.guest_requests > 0);
        assert!(
            report
                .elsewhere
                .iter()
                .any(|note| note.starts_with("only "))
        );
    }
    let (at_a, at_b) = (source.summary, destination.summary);
    assert_eq!(at_a.blackout_ms, told.blackout_ms);
    let sent = |s: &ReportSummary| [s.ram_bytes + s.disk_bytes, s.demand_bytes];
    assert_eq!(sent(&at_a), [told.sent.push, told.sent.demand]);
    assert_eq!(sent(&at_b), sent(&at_a), "nothing was lost on the way");
    assert_eq!(at_b.blackout_ms, None);
    let part = at_b.blackout_parts.first().expect("its own part").ms;
    assert!(told.blackout_ms.is_some_and(|whole| part <= whole + 1.0));
    [at_a, at_b]
}

#[test]
fn by_postcopy_alone_nothing_goes_in_vain() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    let ended = scene.moves(Host::A, &["--ram", "postcopy", "--compress", "none"]);
    let view = ended.last.expect("a last word").view;
    let report = view.report.expect("a report");
    assert_eq!((report.units_outdated, report.units_sent_again), (0, 0));
    assert!(report.units_sent <= report.units_live, "{report:?}");
    assert_eq!(report.codecs.zstd, 0);
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}

#[test]
fn disks_go_ahead_of_the_switch_whatever_way_ram_goes() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    let ended = scene.moves(Host::A, &["--disks", "hybrid", "--ram", "precopy"]);
    let view = ended.last.expect("a last word").view;
    let report = view.report.expect("a report");
    println!("{}", serde_json::to_string(&report).expect("plain data"));
    each_unit_once(&report);
    scene.works(&mut guest);
    // And back the other way, with disks that came that way. Without its older copy, which would be compared instead.
    for args in [["machine", "undefine", NAME], ["volume", "rm", NAME]] {
        scene.on(Host::A).run(&args).expect("forgotten");
    }
    let ended = scene.moves(Host::B, &["--disks", "hybrid", "--ram", "postcopy"]);
    let report = ended.last.and_then(|seen| seen.view.report);
    assert!(report.expect("a report").verified);
    scene.works(&mut guest);
    scene.verified_on(Host::A, &mut guest);
}

#[test]
fn one_that_was_stopped_arrives_stopped_whatever_way_ram_goes() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let mut spec = GuestSpec::small(NAME);
    spec.extra_args = Monitor::args();
    // What its memory is made of and how its disk is attached make no difference either.
    spec.lines = vec!["memory_backing = \"shared\"".to_owned()];
    spec.bus = Some("virtio-scsi".to_owned());
    spec.params.disk = "/dev/sda".to_owned();
    let mut guest = scene.guest_of(Host::A, spec);
    let monitor = |host| Monitor::connect(scene.site(host).namespace()).expect("a monitor");
    let stop = monitor(Host::A).execute("stop", serde_json::json!({}));
    stop.expect("stopped");
    for (from, ram) in [(Host::A, "postcopy"), (Host::B, "precopy")] {
        let ended = scene.moves(from, &["--ram", ram]);
        let report = ended.last.and_then(|seen| seen.view.report);
        let report = report.expect("a report");
        assert!(report.verified);
        assert_eq!(report.blackout_ms, None);
        let status = monitor(from.other()).status().expect("told");
        assert_eq!(status, "paused", "by {ram}");
        assert_eq!(scene.status(from.other()), Some(MachineStatus::Paused));
    }
    scene
        .on(Host::A)
        .run(&["machine", "resume", NAME])
        .expect("resumed");
    scene.works(&mut guest);
    scene.verified_on(Host::A, &mut guest);
}

#[test]
fn back_and_forth_without_a_restart() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    scene.moves(Host::A, &[]);
    scene.works(&mut guest);
    let ended = scene.moves(Host::B, &[]);
    let view = ended.last.expect("a last word").view;
    let report = view.report.as_ref().expect("a report");
    assert_eq!(report.units_sent_again, 0);
    // What it left here has not changed but for what it wrote since.
    let disk = view.spaces.iter().find(|s| s.kind == SpaceKind::Disk);
    let disk = disk.expect("it has a disk");
    println!("{disk:?}");
    assert!(disk.units_sent * 5 < disk.units_live, "{disk:?}");
    assert!(
        view.messages.iter().any(|m| m.contains("older copy")),
        "{:?}",
        view.messages
    );
    scene.works(&mut guest);
    assert_eq!(scene.status(Host::A), Some(MachineStatus::Running));
    assert_eq!(scene.status(Host::B), Some(MachineStatus::Departed));
    scene.verified_on(Host::A, &mut guest);
}
