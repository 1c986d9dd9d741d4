//! Everything that cannot work is refused with a reason and a next step, and changes nothing.

mod e2e_support;

use e2e_support::{
    MOVE_WITHIN, NAME, Scene, can_run, fast, prepare, refusal, script, start, tells,
};
use std::path::{Path, PathBuf};
use std::process::Command;
use whimbrel_lab::net::Host;
use whimbrel_lab::pair::answers::MachineStatus;
use whimbrel_lab::pair::{Guest, PairError, PairSpec, Refusal, SiteSpec};

/// What `migrate` refuses with; the guest runs on at its source.
fn refused_move(scene: &Scene, guest: &mut Guest) -> Refusal {
    let ended = scene.tries_to_move(Host::A, &[]);
    // 1: nothing was begun; 4: it was given up, and the machine is at its source.
    assert!(matches!(ended.exit, Some(1 | 4)), "{}", ended.describe());
    scene.works(guest);
    assert_eq!(scene.status(Host::A), Some(MachineStatus::Running));
    ended.refusal.expect("a refusal")
}

/// A destination whose QEMU is this program.
fn destination_with(qemu: &str) -> PairSpec {
    PairSpec {
        b: SiteSpec {
            qemu: Some(qemu.into()),
            ..SiteSpec::default()
        },
        ..fast()
    }
}

#[test]
fn hosts_and_machines_that_are_not_known() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let a = scene.on(Host::A);
    let nobody = refusal(a.run(&["migrate", NAME, "--to", "host-b"]));
    tells(&nobody, "not-found", &[NAME]);
    let mut guest = scene.defined_on(Host::A);
    let still = refusal(a.run(&["migrate", NAME, "--to", "host-b"]));
    tells(&still, "wrong-state", &[NAME]);
    scene.boot(Host::A, &mut guest).expect("boots");
    let nowhere = refusal(a.run(&["migrate", NAME, "--to", "host-x"]));
    tells(&nowhere, "not-found", &["host-x"]);
    let itself = refusal(a.run(&["migrate", NAME, "--to", "host-a"]));
    assert!(itself.error.is_some(), "{itself:?}");
    scene.works(&mut guest);

    // The same for people: what, state, next.
    let told = refusal(a.run_for_people(&["migrate", NAME, "--to", "host-x"]));
    assert!(told.stderr.starts_with("error: "), "{}", told.stderr);
    assert!(told.stderr.contains("\n  next:  "), "{}", told.stderr);
}

#[test]
fn a_peer_that_does_not_trust_this_host() {
    if !can_run() {
        return;
    }
    let spec = PairSpec {
        trust: false,
        ..fast()
    };
    let scene = start(&spec);
    let key = scene.site(Host::B).key().expect("a key");
    scene.site(Host::A).trust(Host::B, &key).expect("trusted");
    let mut guest = scene.guest_on(Host::A);
    let untrusted = refused_move(&scene, &mut guest);
    tells(&untrusted, "peer-refused", &["host-b"]);
    scene.is_clean(Host::B);
}

#[test]
fn a_peer_with_another_key() {
    if !can_run() {
        return;
    }
    let spec = PairSpec {
        trust: false,
        ..fast()
    };
    let scene = start(&spec);
    let (a, b) = (scene.site(Host::A), scene.site(Host::B));
    let own = a.key().expect("a key");
    // Not the destination's, but well-formed: this host's own.
    a.trust(Host::B, &own).expect("written down");
    b.trust(Host::A, &own).expect("trusted");
    let mut guest = scene.guest_on(Host::A);
    let other = refused_move(&scene, &mut guest);
    tells(&other, "peer-refused", &["key"]);
    scene.is_clean(Host::B);
}

#[test]
fn a_destination_that_already_has_such_a_machine_or_volume() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    let b = scene.on(Host::B);
    b.run(&["volume", "create", NAME, "--size", "16MiB"])
        .expect("created");
    let volume = refused_move(&scene, &mut guest);
    tells(&volume, "migration-failed", &["volume", NAME]);
    let kept = b.run(&["volume", "show", NAME]).expect("untouched");
    assert!(kept.contains("16777216"), "{kept}");

    let toml = scene.site(Host::B).folder().join("other.toml");
    let text = format!("name = \"{NAME}\"\nmemory = \"64MiB\"\n");
    std::fs::write(&toml, text).expect("written");
    b.run(&["volume", "rm", NAME]).expect("removed");
    b.run(&["machine", "define", &toml.to_string_lossy()])
        .expect("defined");
    let machine = refused_move(&scene, &mut guest);
    tells(&machine, "migration-failed", &["machine", NAME]);
    assert_eq!(scene.status(Host::B), Some(MachineStatus::Defined));

    b.run(&["machine", "undefine", NAME]).expect("forgotten");
    scene.moves(Host::A, &[]);
    scene.verified_on(Host::B, &mut guest);
}

#[test]
fn a_destination_without_space() {
    if !can_run() {
        return;
    }
    let mut scene = prepare(&fast());
    let state = scene.site(Host::B).state();
    let small = Tmpfs::over(&state, "96m");
    for host in Host::BOTH {
        scene.site_mut(host).start().expect("up");
    }
    let mut guest = scene.guest_on(Host::A);
    let full = refused_move(&scene, &mut guest);
    tells(&full, "migration-failed", &["room"]);
    scene.is_clean(Host::B);
    scene.site_mut(Host::B).stop().expect("stopped");
    drop(small);
}

/// A small file system over a folder, with the folder's content.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn over(folder: &Path, size: &str) -> Tmpfs {
        let aside = folder.with_extension("aside");
        std::fs::rename(folder, &aside).expect("moved aside");
        std::fs::create_dir(folder).expect("created");
        let size = format!("size={size},mode=700");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "lab"])
            .arg(folder));
        run(Command::new("cp")
            .arg("-a")
            .arg(aside.join("."))
            .arg(folder));
        Tmpfs(folder.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily, for a daemon that still has it open after a failed test.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn run(command: &mut Command) {
    assert!(command.status().expect("starts").success(), "{command:?}");
}

#[test]
fn a_destination_without_qemu() {
    if !can_run() {
        return;
    }
    let scene = start(&destination_with("/nonexistent/qemu"));
    let mut guest = scene.guest_on(Host::A);
    let missing = refused_move(&scene, &mut guest);
    tells(&missing, "migration-failed", &["/nonexistent/qemu"]);
    scene.is_clean(Host::B);
}

#[test]
fn a_destination_whose_qemu_is_too_old() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let folder = scene.site(Host::B).folder().to_owned();
    let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 5}, "package": ""}, "capabilities": []}}"#;
    let old = format!(
        "#!/bin/sh\necho '{greeting}'\n\
         exec sed -u 's/.*\"id\":\\([0-9]*\\).*/{{\"return\": {{}}, \"id\": \\1}}/'\n"
    );
    let mut scene = with_qemu(scene, &script(&folder.join("old-qemu"), &old));
    let mut guest = scene.guest_on(Host::A);
    let refused = refused_move(&scene, &mut guest);
    tells(&refused, "migration-failed", &["5.2"]);
    scene.is_clean(Host::B);
    scene.site_mut(Host::B).stop().expect("stopped");
}

#[test]
fn a_destination_whose_qemu_lacks_the_machine_type() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let folder = scene.site(Host::B).folder().to_owned();
    // Lets every q35 pass for one that nobody asks for.
    let other = "#!/bin/sh\ncase \"$*\" in\n*'-machine none'*)\n  \
        qemu-system-x86_64 \"$@\" | sed -u 's/pc-q35-/pc-other-/g' ;;\n\
        *) exec qemu-system-x86_64 \"$@\" ;;\nesac\n";
    let scene = with_qemu(scene, &script(&folder.join("other-qemu"), other));
    let mut guest = scene.guest_on(Host::A);
    let refused = refused_move(&scene, &mut guest);
    tells(&refused, "migration-failed", &["pc-q35-"]);
    scene.is_clean(Host::B);
}

/// Restarts the destination's daemon with another QEMU.
fn with_qemu(mut scene: Scene, qemu: &Path) -> Scene {
    let site = scene.site_mut(Host::B);
    site.stop().expect("stopped");
    let spec = SiteSpec {
        qemu: Some(qemu.to_owned()),
        ..SiteSpec::default()
    };
    site.configure(&spec).expect("configured");
    site.start().expect("up again");
    scene
}

#[test]
fn without_userfaultfd_memory_goes_first_and_the_output_says_so() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let folder = scene.site(Host::B).folder().to_owned();
    // Neither the device nor the system call: what an unprivileged QEMU finds on most hosts.
    let text = "#!/bin/sh\nexec unshare -m sh -c '\n\
        mount --bind /dev/null /dev/userfaultfd 2>/dev/null\n\
        exec setpriv --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace qemu-system-x86_64 \"$@\"' sh \"$@\"\n";
    let scene = with_qemu(scene, &script(&folder.join("plain-qemu"), text));
    let mut guest = scene.guest_on(Host::A);
    let ended = scene.moves(Host::A, &[]);
    let view = ended.last.expect("a last word").view;
    println!("{:?}", view.messages);
    let told = view
        .messages
        .iter()
        .any(|m| m.contains("pre-copy") || m.contains("precopy"));
    assert!(told, "{:?}", view.messages);
    let report = view.report.expect("a report");
    assert!(report.verified);
    // What the guest wrote to goes again, as what changed.
    let deltas = report.deltas;
    println!("{}", serde_json::to_string(&report).expect("plain data"));
    assert!(deltas.units > 0 && deltas.saved > 0, "{deltas:?}");
    assert!(deltas.units <= deltas.hits && deltas.hits <= deltas.again);
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}

#[test]
fn a_port_that_is_taken() {
    if !can_run() {
        return;
    }
    let mut scene = prepare(&fast());
    let namespace = scene.lab().namespace(Host::A).clone();
    let address = (Host::A.wan_address(), 7420);
    let taken = namespace.run("listener", || {
        Ok(std::net::TcpListener::bind(address).expect("free until now"))
    });
    let log = failed_start(&mut scene);
    assert!(log.contains("7420") && log.contains("in use"), "{log}");
    drop(taken);
    scene.site_mut(Host::A).start().expect("up now");
}

#[test]
fn a_damaged_state_directory() {
    if !can_run() {
        return;
    }
    let mut scene = start(&fast());
    let _guest = scene.defined_on(Host::A);
    let site = scene.site_mut(Host::A);
    site.stop().expect("stopped");
    // One record that cannot be understood: the daemon comes up and names it.
    let record = site
        .state()
        .join("machines")
        .join(NAME)
        .join("runtime.toml");
    std::fs::write(&record, "epoch = what").expect("written");
    site.start().expect("up all the same");
    let log = site.log_text();
    assert!(log.contains("runtime.toml"), "{log}");
    let told = refusal(site.whimbrel().run(&["machine", "start", NAME]));
    assert!(told.error.is_some(), "{told:?}");
    let untouched = std::fs::read_to_string(&record).expect("still there");
    assert_eq!(untouched, "epoch = what");

    // What the whole directory hangs on: it does not come up, and says why.
    site.stop().expect("stopped");
    std::fs::write(site.state().join("VERSION"), "soon\n").expect("written");
    let log = failed_start(&mut scene);
    assert!(log.contains("VERSION"), "{log}");
}

/// The log of a daemon that does not come up on host-a.
fn failed_start(scene: &mut Scene) -> String {
    match scene.site_mut(Host::A).start() {
        Err(PairError::DaemonEnded { log, status, .. }) => {
            assert!(!status.success());
            assert!(log.contains("next:"), "no next step: {log}");
            log
        }
        other => panic!("it should not come up: {other:?}"),
    }
}

#[test]
fn a_second_move_of_the_same_machine() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    let a = scene.on(Host::A);
    let mut follow = a
        .follow(&["migrate", NAME, "--to", "host-b", "--hold"])
        .expect("the command starts");
    let held = follow.until("being held", MOVE_WITHIN, |view| {
        view.state == whimbrel_lab::pair::answers::MigrationState::Held
    });
    held.expect("held");
    let second = refusal(a.run(&["migrate", NAME, "--to", "host-b"]));
    assert!(second.error.is_some(), "{second:?}");
    for args in [
        &["machine", "stop", NAME][..],
        &["machine", "undefine", NAME],
        &["volume", "rm", NAME],
    ] {
        let told = refusal(a.run(args));
        assert!(told.error.is_some(), "{told:?}");
    }
    a.run(&["cancel", NAME]).expect("cancelled");
    follow.end(MOVE_WITHIN).expect("the move ends");
    scene.works(&mut guest);
}
