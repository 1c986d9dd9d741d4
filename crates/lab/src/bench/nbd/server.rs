//! The servers that are compared, each a process of its own, and what they cost.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::param::clock_ticks_per_second;
use serde::Serialize;
use whimbrel_lab::process::Process;

use super::BenchError;

/// How long a server may take until its socket answers.
const START: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Whimbrel,
    QemuNbd,
    Nbdkit,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Whimbrel, Kind::QemuNbd, Kind::Nbdkit];

    pub fn word(self) -> &'static str {
        match self {
            Kind::Whimbrel => "whimbrel",
            Kind::QemuNbd => "qemu-nbd",
            Kind::Nbdkit => "nbdkit",
        }
    }

    /// The settings of which each row takes the best.
    pub fn variants(self) -> &'static [&'static str] {
        match self {
            Kind::Whimbrel => &["default"],
            Kind::QemuNbd => &["threads", "io_uring"],
            Kind::Nbdkit => &["1", "4", "16"],
        }
    }
}

/// Whimbrel with its access log on and off by turns.
pub const IN_TURN: &str = "in-turn";

/// A server at work.
pub struct Server {
    process: Process,
    socket: PathBuf,
}

/// CPU time and memory of a server over one run.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    pub cpu_seconds: f64,
    pub peak_memory_mib: f64,
}

impl Server {
    /// Starts a server of the file, and waits until it accepts.
    pub fn start(
        kind: Kind,
        variant: &str,
        direct: bool,
        disk: &Path,
        folder: &Path,
    ) -> Result<Server, BenchError> {
        let name = format!(
            "{}-{variant}{}",
            kind.word(),
            if direct { "-d" } else { "" }
        );
        let socket = folder.join(format!("{name}.sock"));
        // Those of one of the same name that has ended.
        let log = folder.join(format!("{name}.log"));
        for left in [&socket, &log] {
            let _ = std::fs::remove_file(left);
        }
        let command = match kind {
            Kind::Whimbrel => whimbrel(variant, direct, disk, &socket)?,
            Kind::QemuNbd => {
                let mut c = Command::new("qemu-nbd");
                c.args(["--format=raw", "--persistent", "--shared=8"])
                    .arg(if direct {
                        "--cache=none"
                    } else {
                        "--cache=writeback"
                    })
                    .arg(format!("--aio={variant}"))
                    .arg(format!("--socket={}", socket.display()))
                    .arg(disk);
                c
            }
            Kind::Nbdkit => {
                let mut c = Command::new("nbdkit");
                c.args(["--foreground", "--exit-with-parent", "--threads", variant])
                    .arg("--unix")
                    .arg(&socket)
                    .arg("file")
                    .arg(disk);
                if direct {
                    // It has no O_DIRECT, on a loop device neither; this is what it offers instead.
                    c.arg("cache=none");
                }
                c
            }
        };
        let process = Process::spawn(&name, command, &log)?;
        let mut server = Server { process, socket };
        let deadline = Instant::now() + START;
        while std::os::unix::net::UnixStream::connect(&server.socket).is_err() {
            if !server.process.is_running()? || Instant::now() > deadline {
                return Err(BenchError::Server {
                    name,
                    output: server.process.output(),
                });
            }
            std::thread::sleep(LOOK);
        }
        Ok(server)
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// All it has said.
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// Runs on these cores from now on; on all, if none are named.
    pub fn hold(&self, cores: Option<&str>) -> Result<(), BenchError> {
        // The kernel leaves out those the machine does not have.
        let cores = cores.unwrap_or("0-1023");
        let held = Command::new("taskset")
            .args(["--all-tasks", "--cpu-list", "--pid", cores])
            .arg(self.process.pid().to_string())
            .stdin(Stdio::null())
            .output()
            .map_err(BenchError::Client)?;
        if held.status.success() {
            return Ok(());
        }
        Err(BenchError::NotHeld {
            cores: cores.to_owned(),
            stderr: String::from_utf8_lossy(&held.stderr).into_owned(),
        })
    }

    /// Runs `work` and tells what the server spent on it.
    pub fn cost_of<T>(
        &self,
        work: impl FnOnce() -> Result<T, BenchError>,
    ) -> Result<(T, Cost), BenchError> {
        // Peak memory counts from here. Where the kernel refuses, it counts from the server's start.
        let _ = std::fs::write(self.proc("clear_refs"), "5");
        let before = self.cpu()?;
        let done = work()?;
        let cost = Cost {
            cpu_seconds: self.cpu()? - before,
            peak_memory_mib: self.peak_memory()?,
        };
        Ok((done, cost))
    }

    fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.process.pid()))
    }

    fn read(&self, file: &str) -> Result<String, BenchError> {
        let path = self.proc(file);
        std::fs::read_to_string(&path).map_err(|source| BenchError::File { path, source })
    }

    /// Seconds of all its threads, user and system, those that have ended included.
    fn cpu(&self) -> Result<f64, BenchError> {
        let stat = self.read("stat")?;
        let ticks = cpu_ticks(&stat).ok_or(BenchError::Proc { what: "stat" })?;
        Ok(ticks as f64 / clock_ticks_per_second() as f64)
    }

    fn peak_memory(&self) -> Result<f64, BenchError> {
        let status = self.read("status")?;
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
        Ok(kib.ok_or(BenchError::Proc { what: "status" })? / 1024.0)
    }
}

/// This program itself, as the daemon would serve.
fn whimbrel(
    variant: &str,
    direct: bool,
    disk: &Path,
    socket: &Path,
) -> Result<Command, BenchError> {
    let program = std::env::current_exe().map_err(|source| BenchError::File {
        path: "/proc/self/exe".into(),
        source,
    })?;
    let mut c = Command::new(program);
    c.args(["bench", "nbd-export", "--access-log"])
        .arg(if variant == IN_TURN { IN_TURN } else { "on" })
        .arg(socket)
        .arg(disk);
    if direct {
        c.arg("--direct");
    }
    Ok(c)
}

/// utime and stime, the 14th and 15th field of proc(5)'s stat; the second may hold spaces.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_brackets_shifts_no_field() {
        let stat = "7 (a) b) c) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 8 0 1 2 3";
        assert_eq!(cpu_ticks(stat), Some(300));
    }
}
