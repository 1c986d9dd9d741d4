//! The control server: lines of words in, one line of JSON back for each.
//!
//! `status` · `pause` · `resume` · `pace WORKLOAD off|max|N` · `sync` · `fill MIB` · `trim` ·
//! `poweroff`

use crate::ballast;
use crate::gate::Shared;
use crate::net::Reporter;
use serde::Serialize;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use whimbrel_workload::Error;
use whimbrel_workload::params::{Pace, Params};
use whimbrel_workload::report::{Done, Outcome, Status, Workload};

/// Connections served at once; one more is closed at once.
const CONNECTIONS: usize = 8;
/// Bytes of the longest line; a longer one ends the connection.
const LINE: u64 = 256;
/// Longest wait of `pause` for the workloads to stand still.
const PARK: Duration = Duration::from_secs(10);

/// `poweroff` was asked for.
pub struct Poweroff {
    /// Takes the outcome for the one who asked.
    pub reply: SyncSender<Outcome>,
    /// Says that the answer was written.
    pub replied: Receiver<()>,
}

pub fn listen(params: &Params) -> Result<TcpListener, Error> {
    let port = params.control_port;
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
        .map_err(|source| Error::Listen { port, source })
}

/// Serves until the process ends.
pub fn run(
    listener: &TcpListener,
    shared: &Arc<Shared>,
    reporter: &Arc<Reporter>,
    poweroff: &SyncSender<Poweroff>,
) {
    let serving = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // Too many files or a connection gone again: the listener itself is as good as before.
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        if serving.fetch_add(1, Relaxed) >= CONNECTIONS {
            serving.fetch_sub(1, Relaxed);
            continue;
        }
        let session = Session {
            shared: Arc::clone(shared),
            reporter: Arc::clone(reporter),
            poweroff: poweroff.clone(),
        };
        let serving = Arc::clone(&serving);
        std::thread::spawn(move || {
            // A client that goes away in the middle of a line is no fault.
            let _ = session.serve(&stream);
            serving.fetch_sub(1, Relaxed);
        });
    }
}

struct Session {
    shared: Arc<Shared>,
    reporter: Arc<Reporter>,
    poweroff: SyncSender<Poweroff>,
}

impl Session {
    fn serve(&self, stream: &TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut lines = BufReader::new(stream);
        loop {
            let mut line = String::new();
            if lines.by_ref().take(LINE).read_line(&mut line)? == 0 || !line.ends_with('\n') {
                return Ok(());
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["status"] => answer(stream, &self.status())?,
                ["pause"] => answer(stream, &self.pause())?,
                ["resume"] => {
                    self.shared.paused.store(false, Relaxed);
                    answer(stream, &done())?;
                }
                ["pace", workload, pace] => answer(stream, &self.pace(workload, pace))?,
                ["sync"] => {
                    rustix::fs::sync();
                    answer(stream, &done())?;
                }
                ["fill", mib] => answer(stream, &self.fill(mib))?,
                ["trim"] => answer(stream, &self.on_own_disk(ballast::trim))?,
                ["poweroff"] => return self.poweroff(stream),
                _ => answer(stream, &refused("unknown line"))?,
            }
        }
    }

    fn status(&self) -> Status {
        Status {
            paused: self.shared.paused.load(Relaxed),
            parked: self.shared.parked(),
            paces: Workload::ALL
                .map(|w| (w, self.shared.stage(w).pace()))
                .into(),
            report: self.reporter.last(),
            faults: self.shared.faults(),
        }
    }

    fn pause(&self) -> Done {
        self.shared.paused.store(true, Relaxed);
        let until = Instant::now() + PARK;
        while !self.shared.parked() {
            if Instant::now() > until {
                return refused("a workload does not come to its gate");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        done()
    }

    fn pace(&self, workload: &str, pace: &str) -> Done {
        let Some(workload) = Workload::by_name(workload) else {
            return refused("no such workload");
        };
        let Ok(pace) = pace.parse::<Pace>() else {
            return refused("a pace is `off`, `max` or a number per second");
        };
        self.shared.stage(workload).set_pace(pace);
        done()
    }

    fn fill(&self, mib: &str) -> Done {
        match mib.parse() {
            Ok(mib) => self.on_own_disk(|dir| ballast::fill(dir, mib)),
            Err(_) => refused("not a number of MiB"),
        }
    }

    /// What is done to a whole file system is done only where that is the guest's.
    fn on_own_disk(&self, deed: impl FnOnce(&Path) -> std::io::Result<()>) -> Done {
        let params = &self.shared.params;
        if std::process::id() != 1 || params.disk == "none" {
            return refused("no disk of its own");
        }
        match deed(&params.dir) {
            Ok(()) => done(),
            Err(error) => refused(&error.to_string()),
        }
    }

    fn poweroff(&self, stream: &TcpStream) -> std::io::Result<()> {
        let (reply, outcome) = sync_channel(1);
        let (written, replied) = sync_channel(1);
        let asked = self.poweroff.try_send(Poweroff { reply, replied });
        match (asked, outcome.recv()) {
            (Ok(()), Ok(outcome)) => {
                answer(stream, &outcome)?;
                stream.shutdown(std::net::Shutdown::Write)?;
                // The one who waits for it has given up after a while; that is his to decide.
                let _ = written.send(());
                Ok(())
            }
            _ => answer(stream, &refused("already powering off")),
        }
    }
}

fn done() -> Done {
    Done {
        ok: true,
        message: None,
    }
}

fn refused(why: &str) -> Done {
    Done {
        ok: false,
        message: Some(why.into()),
    }
}

fn answer(mut stream: &TcpStream, answer: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}
