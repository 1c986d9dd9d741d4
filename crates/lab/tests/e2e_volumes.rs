//! A machine moves onto an image, or a device, that waits for it, and back onto a file; what is sparse stays
//! sparse, and what is trimmed under way is not sent.

mod e2e_support;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e_support::{MOVE_WITHIN, NAME, Scene, can_run, fast, line, start};
use whimbrel_lab::net::{Host, LabSpec};
use whimbrel_lab::pair::answers::{MigrationView, Phase, VolumeView};
use whimbrel_lab::pair::{GuestSpec, PairSpec};
use whimbrel_lab::wan::WanSpec;

/// There and back, the other host's place being made by `create`.
fn there_and_back(create: &[&str]) {
    let scene = start(&fast());
    let mut guest = scene.guest_on(Host::A);
    let b = scene.on(Host::B);
    // Too small a place is refused before anything moves.
    b.run(&["volume", "create", NAME, "--size", "1MiB", "--awaits"])
        .expect("made");
    let refused = scene.tries_to_move(Host::A, &[]);
    assert!(!refused.completed());
    assert!(
        refused.describe().contains("1048576 bytes"),
        "{}",
        refused.describe()
    );
    b.run(&["volume", "rm", NAME]).expect("removed");

    let mut args = vec!["volume", "create", NAME, "--awaits"];
    args.extend(create);
    b.run(&args).expect("made");
    scene.works(&mut guest);
    let ended = scene.moves(Host::A, &[]);
    let report = ended.last.and_then(|seen| seen.view.report);
    assert!(report.expect("a report").verified);
    scene.works(&mut guest);
    let shown = b.run(&["volume", "heat", NAME]).expect("shown");
    println!("{shown:?}");
    let ended = scene.moves(Host::B, &[]);
    let report = ended.last.and_then(|seen| seen.view.report);
    assert!(report.expect("a report").verified);
    scene.works(&mut guest);
    scene.verified_on(Host::A, &mut guest);
}

#[test]
fn onto_an_image_that_waits_and_back() {
    if can_run() {
        there_and_back(&["--size", "2GiB", "--format", "qcow2"]);
    }
}

/// A loop device, where this machine has any.
struct Loop(PathBuf);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

#[test]
fn onto_a_device_that_waits_and_back() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("device");
    std::fs::File::create(&file)
        .and_then(|f| f.set_len(2 << 30))
        .expect("a file");
    let out = Command::new("losetup")
        .args(["--find", "--show"])
        .arg(&file)
        .output();
    let Some(out) = out.ok().filter(|out| out.status.success()) else {
        eprintln!("skipped: no loop devices here");
        return;
    };
    let name = String::from_utf8_lossy(&out.stdout).trim().to_string();
    let device = Loop(PathBuf::from(&name));
    there_and_back(&["--device", &name]);
    drop(device);
}

const MIB: u64 = 1 << 20;

/// What the guest deletes and trims.
const BALLAST_MIB: u32 = 48;

/// A file with noise in the first bytes of every stretch, and holes.
fn holey(path: &Path, stretches: u64, stretch: u64, noise: u64) {
    let file = std::fs::File::create(path).expect("a file");
    file.set_len(stretches * stretch).expect("long");
    let mut word = 1u64;
    for at in 0..stretches {
        let bytes: Vec<u8> = (0..noise / 8)
            .flat_map(|_| {
                word = word
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                (word | 1).to_le_bytes()
            })
            .collect();
        file.write_all_at(&bytes, at * stretch).expect("written");
    }
}

/// Bytes that a volume takes on a host.
fn allocated(scene: &Scene, host: Host, volume: &str) -> u64 {
    let view: VolumeView = scene
        .on(host)
        .answer(&["volume", "show", volume])
        .expect("shown");
    std::fs::metadata(view.data).expect("there").blocks() * 512
}

#[test]
fn sparse_stays_sparse_and_a_trim_on_the_way_cancels_its_copies() {
    if !can_run() {
        return;
    }
    let scene = start(&PairSpec::new(LabSpec::new(WanSpec::symmetric(line(
        100, 5,
    )))));
    let folder = tempfile::tempdir().expect("a folder");
    let (holes, full) = (
        folder.path().join("holes.raw"),
        folder.path().join("full.raw"),
    );
    holey(&holes, 128, 2 * MIB, 256 << 10);
    holey(&full, 1, 64 * MIB, 64 * MIB);
    let import = |name: &str, file: &Path, to: &str| {
        let file = file.to_string_lossy();
        let args = ["volume", "import", name, &file, "--to", to];
        scene.on(Host::A).run(&args).expect("imported");
    };
    import("holes-raw", &holes, "raw");
    import("holes-qcow2", &holes, "qcow2");
    import("trimmed", &full, "raw");
    let place = [
        "volume",
        "create",
        "holes-qcow2",
        "--size",
        "256MiB",
        "--format",
        "qcow2",
        "--awaits",
    ];
    scene.on(Host::B).run(&place).expect("made");
    let mut spec = GuestSpec::small(NAME);
    spec.more_volumes = ["holes-raw", "holes-qcow2", "trimmed"]
        .map(String::from)
        .to_vec();
    let mut guest = scene.guest_of(Host::A, spec);
    let control = |patience| guest.control(scene.lab(), patience).expect("reached");
    control(MOVE_WITHIN).fill(BALLAST_MIB).expect("filled");
    let filled = allocated(&scene, Host::A, NAME);

    let args = ["migrate", NAME, "--to", "host-b"];
    let mut follow = scene.on(Host::A).follow(&args).expect("the command starts");
    let draining = follow.until("the drain", MOVE_WITHIN, |view| view.phase == Phase::Drain);
    draining.expect("draining");
    // Memory goes first, so nothing of the last disk has been sent yet.
    let socket = scene.site(Host::B).machine_file(NAME, "nbd.sock");
    let uri = format!("nbd+unix:///trimmed?socket={}", socket.display());
    let io = |deed: &str| {
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw", "-d", "unmap", "-t", "none", "-c", deed, &uri]);
        let out = io.output().expect("qemu-io is there");
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success() && !said.contains("failed"), "{said}");
    };
    io("discard 0 48M");
    let sent_of = |view: &MigrationView, name: &str| {
        let space = view.spaces.iter().find(|space| space.name == name);
        space.map(|space| space.units_sent)
    };
    // When memory is here its own disk begins to come; slowly, while it trims that.
    let begun = follow.until("its own disk", MOVE_WITHIN, |view| {
        sent_of(view, NAME).is_some_and(|sent| sent > 0)
    });
    begun.expect("told");
    scene.lab().wan().set_both(line(4, 5)).expect("slower");
    control(MOVE_WITHIN).trim().expect("trimmed");
    let view = follow.until("what was sent of the trimmed disk", MOVE_WITHIN, |view| {
        view.spaces.iter().any(|space| space.name == "trimmed")
    });
    let before = view.expect("told").view;
    let sent_before = before
        .spaces
        .iter()
        .find(|s| s.name == "trimmed")
        .expect("it")
        .units_sent;
    scene.lab().wan().set_both(line(400, 5)).expect("faster");
    let ended = follow.end(MOVE_WITHIN).expect("the move ends");
    assert!(ended.completed(), "{}", ended.describe());
    let view = ended.last.expect("a last word").view;
    let sent = view
        .spaces
        .iter()
        .find(|s| s.name == "trimmed")
        .expect("it")
        .units_sent;
    println!("of 16384 units, 12288 of them trimmed: {sent_before} sent at first, {sent} in all");
    assert!(
        sent <= 4096 + sent_before,
        "{sent} units sent, {sent_before} before the trim"
    );
    let own_sent = sent_of(&view, NAME).expect("it");
    let (had, ballast) = (filled / 4096, u64::from(BALLAST_MIB) * 256);
    println!(
        "of {had} units of the guest's own disk, {ballast} of them trimmed by it: {own_sent} sent"
    );
    assert!(own_sent <= had - ballast * 3 / 4);
    let report = view.report.expect("a report");
    assert!(report.verified);
    let kept = allocated(&scene, Host::B, NAME);
    println!("the guest's own disk: {filled} bytes at the source, {kept} at the destination");
    // The guest writes on meanwhile.
    assert!(kept <= filled - u64::from(BALLAST_MIB) * MIB / 2);
    io("read -P 0 0 48M");
    for volume in ["holes-raw", "holes-qcow2", "trimmed"] {
        let (there, here) = (
            allocated(&scene, Host::A, volume),
            allocated(&scene, Host::B, volume),
        );
        println!("{volume}: {there} bytes at the source, {here} at the destination");
        let bound = if volume == "trimmed" { 16 * MIB } else { there };
        assert!(here <= bound + bound / 100, "{volume}: {here} of {there}");
    }
    // A trim after the move gives back as well.
    io("discard 48M 16M");
    assert_eq!(allocated(&scene, Host::B, "trimmed"), 0);
    scene.works(&mut guest);
    scene.verified_on(Host::B, &mut guest);
}
