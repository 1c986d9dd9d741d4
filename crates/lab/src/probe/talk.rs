//! A word with the guest: a line there, a line back, by TCP from inside a namespace.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::LabError;
use crate::net::Namespace;

/// Longest answer, in bytes without its end.
pub const LINE_BOUND: usize = 1 << 20;

/// A connection. After an error it may be out of step: connect anew.
#[derive(Debug)]
pub struct LineClient {
    address: SocketAddr,
    stream: TcpStream,
    /// Bytes received beyond the last answer.
    rest: Vec<u8>,
}

impl LineClient {
    /// Connects from inside `namespace`, asking again until the time is up: a guest that boots refuses
    /// at first.
    pub fn connect(
        namespace: &Namespace,
        address: SocketAddr,
        within: Duration,
    ) -> Result<LineClient, LabError> {
        let deadline = Instant::now() + within;
        let stream = namespace.run("line client", || {
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                // A timeout of zero is refused as an argument.
                let attempt = left.clamp(Duration::from_millis(1), Duration::from_secs(1));
                match TcpStream::connect_timeout(&address, attempt) {
                    Ok(stream) => return Ok(stream),
                    Err(_) if !left.is_zero() => {
                        std::thread::sleep(left.min(Duration::from_millis(50)));
                    }
                    Err(source) => {
                        return Err(LabError::Socket {
                            address,
                            step: "connect",
                            source,
                        });
                    }
                }
            }
        })?;
        let client = LineClient {
            address,
            stream,
            rest: Vec::new(),
        };
        let nodelay = client.stream.set_nodelay(true);
        nodelay.map_err(client.failed("nodelay"))?;
        Ok(client)
    }

    /// Sends `line` (its end is added) and waits for one line back, which comes without its end.
    pub fn ask(&mut self, line: &str, within: Duration) -> Result<String, LabError> {
        let deadline = Instant::now() + within;
        let text = format!("{line}\n");
        let timeout = Some(within.max(Duration::from_millis(1)));
        self.stream
            .set_write_timeout(timeout)
            .map_err(self.failed("timeout"))?;
        self.stream
            .write_all(text.as_bytes())
            .map_err(self.failed("send"))?;
        loop {
            if let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line[..end]);
                return Ok(line.trim_end_matches('\r').to_owned());
            }
            if self.rest.len() > LINE_BOUND {
                return Err(LabError::LongLine {
                    address: self.address,
                    bound: LINE_BOUND,
                });
            }
            self.receive(deadline, within)?;
        }
    }

    fn receive(&mut self, deadline: Instant, within: Duration) -> Result<(), LabError> {
        let late = LabError::NoAnswer {
            address: self.address,
            awaited: "answer",
            after: within,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late);
        }
        self.stream
            .set_read_timeout(Some(left))
            .map_err(self.failed("timeout"))?;
        let mut block = [0; 4096];
        match self.stream.read(&mut block) {
            Ok(0) => Err(LabError::Closed {
                address: self.address,
            }),
            Ok(length) => {
                self.rest.extend_from_slice(&block[..length]);
                Ok(())
            }
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock => Err(late),
                ErrorKind::Interrupted => Ok(()),
                _ => Err(self.failed("receive")(error)),
            },
        }
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(std::io::Error) -> LabError + use<> {
        let address = self.address;
        move |source| LabError::Socket {
            address,
            step,
            source,
        }
    }
}
