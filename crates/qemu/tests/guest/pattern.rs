//! Runs inside the test's guest: memory, disk and network in constant use, every page self-checking.
//!
//! Prints `tick N checked C errors E` about ten times a second. A page holds a function of its number
//! and version; it is checked whole before it is written anew.

use std::fs::OpenOptions;
use std::net::UdpSocket;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const WORDS: usize = 512;

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn fill(page: &mut [u64], number: u64, version: u64) {
    let seed = mix(number << 32 | version);
    for (index, word) in (0u64..).zip(page) {
        *word = seed.wrapping_add(index);
    }
}

fn wrong(page: &[u64], number: u64, version: u64) -> bool {
    let seed = mix(number << 32 | version);
    (0u64..).zip(page).any(|(index, word)| *word != seed.wrapping_add(index))
}

fn main() {
    let mut args = std::env::args().skip(1);
    let mut number = |name: &str| -> u64 { args.next().expect(name).parse().expect(name) };
    let (mib, pause_us) = (number("MiB"), number("pause"));
    let pages = mib * 256;
    let mut memory = vec![0u64; pages as usize * WORDS];
    let mut versions = vec![0u64; pages as usize];
    for (number, page) in (0u64..).zip(memory.chunks_exact_mut(WORDS)) {
        fill(page, number, 0);
    }
    let disk = loop {
        match OpenOptions::new().read(true).write(true).open("/dev/vda") {
            Ok(disk) => break disk,
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    let socket = UdpSocket::bind("10.9.0.1:0").expect("eth0 is up");
    socket.set_broadcast(true).expect("broadcast");
    let (mut tick, mut checked, mut errors, mut random) = (0u64, 0u64, 0u64, 1u64);
    println!("ready");
    loop {
        let until = Instant::now() + Duration::from_millis(100);
        while Instant::now() < until {
            random = mix(random.wrapping_add(1));
            let at = random % pages;
            let page = &mut memory[at as usize * WORDS..][..WORDS];
            if wrong(page, at, versions[at as usize]) {
                errors += 1;
                println!("ERROR page {at} version {}", versions[at as usize]);
            }
            versions[at as usize] += 1;
            fill(page, at, versions[at as usize]);
            checked += 1;
            if pause_us > 0 {
                std::thread::sleep(Duration::from_micros(pause_us));
            }
        }
        let at = tick % 256 * 4096;
        let block = [tick as u8; 4096];
        let mut back = [0; 4096];
        let result = disk
            .write_all_at(&block, at)
            .and_then(|()| disk.sync_data())
            .and_then(|()| disk.read_exact_at(&mut back, at));
        if result.is_err() || back != block {
            errors += 1;
            println!("ERROR disk at {at}: {result:?}");
        }
        if let Err(error) = socket.send_to(&[0; 64], "10.9.0.255:9") {
            errors += 1;
            println!("ERROR network: {error}");
        }
        tick += 1;
        println!("tick {tick} checked {checked} errors {errors}");
    }
}
