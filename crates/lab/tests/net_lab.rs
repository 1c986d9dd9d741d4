//! A lab comes up, carries the guests' LAN, and leaves nothing behind however it ends.

mod net_support;

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use net_support::{FakeGuest, lab_or_skip, line, ms, namespace_exists, prefix, run_inside};
use whimbrel_lab::LabError;
use whimbrel_lab::net::{CLIENT, Host, Place};
use whimbrel_lab::probe::{EchoProber, EchoSpec, LineClient, LineCollector};
use whimbrel_lab::process::Process;

const SOON: Duration = Duration::from_secs(60);

/// In the environment of a copy of this program that brings a lab up and waits.
const CHILD: &str = "WHIMBREL_LAB_TEST_CHILD";

#[test]
fn a_guest_moved_between_the_bridges_keeps_its_address() {
    let Some(lab) = lab_or_skip(line(100, 5)) else {
        return;
    };
    let guest = FakeGuest::new(&lab);
    guest.plug(&lab, Host::A);
    let address = guest.address.to_string();
    let ping = ["-c", "2", "-i", "0.01", "-W", "30", &address];
    run_inside(lab.namespace(Place::Client), "ping", &ping);
    guest.unplug();
    guest.plug(&lab, Host::B);
    run_inside(lab.namespace(Place::Client), "ping", &ping);
    let bridge = run_inside(
        lab.namespace(Host::B),
        "bridge",
        &["fdb", "show", "br", "br0"],
    );
    assert!(
        bridge
            .lines()
            .any(|line| line.starts_with("52:54:00:00:00:10 dev g0")),
        "{bridge}"
    );
}

#[test]
fn the_prober_sees_a_guest_go_and_come_back() {
    let Some(lab) = lab_or_skip(line(100, 5)) else {
        return;
    };
    let guest = FakeGuest::new(&lab);
    guest.plug(&lab, Host::A);
    lab.pin_neighbour(guest.address, [0x52, 0x54, 0, 0, 0, 0x10])
        .unwrap();
    let client = lab.namespace(Place::Client);
    let prober = EchoProber::start(client, EchoSpec::new((guest.address, 7).into())).unwrap();
    wait_until(|| prober.series().rtt(0.5).is_some());
    std::thread::sleep(ms(50));
    let gone = Instant::now();
    guest.unplug();
    std::thread::sleep(ms(300));
    guest.plug(&lab, Host::B);
    let back = Instant::now();
    wait_until(|| {
        prober
            .series()
            .probes
            .iter()
            .any(|p| p.sent > back && p.answered.is_some())
    });
    let series = prober.stop();
    let gap = series.echo_gap().unwrap();
    assert!(gap.length >= ms(300) && !gap.open, "{gap:?}");
    assert!(
        gap.start_after(gone).abs() < gap.length.as_secs_f64(),
        "{gap:?}"
    );
    assert!(series.lost() > 0 && series.lost() < series.sent());
    assert!(series.reply_gap().unwrap().length >= ms(300));
    assert!(series.echo_gaps_over(ms(299)).contains(&gap));
}

#[test]
fn lines_of_the_guest_arrive_in_order_with_their_time() {
    let Some(lab) = lab_or_skip(line(100, 5)) else {
        return;
    };
    let guest = FakeGuest::new(&lab);
    guest.plug(&lab, Host::A);
    let collector = LineCollector::start(lab.namespace(Place::Client), 7777).unwrap();
    let began = Instant::now();
    guest.say("{\"rate\":1}\n{\"rate\":2}\n");
    guest.say("{\"rate\":3}");
    let third = collector.wait_for(SOON, |line| line.text.contains('3').then_some(line.at));
    assert!(third.unwrap() > began);
    let lines = collector.take();
    let texts: Vec<_> = lines.iter().map(|line| line.text.as_str()).collect();
    assert_eq!(texts, ["{\"rate\":1}", "{\"rate\":2}", "{\"rate\":3}"]);
    assert_eq!(lines[0].from.ip(), guest.address);
    assert!(lines.is_sorted_by_key(|line| line.at));
    assert_eq!(
        collector.wait_for(ms(20), |_| Some(())),
        None,
        "taken lines are gone"
    );
}

#[test]
fn a_line_is_asked_of_the_guest_and_answered() {
    let Some(lab) = lab_or_skip(line(100, 5)) else {
        return;
    };
    let guest = FakeGuest::new(&lab);
    guest.plug(&lab, Host::B);
    let listening = guest.namespace.thread("control", || {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7008)).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        while let Some(Ok(line)) = lines.next() {
            match line.as_str() {
                "silence" => {}
                "bye" => return,
                _ => writeln!(stream, "you said {line}").unwrap(),
            }
        }
    });
    let address = (guest.address, 7008).into();
    let mut client = LineClient::connect(lab.namespace(Place::Client), address, SOON).unwrap();
    assert_eq!(client.ask("status", SOON).unwrap(), "you said status");
    assert_eq!(client.ask("sync", SOON).unwrap(), "you said sync");
    let silence = client.ask("silence", ms(50));
    assert!(
        matches!(silence, Err(LabError::NoAnswer { .. })),
        "{silence:?}"
    );
    let bye = client.ask("bye", SOON);
    assert!(matches!(bye, Err(LabError::Closed { .. })), "{bye:?}");
    listening.unwrap().join().unwrap().unwrap();
    let nobody = (guest.address, 7009).into();
    let refused = LineClient::connect(lab.namespace(Place::Client), nobody, ms(100));
    assert!(
        matches!(refused, Err(LabError::Socket { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_tap_is_on_the_bridge_until_it_is_removed() {
    let Some(lab) = lab_or_skip(line(100, 5)) else {
        return;
    };
    lab.tap(Host::A, "tap0").unwrap();
    let shown = run_inside(lab.namespace(Host::A), "ip", &["link", "show", "tap0"]);
    assert!(shown.contains("master br0"), "{shown}");
    let twice = lab.tap(Host::A, "tap0").unwrap_err();
    assert!(
        matches!(&twice, LabError::Command { command, stderr, .. }
            if command.contains("tuntap add dev tap0") && stderr.contains("busy")),
        "{twice}"
    );
    lab.remove_tap(Host::A, "tap0").unwrap();
    assert!(lab.remove_tap(Host::A, "tap0").is_err());
    let name = lab.tap(Host::A, "a name with spaces").unwrap_err();
    assert!(matches!(name, LabError::InterfaceName { .. }), "{name}");
}

#[test]
fn two_labs_at_once_do_not_meet() {
    let (Some(one), Some(two)) = (lab_or_skip(line(100, 0)), lab_or_skip(line(100, 20))) else {
        return;
    };
    assert_ne!(prefix(&one), prefix(&two));
    let b = Host::B.wan_address().to_string();
    run_inside(one.namespace(Host::A), "ping", &["-c", "1", "-W", "30", &b]);
    assert_eq!(packets_out(&two), 0);
}

#[test]
fn a_lab_that_ends_takes_its_namespaces_and_processes_along() {
    let Some(lab) = lab_or_skip(line(100, 5)) else {
        return;
    };
    let prefix = prefix(&lab);
    let folder = tempfile::tempdir().unwrap();
    let mut sleep = Command::new("sleep");
    sleep.arg("1000");
    // Not a `Process`: one nobody else would end.
    lab.namespace(Host::A).enter(&mut sleep);
    let mut stray = sleep.stdin(Stdio::null()).spawn().unwrap();
    let mut sleep = Command::new("sleep");
    sleep.arg("1000");
    let log = folder.path().join("log");
    let mut kept = lab.spawn_in(Place::Client, "sleep", sleep, &log).unwrap();
    assert!(kept.is_running().unwrap() && namespace_exists(&prefix));
    drop(lab);
    assert!(!namespace_exists(&prefix));
    assert!(!kept.wait(SOON).unwrap().success());
    assert!(!stray.wait().unwrap().success());
}

#[test]
fn a_panic_leaves_nothing_behind() {
    let Some(lab) = lab_or_skip(line(100, 5)) else {
        return;
    };
    let prefix = prefix(&lab);
    let panicked = std::thread::spawn(move || {
        let _lab = lab;
        panic!("this panic is part of the test");
    })
    .join();
    assert!(panicked.is_err());
    assert!(!namespace_exists(&prefix));
}

#[test]
fn an_interrupt_leaves_nothing_behind() {
    let Some((mut child, prefix)) = lab_in_a_child("interrupt") else {
        return;
    };
    child.signal(rustix::process::Signal::INT).unwrap();
    let status = child.wait(SOON).unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(2)
    );
    assert!(!namespace_exists(&prefix));
}

#[test]
fn what_a_killed_lab_leaves_is_swept_by_the_next() {
    let Some((mut child, prefix)) = lab_in_a_child("kill") else {
        return;
    };
    child.kill9().unwrap();
    let _lab = lab_or_skip(line(100, 5));
    // Not at once: a lab of another test may be at it.
    wait_until(|| !namespace_exists(&prefix));
}

/// Not a test by itself: what the copy of this program does.
#[test]
fn a_lab_that_waits_for_its_end() {
    if std::env::var_os(CHILD).is_some()
        && let Some(lab) = lab_or_skip(line(100, 5))
    {
        eprintln!("lab {} is up", prefix(&lab));
        std::thread::sleep(Duration::from_secs(60));
    }
}

fn lab_in_a_child(name: &str) -> Option<(Process, String)> {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "a_lab_that_waits_for_its_end", "--nocapture"])
        .env(CHILD, name);
    let mut child = Process::spawn(name, command, &folder.path().join("log")).unwrap();
    let mut prefix = None;
    wait_until(|| {
        let output = child.output();
        let up = output
            .lines()
            .find_map(|line| line.strip_prefix("lab ")?.strip_suffix(" is up"));
        prefix = up.map(str::to_owned);
        prefix.is_some() || !child.is_running().unwrap()
    });
    let prefix = prefix?;
    assert!(namespace_exists(&prefix));
    Some((child, prefix))
}

#[test]
fn a_process_that_ignores_sigterm_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "trap '' TERM; echo ready; while :; do sleep 0.05; done",
    ]);
    let mut process = Process::spawn("stubborn", command, &folder.path().join("log")).unwrap();
    wait_until(|| process.output().contains("ready"));
    let status = process.end(ms(100)).unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9)
    );
    assert!(!process.is_running().unwrap());
    process.signal(rustix::process::Signal::TERM).unwrap();
}

#[test]
fn a_program_that_does_not_exist_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let command = Command::new("/no/such/program");
    let error = Process::spawn("none", command, &folder.path().join("log")).unwrap_err();
    assert!(error.to_string().contains("/no/such/program"), "{error}");
}

#[test]
fn hosts_reach_each_other_only_by_the_wan_and_the_client_only_by_the_lan() {
    let Some(lab) = lab_or_skip(line(100, 5)) else {
        return;
    };
    let client = lab.namespace(Place::Client);
    let addresses = run_inside(client, "ip", &["-o", "addr", "show"]);
    assert!(addresses.contains(&CLIENT.to_string()) && !addresses.contains("10.77."));
    assert!(!addresses.contains("inet6"), "{addresses}");
    let route = run_inside(lab.namespace(Host::A), "ip", &["route", "show"]);
    assert_eq!(route.lines().count(), 1, "{route}");
    assert!(route.contains("dev wan0"), "{route}");
}

fn packets_out(lab: &whimbrel_lab::net::Lab) -> u64 {
    let stats = lab.wan().stats(whimbrel_lab::wan::Direction::AToB);
    stats.counts.out_packets
}

fn wait_until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {SOON:?}");
        std::thread::sleep(ms(5));
    }
}
