//! What the emulated wide area really gives: round trips, one TCP stream, an outage, the CPU it takes.
//!
//! `cargo run --release -p whimbrel-lab --example wan_measure` as root; about two minutes. Prints one
//! line of figures for each case.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use whimbrel_lab::LabError;
use whimbrel_lab::net::{Host, Lab, LabSpec, Namespace};
use whimbrel_lab::wan::{Direction, LineSpec, WanSpec};

const PORT: u16 = 5201;

fn main() -> ExitCode {
    match measure() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<(), LabError> {
    let began = Instant::now();
    let lab = Lab::new(&LabSpec::new(WanSpec::symmetric(line(100, 15))))?;
    println!("lab up in {:?}", began.elapsed());
    for delay in [0, 5, 15, 30, 150] {
        lab.wan().set_both(line(100, delay))?;
        println!(
            "delay {delay} ms each way: {}",
            ping(lab.namespace(Host::A))
        );
    }
    for (rate, delay, loss) in [
        (100, 15, 0.0),
        (100, 15, 0.01),
        (1000, 15, 0.0),
        (1000, 15, 0.01),
        (10, 150, 0.0),
        (10, 150, 0.02),
    ] {
        for congestion in ["cubic", "bbr"] {
            lab.wan().set_both(line(rate, delay).with_loss(loss))?;
            let label = format!("{rate} Mbit/s, {delay} ms each way, loss {loss}, {congestion}");
            blast(&lab, &label, congestion, Duration::from_secs(8))?;
        }
    }
    lab.wan().set_both(line(100, 15))?;
    outage(&lab)
}

fn line(megabits: u64, delay_ms: u64) -> LineSpec {
    LineSpec::new(megabits * 1_000_000, Duration::from_millis(delay_ms))
}

fn ping(host: &Namespace) -> String {
    let mut command = Command::new("ping");
    let target = Host::B.wan_address().to_string();
    command.args(["-q", "-i", "0.02", "-c", "50", &target]);
    host.enter(&mut command);
    let output = match command.output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(error) => error.to_string(),
    };
    output.lines().last().unwrap_or_default().to_owned()
}

/// One TCP stream from host A to host B; the second half counts, the first is for the ramp.
fn blast(lab: &Lab, label: &str, congestion: &str, time: Duration) -> Result<(), LabError> {
    let stream = connect(lab, congestion)?;
    let sender = std::thread::spawn(move || send_for(stream.0, time));
    let received = &stream.1;
    let ramp = drain_until(received, Instant::now() + time / 2);
    let before = (
        lab.wan().stats(Direction::AToB),
        lab.wan().stats(Direction::BToA),
    );
    let began = Instant::now();
    let bytes = drain_until(received, began + time / 2 - Duration::from_millis(200));
    let seconds = began.elapsed().as_secs_f64();
    let after = (
        lab.wan().stats(Direction::AToB),
        lab.wan().stats(Direction::BToA),
    );
    let cpu = (after.0.cpu - before.0.cpu + after.1.cpu - before.1.cpu).as_secs_f64();
    let packets = (after.0.counts.out_packets - before.0.counts.out_packets).max(1) as u32;
    let wire = after.0.counts.out_bytes - before.0.counts.out_bytes;
    let rate = lab.wan().spec(Direction::AToB).rate.unwrap_or(u64::MAX) as f64;
    println!(
        "{label}: payload {:.1} Mbit/s, wire {:.1} % of the rate, ramp {:.1} Mbit/s, \
         emulator {:.1} % of a core, lost {}, queue dropped {}, late {:?} on average, {:?} at most",
        bytes as f64 * 8e-6 / seconds,
        wire as f64 * 800.0 / seconds / rate,
        ramp as f64 * 8e-6 / (time / 2).as_secs_f64(),
        cpu / seconds * 100.0,
        after.0.counts.lost_packets - before.0.counts.lost_packets,
        after.0.counts.queue_dropped_packets - before.0.counts.queue_dropped_packets,
        (after.0.late_sum - before.0.late_sum) / packets,
        after.0.late_max,
    );
    drain_until(received, Instant::now() + Duration::from_secs(2));
    let _ = sender.join();
    Ok(())
}

/// A stream over a link that is cut for 3 s: when the bytes stop, and when they are back.
fn outage(lab: &Lab) -> Result<(), LabError> {
    let (sender, receiver) = connect(lab, "bbr")?;
    let sending = std::thread::spawn(move || send_for(sender, Duration::from_secs(8)));
    drain_until(&receiver, Instant::now() + Duration::from_secs(2));
    lab.wan().outage(Duration::from_secs(3))?;
    let cut = Instant::now();
    drain_until(&receiver, cut + Duration::from_millis(100));
    let during = drain_until(&receiver, cut + Duration::from_millis(2990));
    let mut back = None;
    while back.is_none() && cut.elapsed() < Duration::from_secs(20) {
        if drain_until(&receiver, Instant::now() + Duration::from_millis(5)) > 0 {
            back = Some(cut.elapsed());
        }
    }
    println!(
        "outage of 3 s: {during} bytes during it, bytes again after {back:?}, dropped {}",
        lab.wan()
            .stats(Direction::AToB)
            .counts
            .outage_dropped_packets
    );
    drain_until(&receiver, Instant::now() + Duration::from_secs(4));
    let _ = sending.join();
    Ok(())
}

fn connect(lab: &Lab, congestion: &str) -> Result<(TcpStream, TcpStream), LabError> {
    let address = SocketAddr::from((Host::B.wan_address(), PORT));
    let failed = |step| {
        move |source| LabError::Socket {
            address,
            step,
            source,
        }
    };
    let listener = lab.namespace(Host::B).run("sink", || {
        TcpListener::bind(address).map_err(failed("bind"))
    })?;
    let sender = lab.namespace(Host::A).run("blaster", || {
        TcpStream::connect(address).map_err(failed("connect"))
    })?;
    rustix::net::sockopt::set_tcp_congestion(&sender, congestion)
        .map_err(|errno| failed("congestion control")(errno.into()))?;
    let (receiver, _) = listener.accept().map_err(failed("accept"))?;
    let short = Some(Duration::from_millis(5));
    receiver
        .set_read_timeout(short)
        .map_err(failed("timeout"))?;
    Ok((sender, receiver))
}

fn send_for(mut stream: TcpStream, time: Duration) {
    let block = vec![0x5a; 128 << 10];
    let end = Instant::now() + time;
    while Instant::now() < end && stream.write_all(&block).is_ok() {}
}

fn drain_until(mut stream: &TcpStream, end: Instant) -> u64 {
    let mut block = vec![0; 256 << 10];
    let mut sum = 0;
    while Instant::now() < end {
        match stream.read(&mut block) {
            Ok(0) => break,
            Ok(bytes) => sum += bytes as u64,
            Err(_) => {}
        }
    }
    sum
}
