//! The client of the guest's stream: reads, checks each chunk, and notes when it came.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use whimbrel_lab::LabError;
use whimbrel_lab::net::{Lab, Place};
use whimbrel_workload::cell::{self, CHUNK, Kind};

const CONNECT_WITHIN: Duration = Duration::from_secs(10);

const LOOK: Duration = Duration::from_millis(50);

/// What a client got.
#[derive(Debug, Default)]
pub struct Streamed {
    /// When each chunk was there; at the guest's pace, 200 a second, while a move takes.
    pub arrivals: Vec<Instant>,
    /// Why nothing came any more, if it broke off, or what was wrong with a chunk.
    pub problem: Option<String>,
}

/// A thread on the client's host that reads until it is stopped.
pub struct StreamClient {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Streamed, LabError>>>,
}

impl StreamClient {
    pub fn start(lab: &Lab, guest: Ipv4Addr, port: u16, seed: u64) -> Result<Self, LabError> {
        let address = SocketAddr::from((guest, port));
        let stop = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&stop);
        let client = lab.namespace(Place::Client);
        let thread = client.thread("stream client", move || read(address, seed, &theirs))?;
        Ok(StreamClient {
            stop,
            thread: Some(thread),
        })
    }

    pub fn stop(mut self) -> Result<Streamed, LabError> {
        match self.end() {
            Some(streamed) => streamed,
            None => Ok(Streamed {
                problem: Some("the stream's client died".to_owned()),
                ..Streamed::default()
            }),
        }
    }

    fn end(&mut self) -> Option<Result<Streamed, LabError>> {
        self.stop.store(true, Relaxed);
        self.thread.take()?.join().ok()
    }
}

impl Drop for StreamClient {
    fn drop(&mut self) {
        self.end();
    }
}

fn read(address: SocketAddr, seed: u64, stop: &AtomicBool) -> Streamed {
    let mut streamed = Streamed::default();
    if let Err(problem) = receive(address, seed, stop, &mut streamed.arrivals) {
        streamed.problem = Some(problem);
    }
    streamed
}

fn receive(
    address: SocketAddr,
    seed: u64,
    stop: &AtomicBool,
    arrivals: &mut Vec<Instant>,
) -> Result<(), String> {
    let broken = |error: std::io::Error| format!("the guest's stream: {error}");
    let mut socket = TcpStream::connect_timeout(&address, CONNECT_WITHIN).map_err(broken)?;
    socket.set_read_timeout(Some(LOOK)).map_err(broken)?;
    let mut chunk = [0; CHUNK];
    let mut filled = 0;
    let mut index = 0;
    while !stop.load(Relaxed) {
        match socket.read(&mut chunk[filled..]) {
            Ok(0) => return Err("the guest closed its stream".to_owned()),
            Ok(bytes) => filled += bytes,
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(broken(error)),
        }
        if filled < CHUNK {
            continue;
        }
        filled = 0;
        let place = cell::Place {
            kind: Kind::Chunk,
            seed,
            index,
        };
        match place.open(&chunk) {
            Ok(number) if number == index => {}
            wrong => return Err(format!("chunk {index} of the guest's stream: {wrong:?}")),
        }
        arrivals.push(Instant::now());
        index += 1;
    }
    Ok(())
}
