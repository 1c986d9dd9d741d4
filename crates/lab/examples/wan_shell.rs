//! A lab to play with by hand.
//!
//! `cargo run -p whimbrel-lab --example wan_shell -- [MBIT/S] [DELAY_MS] [LOSS_PERCENT]` as root: brings
//! two hosts up (100 Mbit/s, 15 ms each way, no loss), says how to get in, and prints what crosses the
//! link once a second until Ctrl-C takes everything away.

use std::process::ExitCode;
use std::time::Duration;

use whimbrel_lab::LabError;
use whimbrel_lab::net::{CLIENT, Host, Lab, LabSpec, Place, guest_address};
use whimbrel_lab::wan::{Direction, LineSpec, WanSpec};

fn main() -> ExitCode {
    let mut numbers = [100.0, 15.0, 0.0];
    for (number, argument) in numbers.iter_mut().zip(std::env::args().skip(1)) {
        match argument.parse() {
            Ok(value) if value >= 0.0 => *number = value,
            _ => {
                eprintln!(
                    "wan_shell [MBIT/S] [DELAY_MS] [LOSS_PERCENT]: {argument:?} is no number"
                );
                return ExitCode::FAILURE;
            }
        }
    }
    match play(numbers) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn play([megabits, delay_ms, loss_percent]: [f64; 3]) -> Result<(), LabError> {
    let delay = Duration::from_micros((delay_ms * 1e3) as u64);
    let line = LineSpec::new((megabits * 1e6) as u64, delay).with_loss(loss_percent / 100.0);
    let lab = Lab::new(&LabSpec::new(WanSpec::symmetric(line)))?;
    for host in Host::BOTH {
        let name = lab.namespace(host).name();
        println!("{host}: {}   ip netns exec {name} bash", host.wan_address());
    }
    let name = lab.namespace(Place::Client).name();
    println!("client: {CLIENT}   ip netns exec {name} bash");
    println!(
        "guests: {} and up, on bridge br0 of either host",
        guest_address(0)
    );
    println!("the link: {line:?}; Ctrl-C ends the lab");
    let mut before = Direction::BOTH.map(|direction| lab.wan().stats(direction));
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let now = Direction::BOTH.map(|direction| lab.wan().stats(direction));
        if now.map(|stats| stats.counts) != before.map(|stats| stats.counts) {
            for (direction, (was, is)) in Direction::BOTH.iter().zip(before.iter().zip(&now)) {
                let (was, is) = (was.counts, is.counts);
                println!(
                    "{direction:?}: {:.2} Mbit/s, dropped: {} lost, {} by the queue, {} by outage",
                    (is.out_bytes - was.out_bytes) as f64 * 8e-6,
                    is.lost_packets - was.lost_packets,
                    is.queue_dropped_packets - was.queue_dropped_packets,
                    is.outage_dropped_packets - was.outage_dropped_packets,
                );
            }
        }
        before = now;
    }
}
