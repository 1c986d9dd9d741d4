//! The life of volumes through the command and a real daemon, judged by QEMU's tools.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const WHIMBREL: &str = env!("CARGO_BIN_EXE_whimbrel");

struct Daemon {
    dir: tempfile::TempDir,
    child: Child,
}

impl Daemon {
    fn start() -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let init = Command::new(WHIMBREL)
            .args(["host", "init", "--name", "a", "--state"])
            .arg(&state)
            .output()
            .unwrap();
        assert!(init.status.success());
        let child = run_daemon(&state);
        Daemon { dir, child }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Ends it as a crash does, and starts another.
    fn crash(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = run_daemon(&self.state());
    }

    fn data(&self, volume: &str) -> String {
        let path = self.state().join("volumes").join(volume).join("data");
        path.to_str().unwrap().to_string()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(WHIMBREL);
        command
            .args(args)
            .arg("--state")
            .arg(self.state())
            .current_dir(self.dir.path());
        command
    }

    fn ask(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let out = self.ask(args);
        assert!(out.status.success(), "{args:?}: {}", err(&out));
        String::from_utf8(out.stdout).unwrap()
    }

    fn refused(&self, args: &[&str], word: &str) {
        let out = self.ask(args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        let text = err(&out);
        assert!(text.contains(word), "{args:?}: {text}");
        for part in ["state:", "next:"] {
            assert!(text.contains(part), "{args:?} has no {part} {text}");
        }
    }

    fn allocated(&self, volume: &str) -> u64 {
        let view = self.ok(&["volume", "show", volume, "--json"]);
        let view: serde_json::Value = serde_json::from_str(&view).unwrap();
        view["allocated"].as_u64().unwrap()
    }

    /// Everything in the folder of volumes.
    fn folders(&self) -> Vec<String> {
        let folders = std::fs::read_dir(self.state().join("volumes")).unwrap();
        folders
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect()
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_string()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run_daemon(state: &Path) -> Child {
    // Freed at once, so somebody else could take it; nobody else is that quick.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let child = Command::new(WHIMBREL)
        .args(["host", "run", "--listen", &port.to_string(), "--state"])
        .arg(state)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until(|| {
        let mut show = Command::new(WHIMBREL);
        show.args(["volume", "ls", "--state"]).arg(state);
        show.output().unwrap().status.success()
    });
    child
}

/// A bound for what hangs, not for what is slow: a loaded disk may take many seconds over one `mkdir`.
fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(180);
    while !done() {
        assert!(Instant::now() < deadline, "not within 180 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn err(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn tool(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", err(&out));
}

fn identical(format: &str, data: &str, image: &str) {
    tool(
        "qemu-img",
        &["compare", "-q", "-f", format, "-F", "qcow2", data, image],
    );
}

/// A chain of two with some MiB in 256.
fn image(d: &Daemon) -> String {
    let (base, top) = (d.path("base.raw"), d.path("top.qcow2"));
    tool("qemu-img", &["create", "-q", "-f", "raw", &base, "256M"]);
    let base_writes = ["-c", "write -P 7 0 3M", "-c", "write -P 8 40M 1M"];
    let mut args = vec!["-f", "raw"];
    args.extend(base_writes);
    args.push(&base);
    tool("qemu-io", &args);
    tool(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top,
        ],
    );
    tool(
        "qemu-io",
        &["-c", "write -P 9 200M 6M", "-c", "discard 40M 64k", &top],
    );
    top
}

/// 10 MiB of content, one percent, and an image's own tables.
const SPARSE: u64 = (10 << 20) + (10 << 20) / 100;
const TABLES: u64 = 6 * 65_536;

#[test]
fn volumes_come_from_every_format_and_stay_sparse() {
    let d = Daemon::start();
    let top = image(&d);
    let (flat, sparse) = (d.path("flat.vmdk"), d.path("sparse.vmdk"));
    tool(
        "qemu-img",
        &[
            "convert",
            "-O",
            "vmdk",
            "-o",
            "subformat=monolithicFlat",
            &top,
            &flat,
        ],
    );
    tool("qemu-img", &["convert", "-O", "vmdk", &top, &sparse]);
    let raw = d.path("raw");
    tool("qemu-img", &["convert", "-O", "raw", &top, &raw]);
    for (name, from, to) in [
        ("a", &top, "raw"),
        ("b", &top, "qcow2"),
        ("c", &flat, "raw"),
        ("d", &sparse, "qcow2"),
        ("e", &raw, "qcow2"),
    ] {
        d.ok(&["volume", "import", name, from, "--to", to]);
        identical(to, &d.data(name), &top);
        let allocated = d.allocated(name);
        let most = SPARSE + if to == "qcow2" { TABLES } else { 8192 };
        assert!(allocated <= most, "{name}: {allocated}");
        if to == "qcow2" {
            tool("qemu-img", &["check", "-q", &d.data(name)]);
        }
    }
    for (n, format) in ["raw", "qcow2"].into_iter().enumerate() {
        let clone = format!("clone-{n}");
        d.ok(&["volume", "clone", "b", &clone, "--format", format]);
        identical(format, &d.data(&clone), &top);
        assert!(d.allocated(&clone) <= SPARSE + TABLES);
        let file = d.path(&format!("export.{format}"));
        d.ok(&["volume", "export", "a", &file, "--format", format]);
        identical(format, &file, &top);
        d.refused(&["volume", "export", "a", &file], "already");
    }
    let sly = d.path("sly.raw");
    std::fs::copy(&top, &sly).unwrap();
    d.refused(&["volume", "import", "x", &sly], "begins as a qcow2");
    d.refused(&["volume", "import", "x", "nothing.raw"], "No such file");
    assert!(!d.folders().iter().any(|f| f == "x" || f.starts_with('.')));
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn nbdkit(d: &Daemon, socket: &str, args: &[&str]) -> Server {
    let child = Command::new("nbdkit")
        .args(["-f", "-r", "-U", socket])
        .args(args)
        .current_dir(d.dir.path())
        .spawn()
        .unwrap();
    wait_until(|| Path::new(socket).exists());
    Server(child)
}

#[test]
fn a_disk_behind_a_uri_comes_with_its_holes() {
    let d = Daemon::start();
    let top = image(&d);
    let raw = d.path("raw");
    tool("qemu-img", &["convert", "-O", "raw", &top, &raw]);
    let file = format!("file={raw}");
    for (name, options) in [("new", vec![]), ("old", vec!["--no-sr"])] {
        let socket = d.path(&format!("{name}.sock"));
        let mut args = options;
        args.extend(["file", &file]);
        let _server = nbdkit(&d, &socket, &args);
        let uri = format!("nbd+unix:///?socket={socket}");
        d.ok(&["volume", "import", name, &uri, "--to", "qcow2"]);
        identical("qcow2", &d.data(name), &top);
        assert!(d.allocated(name) <= SPARSE + TABLES);
    }
    d.refused(
        &["volume", "import", "x", "nbd+unix:///x?socket=/nowhere"],
        "reached",
    );
    d.refused(&["volume", "import", "x", "nbd://"], "not an NBD URI");
}

#[test]
fn what_is_interrupted_or_killed_leaves_no_volume() {
    let mut d = Daemon::start();
    // One for each import: nbdkit 1.32 may die of a client that breaks off (`raw_send_socket: sock >= 0`).
    let import = |d: &Daemon, socket: &str| {
        let socket = d.path(socket);
        let args = ["--filter=delay", "pattern", "size=1G", "delay-read=200ms"];
        let server = nbdkit(d, &socket, &args);
        let uri = format!("nbd+unix:///?socket={socket}");
        let mut child = d
            .command(&["volume", "import", "slow", &uri, "--json"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_until(|| !d.folders().is_empty() || child.try_wait().unwrap().is_some());
        if child.try_wait().unwrap().is_some() {
            panic!("ended: {}", err(&child.wait_with_output().unwrap()));
        }
        (child, server)
    };
    let (mut child, _server) = import(&d, "slow.sock");
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until(|| d.folders().is_empty());

    let (mut child, _server) = import(&d, "again.sock");
    d.crash();
    assert!(!child.wait().unwrap().success());
    assert_eq!(d.folders(), Vec::<String>::new());
}

#[test]
fn sizes_change_and_what_was_cut_off_is_gone() {
    let d = Daemon::start();
    for format in ["raw", "qcow2"] {
        d.ok(&[
            "volume", "create", format, "--size", "8MiB", "--format", format,
        ]);
        let data = d.data(format);
        tool("qemu-io", &["-f", format, "-c", "write -P 5 0 8M", &data]);
        d.refused(&["volume", "resize", format, "4MiB"], "lose its last 4MiB");
        d.ok(&["volume", "resize", format, "4MiB", "--shrink"]);
        d.ok(&["volume", "resize", format, "1GiB"]);
        let reads = ["-c", "read -P 5 0 4M", "-c", "read -P 0 4M 8M"];
        let mut args = vec!["-f", format];
        args.extend(reads);
        args.push(&data);
        tool("qemu-io", &args);
        d.ok(&["volume", "check", format]);
    }
    d.refused(&["volume", "resize", "raw", "1000"], "whole sectors");
}

#[test]
fn a_check_tells_broken_from_untidy_and_repairs_only_what_is_safe() {
    let d = Daemon::start();
    d.ok(&[
        "volume", "create", "v", "--size", "8MiB", "--format", "qcow2",
    ]);
    let data = d.data("v");
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 1M", &data]);
    assert!(
        d.ok(&["volume", "check", "v"])
            .starts_with("volume v: good")
    );
    // A count too high: lost room. The mark: not closed.
    let mut bytes = std::fs::read(&data).unwrap();
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
    bytes[block + 1] = 0;
    bytes[block + 2 * 200 + 1] = 1;
    bytes[79] |= 1;
    std::fs::write(&data, &bytes).unwrap();
    let told = d.ok(&["volume", "check", "v"]);
    assert!(
        told.contains("untidy") && told.contains("1 clusters in use count as free, 1"),
        "{told}"
    );
    assert!(
        d.ok(&["volume", "check", "v", "--repair"])
            .contains("repaired")
    );
    tool("qemu-img", &["check", "-q", &data]);
    assert!(
        d.ok(&["volume", "check", "v"])
            .starts_with("volume v: good")
    );
    // A pointer to where nothing is.
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[l1 + 1] = 0x77;
    std::fs::write(&data, &bytes).unwrap();
    let out = d.ask(&["volume", "check", "v", "--repair"]);
    assert_eq!(out.status.code(), Some(1));
    let told = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        told.contains("broken") && told.contains("the L1 table"),
        "{told}"
    );
    assert_eq!(
        std::fs::read(&data).unwrap(),
        bytes,
        "what is broken is not touched"
    );
}

#[test]
fn a_device_is_one_volume_and_keeps_its_content() {
    let d = Daemon::start();
    let file = d.path("device");
    std::fs::File::create(&file)
        .unwrap()
        .set_len(96 << 20)
        .unwrap();
    let out = Command::new("losetup")
        .args(["--find", "--show", &file])
        .output()
        .unwrap();
    if !out.status.success() {
        eprintln!("skipped: no loop devices here");
        return;
    }
    let device = String::from_utf8_lossy(&out.stdout).trim().to_string();
    struct Detach(String);
    impl Drop for Detach {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["--detach", &self.0]).status();
        }
    }
    let _detach = Detach(device.clone());
    let shown = d.ok(&["volume", "create", "d", "--device", &device]);
    assert!(shown.contains("96.0 MiB"), "{shown}");
    d.refused(
        &["volume", "create", "e", "--device", &device],
        "is volume `d` already",
    );
    d.refused(
        &["volume", "create", "e", "--device", &file],
        "not a block device",
    );
    d.ok(&["volume", "rm", "d"]);
    d.refused(
        &[
            "volume", "create", "e", "--device", &device, "--size", "1GiB",
        ],
        "are needed",
    );
    let raw = d.path("raw");
    std::fs::write(&raw, vec![3; 5 << 20]).unwrap();
    d.ok(&["volume", "import", "f", &raw, "--device", &device]);
    tool("cmp", &["-n", "5242880", &raw, &device]);
    d.ok(&["volume", "resize", "f", "96MiB"]);
    d.refused(&["volume", "resize", "f", "97MiB"], "are needed");
    d.ok(&["volume", "check", "f"]);
    d.ok(&["volume", "clone", "f", "g"]);
    tool("cmp", &["-n", "5242880", &raw, &d.data("g")]);
    assert!(d.allocated("g") < 6 << 20);
}

#[test]
fn a_tebibyte_is_shown_at_once() {
    let d = Daemon::start();
    for format in ["raw", "qcow2"] {
        let begin = Instant::now();
        d.ok(&[
            "volume", "create", format, "--size", "1TiB", "--format", format,
        ]);
        let map = d.ok(&["volume", "map", format]);
        assert!(map.contains("1.0 TiB"), "{map}");
        d.ok(&["volume", "heat", format]);
        println!(
            "{format}: made, drawn and asked for its heat in {:?}",
            begin.elapsed()
        );
        assert!(d.allocated(format) < 2 << 20);
    }
    let status = std::fs::File::open(format!("/proc/{}/status", d.child.id())).unwrap();
    let line = BufReader::new(status)
        .lines()
        .map(Result::unwrap)
        .find(|l| l.starts_with("VmHWM"));
    let kib: u64 = line
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    println!("the daemon's memory: {kib} KiB at most");
    // 64 MiB, and 40 MiB for each TiB.
    assert!(kib < (64 + 2 * 40) * 1024);
}

#[path = "volumes/recordings.rs"]
mod recordings;
#[path = "volumes/snapshots.rs"]
mod snapshots;
