//! A QEMU started from a spec is what the spec says.

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::json;
use whimbrel_qemu::info::{PhysicalMap, info};
use whimbrel_qemu::launch::{Bus, Drive, LaunchSpec, Memory, Nic, OnError, probe};
use whimbrel_qemu::qmp::Qmp;

/// An NBD server for one file, killed at the end.
struct Server(Child);

impl Server {
    fn start(dir: &Path, socket: &Path, export: &str) -> Server {
        let image = dir.join("image");
        let file = std::fs::File::create(&image).expect("image");
        file.set_len(8 << 20).expect("image");
        let child = Command::new("qemu-nbd")
            .args(["-t", "-f", "raw", "-x", export, "-k"])
            .arg(socket)
            .arg(image)
            .spawn()
            .expect("qemu-nbd");
        let until = Instant::now() + Duration::from_secs(120);
        while !socket.exists() {
            assert!(Instant::now() < until, "qemu-nbd does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Server(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_launched_qemu_has_the_disk_the_card_and_the_memory_of_its_spec() {
    launched_as_described(Memory::Private, Bus::VirtioBlk).await;
    launched_as_described(Memory::Shared, Bus::VirtioScsi).await;
}

async fn launched_as_described(memory: Memory, bus: Bus) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let socket = dir.path().join("disks, all.sock");
    let _server = Server::start(dir.path(), &socket, "vm 1/root");
    let binary = Path::new("qemu-system-x86_64");
    let machine = probe(binary).await.expect("probed");
    let machine = machine.concrete("q35").expect("q35").to_owned();
    let spec = LaunchSpec {
        binary: binary.into(),
        name: "vm 1".into(),
        machine: machine.clone(),
        cpu: "qemu64".into(),
        // More than fits below the hole; none of it is touched.
        memory_bytes: 5 << 30,
        vcpus: 2,
        accel: vec!["tcg".into()],
        memory,
        firmware: None,
        kernel: None,
        drives: vec![Drive {
            name: "disk0".into(),
            socket: socket.clone(),
            export: "vm 1/root".into(),
            reconnect_delay: 30,
            read_only: false,
            on_error: OnError::Stop,
            bus,
        }],
        nics: vec![Nic {
            name: "nic0".into(),
            ifname: format!("wq{}", std::process::id()),
            mac: "02:00:00:00:00:17".into(),
        }],
        serial: Some(dir.path().join("serial")),
        qmp: vec![dir.path().join("qmp0"), dir.path().join("qmp1")],
        incoming: false,
        extra: vec!["-S".into()],
    };
    let launched = spec.spawn(&dir.path().join("log")).expect("started");
    let qmp = launched.connect().await.expect("monitor");

    let info = info(&qmp).await.expect("info");
    assert_eq!(info.machine_type, machine);
    assert_eq!(info.memory_bytes, 5 << 30);
    assert_eq!(info.status, "prelaunch");
    assert_eq!(info.pid, Some(launched.pid as i32));
    assert_eq!(info.nbd.len(), 1);
    assert_eq!(info.nbd[0].node, "disk0-nbd");
    assert_eq!(info.nbd[0].socket, socket);
    assert_eq!(info.nbd[0].export, "vm 1/root");

    // Whatever it is made of, it has the same name.
    let backing = qmp.execute("query-memdev", json!({})).await;
    assert_eq!(backing.expect("told")[0]["share"], memory == Memory::Shared);
    let map = PhysicalMap::query(&qmp).await.expect("map");
    assert_eq!(map.find(1 << 20), Some(("pc.ram", 1 << 20)));
    assert_eq!(map.find(4 << 30), Some(("pc.ram", 2 << 30)));
    assert_eq!(map.find(3 << 30), None);

    let cards = qmp.execute("query-rx-filter", json!({})).await;
    assert_eq!(cards.expect("cards")[0]["main-mac"], "02:00:00:00:00:17");
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", launched.pid));
    let stat = stat.expect("alive");
    let (_, fields) = stat.rsplit_once(") ").expect("a name");
    let session = fields.split(' ').nth(3).expect("a session");
    assert_eq!(session, launched.pid.to_string(), "a session of its own");

    qmp.execute("quit", json!({})).await.expect("quit");
    let status = launched.exited().await.expect("seen");
    assert!(status.success());
    qmp.closed().await;
}

#[tokio::test]
async fn a_lifeline_is_found_again_by_who_knows_only_the_process() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let spec = LaunchSpec {
        binary: "qemu-system-x86_64".into(),
        name: "vm 1".into(),
        machine: "q35".into(),
        cpu: "qemu64".into(),
        memory_bytes: 16 << 20,
        memory: Memory::Private,
        vcpus: 1,
        firmware: None,
        accel: vec!["tcg".into()],
        kernel: None,
        drives: Vec::new(),
        nics: Vec::new(),
        serial: None,
        qmp: vec![dir.path().join("qmp")],
        incoming: false,
        extra: vec!["-S".into()],
    };
    let log = dir.path().join("log");
    // A daemon of its own, which dies: nobody reads what it was still to be told.
    let daemon = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let launched = spec.spawn(&log).expect("started");
            let first = launched.lifeline().await.expect("negotiated");
            (launched.pid, first.version())
        })
    });
    let (pid, version) = daemon.join().expect("it did its work");
    let pid = i32::try_from(pid).expect("a pid");

    let again = Qmp::lifeline(pid).expect("allowed").expect("there is one");
    let answer = again.execute("query-name", json!({})).await.expect("told");
    assert_eq!(answer["name"], "vm 1");
    // Refused, but by a monitor that knows out-of-band commands.
    let refused = again.execute_oob("migrate-pause", json!({})).await;
    let refused = refused.expect_err("nothing to pause").to_string();
    assert!(!refused.contains("exec-oob"), "{refused}");
    let until = Instant::now() + Duration::from_secs(120);
    while again.version() != version {
        assert!(Instant::now() < until, "never told its version");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let _ = again.execute("quit", json!({})).await;
}
