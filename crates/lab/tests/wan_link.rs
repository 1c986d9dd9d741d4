//! The emulated wide area between two real network stacks.

mod net_support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use net_support::{lab_or_skip, line, ms, run_inside};
use whimbrel_lab::LabError;
use whimbrel_lab::net::{Host, Lab};
use whimbrel_lab::wan::{Direction, LineSpec, Queue};

const PORT: u16 = 5201;

fn address() -> SocketAddr {
    (Host::B.wan_address(), PORT).into()
}

fn udp_pair(lab: &Lab) -> (UdpSocket, UdpSocket) {
    let open = |host: Host, port| {
        let bind = move || UdpSocket::bind((host.wan_address(), port)).unwrap();
        let thread = lab.namespace(host).thread("socket", bind).unwrap();
        thread.join().unwrap().unwrap()
    };
    let (a, b) = (open(Host::A, 0), open(Host::B, PORT));
    a.connect(address()).unwrap();
    b.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    (a, b)
}

fn tcp_pair(lab: &Lab) -> (TcpStream, TcpStream) {
    let bind = || TcpListener::bind(address()).unwrap();
    let listener = lab
        .namespace(Host::B)
        .thread("sink", bind)
        .unwrap()
        .join()
        .unwrap()
        .unwrap();
    let connect = || TcpStream::connect(address()).unwrap();
    let a = lab
        .namespace(Host::A)
        .thread("source", connect)
        .unwrap()
        .join()
        .unwrap()
        .unwrap();
    (a, listener.accept().unwrap().0)
}

#[test]
fn a_ping_takes_at_least_the_stated_round_trip() {
    let Some(lab) = lab_or_skip(line(100, 15)) else {
        return;
    };
    let b = Host::B.wan_address().to_string();
    let output = run_inside(
        lab.namespace(Host::A),
        "ping",
        &["-q", "-c", "5", "-i", "0.02", &b],
    );
    let minimum: f64 = output
        .rsplit_once("= ")
        .and_then(|(_, figures)| figures.split('/').next()?.parse().ok())
        .unwrap();
    // 30 ms and twice the 84 bytes of the packet.
    assert!(minimum >= 30.013, "{output}");
    assert!(output.contains("5 received"), "{output}");
}

#[test]
fn what_tcp_carries_arrives_whole_under_loss_and_jitter() {
    // Fast enough for bursts of many segments, and lossy enough to cut most of them.
    let Some(lab) = lab_or_skip(line(1000, 1).with_loss(0.02).with_jitter(ms(1))) else {
        return;
    };
    let (mut a, mut b) = tcp_pair(&lab);
    let content: Vec<u8> = (0..8_000_000u32)
        .map(|n| (n ^ (n >> 7) ^ (n >> 13)) as u8)
        .collect();
    let sent = content.clone();
    let sender = std::thread::spawn(move || a.write_all(&sent).unwrap());
    let mut received = Vec::new();
    b.read_to_end(&mut received).unwrap();
    sender.join().unwrap();
    assert!(
        received == content,
        "{} of {} bytes",
        received.len(),
        content.len()
    );
    let stats = lab.wan().stats(Direction::AToB);
    assert!(stats.counts.lost_packets > 20, "{stats:?}");
    assert_eq!(stats.failed_packets, 0);
}

#[test]
fn the_rate_is_kept_over_a_transfer() {
    let Some(lab) = lab_or_skip(line(50, 2)) else {
        return;
    };
    let (mut a, mut b) = tcp_pair(&lab);
    let began = Instant::now();
    let sender = std::thread::spawn(move || a.write_all(&vec![1; 5_000_000]).unwrap());
    let mut received = Vec::new();
    b.read_to_end(&mut received).unwrap();
    sender.join().unwrap();
    // 40 Mbit at 50 Mbit/s, headers not counted: no machine is fast enough to be quicker.
    assert!(began.elapsed() >= ms(800), "{:?}", began.elapsed());
}

#[test]
fn an_outage_drops_all_and_ends() {
    let Some(lab) = lab_or_skip(line(100, 1)) else {
        return;
    };
    let (a, b) = udp_pair(&lab);
    let mut datagram = [0; 64];
    a.send(b"before").unwrap();
    assert_eq!(b.recv(&mut datagram).unwrap(), 6);
    let cut = Instant::now();
    lab.wan().outage(ms(400)).unwrap();
    let mut sent = 0u64;
    b.set_nonblocking(true).unwrap();
    let back = loop {
        a.send(b"during").unwrap();
        sent += 1;
        std::thread::sleep(ms(5));
        if b.recv(&mut datagram).is_ok() {
            break cut.elapsed();
        }
        assert!(
            cut.elapsed() < Duration::from_secs(60),
            "the outage does not end"
        );
    };
    assert!(back >= ms(400), "{back:?}");
    let stats = lab.wan().stats(Direction::AToB);
    assert!(stats.counts.outage_dropped_packets < sent, "{stats:?}");
}

#[test]
fn one_direction_is_cut_until_it_is_mended() {
    let Some(lab) = lab_or_skip(line(100, 1)) else {
        return;
    };
    let (a, b) = udp_pair(&lab);
    let mut datagram = [0; 64];
    lab.wan().cut(Direction::AToB, None).unwrap();
    a.send(b"into the void").unwrap();
    b.send_to(b"back", a.local_addr().unwrap()).unwrap();
    a.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(
        a.recv(&mut datagram).unwrap(),
        4,
        "the other direction is whole"
    );
    lab.wan().mend(Direction::AToB).unwrap();
    a.send(b"again").unwrap();
    assert_eq!(b.recv(&mut datagram).unwrap(), 5);
    assert_eq!(
        lab.wan()
            .stats(Direction::AToB)
            .counts
            .outage_dropped_packets,
        1
    );
}

#[test]
fn the_queue_drops_what_does_not_fit() {
    let spec = line(1, 0).with_queue(Queue::Bytes(5000));
    let Some(lab) = lab_or_skip(spec) else {
        return;
    };
    let (a, _b) = udp_pair(&lab);
    for _ in 0..20 {
        // 1028 bytes as an IP packet, 8 ms each at this rate.
        a.send(&[0; 1000]).unwrap();
    }
    let stats = wait_for_packets(&lab, 20);
    // Four fit, a fifth does not. How many come to be dropped depends on how fast we were.
    assert!(stats.counts.queue_peak_bytes <= 4 * 1028, "{stats:?}");
}

#[test]
fn the_link_is_changed_while_it_runs() {
    let Some(lab) = lab_or_skip(line(100, 1)) else {
        return;
    };
    let (a, b) = udp_pair(&lab);
    let trip = || {
        let began = Instant::now();
        a.send(b"x").unwrap();
        b.recv(&mut [0; 8]).unwrap();
        began.elapsed()
    };
    trip();
    let slower = line(100, 80);
    lab.wan().set(Direction::AToB, slower).unwrap();
    assert_eq!(lab.wan().spec(Direction::AToB), slower);
    assert_eq!(lab.wan().spec(Direction::BToA), line(100, 1));
    assert!(trip() >= ms(80));
    lab.wan().set_both(line(100, 0).with_loss(1.0)).unwrap();
    let lost = lab.wan().stats(Direction::AToB).counts.lost_packets;
    a.send(b"x").unwrap();
    wait_for_packets(&lab, 3);
    while lab.wan().stats(Direction::AToB).counts.lost_packets == lost {
        std::thread::sleep(ms(1));
    }
}

#[test]
fn a_link_that_cannot_be_is_refused() {
    let Some(lab) = lab_or_skip(line(100, 1)) else {
        return;
    };
    for spec in [
        line(0, 1),
        line(100, 61_000),
        line(100, 1).with_loss(1.5),
        line(100, 1).with_loss(f64::NAN),
        LineSpec::unlimited(ms(1)).with_jitter(ms(61_000)),
    ] {
        let refused = lab.wan().set(Direction::AToB, spec);
        assert!(
            matches!(refused, Err(LabError::LinkSpec { .. })),
            "{spec:?}"
        );
    }
}

/// The counters once `count` packets have come into the direction.
fn wait_for_packets(lab: &Lab, count: u64) -> whimbrel_lab::wan::LineStats {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let stats = lab.wan().stats(Direction::AToB);
        if stats.counts.in_packets >= count {
            return stats;
        }
        assert!(Instant::now() < deadline, "{stats:?}");
        std::thread::sleep(ms(1));
    }
}
