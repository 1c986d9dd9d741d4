//! What the guest streams by TCP: chunks that say which they are, at an even pace, to whoever connects.
//!
//! A client sees by them what users of a guest's stream would: how long nothing came, and whether each byte
//! that came is right. One client at a time; the next is served when it has gone.

use crate::gate::Shared;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};
use whimbrel_workload::Error;
use whimbrel_workload::cell::{CHUNK, Kind, Place};
use whimbrel_workload::params::Params;

/// Binds the stream's socket, if there is to be a stream.
pub fn listen(params: &Params) -> Result<Option<TcpListener>, Error> {
    let port = params.stream_port;
    if port == 0 {
        return Ok(None);
    }
    match TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)) {
        Ok(listener) => Ok(Some(listener)),
        Err(source) => Err(Error::Listen { port, source }),
    }
}

/// Serves one client after the other until the process ends.
pub fn run(listener: &TcpListener, shared: &Shared) {
    while !shared.stopping() {
        if let Ok((client, _)) = listener.accept() {
            serve(client, shared);
        }
    }
}

fn serve(mut client: TcpStream, shared: &Shared) {
    // Refused: chunks then come in twos and threes, which the client sees.
    let _ = client.set_nodelay(true);
    let every = Duration::from_millis(u64::from(shared.params.stream_ms));
    let mut chunk = [0; CHUNK];
    let mut due = Instant::now();
    for index in 0.. {
        if shared.stopping() {
            return;
        }
        let place = Place {
            kind: Kind::Chunk,
            seed: shared.params.seed,
            index,
        };
        place.seal(index, &mut chunk);
        // A client that went away, or one that does not read for as long as TCP has patience.
        if client.write_all(&chunk).is_err() {
            return;
        }
        due += every;
        let now = Instant::now();
        // A guest that stood still goes on at its pace and does not catch up.
        due = due.max(now);
        std::thread::sleep(due - now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::sync::Arc;

    #[test]
    fn chunks_come_in_order_and_prove_themselves() {
        let mut params = Params::idle();
        params.stream_port = 1;
        params.stream_ms = 1;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("bound");
        let shared = Arc::new(Shared::new(params.clone()));
        // Ends with the test's process.
        std::thread::spawn(move || run(&listener, &shared));
        for _ in 0..2 {
            let mut client = TcpStream::connect(address).expect("listens");
            let mut chunk = [0; CHUNK];
            for index in 0..20 {
                client.read_exact(&mut chunk).expect("streams");
                let place = Place {
                    kind: Kind::Chunk,
                    seed: params.seed,
                    index,
                };
                assert_eq!(place.open(&chunk), Ok(index));
            }
        }
    }
}
