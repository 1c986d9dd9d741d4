//! A machine's disk recorded through the command: a real daemon, and a QEMU whose firmware looks for something to
//! start and finds nothing.

use super::{Daemon, err, tool, wait_until};
use serde_json::Value;
use std::process::{Command, Stdio};

#[test]
fn a_recording_holds_what_was_asked_until_it_is_ended() {
    let d = Daemon::start();
    d.ok(&["volume", "create", "root", "--size", "64MiB"]);
    d.refused(
        &["trace", "record", "root", "--out", "t"],
        "no machine runs",
    );
    let text = "name = \"web\"\nmemory = \"64MiB\"\naccel = \"tcg\"\n[[disk]]\nvolume = \"root\"\n";
    std::fs::write(d.path("web.toml"), text).unwrap();
    d.ok(&["machine", "define", &d.path("web.toml")]);
    d.refused(&["trace", "record", "web", "--out", "t"], "does not run");
    d.ok(&["machine", "start", "web"]);
    let timed = [
        "trace", "record", "web", "--for", "300ms", "--out", "timed", "--json",
    ];
    let view: Value = serde_json::from_str(&d.ok(&timed)).unwrap();
    assert_eq!(
        (&view["ended"], &view["volume"]),
        (&"time".into(), &"root".into())
    );
    d.refused(&timed[..7], "cannot be made");

    let record = |out| {
        let mut record = d.command(&["trace", "record", "root", "--out", out, "--json"]);
        record.stdout(Stdio::piped()).stderr(Stdio::piped());
        let record = record.spawn().unwrap();
        // The file is made once it is recorded.
        wait_until(|| d.dir.path().join(out).exists());
        let other = ["trace", "record", "web", "--for", "1ms", "--out", "other"];
        d.refused(&other, "is being recorded");
        record
    };
    let recording = record("asked");
    let socket = d.state().join("machines/web/nbd.sock");
    let uri = format!("nbd+unix:///root?socket={}", socket.display());
    tool(
        "qemu-io",
        &["-f", "raw", "-c", "write 1M 64k", "-c", "flush", &uri],
    );
    let interrupt = |pid: u32| {
        let sent = Command::new("kill")
            .args(["-INT", &pid.to_string()])
            .status();
        assert!(sent.unwrap().success());
    };
    interrupt(recording.id());
    let said = recording.wait_with_output().unwrap();
    assert!(said.status.success(), "{}", err(&said));
    let view: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(
        (&view["ended"], &view["lost"]),
        (&"asked".into(), &0.into())
    );
    let shown: Value = serde_json::from_str(&d.ok(&["trace", "show", "asked", "--json"])).unwrap();
    assert_eq!(shown["writes"]["bytes"], 65_536);
    assert_eq!(shown["reach"], (1 << 20) + 65_536);

    // The machine goes, and the trace is whole.
    let recording = record("gone");
    d.ok(&["machine", "stop", "web", "--force"]);
    let said = recording.wait_with_output().unwrap();
    let view: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(view["ended"], "gone", "{}", err(&said));
    assert!(!d.dir.path().join("other").exists());
}
