//! Storage that fails under a guest: no room, I/O errors. The guest is paused or told, as its machine says, goes
//! on when the storage does, and no byte is wrong afterwards.

mod e2e_support;

use e2e_support::{MOVE_WITHIN, NAME, Scene, can_run, fast, line, secs, start};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use whimbrel_lab::net::{Host, LabSpec};
use whimbrel_lab::pair::answers::{MachineStatus, MachineView, Phase, SpaceKind};
use whimbrel_lab::pair::{Guest, GuestSpec, PairSpec};
use whimbrel_lab::process::Process;
use whimbrel_lab::wan::WanSpec;

/// A second volume, which the guest leaves alone.
const SPARE: &str = "spare";

const MIB: u64 = 1 << 20;

/// A file system in memory of a fixed size, over a folder.
struct Small(PathBuf);

impl Small {
    fn over(folder: &Path, mib: u64) -> Small {
        std::fs::create_dir_all(folder).expect("a folder");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(folder)
            .status();
        assert!(status.expect("mount is there").success(), "mounted");
        Small(folder.to_owned())
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.0).expect("a file system");
        stat.f_bavail * stat.f_frsize
    }

    /// Takes all the room there is, with a file that is returned.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = std::fs::File::create(&path).expect("made");
        let full = loop {
            if let Err(error) = file.write_all(&[1; 65536]) {
                break error;
            }
        };
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Whoever still has a file open there keeps it until then.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// `qemu-io` on a machine's export; what it said, and whether it did it.
fn qemu_io(scene: &Scene, host: Host, volume: &str, deed: &str) -> (bool, String) {
    let socket = scene.site(host).machine_file(NAME, "nbd.sock");
    let uri = format!("nbd+unix:///{volume}?socket={}", socket.display());
    let output = Command::new("qemu-io")
        .args(["-f", "raw", "-t", "none", "-c", deed, &uri])
        .output()
        .expect("qemu-io is there");
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said += &String::from_utf8_lossy(&output.stderr);
    let done = output.status.success() && !said.contains("failed");
    (done, said)
}

fn view(scene: &Scene, host: Host) -> MachineView {
    let view = scene.machine(host, NAME).expect("the daemon answers");
    view.expect("the machine is known")
}

/// Waits until the guest is paused by its disk, which says why.
fn paused(scene: &Scene, host: Host, because: &str) {
    let deadline = Instant::now() + secs(60);
    loop {
        let view = view(scene, host);
        // Without a reason it is a QEMU that is too busy to answer, or was when it was asked for the reason.
        if view.status == MachineStatus::Paused
            && let Some(said) = &view.paused_because
        {
            assert!(said.contains(because) && said.contains(NAME), "{said}");
            return;
        }
        assert!(Instant::now() < deadline, "{view:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Lets it go on, again if the storage was not quite ready.
fn resumes(scene: &Scene, host: Host, guest: &mut Guest) {
    scene
        .on(host)
        .run(&["machine", "resume", NAME])
        .expect("resumed");
    scene.reaches(host, Some(MachineStatus::Running));
    scene.works(guest);
}

fn with_spare() -> GuestSpec {
    let mut spec = GuestSpec::small(NAME);
    spec.more_volumes = vec![SPARE.to_owned()];
    spec
}

#[test]
fn a_full_file_system_pauses_the_guest_and_is_told_to_other_clients() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let small = Small::over(&scene.site(Host::A).state().join("volumes"), 220);
    let a = scene.on(Host::A);
    a.run(&["volume", "create", SPARE, "--size", "1GiB"])
        .expect("made");
    let mut guest = scene.guest_of(Host::A, with_spare());
    let refused = scene.on(Host::A).run(&["machine", "resume", NAME]);
    assert!(refused.is_err(), "nothing paused it: {refused:?}");

    // Another client of the same daemon takes all the room there is.
    let mut stored = 0;
    let said = loop {
        let deed = format!("write -P {} {stored}M 1M", 1 + stored % 200);
        match qemu_io(&scene, Host::A, SPARE, &deed) {
            (true, _) => stored += 1,
            (false, said) => break said,
        }
        assert!(stored < 220, "the file system does not fill up");
    };
    assert!(said.contains("No space left on device"), "{said}");
    paused(&scene, Host::A, "no space left");
    // What was answered is there.
    for at in 0..stored {
        let deed = format!("read -P {} {at}M 1M", 1 + at % 200);
        let (done, said) = qemu_io(&scene, Host::A, SPARE, &deed);
        assert!(done, "{said}");
    }
    // Resumed too early, it is paused again and loses nothing by it.
    scene
        .on(Host::A)
        .run(&["machine", "resume", NAME])
        .expect("tried");
    paused(&scene, Host::A, "no space left");

    // A trim gives room back, to whoever wants it.
    let free = small.free();
    let (done, said) = qemu_io(&scene, Host::A, SPARE, "discard 0 32M");
    assert!(done, "{said}");
    assert!(small.free() >= free + 30 * MIB, "{free} {}", small.free());
    let (done, said) = qemu_io(&scene, Host::A, SPARE, "write -P 77 500M 1M");
    assert!(done, "{said}");
    resumes(&scene, Host::A, &mut guest);
    for (deed, what) in [
        ("read -P 0 0 32M", "trimmed"),
        ("read -P 77 500M 1M", "written after"),
    ] {
        let (done, said) = qemu_io(&scene, Host::A, SPARE, deed);
        assert!(done, "{what}: {said}");
    }
    scene.verified_on(Host::A, &mut guest);
}

#[test]
fn a_destination_that_fills_up_in_the_drain_pauses_the_guest_and_completes_when_there_is_room() {
    if !can_run() {
        return;
    }
    let scene = start(&PairSpec::new(LabSpec::new(WanSpec::symmetric(line(
        100, 5,
    )))));
    let small = Small::over(&scene.site(Host::B).state().join("volumes"), 300);
    let mut guest = scene.guest_on(Host::A);
    let args = ["migrate", NAME, "--to", "host-b"];
    let mut follow = scene.on(Host::A).follow(&args).expect("the command starts");
    // Memory is still on its way, and must go on: QEMU itself waits for it, and says nothing meanwhile.
    let draining = follow.until("the drain", MOVE_WITHIN, |view| view.phase == Phase::Drain);
    draining.expect("draining");
    let filler = small.fill();
    paused(&scene, Host::B, "no space left");
    let told = follow.until("both hosts say so", MOVE_WITHIN, |view| {
        let says = |m: &String| m.contains("cannot store") && m.contains("no space");
        view.messages.iter().any(says)
    });
    let before = told.expect("told").view.link.reconnects;
    let memory = follow.until("memory is there", MOVE_WITHIN, |view| {
        let mut ram = view.spaces.iter().filter(|s| s.kind == SpaceKind::Ram);
        ram.all(|s| s.units_resident >= s.units_live)
    });
    let after = memory.expect("memory needs no disk").view.link.reconnects;
    assert_eq!((before, after), (0, 0), "a full disk breaks no connection");
    std::fs::remove_file(filler).expect("removed");
    resumes(&scene, Host::B, &mut guest);
    let ended = follow.end(MOVE_WITHIN).expect("the move ends");
    assert!(ended.completed(), "{}", ended.describe());
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}

/// A volume's content on a file that fails on command: `nbdkit`'s error filter, shown as a file by
/// `qemu-storage-daemon` (FUSE).
struct Failing {
    trigger: PathBuf,
    // The order is that of dropping.
    _shown: Process,
    _kept: Process,
}

impl Failing {
    /// Puts it over `data`, with its content.
    fn over(data: &Path, folder: &Path) -> Option<Failing> {
        let (kept, trigger) = (folder.join("kept"), folder.join("trigger"));
        std::fs::copy(data, &kept).expect("copied");
        let socket = folder.join("kit.sock");
        let mut command = Command::new("nbdkit");
        command
            .args(["--foreground", "--filter=error", "--unix"])
            .arg(&socket)
            .args(["file", &format!("file={}", kept.display())])
            .args(["error-pread=EIO", "error-pread-rate=100%"])
            .args(["error-pwrite=EIO", "error-pwrite-rate=100%"])
            .arg(format!("error-pread-file={}", trigger.display()))
            .arg(format!("error-pwrite-file={}", trigger.display()));
        let kit = Process::spawn("nbdkit", command, &folder.join("kit.log")).expect("nbdkit");
        wait_for(|| socket.exists());
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!(
                "driver=nbd,node-name=n,server.type=unix,server.path={}",
                socket.display()
            ))
            .arg("--export")
            .arg(format!(
                "type=fuse,id=f,node-name=n,mountpoint={},writable=on",
                data.display()
            ));
        let mut shown =
            Process::spawn("storage daemon", command, &folder.join("fuse.log")).expect("started");
        let mounts = || std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let name = data.display().to_string();
        wait_for(|| mounts().contains(&name) || !shown.is_running().expect("its status"));
        if !mounts().contains(&name) {
            eprintln!("skipped: no FUSE exports here: {}", shown.output());
            return None;
        }
        Some(Failing {
            trigger,
            _shown: shown,
            _kept: kit,
        })
    }

    fn fail(&self) {
        std::fs::write(&self.trigger, "").expect("written");
    }

    fn mend(&self) {
        std::fs::remove_file(&self.trigger).expect("removed");
    }
}

fn wait_for(mut met: impl FnMut() -> bool) {
    let deadline = Instant::now() + secs(20);
    while !met() {
        assert!(Instant::now() < deadline, "does not come up");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_io_error_underneath_pauses_the_guest_which_goes_on_when_it_is_mended() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let mut guest = scene.defined_on(Host::A);
    let folder = tempfile::tempdir().expect("a folder");
    let data = scene
        .site(Host::A)
        .state()
        .join("volumes")
        .join(NAME)
        .join("data");
    let Some(disk) = Failing::over(&data, folder.path()) else {
        return;
    };
    scene.boot(Host::A, &mut guest).expect("the guest boots");
    disk.fail();
    paused(&scene, Host::A, "I/O error");
    // Nobody has read the end of the disk before, so no cache has it.
    let (done, said) = qemu_io(&scene, Host::A, NAME, "read 250M 64k");
    assert!(!done && said.contains("Input/output error"), "{said}");
    disk.mend();
    resumes(&scene, Host::A, &mut guest);
    scene.verified_on(Host::A, &mut guest);
    drop(scene);
}

#[test]
fn a_machine_that_wants_errors_reported_is_not_paused() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let small = Small::over(&scene.site(Host::A).state().join("volumes"), 220);
    let mut spec = GuestSpec::small(NAME);
    spec.on_disk_error = Some("report".to_owned());
    let mut guest = scene.guest_of(Host::A, spec);
    let filler = small.fill();
    // Its file system and its programs have to live with it.
    let deadline = Instant::now() + secs(60);
    while guest.errors() == 0 {
        guest.wait_for_report(secs(30)).expect("it lives");
        assert!(Instant::now() < deadline, "the guest was told of nothing");
    }
    assert_eq!(scene.status(Host::A), Some(MachineStatus::Running));
    std::fs::remove_file(filler).expect("removed");
}

/// A snapshot of the guest at work, and the faults of its disk when it is restored.
fn snapshot_of(
    scene: &Scene,
    guest: &mut Guest,
    repository: &str,
    name: &str,
) -> serde_json::Value {
    // What it has heard of by now must be in it.
    guest.listen();
    let a = scene.on(Host::A);
    let create = [
        "snapshot", "create", NAME, "--to", repository, "--name", name,
    ];
    let made: serde_json::Value = a.answer(&create).expect("made");
    println!("{made}");
    let image = scene.folder().path().join(format!("{name}.raw"));
    let file = image.to_string_lossy();
    a.run(&["snapshot", "restore", repository, name, "--to", &file])
        .expect("restored");
    let faults = guest.verify_crashed(&image).expect("verified");
    assert_eq!(faults, Vec::<String>::new(), "{name}");
    std::fs::remove_file(image).expect("removed");
    made
}

#[test]
fn snapshots_of_a_guest_at_work_are_its_disk_after_a_power_cut() {
    if !can_run() {
        return;
    }
    let scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    scene.works(&mut guest);
    let repository = scene.folder().path().join("repository");
    let repository = repository.to_string_lossy().into_owned();
    let first = snapshot_of(&scene, &mut guest, &repository, "first");
    scene.works(&mut guest);
    let second = snapshot_of(&scene, &mut guest, &repository, "second");
    assert_eq!(second["parent"], "first");
    let stored = |made: &serde_json::Value| made["stored_bytes"].as_u64().expect("a number");
    assert!(stored(&second) * 2 < stored(&first), "{first} {second}");
    scene.works(&mut guest);
    // The older one goes, the younger one has all it needs.
    let a = scene.on(Host::A);
    a.run(&["snapshot", "rm", &repository, "first"])
        .expect("removed");
    let verified: serde_json::Value = a
        .answer(&["snapshot", "verify", &repository])
        .expect("nothing is damaged");
    assert_eq!(verified["damaged"], 0);
    scene.verified_on(Host::A, &mut guest);
}
