//! What goes over the network by UDP: reports and acknowledgements out, echoes back.
//!
//! Nothing here waits for the network: a datagram that the kernel does not take is counted and lost, and
//! the next one says all it said and more.

use crate::gate::Shared;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use whimbrel_workload::Error;
use whimbrel_workload::params::Params;
use whimbrel_workload::report::{Line, Report, Slowest, Totals, Workload};

/// Sends to the client, prints on the console, keeps the last report for `status`.
pub struct Reporter {
    socket: Option<UdpSocket>,
    last: Mutex<Report>,
}

impl Reporter {
    pub fn new(params: &Params) -> io::Result<Self> {
        let socket = match params.client {
            None => None,
            Some(client) => {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.connect((client, params.client_port))?;
                socket.set_nonblocking(true)?;
                Some(socket)
            }
        };
        Ok(Reporter {
            socket,
            last: Mutex::new(Report {
                t: 0.0,
                seq: 0,
                ram_pages_per_s: 0.0,
                ram_checks_per_s: 0.0,
                disk_records_per_s: 0.0,
                disk_random_per_s: 0.0,
                read_bytes_per_s: 0.0,
                errors: 0,
                last_fsynced_seq: 0,
                last_fsynced_generation: 0,
                slowest_us: Slowest::default(),
                totals: Totals::default(),
            }),
        })
    }

    pub fn send(&self, shared: &Shared, line: &Line) {
        if let Some(socket) = &self.socket
            && socket.send(line.to_json().as_bytes()).is_err()
        {
            shared.unsent.fetch_add(1, Relaxed);
        }
    }

    /// Tells the client what is durable now.
    pub fn acknowledge(&self, shared: &Shared) {
        self.send(shared, &Line::Ack(shared.ack()));
    }

    /// The report of the last whole interval.
    pub fn last(&self) -> Report {
        self.last
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Reports every interval until the guest stops.
    pub fn run(&self, shared: &Shared) {
        let interval = Duration::from_millis(u64::from(shared.params.interval_ms));
        let start = Instant::now();
        let mut before = (start, shared.totals());
        let mut seq = 0;
        loop {
            shared.sleep(interval);
            if shared.stopping() {
                return;
            }
            seq += 1;
            let now = (Instant::now(), shared.totals());
            let report = report(shared, start, seq, before, now);
            before = now;
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = report.clone();
            let line = Line::Report(report);
            self.send(shared, &line);
            println!("{}", line.to_json());
        }
    }
}

fn report(
    shared: &Shared,
    start: Instant,
    seq: u64,
    before: (Instant, Totals),
    now: (Instant, Totals),
) -> Report {
    let seconds = now.0.duration_since(before.0).as_secs_f64().max(1e-3);
    let rate = |was: u64, is: u64| round((is - was) as f64 / seconds);
    let slowest = |workload| shared.stage(workload).slowest_us.swap(0, Relaxed);
    let ack = shared.ack();
    Report {
        t: (now.0.duration_since(start).as_secs_f64() * 1000.0).round() / 1000.0,
        seq,
        ram_pages_per_s: rate(before.1.ram_pages, now.1.ram_pages),
        ram_checks_per_s: rate(before.1.ram_checks, now.1.ram_checks),
        disk_records_per_s: rate(before.1.log_records, now.1.log_records),
        disk_random_per_s: rate(before.1.random_writes, now.1.random_writes),
        read_bytes_per_s: rate(before.1.read_bytes, now.1.read_bytes),
        errors: shared.errors(),
        last_fsynced_seq: ack.seq,
        last_fsynced_generation: ack.generation,
        slowest_us: Slowest {
            ram: slowest(Workload::Ram),
            log: slowest(Workload::Log),
            random: slowest(Workload::Random),
            read: slowest(Workload::Read),
            tick: shared.tick_us.swap(0, Relaxed),
        },
        totals: now.1,
    }
}

fn round(x: f64) -> f64 {
    (x * 10.0).round() / 10.0
}

/// Binds the echo's socket.
pub fn echo_socket(params: &Params) -> Result<UdpSocket, Error> {
    let port = params.echo_port;
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).map_err(|source| Error::Listen { port, source })
}

/// Answers every datagram with itself (RFC 862), until the process ends.
pub fn run_echo(socket: &UdpSocket, shared: &Shared) {
    let mut datagram = vec![0; 65_536];
    loop {
        let Ok((len, from)) = socket.recv_from(&mut datagram) else {
            // An ICMP error of an earlier answer; the socket itself is as good as before.
            continue;
        };
        match socket.send_to(&datagram[..len], from) {
            Ok(_) => shared.echoes.fetch_add(1, Relaxed),
            Err(_) => shared.unsent.fetch_add(1, Relaxed),
        };
    }
}

/// Measures how long the guest's own threads were kept from running.
pub fn run_tick(shared: &Shared) {
    let tick = Duration::from_millis(u64::from(shared.params.tick_ms));
    while !tick.is_zero() && !shared.stopping() {
        let began = Instant::now();
        std::thread::sleep(tick);
        let over = began.elapsed().saturating_sub(tick);
        let us = u64::try_from(over.as_micros()).unwrap_or(u64::MAX);
        shared.tick_us.fetch_max(us, Relaxed);
    }
}
