//! The daemon under a guest that does not move: restarted, and with a volume of a TiB.

mod e2e_support;

use e2e_support::{NAME, can_run, fast, secs, start};
use std::process::Command;
use std::time::Instant;
use whimbrel_lab::links::{self, Rig, noise};
use whimbrel_lab::net::Host;
use whimbrel_lab::pair::answers::{HostView, MachineStatus, VolumeView};
use whimbrel_lab::pair::{GuestSpec, Pair, whimbrel_program};

#[test]
fn a_daemon_restarted_under_a_running_guest_costs_no_io_error() {
    if !can_run() {
        return;
    }
    let mut scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    let qemus = scene.site(Host::A).qemus();
    for killed in [true, false, true, false] {
        let site = scene.site_mut(Host::A);
        if killed {
            site.kill9().expect("killed");
        } else {
            let status = site.stop().expect("stopped").expect("it ran");
            assert!(status.success(), "{status}");
        }
        // Long enough for requests to be waiting.
        std::thread::sleep(secs(1));
        site.start().expect("up again");
        scene.reaches(Host::A, Some(MachineStatus::Running));
        scene.works(&mut guest);
        assert_eq!(scene.site(Host::A).qemus(), qemus, "the same process");
    }
    scene.verified_on(Host::A, &mut guest);
}

/// A field of `/proc/PID/status` in KiB.
fn kib_of(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = text.lines().find(|line| line.starts_with(field));
    let number = line.and_then(|l| l.split_whitespace().nth(1)?.parse().ok());
    number.unwrap_or_else(|| panic!("no {field} in {text}"))
}

const BIG: &str = "big";

/// 64 MiB and 40 MiB per TiB.
const BUDGET_KIB: u64 = (64 + 40) << 10;

#[test]
fn a_volume_of_a_tebibyte_takes_little_memory() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let a = scene.on(Host::A);
    let timed = |what: &str, deed: &mut dyn FnMut()| {
        let began = Instant::now();
        deed();
        println!("{what}: {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
    };
    timed("create", &mut || {
        a.run(&["volume", "create", BIG, "--size", "1TiB"])
            .expect("made");
    });
    let mut spec = GuestSpec::small(NAME);
    spec.more_volumes = vec![BIG.to_owned()];
    let ram_kib = u64::from(spec.memory_mib) << 10;
    let mut guest = scene.guest_of(Host::A, spec);
    let socket = scene.site(Host::A).machine_file(NAME, "nbd.sock");
    let uri = format!("nbd+unix:///{BIG}?socket={}", socket.display());
    // All over the volume, so that every part of what is kept about it is in use.
    let mut io = Command::new("qemu-io");
    io.args(["-f", "raw", "-t", "none"]);
    for at in 0..64 {
        io.args(["-c", &format!("write -P 5 {}G 64k", at * 16)]);
    }
    let out = io.arg(&uri).output().expect("qemu-io is there");
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success() && !said.contains("failed"), "{said}");
    timed("map", &mut || {
        a.run(&["volume", "map", BIG]).expect("shown");
    });
    let view: HostView = a.answer(&["host", "show"]).expect("shown");
    let daemon = view.daemon.expect("it runs").pid;
    let most = kib_of(daemon, "VmHWM:");
    println!(
        "the daemon's memory at most: {} MiB of {}",
        most >> 10,
        BUDGET_KIB >> 10
    );
    assert!(most <= BUDGET_KIB, "{most} KiB");

    // Opened again, by a daemon that finds it in use.
    let mut scene = scene;
    scene.site_mut(Host::A).kill9().expect("killed");
    timed("a daemon's start, the volume opened", &mut || {
        scene.site_mut(Host::A).start().expect("up again");
        scene.reaches(Host::A, Some(MachineStatus::Running));
    });
    // A source holds a copy of its guest's memory while it moves.
    let within_budget = |ram_kib: u64| {
        for (host, ram) in Host::BOTH.into_iter().zip([ram_kib, 0]) {
            let budget = BUDGET_KIB + ram;
            let view: HostView = scene.on(host).answer(&["host", "show"]).expect("shown");
            let most = kib_of(view.daemon.expect("it runs").pid, "VmHWM:");
            println!("{host}: at most {} MiB of {}", most >> 10, budget >> 10);
            assert!(most <= budget, "{host}: {most} KiB");
        }
    };
    within_budget(0);
    scene.works(&mut guest);
    timed("the move", &mut || {
        let ended = scene.moves(Host::A, &[]);
        let report = ended.last.and_then(|seen| seen.view.report);
        let report = report.expect("a report");
        assert!(report.verified);
        println!("{report:?}");
    });
    within_budget(ram_kib);
    let views = Host::BOTH.map(|host| {
        scene
            .on(host)
            .answer::<VolumeView>(&["volume", "show", BIG])
    });
    let taken = views.map(|view| {
        let file = std::fs::metadata(view.expect("shown").data).expect("there");
        std::os::unix::fs::MetadataExt::blocks(&file) * 512
    });
    println!("bytes taken there and here: {taken:?}");
    assert!(taken[1] <= taken[0] + taken[0] / 100);
    timed("map", &mut || {
        let map = scene.on(Host::B).run(&["volume", "map", BIG]);
        map.expect("shown");
    });
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}

/// Nobody: the user and group of daemons without rights.
const NOBODY: u32 = 65534;

/// Everything but a guest's network is done by daemons that have no right but to their own folder.
#[test]
fn daemons_without_root_serve_disks_and_move_a_machine() {
    if !can_run() {
        return;
    }
    let mut pair = Pair::prepare(&fast()).expect("two hosts are made");
    // Where a build lies is not everybody's to read.
    let program = pair.folder().path().join("whimbrel");
    std::fs::copy(whimbrel_program().expect("it is built"), &program).expect("room");
    let content = pair.folder().path().join("content");
    noise(&content, 8 << 20).expect("room");
    for host in Host::BOTH {
        let site = pair.site_mut(host);
        let mut chown = Command::new("chown");
        let chown = chown.args(["-R", &format!("{NOBODY}:{NOBODY}")]);
        assert!(chown.arg(site.folder()).status().expect("run").success());
        let as_root = site.daemon_command();
        let mut daemon = Command::new("setpriv");
        let ids = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
        daemon.args(ids).args(["--clear-groups", "--no-new-privs"]);
        daemon.arg(&program).args(as_root.get_args());
        site.start_as(daemon).expect("up without rights");
    }
    let rig = Rig::new(pair, &content).expect("a machine that runs");
    // By pre-copy where `nobody` has no userfaultfd.
    let moves = ["migrate", links::NAME, "--to", "host-b", "--detach"];
    rig.pair().on(Host::A).run(&moves).expect("it begins");
    let deadline = Instant::now() + e2e_support::MOVE_WITHIN;
    loop {
        let view = rig.view(Host::A).expect("the daemon answers");
        let view = view.expect("the move is told of");
        if let Some(report) = view.report {
            assert!(report.verified, "{report:?}");
            break;
        }
        assert!(Instant::now() < deadline, "{view:?}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}
