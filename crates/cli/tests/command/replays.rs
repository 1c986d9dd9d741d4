//! Traces replayed onto exports of nbdkit and qemu-nbd.

use super::{err, out, whimbrel};
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use whimbrel_volume::trace::format::Writer;
use whimbrel_volume::trace::{Kind, Record};

const MIB: u64 = 1 << 20;

/// A server on a socket of its own; ended when dropped.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn start(mut command: Command, socket: PathBuf) -> Server {
        let child = command.stderr(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "{command:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Server { child, socket }
    }

    fn nbdkit(dir: &Path, name: &str, args: &[&str]) -> Server {
        let socket = dir.join(name);
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(&socket).args(args);
        Server::start(command, socket)
    }

    fn qemu_nbd(dir: &Path, image: &str) -> Server {
        let file = dir.join(image);
        File::create_new(&file).unwrap().set_len(8 * MIB).unwrap();
        let socket = dir.join(format!("{image}.sock"));
        let mut command = Command::new("qemu-nbd");
        command.args(["-f", "raw", "-t", "--discard=unmap", "-k"]);
        command.arg(&socket).arg(&file);
        Server::start(command, socket)
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn trace(path: &Path, all: &[(Kind, u64, u64)]) {
    let mut writer = Writer::new(File::create_new(path).unwrap()).unwrap();
    for (n, &(kind, offset, len)) in (0..).zip(all) {
        let record = Record {
            at_us: n * 20_000,
            kind,
            offset,
            len,
        };
        writer.push(&record).unwrap();
    }
    writer.finish().unwrap();
}

/// All kinds; the last request ends at 8 MiB.
const MIXED: [(Kind, u64, u64); 8] = [
    (Kind::Write, 0, 2 * MIB),
    (Kind::Write, 512, 4096),
    (Kind::Zero, MIB, 65_536),
    (Kind::Flush, 0, 0),
    (Kind::Gap, 0, 5),
    (Kind::Trim, 4 * MIB, MIB),
    (Kind::Read, 512, 4096),
    (Kind::Write, 8 * MIB - 512, 512),
];

fn replay(dir: &Path, server: &Server, words: &str) -> std::process::Output {
    let trace = dir.join("trace");
    let line = format!(
        "trace replay {} --to {} {words}",
        trace.display(),
        server.uri()
    );
    whimbrel(dir, &line)
}

#[test]
fn a_replay_does_all_that_the_trace_tells_and_the_same_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    trace(&dir.join("trace"), &MIXED);
    let mut images = Vec::new();
    for (image, speed) in [("a", "original"), ("b", "max --queue 1")] {
        let server = Server::qemu_nbd(dir, image);
        let words = format!("--yes --json --speed {speed}");
        let said = replay(dir, &server, &words);
        assert!(said.status.success(), "{}", err(&said));
        let report: Value = serde_json::from_str(&out(&said)).unwrap();
        assert_eq!(report["requests"], 7);
        assert_eq!(report["errors"], 0);
        assert_eq!(report["not_in_trace"], 5);
        assert_eq!(report["kinds"]["write"]["bytes"], 2 * MIB + 4096 + 512);
        assert_eq!(report["kinds"]["zero"]["requests"], 1);
        assert_eq!(report["kinds"]["trim"]["bytes"], MIB);
        assert_eq!(report["kinds"]["flush"]["requests"], 1);
        let in_time = report["took_s"].as_f64().unwrap() >= 0.14;
        assert_eq!(report["lateness"].is_object(), speed == "original");
        assert!(in_time || speed != "original");
        drop(server);
        images.push(std::fs::read(dir.join(image)).unwrap());
    }
    // Between two writes of a replay at its own speed there was time enough for the first.
    assert!(images[0] == images[1]);
    let content = &images[0];
    assert!(content[..512].iter().any(|&b| b != 0));
    assert!(content[MIB as usize..][..65_536].iter().all(|&b| b == 0));
    assert!(content[8 * MIB as usize - 512..].iter().any(|&b| b != 0));
}

#[test]
fn an_export_that_does_not_fit_or_would_be_overwritten_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    trace(&dir.join("trace"), &MIXED);
    let small = Server::nbdkit(dir, "small", &["memory", "7M"]);
    let read_only = Server::nbdkit(dir, "ro", &["-r", "memory", "8M"]);
    let fine = Server::nbdkit(dir, "fine", &["memory", "8M"]);
    for (server, words, word) in [
        (&small, "--yes", "reaches to byte 8388608"),
        (&read_only, "--yes", "read-only"),
        (&fine, "", "say --yes"),
    ] {
        let said = replay(dir, server, words);
        assert_eq!(said.status.code(), Some(1));
        let text = err(&said);
        assert!(
            text.contains(word) && text.contains("nothing was done"),
            "{text}"
        );
    }
    let said = replay(dir, &fine, "--yes --speed max");
    assert!(said.status.success(), "{}", err(&said));
    assert!(out(&said).contains("7 requests"), "{}", out(&said));
    // Zeroes as content where an export has no zeroing.
    let plain = Server::nbdkit(dir, "plain", &["--filter=nozero", "memory", "8M"]);
    let said = replay(dir, &plain, "--yes --json");
    let report: Value =
        serde_json::from_str(&out(&said)).unwrap_or_else(|_| panic!("{}", err(&said)));
    assert_eq!(report["kinds"]["zero"]["requests"], 1);
    assert_eq!(report["errors"], 0);
}

#[test]
fn what_the_export_fails_at_is_counted_and_the_rest_done() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    trace(
        &dir.join("trace"),
        &[
            (Kind::Read, 0, 512),
            (Kind::Flush, 0, 0),
            (Kind::Read, MIB, 40 * MIB),
        ],
    );
    let error = [
        "--filter=error",
        "memory",
        "64M",
        "error-pread=EIO",
        "error-pread-rate=100%",
    ];
    let server = Server::nbdkit(dir, "bad", &error);
    let said = replay(dir, &server, "--json");
    assert_eq!(said.status.code(), Some(1));
    let report: Value = serde_json::from_str(&out(&said)).unwrap();
    // The long one went as two.
    assert_eq!(report["errors"], 3);
    assert_eq!(report["first_error"]["errno"], 5);
    assert_eq!(report["kinds"]["flush"]["errors"], 0);
    assert!(
        err(&said).contains("3 of 4 requests failed"),
        "{}",
        err(&said)
    );
    drop(server);
    let server = Server::nbdkit(dir, "good", &["memory", "64M"]);
    let said = replay(dir, &server, "--json");
    let report: Value = serde_json::from_str(&out(&said)).unwrap();
    assert_eq!(report["kinds"]["read"]["bytes"], 40 * MIB + 512);
}
