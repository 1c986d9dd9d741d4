//! A machine moves onto an image, or a device, that waits for it, and back onto a file.

mod e2e_support;

use std::path::PathBuf;
use std::process::Command;

use e2e_support::{NAME, can_run, fast, start};
use whimbrel_lab::net::Host;

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
