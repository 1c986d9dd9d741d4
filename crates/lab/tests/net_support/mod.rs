//! What the tests of the network share. Each uses a part.
#![allow(dead_code)]

use std::net::{Ipv4Addr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use whimbrel_lab::LabError;
use whimbrel_lab::net::{BRIDGE, CLIENT, Host, Lab, LabSpec, Namespace, Place, guest_address};
use whimbrel_lab::wan::{LineSpec, WanSpec};

pub fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub fn line(megabits: u64, delay_ms: u64) -> LineSpec {
    LineSpec::new(megabits * 1_000_000, ms(delay_ms))
}

/// A lab, or `None` and the reason printed where this machine cannot carry one.
pub fn lab_or_skip(line: LineSpec) -> Option<Lab> {
    match Lab::new(&LabSpec::new(WanSpec::symmetric(line))) {
        Err(LabError::Unavailable { reason }) => {
            eprintln!("skipped: no lab on this machine: {reason}");
            None
        }
        lab => Some(lab.expect("the lab comes up")),
    }
}

/// Whether `ip netns list` shows a name that begins so.
pub fn namespace_exists(prefix: &str) -> bool {
    let output = run(Command::new("ip").args(["netns", "list"]));
    output.lines().any(|line| line.starts_with(prefix))
}

/// What the three names of a lab begin with.
pub fn prefix(lab: &Lab) -> String {
    lab.namespace(Place::Client)
        .name()
        .trim_end_matches('c')
        .to_owned()
}

/// Runs a command to its end and returns its output; fails the test with its stderr.
pub fn run(command: &mut Command) -> String {
    let output = command.output().expect("the command starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn run_inside(namespace: &Namespace, program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments);
    namespace.enter(&mut command);
    run(&mut command)
}

/// A guest without a hypervisor: a namespace of its own with one card, that can be unplugged from one
/// host's bridge and plugged into the other's, and that answers echo requests.
pub struct FakeGuest {
    pub namespace: Namespace,
    pub address: Ipv4Addr,
    stop: Arc<AtomicBool>,
    echo: Option<JoinHandle<Result<(), LabError>>>,
}

impl FakeGuest {
    pub fn new(lab: &Lab) -> FakeGuest {
        let name = format!("{}g0", prefix(lab));
        run(Command::new("ip").args(["netns", "add", &name]));
        let namespace = Namespace::open(&name).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let echo = namespace.thread("echo", move || echo(&stopped)).unwrap();
        FakeGuest {
            namespace,
            address: guest_address(0),
            stop,
            echo: Some(echo),
        }
    }

    /// Always the same hardware and IP address, as a guest that moves.
    pub fn plug(&self, lab: &Lab, host: Host) {
        let host = lab.namespace(host).name();
        let guest = self.namespace.name();
        let line =
            format!("link add g0 type veth peer name eth0 address 52:54:00:00:00:10 netns {guest}");
        ip(host, &line);
        ip(host, &format!("link set g0 master {BRIDGE} up"));
        ip(guest, &format!("addr add {}/24 dev eth0", self.address));
        ip(guest, "link set eth0 up");
        self.announce();
    }

    pub fn unplug(&self) {
        ip(self.namespace.name(), "link del eth0");
    }

    /// Speaks until it is heard, so that the bridges know where it is now; QEMU announces a guest it
    /// took over, too. The kernel drops what is sent in a card's first moments.
    fn announce(&self) {
        let mut ping = Command::new("ping");
        ping.args(["-q", "-c", "1", "-W", "1", "-w", "1"])
            .arg(CLIENT.to_string());
        ping.stdout(Stdio::null()).stderr(Stdio::null());
        self.namespace.enter(&mut ping);
        let heard = (0..20).any(|_| ping.status().unwrap().success());
        assert!(heard, "the client does not hear the guest");
    }

    /// Sends a datagram to the client's port for lines.
    pub fn say(&self, text: &str) {
        let text = text.to_owned();
        let said = self.namespace.thread("say", move || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.send_to(text.as_bytes(), (CLIENT, 7777))
        });
        said.unwrap().join().unwrap().unwrap().unwrap();
    }
}

impl Drop for FakeGuest {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(echo) = self.echo.take() {
            let _ = echo.join();
        }
        let _ = Command::new("ip")
            .args(["netns", "del", self.namespace.name()])
            .status();
    }
}

fn ip(namespace: &str, line: &str) {
    run(Command::new("ip")
        .args(["-n", namespace])
        .args(line.split(' ')));
}

fn echo(stop: &AtomicBool) {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 7)).unwrap();
    socket.set_read_timeout(Some(ms(20))).unwrap();
    let mut datagram = [0; 2048];
    while !stop.load(Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], from);
        }
    }
}
