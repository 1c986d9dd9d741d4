//! The client of the guest's control server.

use super::{GuestError, Outcome, Status};
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;
use whimbrel_workload::params::Pace;
use whimbrel_workload::report::{Done, Workload};

/// Bytes of the longest answer taken.
const ANSWER: u64 = 1 << 20;

/// One control connection; blocking. It is to be opened in the network namespace that reaches the guest,
/// may then be used from any.
pub struct Control {
    stream: BufReader<TcpStream>,
}

impl Control {
    /// Connects within `patience`, which is also the longest wait for an answer. `poweroff` checks all of
    /// the guest's pages before it answers: give it some seconds per 100 MiB.
    pub fn connect(guest: impl ToSocketAddrs, patience: Duration) -> Result<Control, GuestError> {
        let failed = |source| GuestError::Control { source };
        let mut last = std::io::ErrorKind::AddrNotAvailable.into();
        for address in guest.to_socket_addrs().map_err(failed)? {
            match TcpStream::connect_timeout(&address, patience) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(patience)).map_err(failed)?;
                    stream.set_nodelay(true).map_err(failed)?;
                    return Ok(Control {
                        stream: BufReader::new(stream),
                    });
                }
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }

    pub fn status(&mut self) -> Result<Status, GuestError> {
        self.ask("status")
    }

    /// Returns when every workload stands still.
    pub fn pause(&mut self) -> Result<(), GuestError> {
        self.tell("pause")
    }

    pub fn resume(&mut self) -> Result<(), GuestError> {
        self.tell("resume")
    }

    pub fn pace(&mut self, workload: Workload, pace: Pace) -> Result<(), GuestError> {
        self.tell(&format!("pace {} {pace}", workload.name()))
    }

    /// `sync` in the guest.
    pub fn sync(&mut self) -> Result<(), GuestError> {
        self.tell("sync")
    }

    /// Makes a durable file of so many MiB on the guest's disk.
    pub fn fill(&mut self, mib: u32) -> Result<(), GuestError> {
        self.tell(&format!("fill {mib}"))
    }

    /// Deletes that file, and has `fstrim` tell the disk what the file system does not use.
    pub fn trim(&mut self) -> Result<(), GuestError> {
        self.tell("trim")
    }

    /// Stops the workloads, checks everything, unmounts, answers, powers off.
    pub fn poweroff(mut self) -> Result<Outcome, GuestError> {
        self.ask("poweroff")
    }

    fn tell(&mut self, line: &str) -> Result<(), GuestError> {
        let done: Done = self.ask(line)?;
        if done.ok {
            return Ok(());
        }
        Err(GuestError::Refused {
            line: line.into(),
            reason: done.message.unwrap_or_default(),
        })
    }

    fn ask<T: DeserializeOwned>(&mut self, line: &str) -> Result<T, GuestError> {
        let failed = |source| GuestError::Control { source };
        let question = format!("{line}\n");
        let mut stream = self.stream.get_ref();
        stream.write_all(question.as_bytes()).map_err(failed)?;
        let mut answer = String::new();
        let taken = self
            .stream
            .by_ref()
            .take(ANSWER)
            .read_line(&mut answer)
            .map_err(failed)?;
        if taken == 0 {
            return Err(GuestError::ControlClosed);
        }
        serde_json::from_str(&answer).map_err(|_| GuestError::Answer {
            line: line.into(),
            answer,
        })
    }
}
